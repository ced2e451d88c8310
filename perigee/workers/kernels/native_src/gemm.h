// Products of a few rows with packed matrices: the one inner loop that all large kernels here share.
//
// A matrix of weights [n, k] is *packed* as [n / 16][k / 2][16][2]: sixteen of its rows, interleaved in pairs of columns.
// One such block is what a tile product wants on its right side, and what a dot-product instruction adds to sixteen sums
// at once; either way it is read as one stream. n is a multiple of 16, k of 32.
#pragma once
#include "bf16.h"

enum { BLOCK = 16, TILE_K = 32, GROUP_ROWS = 32, GROUP_COLS = 32 };

// c [m, 32] (float, `ldc` apart) = or += a [m, k] (`lda` apart) times two packed blocks, `block_stride` apart; m <= 32. If
// that is 0 there is one block, and the right half of c stays as it is.
typedef struct {
    const bf16 *a, *b;
    long lda, block_stride, m, k;
    float *c;
    long ldc;
    int accumulate;
} product;

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>

enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} __attribute__((packed, aligned(64))) tile_config;

// The kernel grants tiles to a process that asks, once for all its threads.
static int has_tiles(void) {
    static int state = -1;  // the answer never changes, so a race writes the same value twice
    if (state < 0) state = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
    return state;
}

// Tiles 0 and 1 are the sums of the first 16 rows, 2 and 3 of the others; 4 and 5 hold rows of a, 6 and 7 blocks of b.
static void configure_tiles(long m) {
    long upper = m < BLOCK ? m : BLOCK, lower = m - upper;
    tile_config config = {.palette = 1};
    for (int t = 0; t < 8; t++) config.bytes[t] = 64;
    config.rows[0] = config.rows[1] = config.rows[4] = upper;
    config.rows[2] = config.rows[3] = config.rows[5] = lower ? lower : 1;
    config.rows[6] = config.rows[7] = BLOCK;
    _tile_loadconfig(&config);
}

// How many rows the calling thread's tiles are configured for; 0 where they are not.
static __thread long tile_rows;

static void release_tiles(void) {
    if (tile_rows) _tile_release(), tile_rows = 0;
}

// `two` groups of rows or one, `wide` for both blocks or one: constants at each call.
INLINE void multiply_tiles_of(const product *p, const int two, const int wide) {
    const long lda = p->lda * sizeof(bf16), ldc = p->ldc * sizeof(float);
    const bf16 *left = p->b, *right = p->b + p->block_stride, *below = p->a + BLOCK * p->lda;
    float *c = p->c, *c_below = c + BLOCK * p->ldc;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if (p->accumulate) {
        _tile_loadd(0, c, ldc);
        if (wide) _tile_loadd(1, c + BLOCK, ldc);
        if (two) _tile_loadd(2, c_below, ldc);
        if (two && wide) _tile_loadd(3, c_below + BLOCK, ldc);
    }
    for (long i = 0; i < p->k; i += TILE_K) {
        _tile_loadd(6, left + i * BLOCK, 64);
        if (wide) _tile_loadd(7, right + i * BLOCK, 64);
        _tile_loadd(4, p->a + i, lda);
        _tile_dpbf16ps(0, 4, 6);
        if (wide) _tile_dpbf16ps(1, 4, 7);
        if (two) _tile_loadd(5, below + i, lda);
        if (two) _tile_dpbf16ps(2, 5, 6);
        if (two && wide) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, ldc);
    if (wide) _tile_stored(1, c + BLOCK, ldc);
    if (two) _tile_stored(2, c_below, ldc);
    if (two && wide) _tile_stored(3, c_below + BLOCK, ldc);
}

static void multiply_tiles(const product *p) {
    if (tile_rows != p->m) configure_tiles(p->m), tile_rows = p->m;
    if (p->m > BLOCK && p->block_stride)
        multiply_tiles_of(p, 1, 1);
    else if (p->m > BLOCK)
        multiply_tiles_of(p, 1, 0);
    else if (p->block_stride)
        multiply_tiles_of(p, 0, 1);
    else
        multiply_tiles_of(p, 0, 0);
}
#else
static void release_tiles(void) {}
#endif

// MT rows and NB blocks at once; both are constants at each call, so the sums live in registers.
INLINE void multiply_rows(const product *p, long first, const int MT, const int NB) {
    __m512 sum[8][2];
    for (int r = 0; r < MT; r++)
        for (int j = 0; j < NB; j++) {
            float *c = p->c + (first + r) * p->ldc + j * BLOCK;
            sum[r][j] = p->accumulate ? _mm512_loadu_ps(c) : _mm512_setzero_ps();
        }
    const bf16 *a = p->a + first * p->lda;
    for (long pair = 0; pair < p->k / 2; pair++) {
        __m512bh b[2];
        for (int j = 0; j < NB; j++) b[j] = load32(p->b + j * p->block_stride + pair * 32);
        for (int r = 0; r < MT; r++) {
            int both;
            memcpy(&both, a + r * p->lda + 2 * pair, 4);
            __m512bh x = (__m512bh)_mm512_set1_epi32(both);
            for (int j = 0; j < NB; j++) sum[r][j] = _mm512_dpbf16_ps(sum[r][j], x, b[j]);
        }
    }
    for (int r = 0; r < MT; r++)
        for (int j = 0; j < NB; j++) _mm512_storeu_ps(p->c + (first + r) * p->ldc + j * BLOCK, sum[r][j]);
}

INLINE void multiply_blocks(const product *p, const int NB) {
    long r = 0;
    for (; r + 8 <= p->m; r += 8) multiply_rows(p, r, 8, NB);
    for (; r + 4 <= p->m; r += 4) multiply_rows(p, r, 4, NB);
    for (; r + 2 <= p->m; r += 2) multiply_rows(p, r, 2, NB);
    if (r < p->m) multiply_rows(p, r, 1, NB);
}

static void multiply_vectors(const product *p) {
    if (p->block_stride)
        multiply_blocks(p, 2);
    else
        multiply_blocks(p, 1);
}

static void multiply(const product *p) {
#ifdef __AMX_BF16__
    if (p->m >= 4 && has_tiles()) {
        multiply_tiles(p);
        return;
    }
#endif
    multiply_vectors(p);
}

enum { PANEL_ROWS = 128 };

// As `multiply`, for up to PANEL_ROWS rows, which the two blocks meet one group after the other.
INLINE void multiply_panel(product p) {
    for (long left = p.m; left > 0; left -= GROUP_ROWS) {
        p.m = left < GROUP_ROWS ? left : GROUP_ROWS;
        multiply(&p);
        p.a += GROUP_ROWS * p.lda, p.c += GROUP_ROWS * p.ldc;
    }
}
