// Kernels for bfloat16 inference on CPUs with AVX-512 and its bfloat16 dot product.
//
// Eager torch reads a weight matrix at half of the memory's bandwidth when few rows are to be multiplied with it, and
// passes over its data once per elementary operation. These do each step of a layer in one pass. All arrays are dense,
// row-major bfloat16 unless said otherwise; sums are float32; each result is rounded once.
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

typedef uint16_t bf16;

#define INLINE static inline __attribute__((always_inline))

INLINE float to_float(bf16 v) {
    uint32_t bits = (uint32_t)v << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

INLINE bf16 to_bf16(float v) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    return (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE __m512 load16(const bf16 *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}

INLINE void store16(bf16 *p, __m512 v) { _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(v)); }

INLINE __m512bh load32(const bf16 *p) { return (__m512bh)_mm512_loadu_si512(p); }

// e^x to a relative error of about 1e-7: 2^n by exponent bits, times a polynomial on [-ln2/2, ln2/2].
INLINE __m512 exp16(__m512 x) {
    x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.0f)), _mm512_set1_ps(88.0f));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

// ---- linear: y[m, n] = sum_k x[m, k] w[n, k] + bias[n], for few rows m ----------------------------------------------

// MT rows of x with NR rows of w; k is a multiple of 32. MT and NR are constants at each call, so the sums live in
// registers.
INLINE void product(const bf16 *x, const bf16 *w, const bf16 *bias, bf16 *y, long k, long n, const int MT, const int NR) {
    __m512 sum[8][4];
    for (int m = 0; m < MT; m++)
        for (int r = 0; r < NR; r++) sum[m][r] = _mm512_setzero_ps();
    for (long i = 0; i < k; i += 32) {
        __m512bh rows[4];
        for (int r = 0; r < NR; r++) rows[r] = load32(w + r * k + i);
        for (int m = 0; m < MT; m++) {
            __m512bh a = load32(x + m * k + i);
            for (int r = 0; r < NR; r++) sum[m][r] = _mm512_dpbf16_ps(sum[m][r], a, rows[r]);
        }
    }
    for (int m = 0; m < MT; m++)
        for (int r = 0; r < NR; r++)
            y[m * n + r] = to_bf16(_mm512_reduce_add_ps(sum[m][r]) + (bias ? to_float(bias[r]) : 0.0f));
}

#define PRODUCT(MT, NR)                                       \
    case MT:                                                  \
        product(x, w, bias, y, k, n, MT, NR);                 \
        break

INLINE void product_any(const bf16 *x, const bf16 *w, const bf16 *bias, bf16 *y, long k, long n, long mt, const int NR) {
    switch (mt) {
        PRODUCT(1, NR);
        PRODUCT(2, NR);
        PRODUCT(3, NR);
        PRODUCT(4, NR);
        PRODUCT(5, NR);
        PRODUCT(6, NR);
        PRODUCT(7, NR);
        PRODUCT(8, NR);
    }
}

// Up to `rows` rows of w with all of x, eight rows of x at a time: w is in the first-level cache after the first eight.
static void product_block(const bf16 *x, const bf16 *w, const bf16 *bias, bf16 *y, long m, long n, long k, long rows) {
    for (long first = 0; first < m; first += 8) {
        long mt = m - first < 8 ? m - first : 8, r = 0;
        for (; mt <= 4 && r + 4 <= rows; r += 4)
            product_any(x + first * k, w + r * k, bias ? bias + r : NULL, y + first * n + r, k, n, mt, 4);
        for (; r + 2 <= rows; r += 2)
            product_any(x + first * k, w + r * k, bias ? bias + r : NULL, y + first * n + r, k, n, mt, 2);
        for (; r < rows; r++)
            product_any(x + first * k, w + r * k, bias ? bias + r : NULL, y + first * n + r, k, n, mt, 1);
    }
}

#ifdef __AMX_BF16__
// The same with tile products: 16 rows of w as they lie, times up to 16 rows of x interleaved in pairs. One tile product
// takes as long as the loads that feed it, so 16 rows of x cost little more than one.
enum { TILE_ROWS = 16, TILE_K = 32, ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} __attribute__((packed, aligned(64))) tile_config;

static int amx_permitted(void) {
    static int state = -1;  // the answer never changes, so a race writes the same value twice
    if (state < 0) state = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
    return state;
}

