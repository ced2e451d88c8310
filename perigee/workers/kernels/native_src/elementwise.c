// What happens to each row on its own: norms, gates, rotary embedding. Eager torch passes over its data once per
// elementary operation; these take one pass each.
#include "kernels.h"

// sum = x + delta (or x where delta is NULL), y = sum / rms(sum) * w. Rows of x are x_stride apart; `width` is a multiple
// of 16.
void perigee_add_rms_norm(const bf16 *x, const bf16 *delta, const bf16 *w, bf16 *sum, bf16 *y, long m, long width,
                          long x_stride, float eps) {
#pragma omp parallel for schedule(static) if (m > 16)
    for (long row = 0; row < m; row++) {
        const bf16 *xr = x + row * x_stride;
        const bf16 *in = xr;
        __m512 squares = _mm512_setzero_ps();
        if (delta) {
            for (long i = 0; i < width; i += 16)
                store16(sum + row * width + i, _mm512_add_ps(load16(xr + i), load16(delta + row * width + i)));
            in = sum + row * width;
        }
        for (long i = 0; i < width; i += 16) {
            __m512 v = load16(in + i);
            squares = _mm512_fmadd_ps(v, v, squares);
        }
        __m512 scale = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float)width + eps));
        for (long i = 0; i < width; i += 16)
            store16(y + row * width + i, _mm512_mul_ps(_mm512_mul_ps(load16(in + i), scale), load16(w + i)));
    }
}

// y[m, i] = silu(gate_up[m, i]) * gate_up[m, width + i]. `width` is a multiple of 16.
void perigee_gated_silu(const bf16 *gate_up, bf16 *y, long m, long width) {
#pragma omp parallel for schedule(static) if (m > 4)
    for (long row = 0; row < m; row++) {
        const bf16 *gate = gate_up + row * 2 * width, *up = gate + width;
        for (long i = 0; i < width; i += 16) store16(y + row * width + i, gated(load16(gate + i), load16(up + i)));
    }
}

INLINE void rotate_head(const bf16 *x, const bf16 *cos, const bf16 *sin, bf16 *y, long d) {
    for (long i = 0; i < d / 2; i += 16) {
        __m512 a = load16(x + i), b = load16(x + d / 2 + i);
        // The table's sines of the first half are negated already.
        store16(y + i, _mm512_fmadd_ps(b, load16(sin + i), _mm512_mul_ps(a, load16(cos + i))));
        store16(y + d / 2 + i, _mm512_fmadd_ps(a, load16(sin + d / 2 + i), _mm512_mul_ps(b, load16(cos + d / 2 + i))));
    }
}

// Rotates queries and keys of qkv [m, (heads + 2 kv_heads) d] by their positions' cos and sin [m, d]; queries go to
// q [m, heads d], keys and values to their rows of the pool [rows, kv_heads d]. `d` is a multiple of 32.
void perigee_rotate_and_store(const bf16 *qkv, const bf16 *cos, const bf16 *sin, const int64_t *rows, bf16 *q, bf16 *keys,
                              bf16 *values, long m, long heads, long kv_heads, long d) {
#pragma omp parallel for schedule(static) if (m > 4)
    for (long t = 0; t < m; t++) {
        const bf16 *in = qkv + t * (heads + 2 * kv_heads) * d, *c = cos + t * d, *s = sin + t * d;
        for (long h = 0; h < heads; h++) rotate_head(in + h * d, c, s, q + (t * heads + h) * d, d);
        bf16 *key = keys + rows[t] * kv_heads * d;
        for (long h = 0; h < kv_heads; h++) rotate_head(in + (heads + h) * d, c, s, key + h * d, d);
        memcpy(values + rows[t] * kv_heads * d, in + (heads + kv_heads) * d, kv_heads * d * sizeof(bf16));
    }
}

// The even and the odd values of 32.
INLINE void deinterleave(const bf16 *x, __m512 *even, __m512 *odd) {
    __m512i pairs = _mm512_loadu_si512(x);
    *even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    *odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000)));
}

// As rotate_head, of pairs that lie side by side; the result has halves.
INLINE void rotate_pairs(const bf16 *x, const bf16 *cos, const bf16 *sin, bf16 *y, long d) {
    for (long i = 0; i < d / 2; i += 16) {
        __m512 a, b;
        deinterleave(x + 2 * i, &a, &b);
        store16(y + i, _mm512_fmadd_ps(b, load16(sin + i), _mm512_mul_ps(a, load16(cos + i))));
        store16(y + d / 2 + i, _mm512_fmadd_ps(a, load16(sin + d / 2 + i), _mm512_mul_ps(b, load16(cos + d / 2 + i))));
    }
}

INLINE void rotate(const bf16 *x, const bf16 *cos, const bf16 *sin, bf16 *y, long d, long interleaved) {
    if (interleaved)
        rotate_pairs(x, cos, sin, y, d);
    else
        rotate_head(x, cos, sin, y, d);
}

INLINE void rms_norm(const bf16 *x, const bf16 *w, bf16 *y, long width, float eps) {
    __m512 squares = _mm512_setzero_ps();
    for (long i = 0; i < width; i += 16) squares = _mm512_fmadd_ps(load16(x + i), load16(x + i), squares);
    __m512 scale = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float)width + eps));
    for (long i = 0; i < width; i += 16) store16(y + i, _mm512_mul_ps(_mm512_mul_ps(load16(x + i), scale), load16(w + i)));
}

// Queries of q [m, heads (nope + d)] (rows q_stride apart), rotated in their last d values, go to out [m, heads (nope + d)];
// latents of latent [m, rank + d] (rows latent_stride apart), normalised in their first `rank` and rotated in their last d,
// to their rows of the pool. `d` is a multiple of 32, `rank` of 16.
void perigee_rotate_and_store_latent(const bf16 *q, const bf16 *latent, const bf16 *norm, const bf16 *cos, const bf16 *sin,
                                     const int64_t *rows, bf16 *out, bf16 *latents, long m, long heads, long nope, long d,
                                     long rank, long q_stride, long latent_stride, long interleaved, float eps) {
#pragma omp parallel for schedule(static) if (m > 4)
    for (long t = 0; t < m; t++) {
        const bf16 *c = cos + t * d, *s = sin + t * d, *from = q + t * q_stride, *key = latent + t * latent_stride;
        bf16 *to = out + t * heads * (nope + d), *row = latents + rows[t] * (rank + d);
        for (long h = 0; h < heads; h++, from += nope + d, to += nope + d) {
            memcpy(to, from, nope * sizeof(bf16));
            rotate(from + nope, c, s, to + nope, d, interleaved);
        }
        rms_norm(key, norm, row, rank, eps);
        rotate(key + rank, c, s, row + rank, d, interleaved);
    }
}

// The last `count` values of each row of x [rows, x_width] to the end of that of y [rows, y_width].
void perigee_copy_ends(const bf16 *x, bf16 *y, long rows, long x_width, long y_width, long count) {
    for (long r = 1; r <= rows; r++) memcpy(y + r * y_width - count, x + r * x_width - count, count * sizeof(bf16));
}
