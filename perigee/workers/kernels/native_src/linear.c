// y = x wᵀ + bias, for packed w.
#include "gemm.h"
#include "kernels.h"

// In place, sixteen rows at a time, through `scratch` of as many. w [n, k].
static void pack_rows(bf16 *w, long k, uint32_t *scratch) {
    memcpy(scratch, w, BLOCK * k * sizeof(bf16));
    uint32_t *out = (uint32_t *)w;  // a pair of columns
    for (long pair = 0; pair < k / 2; pair++)
        for (long row = 0; row < BLOCK; row++) out[pair * BLOCK + row] = scratch[row * (k / 2) + pair];
}

// Packs w [n, k] where it lies. 0 if done, -1 if there was no memory for sixteen rows.
int perigee_pack(bf16 *w, long n, long k) {
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        uint32_t *scratch = malloc(BLOCK * k * sizeof(bf16));
        failed |= !scratch;
#pragma omp for schedule(static)
        for (long row = 0; row < n; row += BLOCK)
            if (scratch) pack_rows(w + row * k, k, scratch);
        free(scratch);
    }
    return failed ? -1 : 0;
}

// One group of 32 columns of y (16 at the right edge) for rows [first, last) of x. y is float if `exact`, else bf16.
typedef struct {
    const bf16 *x, *w, *bias;
    void *y;
    long x_stride, y_stride, n, k, exact;
} linear;

static void round_rows(const float *c, const bf16 *bias, bf16 *y, long y_stride, long m, long cols) {
    for (long j = 0; j < cols; j += BLOCK) {
        __m512 offset = bias ? load16(bias + j) : _mm512_setzero_ps();
        for (long r = 0; r < m; r++)
            store16(y + r * y_stride + j, _mm512_add_ps(_mm512_loadu_ps(c + r * GROUP_COLS + j), offset));
    }
}

static void copy_rows(const float *c, float *y, long y_stride, long m, long cols) {
    for (long r = 0; r < m; r++) memcpy(y + r * y_stride, c + r * GROUP_COLS, cols * sizeof(float));
}

static void linear_group(const linear *l, long first, long last, long col) {
    float c[PANEL_ROWS * GROUP_COLS] __attribute__((aligned(64)));
    const long cols = l->n - col < GROUP_COLS ? l->n - col : GROUP_COLS;
    multiply_panel((product){.a = l->x + first * l->x_stride, .b = l->w + col * l->k, .lda = l->x_stride, .m = last - first,
                             .block_stride = cols == GROUP_COLS ? BLOCK * l->k : 0, .k = l->k, .c = c, .ldc = GROUP_COLS});
    const long at = first * l->y_stride + col;
    if (l->exact)
        copy_rows(c, (float *)l->y + at, l->y_stride, last - first, cols);
    else
        round_rows(c, l->bias ? l->bias + col : NULL, (bf16 *)l->y + at, l->y_stride, last - first, cols);
}

static void multiply_all(linear l, long heads, long m, long x_head, long y_head, long w_head) {
    const long row_blocks = (m + PANEL_ROWS - 1) / PANEL_ROWS, col_blocks = (l.n + GROUP_COLS - 1) / GROUP_COLS;
    const long y_bytes = l.exact ? sizeof(float) : sizeof(bf16);
#pragma omp parallel
    {
#pragma omp for collapse(2) schedule(dynamic, m > GROUP_ROWS ? 4 : 2)
        for (long hr = 0; hr < heads * row_blocks; hr++)
            for (long cb = 0; cb < col_blocks; cb++) {
                long h = hr / row_blocks, first = hr % row_blocks * PANEL_ROWS;
                linear one = l;
                one.x += h * x_head, one.w += h * w_head, one.y = (char *)one.y + h * y_head * y_bytes;
                linear_group(&one, first, m - first < PANEL_ROWS ? m : first + PANEL_ROWS, cb * GROUP_COLS);
            }
        release_tiles();
    }
}

// x [m, k], rows x_stride apart; w [n, k] packed; y [m, n], rows y_stride apart. `heads` such products, whose x and y lie
// k and n further on each, as the heads of a token do, and whose w follow one another with w_stride between them.
void perigee_linear(const bf16 *x, const bf16 *w, const bf16 *bias, bf16 *y, long heads, long m, long n, long k, long x_stride,
                    long y_stride, long x_head, long y_head, long w_head) {
    multiply_all((linear){x, w, bias, y, x_stride, y_stride, n, k, 0}, heads, m, x_head, y_head, w_head);
}

// The sums as they are, not rounded. x [m, k]; w [n, k] packed; y [m, n].
void perigee_logits(const bf16 *x, const bf16 *w, float *y, long m, long n, long k) {
    multiply_all((linear){x, w, NULL, y, k, n, n, k, 1}, 1, m, 0, 0, 0);
}
