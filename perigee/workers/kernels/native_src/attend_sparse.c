// Attention of a chunk to some blocks of what lies before it (MoBA, algorithm 1): the gate that chooses them, and the
// attention, which gathers the rows that chose a block as a mixture of experts gathers an expert's tokens.
#include <omp.h>

#include "flash.h"

// ---- the gate -------------------------------------------------------------------------------------------------------

// The indices of the `count` largest of `scores`, the first of equal ones, -1 where there are no more.
static void choose(float *scores, long blocks, int32_t *chosen, long count) {
    for (long i = 0; i < count; i++) {
        long best = -1;
        for (long j = 0; j < blocks; j++)
            if (scores[j] > -INFINITY && (best < 0 || scores[j] > scores[best])) best = j;
        chosen[i] = (int32_t)best;
        if (best >= 0) scores[best] = -INFINITY;
    }
}

// Which blocks each row attends to beside its own: those before it whose centroids its query fits best. q [length, heads,
// d]; centroids [kv_heads, padded, d], each head's packed, `padded` a multiple of 32; chosen [length, heads, count]. 0 if
// done, -1 if there was no memory.
int perigee_choose_blocks(const bf16 *q, const bf16 *centroids, int32_t *chosen, long length, long start, long heads, long kv_heads,
                          long d, long padded, long block, long count) {
    const long group = heads / kv_heads, row_groups = (length + GROUP_ROWS - 1) / GROUP_ROWS;
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        float *scores = aligned_alloc(64, GROUP_ROWS * padded * sizeof(float));
        failed |= !scores;
#pragma omp for schedule(dynamic, 4)
        for (long i = 0; i < heads * row_groups; i++) {
            if (!scores) continue;
            const long head = i % heads, first = i / heads * GROUP_ROWS;
            const long m = length - first < GROUP_ROWS ? length - first : GROUP_ROWS;
            product p = {.a = q + (first * heads + head) * d, .lda = heads * d, .block_stride = BLOCK * d, .m = m, .k = d,
                         .ldc = padded};
            for (long j = 0; j < (start + first + m - 1) / block; j += GROUP_COLS) {
                p.b = centroids + (head / group * padded + j) * d, p.c = scores + j;
                multiply(&p);
            }
            for (long r = 0; r < m; r++)
                choose(scores + r * padded, (start + first + r) / block, chosen + ((first + r) * heads + head) * count, count);
        }
        release_tiles();
        free(scores);
    }
    return failed ? -1 : 0;
}

// ---- attention ------------------------------------------------------------------------------------------------------

// Rows of one task: the more, the fewer times a block is read for those that chose it.
// What the tasks sum up, all threads together, is kept within a budget, as the KVCache's own size grows with neither.
enum { LEAST_ROWS = 256, SUMS_BYTES = 64 << 20 };

// What each row attends to beside its own block: [length, heads, count] blocks of `block` tokens, -1 for none.
typedef struct {
    const int32_t *chosen;
    long count, block, task_rows;
} selection;

// One task's rows, sorted by the blocks they chose.
typedef struct {
    running *state;
    float *sums;
    int32_t *order;  // rows of block j are order[start[j] .. start[j + 1])
    long *start;
    int complete;  // whether there was memory
} sparse_work;

static void sort_by_block(const chunk *c, const selection *s, long head, long first, long last, long blocks, sparse_work *w) {
    memset(w->start, 0, (blocks + 2) * sizeof(long));
    for (int placing = 0; placing < 2; placing++) {
        for (long row = first; row < last; row++)
            for (long i = 0; i < s->count; i++) {
                const long block = s->chosen[(row * c->heads + head) * s->count + i];
                if (block < 0) continue;
                if (placing)
                    w->order[w->start[block + 1]++] = (int32_t)(row - first);
                else
                    w->start[block + 2]++;
            }
        if (!placing)
            for (long j = 2; j < blocks + 2; j++) w->start[j] += w->start[j - 1];
    }
}

