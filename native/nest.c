/* Codes chosen for all levels together: once column by column, each error fed on to the columns after it,
 * then over and over while a single code can be changed for the better. */
#include <string.h>

#include "clones.h"
#include "ops_common.h"

/* Columns whose changes are collected before they are taken to all others: the rows of `feedback` and
 * `moment` that are then read serve all rows of a task at once. */
enum { LAZY = 64, TASK_ROWS = 8, CODES = 256 };

typedef struct {
    const float *w, *feedback, *moment, *s, *o, *weight;
    const int32_t *starts, *bits;
    int rows, cols, groups, levels, reach, sweeps;
    uint8_t *codes;
    float *scratch;
    size_t stride; /* floats of scratch a worker */
} nest_ctx;

/* Rows of a task at work. k counts its levels and rows, row fastest: few codes change at the low levels. */
typedef struct {
    const nest_ctx *c;
    int row0, rows;
    float *state;     /* [k, cols]: targets, and afterwards gradients, sums over columns of error * moment */
    float *change;    /* [k, LAZY]: by how much a column of the block at hand moves the others */
    float *value;     /* [levels, 256]: what codes decode to in the group at hand */
    uint8_t *nearest; /* [rows, cols]: the codes as they were */
} nest_rows;

typedef float f8 __attribute__((vector_size(32), aligned(4), may_alias));
enum { ALONG = 16, ACROSS = 4 };

/* Columns that move any of `rows` rows at `change`: how many, and which. */
static int moving(const float *change, int rows, int count, int *which) {
    int found = 0;
    for (int i = 0; i < count; i++) {
        int moves = 0;
        for (int k = 0; k < rows; k++) moves |= change[k * LAZY + i] != 0;
        which[found] = i;
        found += moves;
    }
    return found;
}

/* y[k, j] += sum over i, in order, of change[k, i] * f[i, j], for j < n. y and f have rows of `cols`. */
VECTOR_CLONES static void feed(float *y, int rows, const float *change, const float *f, size_t cols,
                               int count, int n) {
    int which[LAZY];
    for (int k = 0; k < rows; k += ACROSS) {
        float *const to = y + (size_t)k * cols;
        const float *by = change + (size_t)k * LAZY;
        const int together = rows - k < ACROSS ? rows - k : ACROSS;
        const int moves = moving(by, together, count, which);
        int j = 0;
        for (; together == ACROSS && j + ALONG <= n; j += ALONG) {
            f8 sum[ACROSS][2];
            for (int q = 0; q < ACROSS; q++)
                for (int h = 0; h < 2; h++) sum[q][h] = *(const f8 *)(to + (size_t)q * cols + j + 8 * h);
            for (int m = 0; m < moves; m++) {
                const float *from = f + (size_t)which[m] * cols + j, *e = by + which[m];
                const f8 lo = *(const f8 *)from, hi = *(const f8 *)(from + 8);
                for (int q = 0; q < ACROSS; q++) {
                    sum[q][0] += e[q * LAZY] * lo;
                    sum[q][1] += e[q * LAZY] * hi;
                }
            }
            for (int q = 0; q < ACROSS; q++)
                for (int h = 0; h < 2; h++) *(f8 *)(to + (size_t)q * cols + j + 8 * h) = sum[q][h];
        }
        for (int q = 0; q < together; q++)
            for (int m = 0; m < moves; m++) {
                const float e = by[q * LAZY + which[m]], *from = f + (size_t)which[m] * cols;
                for (int l = j; l < n; l++) to[(size_t)q * cols + l] += e * from[l];
            }
    }
}

/* Of the codes [first, stop) the one of the smallest sum over levels of weight * (value - target)^2;
 * `now` where none is smaller than its own, infinite sums of huge weights among them. */
VECTOR_CLONES static int best_code(const float *value, const float *target, const float *weight, int levels,
                                   int first, int stop, int now) {
    float cost[CODES] = {0};
    const int n = stop - first;
    for (int l = 0; l < levels; l++) {
        const float *v = value + l * CODES + first, t = target[l], by = weight[l];
        for (int c = 0; c < n; c++) cost[c] += by * ((v[c] - t) * (v[c] - t));
    }
    int best = now - first;
    for (int c = 0; c < n; c++) best = cost[c] < cost[best] ? c : best;
    return first + best;
}

static int choose(const nest_rows *t, const float *target, int nearest, int now) {
    const int reach = t->c->reach, first = nearest > reach ? nearest - reach : 0;
    const int stop = nearest + reach < CODES ? nearest + reach + 1 : CODES;
    return best_code(t->value, target, t->c->weight, t->c->levels, first, stop, now);
}

static void tabulate(const nest_rows *t, int row, int group) {
    const nest_ctx *c = t->c;
    for (int l = 0; l < c->levels; l++) {
        const size_t at = ((size_t)l * (size_t)c->rows + (size_t)row) * (size_t)c->groups + (size_t)group;
        const int drop = 8 - c->bits[l * c->groups + group];
        for (int code = 0; code < CODES; code++)
            t->value[l * CODES + code] = c->s[at] * (float)(code >> drop) + c->o[at];
    }
}

/* y += e * f */
VECTOR_CLONES static void add_scaled(float *y, float e, const float *f, int n) {
    for (int j = 0; j < n; j++) y[j] += e * f[j];
}

