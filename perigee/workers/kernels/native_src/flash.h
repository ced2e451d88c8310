// Attention of a chunk of queries over a context that ends with it (FlashAttention-2's loop, on packed blocks).
//
// Keys and values of one head are packed once, then every task takes some queries through what they see: scores of a few
// rows with a few keys, online softmax, products with the values, all of it within the second-level cache.
#pragma once
#include "gemm.h"

enum { KEYS = 128, MAX_D = 640, MAX_VALUE_D = 512 };  // keys of one step

typedef struct {
    const bf16 *q, *keys, *shared_keys, *values;  // one row a token each
    bf16 *out;
    long length, start, heads, kv_heads, d, shared_d, value_d;  // a key is `d - shared_d` of its head's, then the shared
    long key_stride, key_head, shared_stride, value_stride, value_head;  // from token to token, from head to head
    float scale;
} chunk;

// Of one key head, its context padded with zeros to whole groups of 32.
typedef struct {
    bf16 *keys, *values;  // [context / 16][d / 2][16][2], [value_d / 16][context / 2][16][2]
    long context, padded;
} packed;

// Sixteen rows of sixteen 32-bit values, to columns.
static void transpose(const uint32_t *const rows[BLOCK], long at, uint32_t *to) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = rows[i] ? _mm512_loadu_si512(rows[i] + at) : _mm512_setzero_si512();
    for (int i = 0; i < 16; i += 2)
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]), b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]), a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]), a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < 4; i++) {  // a[4 j + i] has columns i, i + 4, i + 8, i + 12 of rows 4 j to 4 j + 3
        __m512i low = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88), high = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd);
        __m512i low2 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88), high2 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xdd);
        _mm512_storeu_si512(to + (i + 0) * BLOCK, _mm512_shuffle_i32x4(low, low2, 0x88));
        _mm512_storeu_si512(to + (i + 8) * BLOCK, _mm512_shuffle_i32x4(low, low2, 0xdd));
        _mm512_storeu_si512(to + (i + 4) * BLOCK, _mm512_shuffle_i32x4(high, high2, 0x88));
        _mm512_storeu_si512(to + (i + 12) * BLOCK, _mm512_shuffle_i32x4(high, high2, 0xdd));
    }
}

// `width` values of each of sixteen tokens from `first` on, zeros for those beyond the context, as [width / 2][16][2].
static void pack_part(const bf16 *from, long stride, long first, long context, long width, uint32_t *to) {
    const uint32_t *rows[BLOCK];
    for (long i = 0; i < BLOCK; i++) rows[i] = first + i < context ? (const uint32_t *)(from + (first + i) * stride) : NULL;
    for (long pair = 0; pair < width / 2; pair += BLOCK) transpose(rows, pair, to + pair * BLOCK);
}

static void pack_keys(const chunk *c, const packed *p, long head, long first) {
    const long own = c->d - c->shared_d;
    uint32_t *to = (uint32_t *)(p->keys + first * c->d);
    pack_part(c->keys + head * c->key_head, c->key_stride, first, p->context, own, to);
    pack_part(c->shared_keys, c->shared_stride, first, p->context, c->shared_d, to + own / 2 * BLOCK);
}

static void pack_values(const chunk *c, const packed *p, long head, long first) {
    const __m256i zero = _mm256_setzero_si256();
    for (long t = first; t < first + BLOCK; t += 2) {
        const bf16 *value = c->values + t * c->value_stride + head * c->value_head;
        for (long j = 0; j < c->value_d; j += BLOCK) {
            __m256i even = t < p->context ? _mm256_loadu_si256((const __m256i *)(value + j)) : zero;
            __m256i odd = t + 1 < p->context ? _mm256_loadu_si256((const __m256i *)(value + c->value_stride + j)) : zero;
            __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16);
            _mm512_storeu_si512(p->values + (j * p->padded) + t * BLOCK, _mm512_or_si512(_mm512_cvtepu16_epi32(even), high));
        }
    }
}

// 2^x for x <= 0 to a relative error of about 1e-4, a twentieth of that of the bfloat16 it becomes.
INLINE __m512 exp2_16(__m512 x) {
    __m512 n = _mm512_roundscale_ps(x, 0), f = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(5.517164e-2f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4261112e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9326099e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.9992807e-1f));
    return _mm512_scalef_ps(p, n);
}

// The running softmax of one query: scores are in units of log 2.
typedef struct {
    float max, total;
} running;

// -inf for the scores that the row must not see.
static void hide(float *scores, long count, long visible) {
    for (long i = visible < 0 ? 0 : visible; i < count; i++) scores[i] = -INFINITY;
}

