/* Codes chosen for all levels together, against the plain loops that edgemoe.h describes. */
#include "../edgemoe.h"
#include "check.h"

typedef struct {
    int rows, cols, groups, levels, reach;
    const int32_t *starts, *bits;
    const float *w, *feedback, *s, *o, *weight;
} problem;

static float decoded(const problem *p, int l, int row, int col, int code) {
    int group = 0;
    while (p->starts[group + 1] <= col) group++;
    const size_t at = (size_t)((l * p->rows + row) * p->groups + group);
    return p->s[at] * (float)(code >> (8 - p->bits[l * p->groups + group])) + p->o[at];
}

static void plain_row(const problem *p, int row, float *target, uint8_t *codes) {
    const size_t cols = (size_t)p->cols;
    for (int l = 0; l < p->levels; l++)
        memcpy(target + (size_t)l * cols, p->w + (size_t)row * cols, cols * 4);
    for (int i = 0; i < p->cols; i++) {
        float cost[256];
        int best = codes[i];
        const int first = best > p->reach ? best - p->reach : 0;
        const int last = best + p->reach < 255 ? best + p->reach : 255;
        for (int code = first; code <= last; code++) {
            cost[code] = 0;
            for (int l = 0; l < p->levels; l++) {
                const float d = decoded(p, l, row, i, code) - target[(size_t)l * cols + (size_t)i];
                cost[code] += p->weight[l] * (d * d);
            }
        }
        for (int code = first; code <= last; code++) best = cost[code] < cost[best] ? code : best;
        codes[i] = (uint8_t)best;
        for (int l = 0; l < p->levels; l++) {
            float *t = target + (size_t)l * cols;
            const float e = t[i] - decoded(p, l, row, i, best);
            for (size_t j = (size_t)i + 1; j < cols; j++) t[j] -= e * p->feedback[(size_t)i * cols + j];
        }
    }
}

/* Groups of up to `group` columns; those that begin before column `ahead`, where one begins anew, are a
 * level ahead. */
static void try_shape(int rows, int cols, int ahead, int group, int levels, int reach, int threads) {
    static const int32_t level[] = {2, 3, 4, 6, 8, 8};
    int32_t starts[64] = {0}, bits[EM_LEVELS * 64];
    int groups = 0;
    for (int at = 0; at < cols; starts[++groups] = at)
        at = at < ahead && at + group > ahead ? ahead : at + group < cols ? at + group : cols;
    for (int l = 0; l < levels; l++)
        for (int g = 0; g < groups; g++) bits[l * groups + g] = level[l + (starts[g] < ahead)];
    const size_t n = (size_t)rows * (size_t)cols, scales = (size_t)(levels * rows * groups);
    float *w = floats(n, -1, 1), *feedback = floats((size_t)cols * (size_t)cols, -0.2f, 0.2f);
    float *s = floats(scales, 0.01f, 0.02f), *o = floats(scales, -1, 0);
    float *weight = floats((size_t)levels, 0, 1), *target = need((size_t)(levels * cols) * sizeof(float));
    uint8_t *want = need(n), *got = need(n);
    for (size_t i = 0; i < n; i++) want[i] = got[i] = (uint8_t)next();
    const problem p = {rows, cols, groups, levels, reach, starts, bits, w, feedback, s, o, weight};
    for (int row = 0; row < rows; row++) plain_row(&p, row, target, want + (size_t)row * (size_t)cols);
    em_pool *pool = em_pool_new(threads);
    CHECK(em_nest_rows(pool, w, rows, cols, starts, groups, bits, feedback, s, o, weight, levels, reach,
                       got) == EM_OK);
    CHECK(same(got, want, n));
    em_pool_free(pool);
    free(w), free(feedback), free(s), free(o), free(weight), free(target), free(want), free(got);
}

int main(void) {
    for (int threads = 1; threads <= 3; threads++) {
        try_shape(1, 1, 0, 128, 1, 0, threads);
        try_shape(7, 31, 31, 32, 5, 255, threads);
        try_shape(8, 64, 0, 64, 3, 10, threads);
        try_shape(17, 65, 32, 128, 5, 64, threads);
        try_shape(40, 300, 160, 128, 5, 64, threads);
    }
    printf("%d checks, %d failures\n", checks, failures);
    return failures != 0;
}
