/* Quantization and packing of weights: a row, or a block of 8 rows, a task. */
#include <math.h>
#include <string.h>

#include "clones.h"
#include "ops_common.h"

/* 2^127: wider groups could overflow float32 when they are decoded. */
#define LARGEST_SPAN 170141183460469231731687303715884105728.0

/* Of a row's exponent: the smallest normal step; its groups span at most 15 octaves above it. */
enum { SMALLEST_EXPONENT = -126, OCTAVES = 15 };

typedef struct {
    float low, high; /* the group's range, zero included */
    int exponent;    /* the smallest storable step at or above span / 255 is */
    int sixteenths;  /* 2^exponent * (1 + sixteenths / 16) */
} group_range;

/* 0 if a weight is not finite or the group too wide. */
VECTOR_CLONES static int find_range(const float *w, int n, group_range *out) {
    float low = 0, high = 0;
    int bad = 0;
    for (int i = 0; i < n; i++) {
        low = w[i] < low ? w[i] : low;
        high = w[i] > high ? w[i] : high;
        bad |= !(fabsf(w[i]) <= 3.4028234663852886e38f);
    }
    const double span = (double)high - (double)low;
    if (bad || span > LARGEST_SPAN) return 0;
    int exponent;
    const int mantissa = (int)ceil(frexp(span / 255.0, &exponent) * 32.0); /* 0, or 16 to 32 */
    const int carry = mantissa == 32;
    *out = (group_range){low, high, span > 0 ? exponent - 1 + carry : SMALLEST_EXPONENT,
                         span > 0 && !carry ? mantissa - 16 : 0};
    return 1;
}

/* Returns the sum of the weights' positions, in 1/256 so that it is exact. */
VECTOR_CLONES static int64_t find_codes(const float *w, int n, double inverse, double zero, uint8_t *codes) {
    int64_t total = 0;
    for (int i = 0; i < n; i++) {
        const double p = (double)w[i] * inverse + zero;
        double code = rint(p), place = rint(p * 256.0);
        code = code < 0 ? 0 : code;
        codes[i] = (uint8_t)(int32_t)(code > 255 ? 255 : code);
        place = place < -256 ? -256 : place;
        total += (int32_t)(place > 65536 ? 65536 : place);
    }
    return total;
}

/* The mean distance of n positions from the centres of their cells, in sixteenths of a cell, plus 8. */
VECTOR_CLONES static uint8_t find_shift(const uint8_t *codes, int n, int64_t total, int bits) {
    const int cell = 1 << (8 - bits);
    int64_t kept = 0;
    for (int i = 0; i < n; i++) kept += codes[i] & -cell;
    const int64_t centre = kept * 256 + (int64_t)n * (cell - 1) * 128;
    const double mean = rint((double)(total - centre) / ((double)n * cell * 16.0)) + 8;
    return (uint8_t)(mean < 0 ? 0 : mean > 15 ? 15 : mean);
}

typedef struct {
    const float *w;
    int rows, cols, group, groups, levels;
    const int32_t *level;
    uint8_t *codes, *exponent, *step, *zero, *shift;
    group_range *range; /* [threads, groups] */
    int *bad_row;       /* [rows] */
} quantize_ctx;

static void quantize_task(void *raw, int row, int worker) {
    const quantize_ctx *c = raw;
    const float *w = c->w + (size_t)row * (size_t)c->cols;
    group_range *range = c->range + (size_t)worker * (size_t)c->groups;
    int largest = SMALLEST_EXPONENT;
    for (int g = 0; g < c->groups; g++) {
        const int first = g * c->group, left = c->cols - first;
        if (!find_range(w + first, left < c->group ? left : c->group, &range[g])) {
            c->bad_row[row] = 1;
            return;
        }
        largest = range[g].exponent > largest ? range[g].exponent : largest;
    }
    const int base = largest - OCTAVES > SMALLEST_EXPONENT ? largest - OCTAVES : SMALLEST_EXPONENT;
    c->exponent[row] = (uint8_t)(base + 127);
    for (int g = 0; g < c->groups; g++) {
        const group_range *r = &range[g];
        const int below = r->exponent < base, sixteenths = below ? 0 : r->sixteenths;
        const int octave = below ? 0 : r->exponent - base;
        const double step = ldexp(1.0 + sixteenths / 16.0, base + octave), inverse = 1.0 / step;
        double zero = rint(127.5 - ((double)r->low + (double)r->high) * 0.5 * inverse);
        zero = zero < 0 ? 0 : zero > 255 ? 255 : zero;
        const size_t at = (size_t)row * (size_t)c->groups + (size_t)g;
        c->step[at] = (uint8_t)(octave * 16 + sixteenths);
        c->zero[at] = (uint8_t)zero;
        const int first = g * c->group, left = c->cols - first, n = left < c->group ? left : c->group;
        uint8_t *codes = c->codes + (size_t)row * (size_t)c->cols + first;
        const int64_t total = find_codes(w + first, n, inverse, zero, codes);
        for (int i = 0; i < c->levels; i++)
            c->shift[(size_t)i * (size_t)c->rows * (size_t)c->groups + at] =
                c->level[i] < 8 ? find_shift(codes, n, total, c->level[i]) : 8;
    }
}

int em_quantize_rows(em_pool *p, const float *w, int rows, int cols, int group, const int32_t *levels,
                     int count, uint8_t *codes, uint8_t *exponent, uint8_t *step, uint8_t *zero,
                     uint8_t *shift) {
    const int groups = em_ceil_div(cols, group);
    const size_t ranges = em_padded((size_t)em_pool_threads(p) * (size_t)groups * sizeof(group_range));
    em_pool_lock(p);
    em_carver c = {.at = em_pool_scratch(p, ranges + em_padded((size_t)rows * sizeof(int)))};
    if (!c.at) {
        em_pool_unlock(p);
        return EM_NO_MEMORY;
    }
    group_range *range = em_carve(&c, ranges);
    int *bad_row = em_carve(&c, (size_t)rows * sizeof(int));
    memset(bad_row, 0, (size_t)rows * sizeof(int));
    quantize_ctx ctx = {w,     rows,     cols, group, groups, count, levels,
                        codes, exponent, step, zero,  shift,  range, bad_row};
    em_pool_run(p, quantize_task, &ctx, rows);
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
