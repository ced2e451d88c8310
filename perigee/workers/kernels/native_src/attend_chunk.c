// Causal attention of a chunk to all before it.
#include "flash.h"

enum { QUERIES = 128 };  // of one task

// Rows [first, last) of the chunk, of one head, from their first key to themselves.
static void attend_rows(const chunk *c, const packed *p, long head, long first, long last) {
    float sums[QUERIES * MAX_VALUE_D] __attribute__((aligned(64)));
    running state[QUERIES];
    begin(c, last - first, state, sums);
    for (long from = 0; from < c->start + last; from += KEYS)
        for (long row = first; row < last; row += GROUP_ROWS) {
            long m = last - row < GROUP_ROWS ? last - row : GROUP_ROWS, at = row - first;
            if (from < c->start + row + m) step_causal(c, p, head, row, m, from, state + at, sums + at * c->value_d);
        }
    finish(c, head, first, last - first, state, sums);
}

static void attend_head(const chunk *c, const packed *p, long kv_head) {
    const long group = c->heads / c->kv_heads, blocks = (c->length + QUERIES - 1) / QUERIES;
    // The last rows see the most, so they come first.
#pragma omp for schedule(dynamic, 1)
    for (long i = 0; i < group * blocks; i++) {
        long first = (blocks - 1 - i / group) * QUERIES, head = kv_head * group + i % group;
        attend_rows(c, p, head, first, first + QUERIES < c->length ? first + QUERIES : c->length);
    }
}

// q [length, heads, d], out [length, heads, value_d], dense. Keys are kv_heads of d - shared_d a token, each followed by
// the token's `shared_d` of `shared_keys`; values are kv_heads of value_d. The queries' positions begin at `start`. 0 if
// done; -1 for another shape: d, d - shared_d, shared_d and value_d must be multiples of 32.
int perigee_attend_chunk(const chunk *c) {
    packed p;
    if (!allocate_packed(c, &p)) return -1;
#pragma omp parallel
    {
        for (long head = 0; head < c->kv_heads; head++) {
            pack_head(c, &p, head);
            attend_head(c, &p, head);
        }
        release_tiles();
    }
    free(p.keys);
    return 0;
}
