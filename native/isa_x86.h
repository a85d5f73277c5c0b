/* Primitives of isa_body.h that the x86 instruction sets share: 256-bit vectors, AVX2 and F16C. */
#ifndef ISA_X86_H
#define ISA_X86_H

#ifdef EM_SIMDE
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#else
#include <immintrin.h>
#endif

#include "isa_body.h"

typedef __m256 f8;
typedef __m256i i8x;

#define f8_zero _mm256_setzero_ps
#define f8_set1 _mm256_set1_ps
#define f8_load _mm256_loadu_ps
#define f8_store _mm256_storeu_ps
#define f8_add _mm256_add_ps
#define f8_sub _mm256_sub_ps
#define f8_mul _mm256_mul_ps
#define f8_div _mm256_div_ps
#define f8_max _mm256_max_ps
#define f8_ints _mm256_cvtepi32_ps

INLINE f8 f8_neg(f8 x) { return _mm256_xor_ps(x, _mm256_set1_ps(-0.0f)); }
INLINE f8 f8_abs(f8 x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
INLINE f8 f8_below(f8 x, f8 limit, f8 other) {
    return _mm256_blendv_ps(x, other, _mm256_cmp_ps(x, limit, _CMP_LT_OQ));
}
INLINE f8 f8_above(f8 x, f8 limit, f8 other) {
    return _mm256_blendv_ps(x, other, _mm256_cmp_ps(x, limit, _CMP_GT_OQ));
}
INLINE f8 f8_round(f8 x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE f8 f8_halves(const uint8_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
INLINE void f8_store_halves(uint16_t *p, f8 x) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
INLINE f8 f8_signed(const int8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}

INLINE i8x i8x_bytes(const uint8_t *p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)); }
INLINE i8x i8x_nibbles(const uint8_t *p) {
    int32_t all;
    memcpy(&all, p, sizeof all);
    const __m256i each =
        _mm256_srlv_epi32(_mm256_set1_epi32(all), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
    return _mm256_sub_epi32(_mm256_and_si256(each, _mm256_set1_epi32(15)), _mm256_set1_epi32(8));
}
INLINE f8 f8_steps(i8x e, i8x s) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(e, 23), _mm256_slli_epi32(s, 19)));
}

INLINE f8 f8_pow2(f8 n) {
    const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}

INLINE float f8_peak(f8 x) {
    __m128 h = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    h = _mm_max_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_max_ss(h, _mm_shuffle_ps(h, h, 1)));
}

INLINE float f8_tree(f8 lo, f8 hi) {
    const __m256 s8 = _mm256_add_ps(lo, hi);
    const __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
    const __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
    return _mm_cvtss_f32(_mm_add_ss(s2, _mm_shuffle_ps(s2, s2, 1)));
}

/* v, which the compiler must take for a new value every time. */
INLINE i8x renewed(i8x v) {
    __asm__ volatile("" : "+v"(v));
    return v;
}

INLINE uint32_t i8x_sum(i8x v) {
    uint32_t lane[8], sum = 0;
    memcpy(lane, &v, sizeof lane);
    for (int i = 0; i < 8; i++) sum += lane[i];
    return sum;
}

INLINE void i8x_store(int32_t *to, i8x v) { _mm256_storeu_si256((__m256i *)to, v); }

INLINE int32_t bytes_sum(const f8 v[4], int8_t *q) {
    __m256i k[4];
    for (int i = 0; i < 4; i++) k[i] = _mm256_cvtps_epi32(v[i]);
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(k[0], k[1]), _mm256_add_epi32(k[2], k[3]));
    __m128i s4 = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    s4 = _mm_add_epi32(s4, _mm_shuffle_epi32(s4, 0x4e));
    s4 = _mm_add_epi32(s4, _mm_shuffle_epi32(s4, 0xb1));
    /* packs interleaves 128-bit halves; the permutation puts the 4-byte runs back in order. */
    const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(k[0], k[1]), _mm256_packs_epi32(k[2], k[3]));
    _mm256_storeu_si256((__m256i *)q,
                        _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
    return _mm_cvtsi128_si32(s4);
}

typedef __m256i b32;

#define b32_and _mm256_and_si256
#define b32_or _mm256_or_si256
#define b32_xor _mm256_xor_si256
#define b32_shl _mm256_slli_epi16
#define b32_shr _mm256_srli_epi16

INLINE b32 b32_load(const uint8_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
INLINE b32 b32_set1(uint8_t x) { return _mm256_set1_epi8((char)x); }
INLINE b32 b32_look(b32 nibbles, const uint8_t table[16]) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table)), nibbles);
}

/* Four activations, once for each row. */
typedef b32 x4;

INLINE x4 x4_of(const int8_t *q) {
    int32_t four;
    memcpy(&four, q, 4);
    return _mm256_set1_epi32(four);
}

/* v[t]: activations 4t .. 4t + 3, once for each row. */
typedef struct {
    b32 v[4];
} x16;

INLINE x16 x16_of(const int8_t *q) {
    x16 x;
#pragma GCC unroll 4
    for (int t = 0; t < 4; t++) x.v[t] = x4_of(q + 4 * t);
    return x;
}

#include "isa_unpack.h"

#endif
