/* Codes chosen for all levels together, with the errors of a column fed on to the columns after it. */
#include <string.h>

#include "clones.h"
#include "ops_common.h"

/* Columns whose errors are collected before they are taken to the columns beyond: the rows of
 * `feedback` that are then read serve all rows of a task at once. */
enum { LAZY = 64, TASK_ROWS = 8, CODES = 256 };

typedef struct {
    const float *w, *feedback, *s, *o, *weight;
    const int32_t *starts, *bits;
    int rows, cols, groups, levels, reach;
    uint8_t *codes;
    float *scratch;
    size_t stride; /* floats of scratch a worker */
} nest_ctx;

/* y -= e * f */
VECTOR_CLONES static void feed(float *y, float e, const float *f, int n) {
    for (int i = 0; i < n; i++) y[i] -= e * f[i];
}

/* Of the codes [first, stop) the one of the smallest sum over levels of weight * (value - target)^2;
 * `near` where none is smaller than its own, infinite sums of huge weights among them. */
VECTOR_CLONES static int best_code(const float *value, const float *target, const float *weight, int levels,
                                   int first, int stop, int near) {
    float cost[CODES] = {0};
    const int n = stop - first;
    for (int l = 0; l < levels; l++) {
        const float *v = value + l * CODES + first, t = target[l], by = weight[l];
        for (int c = 0; c < n; c++) cost[c] += by * ((v[c] - t) * (v[c] - t));
    }
    int best = near - first;
    for (int c = 0; c < n; c++) best = cost[c] < cost[best] ? c : best;
    return first + best;
}

/* What every code decodes to: value [levels, 256]. */
static void tabulate(const nest_ctx *c, int row, int group, float *value) {
    for (int l = 0; l < c->levels; l++) {
        const size_t at = ((size_t)l * (size_t)c->rows + (size_t)row) * (size_t)c->groups + (size_t)group;
        const int drop = 8 - c->bits[l * c->groups + group];
        for (int code = 0; code < CODES; code++)
            value[l * CODES + code] = c->s[at] * (float)(code >> drop) + c->o[at];
    }
}

static void nest_task(void *raw, int block, int worker) {
    const nest_ctx *c = raw;
    const size_t cols = (size_t)c->cols, levels = (size_t)c->levels;
    const int row0 = block * TASK_ROWS, rows = c->rows - row0 < TASK_ROWS ? c->rows - row0 : TASK_ROWS;
    float *target = c->scratch + (size_t)worker * c->stride; /* [rows, levels, cols] */
    float *error = target + TASK_ROWS * levels * cols;       /* [rows, levels, LAZY] */
    float *value = error + TASK_ROWS * levels * LAZY;        /* [levels, 256] */
    int first_group = 0;                                     /* of the columns at hand */
    for (int r = 0; r < rows; r++)
        for (size_t l = 0; l < levels; l++)
            memcpy(target + ((size_t)r * levels + l) * cols, c->w + (size_t)(row0 + r) * cols,
                   cols * sizeof(float));
    for (int from = 0; from < c->cols; from += LAZY) {
        const int to = c->cols - from < LAZY ? c->cols : from + LAZY;
        while (c->starts[first_group + 1] <= from) first_group++;
        for (int r = 0; r < rows; r++) {
            float *mine = target + (size_t)r * levels * cols;
            uint8_t *codes = c->codes + (size_t)(row0 + r) * cols;
            int group = first_group;
            for (int i = from; i < to; i++) {
                if (i == c->starts[group + 1]) group++;
                if (i == from || i == c->starts[group]) tabulate(c, row0 + r, group, value);
                float wanted[EM_LEVELS];
                for (size_t l = 0; l < levels; l++) wanted[l] = mine[l * cols + (size_t)i];
                const int near = codes[i];
                const int first = near > c->reach ? near - c->reach : 0;
                const int stop = near + c->reach < CODES ? near + c->reach + 1 : CODES;
                const int code = best_code(value, wanted, c->weight, c->levels, first, stop, near);
                codes[i] = (uint8_t)code;
                const float *f = c->feedback + (size_t)i * cols;
                for (size_t l = 0; l < levels; l++) {
                    const float e = wanted[l] - value[l * CODES + (size_t)code];
                    error[((size_t)r * levels + l) * LAZY + (size_t)(i - from)] = e;
                    feed(mine + l * cols + (size_t)i + 1, e, f + i + 1, to - i - 1);
                }
            }
        }
        for (int i = from; i < to; i++)
            for (size_t k = 0; k < (size_t)rows * levels; k++)
                feed(target + k * cols + (size_t)to, error[k * LAZY + (size_t)(i - from)],
                     c->feedback + (size_t)i * cols + to, c->cols - to);
    }
}

int em_nest_rows(em_pool *p, const float *w, int rows, int cols, const int32_t *starts, int groups,
                 const int32_t *bits, const float *feedback, const float *s, const float *o,
                 const float *weight, int levels, int reach, uint8_t *codes) {
    nest_ctx c = {w, feedback, s, o, weight, starts, bits, rows, cols, groups, levels, reach, codes, NULL, 0};
    c.stride = TASK_ROWS * (size_t)levels * ((size_t)cols + LAZY) + (size_t)levels * CODES;
    em_pool_lock(p);
    c.scratch = em_pool_scratch(p, (size_t)em_pool_threads(p) * c.stride * sizeof(float));
    if (c.scratch) em_pool_run(p, nest_task, &c, em_ceil_div(rows, TASK_ROWS));
    em_pool_unlock(p);
    return c.scratch ? EM_OK : EM_NO_MEMORY;
}
