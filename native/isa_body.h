/* The vector bodies, written once over primitives that an instruction set's file defines before it
 * includes this one. Eight rows, or eight consecutive floats, make one f8.
 *
 *   f8, i8x                     8 floats, 8 int32
 *   f8_zero f8_set1 f8_load f8_store f8_add f8_sub f8_mul f8_div f8_neg f8_abs f8_max
 *   f8_below(x, limit, other)   other where x < limit, else x
 *   f8_above(x, limit, other)   other where x > limit, else x
 *   f8_round                    to nearest, ties to even
 *   f8_pow2(n)                  2^n of integral n in [-126, 127]
 *   f8_halves(p)                8 float16 -> f8
 *   f8_store_halves(p, x)       f8 within +-65504 -> 8 float16, to nearest, ties to even
 *   f8_signed(p)                8 int8 -> f8
 *   i8x_bytes(p)                8 uint8 -> i8x
 *   f8_steps(e, s)              floats of bits (e << 23) + (s << 19)
 *   i8x_nibbles(p)              8 fields of 4 bits, minus 8 -> i8x
 *   f8_ints(i8x)                int32 -> float
 *   f8_tree(lo, hi)             sum of 16 lanes in the order of em_tree16
 *   f8_peak(x)                  largest of 8
 *   bytes_sum(v, q)             4 f8 of integral values -> 32 int8 at q; returns their sum
 *   b32 ...                     isa_unpack.h
 *   x16, x16_of(q)              16 activations, as sums_add takes them
 *   sums                        sums of products of 8 rows, of a kind of codes each instruction set likes
 *   sums_add(s, level, half, v, x)  adds 4 vectors of codes times 16 activations; half 0 starts anew
 *   sums_done(top, low, level)  i8x: the rows' dots, exactly; low counts at level 4 only
 *   i8x_store
 *   peak                        as em_isa says
 *
 * Every operation below rounds as the scalar body's does, in the same order: same bits. */
#ifndef ISA_BODY_H
#define ISA_BODY_H

#include "edgemoe.h"
#include "em_math.h"

#define INLINE static inline __attribute__((always_inline))

typedef struct {
    const uint8_t *p[EM_LEVELS];
} em_unit;

/* Bytes of a cell, 8 rows x 32 columns, in segment s. */
INLINE int cell_bytes(int s) { return s == 1 || s == 2 ? 32 : 64; }

#endif

#ifdef ISA_BODY

static void quantize(const float *x, int cols, const em_acts *a, int token) {
    for (int g = 0; g < a->groups; g++) a->gx[(size_t)g * (size_t)a->tokens + (size_t)token] = 0.0f;
    for (int u = 0; u < a->units; u++) {
        const int first = u * EM_UNIT;
        float tail[EM_UNIT] = {0};
        const float *from = x + first;
        if (cols - first < EM_UNIT) {
            memcpy(tail, from, (size_t)(cols - first) * sizeof(float));
            from = tail;
        }
        f8 v[4];
        for (int i = 0; i < 4; i++) v[i] = f8_load(from + 8 * i);
        const float amax =
            f8_peak(f8_max(f8_max(f8_abs(v[0]), f8_abs(v[1])), f8_max(f8_abs(v[2]), f8_abs(v[3]))));
        const f8 inverse = f8_set1(amax >= EM_SMALLEST_PEAK ? 127.0f / amax : 0.0f);
        for (int i = 0; i < 4; i++) v[i] = f8_round(f8_mul(v[i], inverse));
        const size_t at = em_acts_unit(a, (size_t)token, u);
        const int32_t sum = bytes_sum(v, a->q + at * EM_UNIT);
        a->scale[at] = amax / 127.0f;
        a->gx[(size_t)(u / a->group_units) * (size_t)a->tokens + (size_t)token] += a->scale[at] * (float)sum;
    }
}

static float dot(const float *a, const float *b, int n) {
    f8 lo = f8_zero(), hi = f8_zero();
    int i = 0;
    for (; i + 16 <= n; i += 16) {
        lo = f8_add(lo, f8_mul(f8_load(a + i), f8_load(b + i)));
        hi = f8_add(hi, f8_mul(f8_load(a + i + 8), f8_load(b + i + 8)));
    }
    if (i < n) {
        float ta[16] = {0}, tb[16] = {0};
        memcpy(ta, a + i, (size_t)(n - i) * sizeof(float));
        memcpy(tb, b + i, (size_t)(n - i) * sizeof(float));
        lo = f8_add(lo, f8_mul(f8_load(ta), f8_load(tb)));
        hi = f8_add(hi, f8_mul(f8_load(ta + 8), f8_load(tb + 8)));
    }
    return f8_tree(lo, hi);
}

static void scale_mul(const float *x, float r, const float *w, int n, float *y) {
    int i = 0;
    for (; i + 8 <= n; i += 8) f8_store(y + i, f8_mul(f8_mul(f8_load(x + i), f8_set1(r)), f8_load(w + i)));
    for (; i < n; i++) y[i] = (x[i] * r) * w[i];
}

/* em_expf on 8 lanes, operation for operation. */
INLINE f8 exp8(f8 x) {
    x = f8_below(x, f8_set1(EM_EXP_LO), f8_set1(EM_EXP_LO));
    x = f8_above(x, f8_set1(EM_EXP_HI), f8_set1(EM_EXP_HI));
    const f8 n = f8_round(f8_mul(x, f8_set1(EM_LOG2E)));
    f8 r = f8_sub(x, f8_mul(n, f8_set1(EM_LN2_HI)));
    r = f8_sub(r, f8_mul(n, f8_set1(EM_LN2_LO)));
    f8 p = f8_set1(EM_EXP_C0);
    p = f8_add(f8_mul(p, r), f8_set1(EM_EXP_C1));
    p = f8_add(f8_mul(p, r), f8_set1(EM_EXP_C2));
    p = f8_add(f8_mul(p, r), f8_set1(EM_EXP_C3));
    p = f8_add(f8_mul(p, r), f8_set1(EM_EXP_C4));
    p = f8_add(f8_mul(p, r), f8_set1(EM_EXP_C5));
    p = f8_add(f8_mul(p, f8_mul(r, r)), f8_add(r, f8_set1(1.0f)));
    return f8_mul(p, f8_pow2(n));
}

static void silu_mul(float *g, const float *u, int n) {
    int i = 0;
    for (; i + 8 <= n; i += 8) {
        const f8 x = f8_load(g + i);
        const f8 silu = f8_div(x, f8_add(f8_set1(1.0f), exp8(f8_neg(x))));
        f8_store(g + i, f8_mul(silu, f8_load(u + i)));
    }
    for (; i < n; i++) g[i] = g[i] / (1.0f + em_expf(-g[i])) * u[i];
}

#include "attention_body.h"
#include "matmul_body.h"

#define EM_ISA_TABLE(name)                                                                                   \
    {name, supported, quantize, matmul, accumulate, dot, scale_mul, silu_mul, panels, soften, to_half, peak}

#endif