// Turns `count` scores of a row into weights; rescales what was summed before.
static void soften(const float *scores, bf16 *weights, long count, float scale, running *r, float *out, long value_d) {
    __m512 top = _mm512_load_ps(scores);
    for (long i = 16; i < count; i += 16) top = _mm512_max_ps(top, _mm512_load_ps(scores + i));
    const float highest = _mm512_reduce_max_ps(top) * scale;
    if (highest > r->max) {
        const float keep = exp2f(r->max - highest);
        if (r->total > 0)
            for (long i = 0; i < value_d; i += 16)
                _mm512_storeu_ps(out + i, _mm512_mul_ps(_mm512_loadu_ps(out + i), _mm512_set1_ps(keep)));
        r->total *= keep, r->max = highest;
    }
    const __m512 max = _mm512_set1_ps(r->max), factor = _mm512_set1_ps(scale);
    __m512 total = _mm512_setzero_ps();
    for (long i = 0; i < count; i += 16) {
        __m512 weight = exp2_16(_mm512_fmsub_ps(_mm512_load_ps(scores + i), factor, max));
        total = _mm512_add_ps(total, weight);
        store16(weights + i, weight);
    }
    r->total += _mm512_reduce_add_ps(total);
}

// Some rows of one head, their queries at `q`, with `count` keys from `from` on: adds to `out` [m, value_d]. Row r sees
// the first `visible` + r of those keys.
typedef struct {
    const bf16 *q;
    long q_stride, m, from, count, visible;
    running *state;
    float *out;
} rows;

static void step(const chunk *c, const packed *p, const rows *r) {
    float scores[GROUP_ROWS * KEYS] __attribute__((aligned(64)));
    bf16 weights[GROUP_ROWS * KEYS] __attribute__((aligned(64)));
    const long count = (r->count + GROUP_COLS - 1) / GROUP_COLS * GROUP_COLS;
    product s = {.a = r->q, .lda = r->q_stride, .block_stride = BLOCK * c->d, .m = r->m, .k = c->d, .ldc = KEYS};
    for (long j = 0; j < count; j += GROUP_COLS) {
        s.b = p->keys + (r->from + j) * c->d, s.c = scores + j;
        multiply(&s);
    }
    const float scale = c->scale * 1.44269504f;
    for (long i = 0; i < r->m; i++) {
        if (r->visible + i < count) hide(scores + i * KEYS, count, r->visible + i);
        soften(scores + i * KEYS, weights + i * KEYS, count, scale, r->state + i, r->out + i * c->value_d, c->value_d);
    }
    product v = {.a = weights, .lda = KEYS, .block_stride = BLOCK * p->padded, .m = r->m, .k = count, .ldc = c->value_d,
                 .accumulate = 1};
    for (long j = 0; j < c->value_d; j += GROUP_COLS) {
        v.b = p->values + j * p->padded + r->from * BLOCK, v.c = r->out + j;
        multiply(&v);
    }
}

// Rows [first, first + m) of the chunk with what they see of the keys from `from` on, KEYS at most.
static void step_causal(const chunk *c, const packed *p, long head, long first, long m, long from, running *state, float *out) {
    const long position = c->start + first, seen = position + m - from;
    step(c, p, &(rows){.q = c->q + (first * c->heads + head) * c->d, .q_stride = c->heads * c->d, .m = m, .from = from,
                       .count = seen < KEYS ? seen : KEYS, .visible = position + 1 - from, .state = state, .out = out});
}

static void finish(const chunk *c, long head, long first, long m, const running *state, const float *sums) {
    for (long r = 0; r < m; r++) {
        __m512 share = _mm512_set1_ps(1.0f / state[r].total);
        bf16 *to = c->out + ((first + r) * c->heads + head) * c->value_d;
        for (long i = 0; i < c->value_d; i += 16)
            store16(to + i, _mm512_mul_ps(_mm512_loadu_ps(sums + r * c->value_d + i), share));
    }
}

static void begin(const chunk *c, long m, running *state, float *sums) {
    memset(sums, 0, m * c->value_d * sizeof(float));
    for (long r = 0; r < m; r++) state[r] = (running){-1e30f, 0};
}

static void pack_head(const chunk *c, const packed *p, long kv_head) {
#pragma omp for schedule(static)
    for (long t = 0; t < p->padded; t += BLOCK) pack_keys(c, p, kv_head, t), pack_values(c, p, kv_head, t);
}

// Room for one head's context; 0 if the shape is not one of these, or there is no memory.
static int allocate_packed(const chunk *c, packed *p) {
    if (c->d % 32 || c->shared_d % 32 || c->value_d % 32 || c->d > MAX_D || c->value_d > MAX_VALUE_D) return 0;
    p->context = c->start + c->length;
    p->padded = (p->context + KEYS - 1) / KEYS * KEYS;
    p->keys = aligned_alloc(64, p->padded * (c->d + c->value_d) * sizeof(bf16));
    p->values = p->keys + p->padded * c->d;
    return p->keys != NULL;
}
