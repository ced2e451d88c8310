// Attention of one query a sequence over its pages.
#include "bf16.h"

// One task: the queries that share one key head, over the tokens [first, last) of their sequence.
typedef struct {
    const bf16 *q, *keys, *values;  // q [group, d]; keys and values: the pool, at this head
    const int32_t *pages;
    long group, d, value_d, key_stride, value_stride, page_tokens, first, last;
    float scale;
} span;

enum { TILE = 32 };  // tokens at a time

// Online softmax, TILE tokens at a time: out [group, d] float32 (not divided), with its maximum and sum per query.
static void attend_span(const span *s, float *out, float *max, float *total) {
    for (long g = 0; g < s->group; g++) max[g] = -INFINITY, total[g] = 0;
    memset(out, 0, s->group * s->value_d * sizeof(float));
    for (long at = s->first; at < s->last;) {
        long page = at / s->page_tokens, offset = at % s->page_tokens;
        long count = s->page_tokens - offset;
        if (count > s->last - at) count = s->last - at;
        if (count > TILE) count = TILE;
        long row = (long)s->pages[page] * s->page_tokens + offset;
        const bf16 *k = s->keys + row * s->key_stride, *v = s->values + row * s->value_stride;
        for (long g = 0; g < s->group; g++) {
            float scores[TILE] __attribute__((aligned(64)));
            const bf16 *q = s->q + g * s->d;
            for (long t = 0; t < count; t++) {
                __m512 sum = _mm512_setzero_ps();
                for (long i = 0; i < s->d; i += 32)
                    sum = _mm512_dpbf16_ps(sum, load32(q + i), load32(k + t * s->key_stride + i));
                scores[t] = _mm512_reduce_add_ps(sum) * s->scale;
            }
            for (long t = count; t < TILE; t++) scores[t] = -INFINITY;
            __m512 a = _mm512_load_ps(scores), b = _mm512_load_ps(scores + 16);
            float top = _mm512_reduce_max_ps(_mm512_max_ps(a, b));
            float new_max = top > max[g] ? top : max[g], keep = expf(max[g] - new_max);
            __m512 m = _mm512_set1_ps(new_max);
            __mmask16 in_a = _mm512_cmp_ps_mask(a, _mm512_set1_ps(-INFINITY), _CMP_NEQ_OQ);
            __mmask16 in_b = _mm512_cmp_ps_mask(b, _mm512_set1_ps(-INFINITY), _CMP_NEQ_OQ);
            a = _mm512_maskz_mov_ps(in_a, exp16(_mm512_sub_ps(a, m)));
            b = _mm512_maskz_mov_ps(in_b, exp16(_mm512_sub_ps(b, m)));
            _mm512_store_ps(scores, a), _mm512_store_ps(scores + 16, b);
            total[g] = total[g] * keep + _mm512_reduce_add_ps(_mm512_add_ps(a, b));
            max[g] = new_max;
            for (long i = 0; i < s->value_d; i += 16) {
                __m512 sum = _mm512_mul_ps(_mm512_loadu_ps(out + g * s->value_d + i), _mm512_set1_ps(keep));
                for (long t = 0; t < count; t++)
                    sum = _mm512_fmadd_ps(_mm512_set1_ps(scores[t]), load16(v + t * s->value_stride + i), sum);
                _mm512_storeu_ps(out + g * s->value_d + i, sum);
            }
        }
        at += count;
    }
}

// Adds the parts of a context that were attended apart, each weighted by its share of the sum.
static void merge(const float *out, const float *max, const float *total, bf16 *y, long parts, long group, long d) {
    for (long g = 0; g < group; g++) {
        float top = -INFINITY, sum = 0;
        for (long p = 0; p < parts; p++) top = max[p * group + g] > top ? max[p * group + g] : top;
        for (long p = 0; p < parts; p++) sum += total[p * group + g] * expf(max[p * group + g] - top);
        for (long i = 0; i < d; i += 16) {
            __m512 v = _mm512_setzero_ps();
            for (long p = 0; p < parts; p++) {
                __m512 weight = _mm512_set1_ps(expf(max[p * group + g] - top) / sum);
                v = _mm512_fmadd_ps(weight, _mm512_loadu_ps(out + (p * group + g) * d + i), v);
            }
            store16(y + g * d + i, v);
        }
    }
}

// q [m, heads d], y [m, heads value_d]; keys, values: the pool, a row a token, kv_heads of d and value_d each; pages
// [m, max_pages] int32; contexts [m] int64: tokens that each query sees. Long contexts are cut in `parts`, so that few
// sequences keep all threads busy. 0 if done, -1 if the shape is not one of these: d and value_d multiples of 32.
int perigee_attend_paged(const bf16 *q, const bf16 *keys, const bf16 *values, const int32_t *pages, const int64_t *contexts,
                         bf16 *y, long m, long heads, long kv_heads, long d, long value_d, long key_stride, long value_stride,
                         long page_tokens, long max_pages, long parts, float scale) {
    long group = heads / kv_heads;
    if (d % 32 || value_d % 32) return -1;
    float *scratch = malloc(m * kv_heads * parts * group * (value_d + 2) * sizeof(float));
    if (!scratch) return -1;
    float *out = scratch, *max = out + m * kv_heads * parts * group * value_d, *total = max + m * kv_heads * parts * group;
#pragma omp parallel
    {
#pragma omp for schedule(dynamic, 1)
        for (long task = 0; task < m * kv_heads * parts; task++) {
            long b = task / (kv_heads * parts), h = task / parts % kv_heads, p = task % parts;
            span s = {q + (b * heads + h * group) * d, keys + h * d, values + h * value_d, pages + b * max_pages, group, d,
                      value_d, key_stride, value_stride, page_tokens, contexts[b] * p / parts,
                      contexts[b] * (p + 1) / parts, scale};
            attend_span(&s, out + task * group * value_d, max + task * group, total + task * group);
        }
#pragma omp for schedule(static)
        for (long task = 0; task < m * kv_heads; task++) {
            long first = task * parts * group;
            merge(out + first * value_d, max + first, total + first, y + task * group * value_d, parts, group, value_d);
        }
    }
    free(scratch);
    return 0;
}
