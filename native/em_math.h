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

static inline float em_half_to_float(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
    const uint32_t exponent = (h >> 10) & 31u;
    const uint32_t mantissa = h & 1023u;
    uint32_t bits;
    if (exponent == 31) {
        bits = sign | 0x7f800000u | (mantissa << 13);
    } else if (exponent) {
        bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
    } else {
        const float f = (float)mantissa * 5.9604644775390625e-8f; /* 2^-24: subnormals are exact */
        memcpy(&bits, &f, sizeof bits);
        bits |= sign;
    }
    float out;
    memcpy(&out, &bits, sizeof out);
    return out;
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