enum pass { FIRST, MEASURE, IMPROVE };

/* Column i of one row, whose code is changed where that is better; returns whether it was. Of what the
 * columns of its block [from, to) see of the change, those that are still to come see it at once. */
static int column(const nest_rows *t, enum pass pass, int r, int i, int from, int to) {
    const nest_ctx *c = t->c;
    const size_t cols = (size_t)c->cols, levels = (size_t)c->levels, rows = (size_t)t->rows;
    uint8_t *code = c->codes + (size_t)(t->row0 + r) * cols + i;
    const int now = *code;
    const float w = c->w[(size_t)(t->row0 + r) * cols + (size_t)i];
    const float *by = (pass == FIRST ? c->feedback : c->moment) + (size_t)i * cols;
    float target[EM_LEVELS];
    for (size_t l = 0; l < levels; l++) {
        const float state = t->state[(l * rows + (size_t)r) * cols + (size_t)i];
        target[l] = pass == FIRST ? state : t->value[l * CODES + (size_t)now] - state / by[i];
    }
    if (pass != MEASURE) *code = (uint8_t)choose(t, target, t->nearest[(size_t)r * cols + (size_t)i], now);
    const int begin = pass == FIRST ? i + 1 : from;
    for (size_t l = 0; l < levels; l++) {
        const float *value = t->value + l * CODES;
        const float before = pass == FIRST ? target[l] : pass == MEASURE ? w : value[now];
        const float change = value[*code] - before;
        const size_t k = l * rows + (size_t)r;
        t->change[k * LAZY + (size_t)(i - from)] = change;
        if (change != 0) add_scaled(t->state + k * cols + begin, change, by + begin, to - begin);
    }
    return *code != now;
}

/* All columns once; the number of codes that changed. */
static int sweep(const nest_rows *t, enum pass pass) {
    const nest_ctx *c = t->c;
    const int all = t->rows * c->levels;
    int first_group = 0, changed = 0;
    for (int from = 0; from < c->cols; from += LAZY) {
        const int to = c->cols - from < LAZY ? c->cols : from + LAZY;
        int here = pass != IMPROVE;
        while (c->starts[first_group + 1] <= from) first_group++;
        for (int r = 0; r < t->rows; r++) {
            int group = first_group;
            for (int i = from; i < to; i++) {
                if (i == c->starts[group + 1]) group++;
                if (i == from || i == c->starts[group]) tabulate(t, t->row0 + r, group);
                here += column(t, pass, r, i, from, to);
            }
        }
        changed += here;
        if (!here) continue;
        const float *by = (pass == FIRST ? c->feedback : c->moment) + (size_t)from * (size_t)c->cols;
        if (pass != FIRST) feed(t->state, all, t->change, by, (size_t)c->cols, to - from, from);
        feed(t->state + to, all, t->change, by + to, (size_t)c->cols, to - from, c->cols - to);
    }
    return changed;
}

static void nest_task(void *raw, int block, int worker) {
    const nest_ctx *c = raw;
    const size_t cols = (size_t)c->cols, levels = (size_t)c->levels;
    const int row0 = block * TASK_ROWS;
    nest_rows t = {.c = c, .row0 = row0, .rows = c->rows - row0 < TASK_ROWS ? c->rows - row0 : TASK_ROWS};
    t.state = c->scratch + (size_t)worker * c->stride;
    t.change = t.state + TASK_ROWS * levels * cols;
    t.value = t.change + TASK_ROWS * levels * LAZY;
    t.nearest = (uint8_t *)(t.value + levels * CODES);
    memcpy(t.nearest, c->codes + (size_t)row0 * cols, (size_t)t.rows * cols);
    for (int r = 0; r < t.rows; r++)
        for (size_t l = 0; l < levels; l++)
            memcpy(t.state + (l * (size_t)t.rows + (size_t)r) * cols, c->w + (size_t)(row0 + r) * cols,
                   cols * sizeof(float));
    sweep(&t, FIRST);
    if (!c->sweeps) return;
    memset(t.state, 0, (size_t)t.rows * levels * cols * sizeof(float));
    sweep(&t, MEASURE);
    for (int n = 0; n < c->sweeps && sweep(&t, IMPROVE); n++) continue;
}

int em_nest_rows(em_pool *p, const float *w, int rows, int cols, const int32_t *starts, int groups,
                 const int32_t *bits, const float *feedback, const float *moment, const float *s,
                 const float *o, const float *weight, int levels, int reach, int sweeps, uint8_t *codes) {
    nest_ctx c = {w,    feedback, moment, s,     o,      weight, starts, bits, rows,
                  cols, groups,   levels, reach, sweeps, codes,  NULL,   0};
    c.stride = TASK_ROWS * (size_t)levels * ((size_t)cols + LAZY) + (size_t)levels * CODES +
               TASK_ROWS * (size_t)cols / sizeof(float);
    em_pool_lock(p);
    c.scratch = em_pool_scratch(p, (size_t)em_pool_threads(p) * c.stride * sizeof(float));
    if (c.scratch) em_pool_run(p, nest_task, &c, em_ceil_div(rows, TASK_ROWS));
    em_pool_unlock(p);
    return c.scratch ? EM_OK : EM_NO_MEMORY;
}
