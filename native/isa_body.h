/* The vector bodies, written once over primitives that an instruction set's file defines before it
 * includes this one. Eight rows, or eight consecutive floats, make one f8.
 *
 *   f8, i8x                     8 floats, 8 int32
 *   codes                       unpacked codes of 8 rows x 32 columns at one level
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
 *   unpack(planes, level, *c)   planes of one unit -> codes
 *   dots(*c, level, q)          i8x: each row's codes times 32 activations, exactly
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

#endif

#ifdef ISA_BODY

static void quantize(const float *x, int cols, const em_acts *a, int row) {
    int8_t *q = a->q + (size_t)row * (size_t)a->units * EM_UNIT;
    float *scale = a->scale + (size_t)row * (size_t)a->units;
    float *gx = a->gx + (size_t)row * (size_t)a->groups;
    for (int g = 0; g < a->groups; g++) gx[g] = 0.0f;
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
        const int32_t sum = bytes_sum(v, q + first);
        scale[u] = amax / 127.0f;
        gx[u / a->group_units] += scale[u] * (float)sum;
    }
}

INLINE em_unit unit_at(const em_matrix *w, int level, int rb, int u) {
    static const int bytes[EM_LEVELS] = {64, 32, 32, 64, 64};
    const size_t at = (size_t)rb * (size_t)w->units + (size_t)u;
    em_unit out = {{0}};
    for (int s = 0; s <= level; s++) out.p[s] = w->plane[s] + at * (size_t)bytes[s];
    return out;
}

enum { TILE = 64 }; /* tokens that share one unpacking */

/* t + scale * dots, for one unit and one token. */
INLINE f8 add_unit(f8 t, const codes *c, int level, const int8_t *q, float scale) {
    return f8_add(t, f8_mul(f8_set1(scale), f8_ints(dots(c, level, q))));
}

INLINE void matmul_level(const em_matrix *w, int level, int rb0, int rb1, const em_acts *a,
                         const int32_t *idx, int n, float *out, size_t ld) {
    const int bits = em_level_bits(level);
    for (int first = 0; first < n; first += TILE) {
        const int tile = n - first < TILE ? n - first : TILE;
        for (int rb = rb0; rb < rb1; rb++) {
            const size_t row0 = (size_t)rb * EM_ROW_BLOCK;
            const i8x exponent = i8x_bytes(w->exponent + row0);
            const f8 gain = f8_mul(f8_halves(w->gain + 2 * row0), f8_set1((float)(1 << (8 - bits))));
            const f8 sixteenth = f8_set1((float)(1 << (8 - bits)) * 0.0625f);
            const f8 middle = f8_sub(f8_set1(127.5f), f8_mul(gain, f8_set1(em_mean_code(bits))));
            f8 y[TILE];
            for (int i = 0; i < tile; i++) y[i] = f8_zero();
            for (int g = 0; g < w->groups; g++) {
                const int u0 = g * w->group_units;
                const int u1 = u0 + w->group_units < w->units ? u0 + w->group_units : w->units;
                const uint8_t *steps = w->step + (row0 * (size_t)w->groups + (size_t)g * EM_ROW_BLOCK) * 2;
                const f8 step = f8_steps(exponent, i8x_bytes(steps));
                const f8 s = f8_mul(step, gain);
                f8 from = f8_sub(middle, f8_ints(i8x_bytes(steps + EM_ROW_BLOCK)));
                if (level < EM_LEVELS - 1) {
                    const uint8_t *shifts = w->shift + ((size_t)rb * (size_t)w->groups + (size_t)g) * 4;
                    from = f8_add(from, f8_mul(f8_ints(i8x_nibbles(shifts)), sixteenth));
                }
                const f8 o = f8_mul(step, from);
                codes c[EM_MAX_GROUP_UNITS];
                if (tile > 1)
                    for (int u = u0; u < u1; u++) unpack(unit_at(w, level, rb, u), level, &c[u - u0]);
                for (int i = 0; i < tile; i++) {
                    const size_t row = (size_t)(idx ? idx[first + i] : first + i);
                    const int8_t *q = a->q + row * (size_t)a->units * EM_UNIT;
                    const float *xs = a->scale + row * (size_t)a->units;
                    f8 t = f8_zero();
                    if (tile > 1) {
                        for (int u = u0; u < u1; u++)
                            t = add_unit(t, &c[u - u0], level, q + (size_t)u * EM_UNIT, xs[u]);
                    } else {
                        for (int u = u0; u < u1; u++) { /* one token: the codes stay in registers */
                            codes once;
                            unpack(unit_at(w, level, rb, u), level, &once);
                            t = add_unit(t, &once, level, q + (size_t)u * EM_UNIT, xs[u]);
                        }
                    }
                    const f8 gx = f8_set1(a->gx[row * (size_t)a->groups + (size_t)g]);
                    y[i] = f8_add(f8_add(y[i], f8_mul(s, t)), f8_mul(o, gx));
                }
            }
            const int live = w->rows - rb * EM_ROW_BLOCK;
            for (int i = 0; i < tile; i++) {
                float *to = out + (size_t)(first + i) * ld + (size_t)(rb - rb0) * EM_ROW_BLOCK;
                if (live >= EM_ROW_BLOCK) {
                    f8_store(to, y[i]);
                } else {
                    float all[EM_ROW_BLOCK];
                    f8_store(all, y[i]);
                    memcpy(to, all, (size_t)live * sizeof(float));
                }
            }
        }
    }
}

