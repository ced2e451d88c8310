// A mixture of experts: chooses, gathers each expert's tokens, and computes no expert for a token that did not choose it.
#include "gemm.h"
#include "kernels.h"

// ---- choosing -------------------------------------------------------------------------------------------------------

enum { MAX_EXPERTS = 1024 };

typedef struct {
    long num_experts, chosen, groups, chosen_groups, best_of_group, softmax, normalise;
    float scale;
} routing;

INLINE float dot(const bf16 *x, const bf16 *w, long k) {
    __m512 sum = _mm512_setzero_ps();
    for (long i = 0; i < k; i += 32) sum = _mm512_dpbf16_ps(sum, load32(x + i), load32(w + i));
    return _mm512_reduce_add_ps(sum);
}

static void to_scores(float *logits, const routing *r) {
    float top = -INFINITY, total = 0;
    for (long e = 0; e < r->num_experts; e++) top = logits[e] > top ? logits[e] : top;
    for (long e = 0; e < r->num_experts; e++) {
        logits[e] = r->softmax ? expf(logits[e] - top) : 1.0f / (1.0f + expf(-logits[e]));
        total += logits[e];
    }
    if (r->softmax)
        for (long e = 0; e < r->num_experts; e++) logits[e] /= total;
}

// The index of the largest of `count` values, the first of equal ones.
INLINE long largest(const float *values, long count) {
    long best = 0;
    for (long i = 1; i < count; i++)
        if (values[i] > values[best]) best = i;
    return best;
}

// Leaves -inf in `ranked` for the experts of all groups but the best.
static void drop_groups(float *ranked, const routing *r) {
    float scores[MAX_EXPERTS], copy[MAX_EXPERTS];
    uint8_t kept[MAX_EXPERTS] = {0};
    const long size = r->num_experts / r->groups;
    memcpy(copy, ranked, r->num_experts * sizeof(float));
    for (long g = 0; g < r->groups; g++) {
        scores[g] = 0;
        for (long i = 0; i < r->best_of_group && i < size; i++) {
            long best = largest(copy + g * size, size);
            scores[g] += copy[g * size + best];
            copy[g * size + best] = -INFINITY;
        }
    }
    for (long i = 0; i < r->chosen_groups; i++) {
        long best = largest(scores, r->groups);
        kept[best] = 1, scores[best] = -INFINITY;
    }
    for (long e = 0; e < r->num_experts; e++)
        if (!kept[e / size]) ranked[e] = -INFINITY;
}

static void route_token(const bf16 *x, const bf16 *w, const float *bias, int64_t *experts, float *weights, long k,
                        const routing *r) {
    float scores[MAX_EXPERTS], ranked[MAX_EXPERTS], total = 1e-20f;
    for (long e = 0; e < r->num_experts; e++) scores[e] = dot(x, w + e * k, k);
    to_scores(scores, r);
    for (long e = 0; e < r->num_experts; e++) ranked[e] = scores[e] + (bias ? bias[e] : 0.0f);
    if (r->groups > 1) drop_groups(ranked, r);
    for (long i = 0; i < r->chosen; i++) {
        long best = largest(ranked, r->num_experts);
        ranked[best] = -INFINITY;
        experts[i] = best, weights[i] = scores[best], total += scores[best];
    }
    for (long i = 0; i < r->chosen; i++) weights[i] *= r->scale / (r->normalise ? total : 1.0f);
}

// x [m, k] (k a multiple of 32), w [experts, k], bias [experts] float32 or NULL; experts, weights [m, chosen].
int perigee_route(const bf16 *x, const bf16 *w, const float *bias, int64_t *experts, float *weights, long m, long k,
                  long num_experts, long chosen, long groups, long chosen_groups, long best_of_group, long softmax,
                  long normalise, float scale) {
    if (num_experts > MAX_EXPERTS) return -1;
    routing r = {num_experts, chosen, groups, chosen_groups, best_of_group, softmax, normalise, scale};
#pragma omp parallel for schedule(static) if (m > 4)
    for (long t = 0; t < m; t++) route_token(x + t * k, w, bias, experts + t * chosen, weights + t * chosen, k, &r);
    return 0;
}

// ---- computing ------------------------------------------------------------------------------------------------------

enum { TASK_ROWS = PANEL_ROWS };  // of one expert's tokens, at most: a unit of work, times a group of columns

typedef struct {
    long expert, first, last;  // rows of the gathered tokens
} task;

typedef struct {
    long rows, num_tasks;
    long *start;  // [experts + 1]: where each expert's rows begin
    int64_t *order;  // [rows]: which choice, token * per_token + i, lies in which gathered row
    task *tasks;
    bf16 *gathered, *hidden, *made;  // [rows, width], [rows, inter] by gathered row, [rows, width] by choice
} work;

// The expert of a token's choice: the routed ones, then those that everybody has.
INLINE long expert_of(const int64_t *experts, long choice, long per_token, long routed, long first_shared) {
    long t = choice / per_token, i = choice % per_token;
    return i < routed ? experts[t * routed + i] : first_shared + i - routed;
}

