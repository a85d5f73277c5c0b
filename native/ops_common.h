/* What the operations share: scratch carving, task sizes, quantization of activations. */
#ifndef OPS_COMMON_H
#define OPS_COMMON_H

#include "edgemoe.h"

/* A task multiplies this many row blocks with this many tokens. */
enum { CHUNK_BLOCKS = 8, CHUNK_ROWS = CHUNK_BLOCKS * EM_ROW_BLOCK, TOKEN_TILE = 64 };

/* Floats that are written or read once: less is done sooner than a worker is told. */
#define EM_LITTLE ((size_t)8192)

/* As em_pool_run, but on the calling thread alone where all tasks together touch few floats. */
static inline void em_run(em_pool *p, em_task fn, void *ctx, int tasks, size_t floats) {
    if (floats < EM_LITTLE) {
        for (int i = 0; i < tasks; i++) fn(ctx, i, 0);
    } else {
        em_pool_run(p, fn, ctx, tasks);
    }
}

static inline size_t em_padded(size_t bytes) { return (bytes + 63) & ~(size_t)63; }

static inline int em_ceil_div(int a, int b) { return (a + b - 1) / b; }

/* Carves 64-byte aligned pieces out of one allocation; out of none (NULL) it only counts their bytes. */
typedef struct {
    char *at;
    size_t used;
} em_carver;

static inline void *em_carve(em_carver *c, size_t bytes) {
    void *out = c->at ? c->at + c->used : NULL;
    c->used += em_padded(bytes);
    return out;
}

static inline em_acts em_carve_acts(em_carver *c, int n, int cols, int group_units) {
    em_acts a = {.tokens = n, .units = em_ceil_div(cols, EM_UNIT), .group_units = group_units};
    a.groups = em_ceil_div(a.units, group_units);
    const size_t groups = (size_t)n * (size_t)a.groups, units = groups * (size_t)group_units;
    a.q = em_carve(c, units * EM_UNIT);
    a.scale = em_carve(c, units * sizeof(float));
    a.gx = em_carve(c, groups * sizeof(float));
    return a;
}

static inline size_t em_acts_bytes(int n, int cols, int group_units) {
    em_carver counted = {0};
    em_carve_acts(&counted, n, cols, group_units);
    return counted.used;
}

/* Quantizes x [n, cols], whose rows are ld apart, into acts, a row a task. */
void em_quantize_all(em_pool *p, const em_isa *isa, const float *x, int n, int cols, int ld, em_acts acts);

#endif
