// Causal attention of a chunk of queries over a context that ends with it (FlashAttention-2's loop, on packed blocks).
//
// Keys and values of one head are packed once, then every task takes some queries through all that they see: scores of a
// few rows with a few keys, online softmax, products with the values, all of it within the second-level cache.
#include "gemm.h"

enum { QUERIES = 128, KEYS = 128, MAX_VALUE_D = 512 };  // of a task; of one step within it

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

static void pack_keys(const chunk *c, const packed *p, long head, long first) {
    const long own = c->d - c->shared_d;
    uint32_t *to = (uint32_t *)(p->keys + first * c->d);
    for (long row = 0; row < BLOCK; row++) {
        const long t = first + row;
        if (t >= p->context) {
            for (long pair = 0; pair < c->d / 2; pair++) to[pair * BLOCK + row] = 0;
            continue;
        }
        const uint32_t *key = (const uint32_t *)(c->keys + t * c->key_stride + head * c->key_head);
        for (long pair = 0; pair < own / 2; pair++) to[pair * BLOCK + row] = key[pair];
        const uint32_t *shared = (const uint32_t *)(c->shared_keys + t * c->shared_stride);
        for (long pair = 0; pair < c->shared_d / 2; pair++) to[(own / 2 + pair) * BLOCK + row] = shared[pair];
    }
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

// Rows [first, first + m) of the chunk, of one head, with the keys from `from` on: adds to `out` [m, value_d].
static void step(const chunk *c, const packed *p, long head, long first, long m, long from, running *state, float *out) {
    float scores[GROUP_ROWS * KEYS] __attribute__((aligned(64)));
    bf16 weights[GROUP_ROWS * KEYS] __attribute__((aligned(64)));
    const long seen = c->start + first + m - from;  // by the last of the rows
    const long count = seen >= KEYS ? KEYS : (seen + GROUP_COLS - 1) / GROUP_COLS * GROUP_COLS;
    product s = {.a = c->q + (first * c->heads + head) * c->d, .lda = c->heads * c->d, .block_stride = BLOCK * c->d, .m = m,
                 .k = c->d, .ldc = KEYS};
    for (long j = 0; j < count; j += GROUP_COLS) {
        s.b = p->keys + (from + j) * c->d, s.c = scores + j;
        multiply(&s);
    }
    const float scale = c->scale * 1.44269504f;
    for (long r = 0; r < m; r++) {
        const long visible = c->start + first + r + 1 - from;
        if (visible < count) hide(scores + r * KEYS, count, visible);
        soften(scores + r * KEYS, weights + r * KEYS, count, scale, state + r, out + r * c->value_d, c->value_d);
    }
    product v = {.a = weights, .lda = KEYS, .block_stride = BLOCK * p->padded, .m = m, .k = count, .ldc = c->value_d,
                 .accumulate = 1};
    for (long j = 0; j < c->value_d; j += GROUP_COLS) {
        v.b = p->values + j * p->padded + from * BLOCK, v.c = out + j;
        multiply(&v);
    }
}

// Rows [first, last) of the chunk, of one head, from their first key to themselves.
static void attend_rows(const chunk *c, const packed *p, long head, long first, long last) {
    float out[QUERIES * MAX_VALUE_D] __attribute__((aligned(64)));
    running state[QUERIES];
    memset(out, 0, (last - first) * c->value_d * sizeof(float));
    for (long r = 0; r < last - first; r++) state[r] = (running){-1e30f, 0};
    for (long from = 0; from < c->start + last; from += KEYS)
        for (long row = first; row < last; row += GROUP_ROWS) {
            long m = last - row < GROUP_ROWS ? last - row : GROUP_ROWS, at = row - first;
            if (from < c->start + row + m) step(c, p, head, row, m, from, state + at, out + at * c->value_d);
        }
    for (long r = 0; r < last - first; r++) {
        __m512 share = _mm512_set1_ps(1.0f / state[r].total);
        bf16 *to = c->out + ((first + r) * c->heads + head) * c->value_d;
        for (long i = 0; i < c->value_d; i += 16)
            store16(to + i, _mm512_mul_ps(_mm512_loadu_ps(out + r * c->value_d + i), share));
    }
}

static void attend_head(const chunk *c, const packed *p, long kv_head) {
    const long group = c->heads / c->kv_heads, blocks = (c->length + QUERIES - 1) / QUERIES;
#pragma omp for schedule(static)
    for (long t = 0; t < p->padded; t += BLOCK) pack_keys(c, p, kv_head, t), pack_values(c, p, kv_head, t);
    // The last rows see the most, so they come first.
#pragma omp for schedule(dynamic, 1)
    for (long i = 0; i < group * blocks; i++) {
        long first = (blocks - 1 - i / group) * QUERIES, head = kv_head * group + i % group;
        attend_rows(c, p, head, first, first + QUERIES < c->length ? first + QUERIES : c->length);
    }
}

// q [length, heads, d], out [length, heads, value_d], dense. Keys are kv_heads of d - shared_d a token, each followed by
// the token's `shared_d` of `shared_keys`; values are kv_heads of value_d. The queries' positions begin at `start`. 0 if
// done; -1 for another shape: d, d - shared_d, shared_d, value_d must be multiples of 32.
int perigee_attend_chunk(const bf16 *q, const bf16 *keys, const bf16 *shared_keys, const bf16 *values, bf16 *out, long length,
                         long start, long heads, long kv_heads, long d, long shared_d, long value_d, long key_stride,
                         long key_head, long shared_stride, long value_stride, long value_head, float scale) {
    if (d % 32 || shared_d % 32 || value_d % 32 || value_d > MAX_VALUE_D) return -1;
    chunk c = {q, keys, shared_keys, values, out, length, start, heads, kv_heads, d, shared_d, value_d, key_stride,
               key_head, shared_stride, value_stride, value_head, scale};
    packed p = {.context = start + length, .padded = (start + length + KEYS - 1) / KEYS * KEYS};
    p.keys = aligned_alloc(64, p.padded * (d + value_d) * sizeof(bf16));
    if (!p.keys) return -1;
    p.values = p.keys + p.padded * d;
#pragma omp parallel
    {
        for (long head = 0; head < kv_heads; head++) attend_head(&c, &p, head);
        release_tiles();
    }
    free(p.keys);
    return 0;
}
