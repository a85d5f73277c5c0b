/* Codes chosen for all levels together, against the plain loops that edgemoe.h describes. */
#include "../edgemoe.h"
#include "check.h"

typedef struct {
    int rows, cols, groups, levels, reach, sweeps;
    const int32_t *starts, *bits;
    const float *w, *feedback, *moment, *s, *o, *weight;
} problem;

static float decoded(const problem *p, int l, int row, int col, int code) {
    int group = 0;
    while (p->starts[group + 1] <= col) group++;
    const size_t at = (size_t)((l * p->rows + row) * p->groups + group);
    return p->s[at] * (float)(code >> (8 - p->bits[l * p->groups + group])) + p->o[at];
}

static void choose(const problem *p, int row, int col, const float *target, int nearest, uint8_t *code) {
    float cost[256];
    int best = *code;
    const int first = nearest > p->reach ? nearest - p->reach : 0;
    const int last = nearest + p->reach < 255 ? nearest + p->reach : 255;
    for (int c = first; c <= last; c++) {
        cost[c] = 0;
        for (int l = 0; l < p->levels; l++) {
            const float d = decoded(p, l, row, col, c) - target[l];
            cost[c] += p->weight[l] * (d * d);
        }
    }
    for (int c = first; c <= last; c++) best = cost[c] < cost[best] ? c : best;
    *code = (uint8_t)best;
}

/* at_work: floats [levels, cols] */
static void plain_row(const problem *p, int row, float *at_work, uint8_t *codes) {
    const size_t cols = (size_t)p->cols;
    const float *w = p->w + (size_t)row * cols;
    float target[EM_LEVELS];
    uint8_t nearest[512];
    memcpy(nearest, codes, cols);
    for (int l = 0; l < p->levels; l++) memcpy(at_work + (size_t)l * cols, w, cols * sizeof *w);
    for (int i = 0; i < p->cols; i++) {
        for (int l = 0; l < p->levels; l++) target[l] = at_work[(size_t)l * cols + (size_t)i];
        choose(p, row, i, target, nearest[i], codes + i);
        for (int l = 0; l < p->levels; l++) {
            const float e = decoded(p, l, row, i, codes[i]) - target[l];
            for (size_t j = (size_t)i + 1; j < cols; j++)
                at_work[(size_t)l * cols + j] += e * p->feedback[(size_t)i * cols + j];
        }
    }
    memset(at_work, 0, (size_t)p->levels * cols * sizeof *at_work);
    for (int sweep = -1; sweep < p->sweeps; sweep++) {
        for (int i = 0; i < p->cols; i++) {
            const float *by = p->moment + (size_t)i * cols;
            float before[EM_LEVELS];
            for (int l = 0; l < p->levels; l++) {
                before[l] = sweep < 0 ? w[i] : decoded(p, l, row, i, codes[i]);
                target[l] = before[l] - at_work[(size_t)l * cols + (size_t)i] / by[i];
            }
            if (sweep >= 0) choose(p, row, i, target, nearest[i], codes + i);
            for (int l = 0; l < p->levels; l++) {
                const float change = decoded(p, l, row, i, codes[i]) - before[l];
                for (size_t j = 0; j < cols; j++) at_work[(size_t)l * cols + j] += change * by[j];
            }
        }
    }
}

/* Groups of up to `group` columns; those that begin before column `ahead`, where one begins anew, are a
 * level ahead. */
static void try_shape(int rows, int cols, int ahead, int group, int levels, int reach, int sweeps,
                      int threads) {
    static const int32_t level[] = {2, 3, 4, 6, 8, 8};
    int32_t starts[64] = {0}, bits[EM_LEVELS * 64];
    int groups = 0;
    for (int at = 0; at < cols; starts[++groups] = at)
        at = at < ahead && at + group > ahead ? ahead : at + group < cols ? at + group : cols;
    for (int l = 0; l < levels; l++)
        for (int g = 0; g < groups; g++) bits[l * groups + g] = level[l + (starts[g] < ahead)];
    const size_t n = (size_t)rows * (size_t)cols, scales = (size_t)(levels * rows * groups);
    float *w = floats(n, -1, 1), *feedback = floats((size_t)cols * (size_t)cols, -0.2f, 0.2f);
    float *moment = floats((size_t)cols * (size_t)cols, -0.2f, 0.2f);
    for (int i = 0; i < cols; i++) {
        for (int j = 0; j < i; j++) moment[i * cols + j] = moment[j * cols + i];
        moment[i * cols + i] = 1;
    }
    float *s = floats(scales, 0.01f, 0.02f), *o = floats(scales, -1, 0);
    float *weight = floats((size_t)levels, 0, 1), *target = need((size_t)(levels * cols) * sizeof(float));
    uint8_t *want = need(n), *got = need(n);
    for (size_t i = 0; i < n; i++) want[i] = got[i] = (uint8_t)next();
    const problem p = {rows, cols, groups,   levels, reach, sweeps, starts,
                       bits, w,    feedback, moment, s,     o,      weight};
    for (int row = 0; row < rows; row++) plain_row(&p, row, target, want + (size_t)row * (size_t)cols);
    em_pool *pool = em_pool_new(threads);
    CHECK(em_nest_rows(pool, w, rows, cols, starts, groups, bits, feedback, moment, s, o, weight, levels,
                       reach, sweeps, got) == EM_OK);
    CHECK(same(got, want, n));
    em_pool_free(pool);
    free(w), free(feedback), free(moment), free(s), free(o), free(weight), free(target), free(want),
        free(got);
}

int main(void) {
    for (int threads = 1; threads <= 3; threads++) {
        try_shape(1, 1, 0, 128, 1, 0, 1, threads);
        try_shape(7, 31, 31, 32, 5, 255, 3, threads);
        try_shape(8, 64, 0, 64, 3, 10, 0, threads);
        try_shape(17, 65, 32, 128, 5, 64, 1, threads);
        try_shape(40, 300, 160, 128, 5, 64, 2, threads);
    }
    printf("%d checks, %d failures\n", checks, failures);
    return failures != 0;
}