// x [m, k] as [k / 32][16 pairs][m][2], what a tile product wants on its right side.
static void interleave(const bf16 *x, bf16 *packed, long m, long k) {
    for (long pair = 0; pair < k / 2; pair++)
        for (long row = 0; row < m; row++) memcpy(packed + (pair * m + row) * 2, x + row * k + pair * 2, 2 * sizeof(bf16));
}

INLINE void store_tile(const float *sums, const bf16 *bias, bf16 *y, long m, long n) {
    for (long row = 0; row < m; row++)
        for (long r = 0; r < TILE_ROWS; r++)
            y[row * n + r] = to_bf16(sums[r * m + row] + (bias ? to_float(bias[r]) : 0.0f));
}

// All of y [m, n] for m up to 16; n is a multiple of 32. Whether there was memory for it.
static int linear_amx(const bf16 *x, const bf16 *w, const bf16 *bias, bf16 *y, long m, long n, long k) {
    bf16 *packed = aligned_alloc(64, (m * k * sizeof(bf16) + 63) / 64 * 64);
    if (!packed) return 0;
    interleave(x, packed, m, k);
    tile_config config = {.palette = 1};
    for (int t = 0; t < 2; t++) config.rows[t] = TILE_ROWS, config.bytes[t] = 4 * m;          // sums
    for (int t = 2; t < 4; t++) config.rows[t] = TILE_ROWS, config.bytes[t] = 2 * TILE_K;     // w
    config.rows[4] = TILE_ROWS, config.bytes[4] = 4 * m;                                      // x
#pragma omp parallel
    {
        float sums[2][TILE_ROWS * TILE_ROWS] __attribute__((aligned(64)));
        _tile_loadconfig(&config);
#pragma omp for schedule(dynamic, 2)
        for (long first = 0; first < n; first += 2 * TILE_ROWS) {
            const bf16 *upper = w + first * k, *lower = upper + TILE_ROWS * k;
            _tile_zero(0);
            _tile_zero(1);
            for (long i = 0; i < k; i += TILE_K) {
                _tile_loadd(4, packed + i * m, 4 * m);
                _tile_loadd(2, upper + i, 2 * k);
                _tile_dpbf16ps(0, 2, 4);
                _tile_loadd(3, lower + i, 2 * k);
                _tile_dpbf16ps(1, 3, 4);
            }
            _tile_stored(0, sums[0], 4 * m);
            _tile_stored(1, sums[1], 4 * m);
            for (int t = 0; t < 2; t++) {
                long at = first + t * TILE_ROWS;
                store_tile(sums[t], bias ? bias + at : NULL, y + at, m, n);
            }
        }
        _tile_release();
    }
    free(packed);
    return 1;
}
#endif

// How many rows of x `perigee_linear` is worth calling for: beyond, oneDNN's blocked product is faster.
int perigee_linear_rows(void) {
#ifdef __AMX_BF16__
    if (amx_permitted()) return 16;
#endif
    return 4;
}

void perigee_linear(const bf16 *x, const bf16 *w, const bf16 *bias, bf16 *y, long m, long n, long k) {
#ifdef __AMX_BF16__
    if (m > 1 && m <= 16 && n % (2 * TILE_ROWS) == 0 && amx_permitted() && linear_amx(x, w, bias, y, m, n, k)) return;
#endif
    const long block = 16;
#pragma omp parallel for schedule(dynamic, 2)
    for (long first = 0; first < n; first += block) {
        long rows = n - first < block ? n - first : block;
        product_block(x, w + first * k, bias ? bias + first : NULL, y + first, m, n, k, rows);
    }
}

// ---- elementwise, row by row ----------------------------------------------------------------------------------------

// sum = x + delta (or x where delta is NULL), y = sum / rms(sum) * w. `width` is a multiple of 16.
void perigee_add_rms_norm(const bf16 *x, const bf16 *delta, const bf16 *w, bf16 *sum, bf16 *y, long m, long width, float eps) {
#pragma omp parallel for schedule(static) if (m > 16)
    for (long row = 0; row < m; row++) {
        const bf16 *xr = x + row * width;
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
        for (long i = 0; i < width; i += 16) {
            __m512 g = load16(gate + i), one = _mm512_set1_ps(1.0f);
            __m512 sigmoid = _mm512_div_ps(one, _mm512_add_ps(one, exp16(_mm512_sub_ps(_mm512_setzero_ps(), g))));
            store16(y + row * width + i, _mm512_mul_ps(_mm512_mul_ps(g, sigmoid), load16(up + i)));
        }
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

// ---- attention of one query a sequence over its pages ---------------------------------------------------------------

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
