// The kernels that a recorded step is made of: see replay.c. Each is described where it is defined.
#pragma once
#include "bf16.h"

void perigee_linear(const bf16 *x, const bf16 *w, const bf16 *bias, bf16 *y, long heads, long m, long n, long k, long x_stride,
                    long y_stride, long x_head, long y_head, long w_head);
void perigee_copy_ends(const bf16 *x, bf16 *y, long rows, long x_width, long y_width, long count);
void perigee_add_rms_norm(const bf16 *x, const bf16 *delta, const bf16 *w, bf16 *sum, bf16 *y, long m, long width,
                          long x_stride, float eps);
void perigee_gated_silu(const bf16 *gate_up, bf16 *y, long m, long width);
void perigee_rotate_and_store(const bf16 *qkv, const bf16 *cos, const bf16 *sin, const int64_t *rows, bf16 *q, bf16 *keys,
                              bf16 *values, long m, long heads, long kv_heads, long d);
void perigee_rotate_and_store_latent(const bf16 *q, const bf16 *latent, const bf16 *norm, const bf16 *cos, const bf16 *sin,
                                     const int64_t *rows, bf16 *out, bf16 *latents, long m, long heads, long nope, long d,
                                     long rank, long q_stride, long latent_stride, long interleaved, float eps);
int perigee_route(const bf16 *x, const bf16 *w, const float *bias, int64_t *experts, float *weights, long m, long k,
                  long num_experts, long chosen, long groups, long chosen_groups, long best_of_group, long softmax,
                  long normalise, float scale);
int perigee_experts(const bf16 *x, const int64_t *experts, const float *weights, const bf16 *gate_up, const bf16 *down, bf16 *y,
                    long m, long routed, long shared, long num_experts, long width, long inter);
int perigee_attend_paged(const bf16 *q, const bf16 *keys, const bf16 *values, const int32_t *pages, const int64_t *contexts,
                         bf16 *y, long m, long heads, long kv_heads, long d, long value_d, long key_stride, long value_stride,
                         long page_tokens, long max_pages, long parts, float scale);
