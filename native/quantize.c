/* Quantization and packing of weights: a row, or a block of 8 rows, a task.
 *
 * A weight's position t in its group's range, 0 .. 255, is kept in 1/4096 of a step, so that all
 * sums of the least-squares fits are exact integers and any order gives the same bytes. */
#include <math.h>
#include <string.h>

#include "ops_common.h"

enum { FRACTION = 4096, MAX_GROUP = 4096 };

/* 2^127: wider groups could overflow float32 when s * code is decoded. */
#define LARGEST_SPAN 170141183460469231731687303715884105728.0

#if defined(__x86_64__) && defined(__GNUC__)
#define VECTOR_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define VECTOR_CLONES
#endif

/* Nearest value of 11 significant bits: what float16 keeps of a normal number. */
static double round_to_stored(double s) {
    int exponent;
    const double mantissa = frexp(s, &exponent);
    return ldexp(rint(mantissa * 2048.0), exponent - 11);
}

/* Codes of one group and, for each level, (s, o) at fit[level * 2 * stride] and stride further on.
 * Returns 0 if a weight is not finite or the group too wide. */
VECTOR_CLONES static int quantize_group(const float *w, int n, const int32_t *levels, int count,
                                        uint8_t *codes, float *fit, size_t stride) {
    float low = w[0], high = w[0];
    int bad = 0;
    for (int i = 0; i < n; i++) {
        low = w[i] < low ? w[i] : low;
        high = w[i] > high ? w[i] : high;
        bad |= !(fabsf(w[i]) <= 3.4028234663852886e38f);
    }
    const double span = (double)high - (double)low;
    if (bad || span > LARGEST_SPAN) return 0;
    const double inverse = span > 0 ? 255.0 / span : 0.0;
    int32_t t[MAX_GROUP];
    int64_t sum_t = 0;
    for (int i = 0; i < n; i++) {
        t[i] = (int32_t)rint(((double)w[i] - (double)low) * inverse * FRACTION);
        codes[i] = (uint8_t)((t[i] + FRACTION / 2) / FRACTION);
        sum_t += t[i];
    }
    const double unit = span / 255.0;
    const double mean_w = low + unit * ((double)sum_t / FRACTION / n);
    for (int level = 0; level < count; level++) {
        const int shift = 8 - levels[level];
        int64_t sum_tc = 0;
        int32_t sum_c = 0, sum_cc = 0;
        for (int i = 0; i < n; i++) {
            const int32_t c = codes[i] >> shift;
            sum_c += c;
            sum_cc += c * c;
            sum_tc += (int64_t)(t[i] * c);
        }
        const int64_t cov = n * sum_tc - sum_t * sum_c;
        const int64_t var = (int64_t)n * sum_cc - (int64_t)sum_c * sum_c;
        const double s = var ? round_to_stored((double)cov / ((double)var * FRACTION) * unit) : 0.0;
        fit[(size_t)level * 2 * stride] = (float)s;
        fit[((size_t)level * 2 + 1) * stride] = (float)(mean_w - s * ((double)sum_c / n));
    }
    return 1;
}

typedef struct {
    const float *w;
    int rows, cols, group, groups, levels;
    const int32_t *level;
    uint8_t *codes;
    float *fits;
    int *bad_row; /* [rows] */
} quantize_ctx;

static void quantize_task(void *raw, int row, int worker) {
    (void)worker;
    const quantize_ctx *c = raw;
    const size_t stride = (size_t)c->rows * (size_t)c->groups;
    for (int g = 0; g < c->groups; g++) {
        const size_t first = (size_t)row * (size_t)c->cols + (size_t)g * (size_t)c->group;
        const int left = c->cols - g * c->group;
        float *fit = c->fits + (size_t)row * (size_t)c->groups + (size_t)g;
        if (!quantize_group(c->w + first, left < c->group ? left : c->group, c->level, c->levels,
                            c->codes + first, fit, stride))
            c->bad_row[row] = 1;
    }
}

int em_quantize_rows(em_pool *p, const float *w, int rows, int cols, int group, const int32_t *levels,
                     int count, uint8_t *codes, float *fits) {
    em_pool_lock(p);
    int *bad_row = em_pool_scratch(p, (size_t)rows * sizeof(int));
    if (!bad_row) {
        em_pool_unlock(p);
        return EM_NO_MEMORY;
    }
    memset(bad_row, 0, (size_t)rows * sizeof(int));
    quantize_ctx c = {w, rows, cols, group, em_ceil_div(cols, group), count, levels, codes, fits, bad_row};
    em_pool_run(p, quantize_task, &c, rows);
    int status = EM_OK;
    for (int r = 0; r < rows; r++)
        if (bad_row[r]) status = EM_BAD_WEIGHTS;
    em_pool_unlock(p);
    return status;
}

typedef struct {
    const uint8_t *codes;
    int rows, cols, units, levels;
    const int32_t *level;
    uint8_t *const *planes;
} pack_ctx;

/* One unit of a row block at one level: bits [shift, shift + width) of every code. */
VECTOR_CLONES static void pack_cell(uint8_t code[8][4 * EM_ROW_BLOCK], int shift, int width, uint8_t *cell) {
    const int per_vector = 8 / width, mask = (1 << width) - 1;
    memset(cell, 0, 32 * (size_t)width);
    for (int t = 0; t < 8; t++) {
        uint8_t *v = cell + 32 * (t / per_vector);
        const int to = width * (t % per_vector);
        for (int b = 0; b < 4 * EM_ROW_BLOCK; b++)
            v[b] = (uint8_t)(v[b] | (code[t][b] >> shift & mask) << to);
    }
}

static void pack_task(void *raw, int block, int worker) {
    (void)worker;
    const pack_ctx *c = raw;
    for (int u = 0; u < c->units; u++) {
        uint8_t code[8][4 * EM_ROW_BLOCK] = {{0}};
        const int left = c->cols - u * EM_UNIT, cols = left < EM_UNIT ? left : EM_UNIT;
        for (int r = 0; r < EM_ROW_BLOCK && block * EM_ROW_BLOCK + r < c->rows; r++) {
            const uint8_t *from =
                c->codes + (size_t)(block * EM_ROW_BLOCK + r) * (size_t)c->cols + (size_t)u * EM_UNIT;
            for (int i = 0; i < cols; i++) code[i / 4][4 * r + i % 4] = from[i];
        }
        for (int level = 0; level < c->levels; level++) {
            const int width = c->level[level] - (level ? c->level[level - 1] : 0);
            uint8_t *cell =
                c->planes[level] + ((size_t)block * (size_t)c->units + (size_t)u) * 32 * (size_t)width;
            pack_cell(code, 8 - c->level[level], width, cell);
        }
    }
}

void em_pack_rows(em_pool *p, const uint8_t *codes, int rows, int cols, const int32_t *levels, int count,
                  uint8_t *const *planes) {
    pack_ctx c = {codes, rows, cols, em_ceil_div(cols, EM_UNIT), count, levels, planes};
    em_pool_lock(p);
    em_pool_run(p, pack_task, &c, em_ceil_div(rows, EM_ROW_BLOCK));
    em_pool_unlock(p);
}