// Sorts the choices by expert and cuts each expert's into tasks.
static void plan(work *w, const int64_t *experts, long per_token, long routed, long num_experts) {
    const long first_shared = num_experts - (per_token - routed);
    long *start = w->start;
    for (long c = 0; c < w->rows; c++) start[expert_of(experts, c, per_token, routed, first_shared) + 1]++;
    w->num_tasks = 0;
    for (long e = 0; e < num_experts; e++) {
        start[e + 1] += start[e];
        for (long first = start[e]; first < start[e + 1]; first += TASK_ROWS)
            w->tasks[w->num_tasks++] =
                (task){e, first, first + TASK_ROWS < start[e + 1] ? first + TASK_ROWS : start[e + 1]};
    }
    for (long c = 0; c < w->rows; c++) w->order[start[expert_of(experts, c, per_token, routed, first_shared)]++] = c;
}

static int allocate(work *w, long rows, long num_experts, long width, long inter) {
    w->rows = rows;
    w->start = calloc(num_experts + 1, sizeof(long));
    w->order = malloc(rows * sizeof(int64_t));
    w->tasks = malloc((rows / TASK_ROWS + num_experts + 1) * sizeof(task));
    w->gathered = malloc(rows * (2 * width + inter) * sizeof(bf16));
    w->hidden = w->gathered + rows * width;
    w->made = w->hidden + rows * inter;
    return w->start && w->order && w->tasks && w->gathered;
}

static void deallocate(work *w) { free(w->start), free(w->order), free(w->tasks), free(w->gathered); }

// hidden[:, col : col + 32] = silu(gate) * up for one task's rows.
static void gate_and_up(const work *w, const task *t, const bf16 *gate_up, long col, long width, long inter) {
    float gate[TASK_ROWS * GROUP_COLS] __attribute__((aligned(64))), up[TASK_ROWS * GROUP_COLS] __attribute__((aligned(64)));
    const long cols = inter - col < GROUP_COLS ? BLOCK : GROUP_COLS, rows = t->last - t->first;
    product p = {.a = w->gathered + t->first * width, .b = gate_up + (2 * t->expert * inter + col) * width, .lda = width,
                 .block_stride = cols == GROUP_COLS ? BLOCK * width : 0, .m = rows, .k = width, .c = gate, .ldc = GROUP_COLS};
    multiply_panel(p);
    p.b += inter * width, p.c = up;
    multiply_panel(p);
    for (long r = 0; r < rows; r++)
        for (long j = 0; j < cols; j += BLOCK) {
            const long at = r * GROUP_COLS + j;
            store16(w->hidden + (t->first + r) * inter + col + j, gated(_mm512_load_ps(gate + at), _mm512_load_ps(up + at)));
        }
}

// made[:, col : col + 32] for one task's rows, each to the place of its choice.
static void project_down(const work *w, const task *t, const bf16 *down, long col, long width, long inter) {
    float c[TASK_ROWS * GROUP_COLS] __attribute__((aligned(64)));
    const long cols = width - col < GROUP_COLS ? BLOCK : GROUP_COLS, rows = t->last - t->first;
    multiply_panel((product){.a = w->hidden + t->first * inter, .b = down + (t->expert * width + col) * inter, .lda = inter,
                             .block_stride = cols == GROUP_COLS ? BLOCK * inter : 0, .m = rows, .k = inter, .c = c,
                             .ldc = GROUP_COLS});
    for (long r = 0; r < rows; r++)
        for (long j = 0; j < cols; j += BLOCK)
            store16(w->made + w->order[t->first + r] * width + col + j, _mm512_load_ps(c + r * GROUP_COLS + j));
}

// The weighted sum of what a token's experts made; shared experts weigh 1.
static void combine(const work *w, const float *weights, bf16 *y, long token, long per_token, long routed, long width) {
    for (long i = 0; i < width; i += BLOCK) {
        __m512 sum = _mm512_setzero_ps();
        for (long e = 0; e < per_token; e++) {
            __m512 weight = _mm512_set1_ps(e < routed ? weights[token * routed + e] : 1.0f);
            sum = _mm512_fmadd_ps(weight, load16(w->made + (token * per_token + e) * width + i), sum);
        }
        store16(y + token * width + i, sum);
    }
}

// x, y [m, width]; experts, weights [m, routed]; gate_up [experts, 2 inter, width] and down [experts, width, inter], each
// expert packed. The last `shared` experts get every token. 0 if done, -1 if there was no memory.
int perigee_experts(const bf16 *x, const int64_t *experts, const float *weights, const bf16 *gate_up, const bf16 *down, bf16 *y,
                    long m, long routed, long shared, long num_experts, long width, long inter) {
    const long per_token = routed + shared;
    work w;
    int failed = !allocate(&w, m * per_token, num_experts, width, inter);
    if (!failed) {
        plan(&w, experts, per_token, routed, num_experts);
        const long inner = (inter + GROUP_COLS - 1) / GROUP_COLS, outer = (width + GROUP_COLS - 1) / GROUP_COLS;
#pragma omp parallel
        {
#pragma omp for schedule(static)
            for (long row = 0; row < w.rows; row++)
                memcpy(w.gathered + row * width, x + w.order[row] / per_token * width, width * sizeof(bf16));
#pragma omp for schedule(dynamic, 4)
            for (long i = 0; i < w.num_tasks * inner; i++)
                gate_and_up(&w, w.tasks + i / inner, gate_up, i % inner * GROUP_COLS, width, inter);
#pragma omp for schedule(dynamic, 4)
            for (long i = 0; i < w.num_tasks * outer; i++)
                project_down(&w, w.tasks + i / outer, down, i % outer * GROUP_COLS, width, inter);
            release_tiles();
#pragma omp for schedule(static)
            for (long t = 0; t < m; t++) combine(&w, weights, y, t, per_token, routed, width);
        }
    }
    deallocate(&w);
    return failed ? -1 : 0;
}