// Up to 32 rows that chose a block: their queries and sums are brought together, and the sums taken back.
static void step_chosen(const chunk *c, const packed *p, const selection *s, long head, long first, const int32_t *order, long m,
                        long block, const sparse_work *w) {
    bf16 q[GROUP_ROWS * MAX_D] __attribute__((aligned(64)));
    float sums[GROUP_ROWS * MAX_VALUE_D] __attribute__((aligned(64)));
    running state[GROUP_ROWS];
    for (long r = 0; r < m; r++) {
        memcpy(q + r * c->d, c->q + ((first + order[r]) * c->heads + head) * c->d, c->d * sizeof(bf16));
        memcpy(sums + r * c->value_d, w->sums + order[r] * c->value_d, c->value_d * sizeof(float));
        state[r] = w->state[order[r]];
    }
    for (long from = block * s->block; from < (block + 1) * s->block; from += KEYS) {
        const long left = (block + 1) * s->block - from, count = left < KEYS ? left : KEYS;
        step(c, p, &(rows){q, c->d, m, from, count, count, state, sums});
    }
    for (long r = 0; r < m; r++) {
        memcpy(w->sums + order[r] * c->value_d, sums + r * c->value_d, c->value_d * sizeof(float));
        w->state[order[r]] = state[r];
    }
}

// Rows [first, last) of the chunk, of one head: each with its own block causally, then block by block with the chosen.
static void attend_sparse_rows(const chunk *c, const packed *p, const selection *s, long head, long first, long last,
                               sparse_work *w) {
    const long blocks = (c->start + last + s->block - 1) / s->block;
    begin(c, last - first, w->state, w->sums);
    for (long row = first; row < last;) {
        const long own = (c->start + row) / s->block * s->block, end = own + s->block - c->start;  // a row of the next block
        long m = last - row < GROUP_ROWS ? last - row : GROUP_ROWS;
        if (m > end - row) m = end - row;
        for (long from = own; from < c->start + row + m; from += KEYS)
            step_causal(c, p, head, row, m, from, w->state + row - first, w->sums + (row - first) * c->value_d);
        row += m;
    }
    sort_by_block(c, s, head, first, last, blocks, w);
    for (long j = 0; j < blocks; j++)
        for (long at = w->start[j]; at < w->start[j + 1]; at += GROUP_ROWS) {
            const long left = w->start[j + 1] - at;
            step_chosen(c, p, s, head, first, w->order + at, left < GROUP_ROWS ? left : GROUP_ROWS, j, w);
        }
    finish(c, head, first, last - first, w->state, w->sums);
}

static int allocate_sparse(const chunk *c, const selection *s, sparse_work *w) {
    const long m = c->length < s->task_rows ? c->length : s->task_rows;
    w->state = malloc(m * sizeof(running));
    w->sums = aligned_alloc(64, m * c->value_d * sizeof(float));
    w->order = malloc((m * s->count + 1) * sizeof(int32_t));
    w->start = malloc(((c->start + c->length) / s->block + 4) * sizeof(long));
    w->complete = w->state && w->sums && w->order && w->start;
    return w->complete;
}

static void deallocate_sparse(sparse_work *w) { free(w->state), free(w->sums), free(w->order), free(w->start); }

static void attend_sparse_head(const chunk *c, const packed *p, const selection *s, long kv_head, sparse_work *w) {
    const long group = c->heads / c->kv_heads, tasks = (c->length + s->task_rows - 1) / s->task_rows;
#pragma omp for schedule(dynamic, 1)
    for (long i = 0; i < group * tasks; i++) {
        if (!w->complete) continue;
        const long first = i / group * s->task_rows, head = kv_head * group + i % group, left = c->length - first;
        attend_sparse_rows(c, p, s, head, first, first + (left < s->task_rows ? left : s->task_rows), w);
    }
}

// As perigee_attend_chunk, but a row sees its own block of `block` tokens, and of those before it the ones in `chosen`
// [length, heads, count]. `block` must be a multiple of 32.
int perigee_attend_sparse(const chunk *c, const int32_t *chosen, long count, long block) {
    const long threads = omp_get_max_threads(), most = SUMS_BYTES / (threads * c->value_d * (long)sizeof(float));
    const long share = c->length * (c->heads / c->kv_heads) / threads, wanted = share < most ? share : most;
    const long rows = wanted < LEAST_ROWS ? LEAST_ROWS : wanted;
    const selection s = {chosen, count, block, rows};
    packed p;
    if (block % 32 || !allocate_packed(c, &p)) return -1;
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        sparse_work work = {0};
        failed |= !allocate_sparse(c, &s, &work);
        for (long head = 0; head < c->kv_heads; head++) {
            pack_head(c, &p, head);
            attend_sparse_head(c, &p, &s, head, &work);
        }
        release_tiles();
        deallocate_sparse(&work);
    }
    free(p.keys);
    return failed ? -1 : 0;
}
