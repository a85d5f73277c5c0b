/* Scalar arithmetic that every instruction set must reproduce bit for bit. */
#ifndef EM_MATH_H
#define EM_MATH_H

#include <math.h>
#include <stdint.h>
#include <string.h>

/* 32 activations whose largest is below this round to zero: 127 / peak would overflow. */
#define EM_SMALLEST_PEAK 1e-36f

/* exp(x) by 2^n * p(r), |r| <= ln2 / 2; relative error below 2e-7 on [-87, 88], clamped outside. */
#define EM_EXP_LO (-87.0f)
#define EM_EXP_HI 88.0f
#define EM_LOG2E 1.44269504088896341f
#define EM_LN2_HI 0.693359375f
#define EM_LN2_LO (-2.12194440e-4f)
#define EM_EXP_C0 1.9875691500e-4f
#define EM_EXP_C1 1.3981999507e-3f
#define EM_EXP_C2 8.3334519073e-3f
#define EM_EXP_C3 4.1665795894e-2f
#define EM_EXP_C4 1.6666665459e-1f
#define EM_EXP_C5 5.0000001201e-1f

static inline float em_expf(float x) {
    x = x < EM_EXP_LO ? EM_EXP_LO : x;
    x = x > EM_EXP_HI ? EM_EXP_HI : x;
    const float n = rintf(x * EM_LOG2E);
    float r = x - n * EM_LN2_HI;
    r = r - n * EM_LN2_LO;
    float p = EM_EXP_C0;
    p = p * r + EM_EXP_C1;
    p = p * r + EM_EXP_C2;
    p = p * r + EM_EXP_C3;
    p = p * r + EM_EXP_C4;
    p = p * r + EM_EXP_C5;
    p = p * (r * r) + (r + 1.0f);
    const int32_t bits = ((int32_t)n + 127) << 23;
    float two_n;
    memcpy(&two_n, &bits, sizeof two_n);
    return p * two_n;
}

/* Exact, without a branch, so that loops of it become vectors. NaN becomes a quiet NaN. */
static inline float em_half_to_float(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, magnitude = (uint32_t)(h & 0x7fffu) << 13;
    const uint32_t is_special = -(uint32_t)(magnitude >= 31u << 23),
                   is_tiny = -(uint32_t)(magnitude < 1u << 23);
    /* The exponent's bias grows by 112, that of infinity and NaN by as much again. A subnormal gets an
     * implicit 1 that it does not have, and which is taken away again: 2^-14. */
    uint32_t bits = magnitude + (112u << 23) + (is_special & 112u << 23) + (is_tiny & 1u << 23);
    const uint32_t one_bits = is_tiny & 113u << 23;
    float out, one;
    memcpy(&out, &bits, sizeof out);
    memcpy(&one, &one_bits, sizeof one);
    out -= one;
    memcpy(&bits, &out, sizeof bits);
    bits |= sign;
    memcpy(&out, &bits, sizeof out);
    return out;
}

#define EM_HALF_MAX 65504.0f

/* To nearest, ties to even; what lies beyond the largest float16 becomes it. */
static inline uint16_t em_float_to_half(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000u;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | (bits >> 13 & 0x3ffu)); /* NaN */
    if (bits >= 0x477fe000u) return (uint16_t)(sign | 0x7bffu);                        /* 65504 */
    if (bits < 113u << 23) { /* subnormal: 0.5 has the float32 step that these are multiples of */
        float tiny;
        memcpy(&tiny, &bits, sizeof tiny);
        tiny += 0.5f;
        memcpy(&bits, &tiny, sizeof bits);
        return (uint16_t)(sign | (bits - (126u << 23)));
    }
    bits += 0xfffu + (bits >> 13 & 1u);
    return (uint16_t)(sign | (bits - (112u << 23)) >> 13);
}

/* To nearest, ties to even, for |x| < 2^22. */
static inline float em_round(float x) { return (x + 12582912.0f) - 12582912.0f; }

/* Step of a group (docs/FORMAT.md): the row's exponent raises a 4-bit exponent and 4-bit mantissa. */
static inline float em_step(uint8_t exponent, uint8_t step) {
    const uint32_t bits = ((uint32_t)exponent << 23) + ((uint32_t)step << 19);
    float out;
    memcpy(&out, &bits, sizeof out);
    return out;
}

/* 8-bit codes that share a code of `bits`: a cell. */
static inline float em_cell(int bits) { return (float)(1 << (8 - bits)); }

/* The mean of the first cell's. */
static inline float em_first_centre(int bits) { return (em_cell(bits) - 1.0f) * 0.5f; }

/* What a shift of 4 bits adds, in steps; none at 8 bits. */
static inline float em_shift(const uint8_t *shifts, int row, int bits) {
    if (!shifts) return 0.0f;
    const int nibble = shifts[row / 2] >> (4 * (row % 2)) & 15;
    return (float)(nibble - 8) * ((float)(1 << (8 - bits)) * 0.0625f);
}

/* Sum of 16 lanes in the fixed tree order. */
static inline float em_tree16(const float *lane) {
    float t[8];
    for (int i = 0; i < 8; i++) t[i] = lane[i] + lane[i + 8];
    for (int i = 0; i < 4; i++) t[i] = t[i] + t[i + 4];
    for (int i = 0; i < 2; i++) t[i] = t[i] + t[i + 2];
    return t[0] + t[1];
}

#endif
