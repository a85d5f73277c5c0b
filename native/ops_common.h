/* What the operations share: scratch carving, task sizes, quantization of activations. */
#ifndef OPS_COMMON_H
#define OPS_COMMON_H

#include "edgemoe.h"

/* A task multiplies this many row blocks with this many tokens. */
enum { CHUNK_BLOCKS = 8, CHUNK_ROWS = CHUNK_BLOCKS * EM_ROW_BLOCK, TOKEN_TILE = 64 };

/* Floats that are written or read once: less is done sooner than a worker is told. */
#define EM_LITTLE ((size_t)8192)

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

static inline size_t em_acts_bytes(int n, int units, int groups) {
    const size_t rows = (size_t)n;
    return em_padded(rows * (size_t)units * EM_UNIT) + em_padded(rows * (size_t)units * sizeof(float)) +
           em_padded(rows * (size_t)groups * sizeof(float));
}

static inline em_acts em_carve_acts(em_carver *c, int n, int units, int groups, int group_units) {
    em_acts a = {0};
    const size_t rows = (size_t)n;
    a.q = em_carve(c, rows * (size_t)units * EM_UNIT);
    a.scale = em_carve(c, rows * (size_t)units * sizeof(float));
    a.gx = em_carve(c, rows * (size_t)groups * sizeof(float));
    a.units = units;
    a.groups = groups;
    a.group_units = group_units;
    return a;
}

/* Quantizes x [n, cols], whose rows are ld apart, into acts, a row a task. */
void em_quantize_all(em_pool *p, const em_isa *isa, const float *x, int n, int cols, int ld, em_acts acts);

#endif