INLINE void accumulate_level(const em_matrix *w, int level, int rb0, int rb1, const em_acts *a, int n,
                             int32_t *out) {
    const size_t rows = (size_t)(w->rows + EM_ROW_BLOCK - 1) / EM_ROW_BLOCK * EM_ROW_BLOCK;
    for (int rb = rb0; rb < rb1; rb++) {
        for (int u = 0; u < w->units; u++) {
            codes c;
            unpack(unit_at(w, level, rb, u), level, &c);
            for (int i = 0; i < n; i++) {
                int32_t lane[EM_ROW_BLOCK];
                i8x_store(lane, dots(&c, level, a->q + ((size_t)i * (size_t)a->units + (size_t)u) * EM_UNIT));
                for (int r = 0; r < EM_ROW_BLOCK; r++)
                    out[((size_t)i * rows + (size_t)(rb * EM_ROW_BLOCK + r)) * (size_t)w->units + (size_t)u] =
                        lane[r];
            }
        }
    }
}

/* One body a level, so that the level is a constant in each. */
static void matmul(const em_matrix *w, int rb0, int rb1, const em_acts *a, const int32_t *idx, int n,
                   float *out, size_t ld) {
    switch (w->level) {
    case 0: matmul_level(w, 0, rb0, rb1, a, idx, n, out, ld); break;
    case 1: matmul_level(w, 1, rb0, rb1, a, idx, n, out, ld); break;
    case 2: matmul_level(w, 2, rb0, rb1, a, idx, n, out, ld); break;
    case 3: matmul_level(w, 3, rb0, rb1, a, idx, n, out, ld); break;
    default: matmul_level(w, 4, rb0, rb1, a, idx, n, out, ld); break;
    }
}

static void accumulate(const em_matrix *w, int rb0, int rb1, const em_acts *a, int n, int32_t *out) {
    switch (w->level) {
    case 0: accumulate_level(w, 0, rb0, rb1, a, n, out); break;
    case 1: accumulate_level(w, 1, rb0, rb1, a, n, out); break;
    case 2: accumulate_level(w, 2, rb0, rb1, a, n, out); break;
    case 3: accumulate_level(w, 3, rb0, rb1, a, n, out); break;
    default: accumulate_level(w, 4, rb0, rb1, a, n, out); break;
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

#define EM_ISA_TABLE(name)                                                                                   \
    {name, supported, quantize, matmul, accumulate, dot, scale_mul, silu_mul, panels, soften, to_half, peak}

#endif
