// Attention of one query a sequence over its pages: decode.
//
// The queries that share a key head are packed as a block of sixteen, which keys are multiplied with as they lie.
#include "gemm.h"
#include "kernels.h"

enum { QUERIES = 16, STEP = 32 };  // of one task; tokens at a time

typedef struct {
    const bf16 *q, *keys, *values;  // q [group, d]; keys and values: the pool, at this head
    const int32_t *pages;
    long group, d, value_d, key_stride, value_stride, page_tokens, first, last;  // tokens [first, last) of the sequence
    float scale;
} span;

// Zeros stand for the queries that are not there.
static void pack_queries(const span *s, bf16 *packed) {
    uint32_t *to = (uint32_t *)packed;
    memset(packed, 0, QUERIES * s->d * sizeof(bf16));
    for (long g = 0; g < s->group; g++) {
        const uint32_t *q = (const uint32_t *)(s->q + g * s->d);
        for (long pair = 0; pair < s->d / 2; pair++) to[pair * QUERIES + g] = q[pair];
    }
}

// `count` tokens' values as [value_d / 16][STEP / 2][16][2], zeros for the tokens that are not there.
static void pack_values(const span *s, const bf16 *values, long count, bf16 *packed) {
    const __m256i zero = _mm256_setzero_si256();
    for (long t = 0; t < STEP; t += 2) {
        const bf16 *row = values + t * s->value_stride;
        for (long j = 0; j < s->value_d; j += BLOCK) {
            __m256i even = t < count ? _mm256_loadu_si256((const __m256i *)(row + j)) : zero;
            __m256i odd = t + 1 < count ? _mm256_loadu_si256((const __m256i *)(row + s->value_stride + j)) : zero;
            __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16);
            _mm512_store_si512(packed + j * STEP + t * BLOCK, _mm512_or_si512(_mm512_cvtepu16_epi32(even), high));
        }
    }
}

typedef struct {
    float max[QUERIES], total[QUERIES], keep[QUERIES];
} __attribute__((aligned(64))) running;

// Scores [count, 32], a query a column, to weights [group, STEP], a query a row.
static void soften(const float *scores, long count, long group, float scale, running *r, bf16 *weights) {
    const __m512 factor = _mm512_set1_ps(scale), before = _mm512_load_ps(r->max);
    __m512 max = before, total = _mm512_setzero_ps();
    for (long t = 0; t < count; t++) max = _mm512_max_ps(max, _mm512_mul_ps(_mm512_load_ps(scores + t * GROUP_COLS), factor));
    float columns[STEP * QUERIES] __attribute__((aligned(64)));
    for (long t = 0; t < count; t++) {
        __m512 weight = exp16(_mm512_fmsub_ps(_mm512_load_ps(scores + t * GROUP_COLS), factor, max));
        total = _mm512_add_ps(total, weight);
        _mm512_store_ps(columns + t * QUERIES, weight);
    }
    for (long g = 0; g < group; g++)
        for (long t = 0; t < STEP; t++) weights[g * STEP + t] = t < count ? to_bf16(columns[t * QUERIES + g]) : 0;
    __m512 keep = exp16(_mm512_sub_ps(before, max));
    _mm512_store_ps(r->keep, keep), _mm512_store_ps(r->max, max);
    _mm512_store_ps(r->total, _mm512_fmadd_ps(_mm512_load_ps(r->total), keep, total));
}

static void rescale(const span *s, const running *r, float *out) {
    for (long g = 0; g < s->group; g++) {
        if (r->keep[g] == 1.0f) continue;
        const __m512 keep = _mm512_set1_ps(r->keep[g]);
        for (long i = 0; i < s->value_d; i += 16) {
            float *at = out + g * s->value_d + i;
            _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_loadu_ps(at), keep));
        }
    }
}

// Online softmax: out [group, value_d] float32 (not divided), with its maximum and sum per query. `scratch` holds
// 16 d + 32 value_d values.
static void attend_span(const span *s, float *out, float *max, float *total, bf16 *scratch) {
    float scores[STEP * GROUP_COLS] __attribute__((aligned(64)));
    bf16 weights[QUERIES * STEP] __attribute__((aligned(64)));
    bf16 *queries = scratch, *packed = scratch + QUERIES * s->d;
    running r;
    for (long g = 0; g < QUERIES; g++) r.max[g] = -1e30f, r.total[g] = 0;
    memset(out, 0, s->group * s->value_d * sizeof(float));
    pack_queries(s, queries);
    product score = {.b = queries, .lda = s->key_stride, .k = s->d, .c = scores, .ldc = GROUP_COLS};
    product value = {.a = weights, .lda = STEP, .block_stride = BLOCK * STEP, .m = s->group, .k = STEP, .ldc = s->value_d,
                     .accumulate = 1};
    for (long at = s->first; at < s->last; at += score.m) {
        const long offset = at % s->page_tokens, row = s->pages[at / s->page_tokens] * s->page_tokens + offset;
        score.m = s->page_tokens - offset;
        if (score.m > s->last - at) score.m = s->last - at;
        if (score.m > STEP) score.m = STEP;
        score.a = s->keys + row * s->key_stride;
        multiply(&score);
        soften(scores, score.m, s->group, s->scale, &r, weights);
        rescale(s, &r, out);
        pack_values(s, s->values + row * s->value_stride, score.m, packed);
        for (long j = 0; j < s->value_d; j += GROUP_COLS) {
            value.b = packed + j * STEP, value.c = out + j;
            multiply(&value);
        }
    }
    memcpy(max, r.max, s->group * sizeof(float)), memcpy(total, r.total, s->group * sizeof(float));
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
// sequences keep all threads busy. 0 if done, -1 if the shape is not one of these: d and value_d multiples of 32, at most
// sixteen queries to a key head.
int perigee_attend_paged(const bf16 *q, const bf16 *keys, const bf16 *values, const int32_t *pages, const int64_t *contexts,
                         bf16 *y, long m, long heads, long kv_heads, long d, long value_d, long key_stride, long value_stride,
                         long page_tokens, long max_pages, long parts, float scale) {
    const long group = heads / kv_heads, tasks = m * kv_heads * parts;
    if (d % 32 || value_d % 32 || group > QUERIES) return -1;
    float *partial = malloc(tasks * group * (value_d + 2) * sizeof(float));
    if (!partial) return -1;
    float *max = partial + tasks * group * value_d, *total = max + tasks * group;
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        bf16 *scratch = aligned_alloc(64, (QUERIES * d + STEP * value_d) * sizeof(bf16));
        failed |= !scratch;
#pragma omp for schedule(dynamic, 1)
        for (long task = 0; task < tasks; task++) {
            long b = task / (kv_heads * parts), h = task / parts % kv_heads, p = task % parts;
            span s = {q + (b * heads + h * group) * d, keys + h * d, values + h * value_d, pages + b * max_pages, group, d,
                      value_d, key_stride, value_stride, page_tokens, contexts[b] * p / parts,
                      contexts[b] * (p + 1) / parts, scale};
            if (scratch)
                attend_span(&s, partial + task * group * value_d, max + task * group, total + task * group, scratch);
        }
        release_tiles();
        free(scratch);
#pragma omp for schedule(static)
        for (long task = 0; task < m * kv_heads; task++) {
            long first = task * parts * group;
            merge(partial + first * value_d, max + first, total + first, y + task * group * value_d, parts, group, value_d);
        }
    }
    free(partial);
    return failed ? -1 : 0;
}
