/* AVX2. Compiled with -mavx2 -mf16c and without fused multiply-add (see edgemoe.h).
 *
 * Rows sit in lanes: a 32-byte vector of codes is 8 rows x 4 columns, multiplied with four
 * broadcast activations (maddubs), so that integer sums need no shuffle across rows. */
#if defined(__x86_64__)

#include "isa_x86.h"

static int supported(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"); }

/* top[t]: columns 4t .. 4t + 3 of 8 rows, the top six bits (fewer at lower levels) of every code;
 * low[t]: the last two bits of level-8 codes. */
typedef struct {
    __m256i top[8], low[8];
} codes;

INLINE void unpack(em_unit u, int level, codes *c) {
#pragma GCC unroll 8
    for (int t = 0; t < 8; t++) {
        c->top[t] = top_codes(&u, level, t);
        if (level == 4) c->low[t] = low_codes(&u, t);
    }
}

/* Products of codes below 16 are at most 15 * 127 * 2 a pair, so eight of them fit in int16;
 * six-bit codes allow two. */
INLINE __m256i dots(const codes *c, int level, const int8_t *q) {
    const __m256i ones = _mm256_set1_epi16(1);
    if (level <= 2) {
        __m256i s16 = _mm256_setzero_si256();
#pragma GCC unroll 8
        for (int t = 0; t < 8; t++)
            s16 = _mm256_add_epi16(s16, _mm256_maddubs_epi16(c->top[t], broadcast4(q + 4 * t)));
        return _mm256_madd_epi16(s16, ones);
    }
    __m256i sum = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int t = 0; t < 8; t += 2) {
        const __m256i s16 = _mm256_add_epi16(_mm256_maddubs_epi16(c->top[t], broadcast4(q + 4 * t)),
                                             _mm256_maddubs_epi16(c->top[t + 1], broadcast4(q + 4 * t + 4)));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(s16, ones));
    }
    if (level == 4) {
        __m256i s16 = _mm256_setzero_si256();
#pragma GCC unroll 8
        for (int t = 0; t < 8; t++)
            s16 = _mm256_add_epi16(s16, _mm256_maddubs_epi16(c->low[t], broadcast4(q + 4 * t)));
        sum = _mm256_add_epi32(_mm256_slli_epi32(sum, 2), _mm256_madd_epi16(s16, ones));
    }
    return sum;
}

/* Eight products of a nibble in int16, then one widening: the fewest instructions a product takes. */
static uint32_t peak(int code, int activation, int rounds) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i c[4], q[4], sum = _mm256_setzero_si256();
    for (int i = 0; i < 4; i++) {
        c[i] = _mm256_set1_epi8((char)code);
        q[i] = renewed(_mm256_set1_epi8((char)activation));
    }
    for (int r = 0; r < rounds; r++) {
        for (int i = 0; i < 4; i += 2) {
            const __m256i a = renewed(c[i]), b = renewed(c[i + 1]);
            __m256i s16 = _mm256_setzero_si256();
            for (int j = 0; j < 4; j++) {
                s16 = _mm256_add_epi16(s16, _mm256_maddubs_epi16(a, q[j]));
                s16 = _mm256_add_epi16(s16, _mm256_maddubs_epi16(b, q[j]));
            }
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(s16, ones));
        }
    }
    return i8x_sum(sum);
}

#define ISA_BODY
#include "isa_body.h"

const em_isa em_isa_avx2 = EM_ISA_TABLE("avx2");

#endif
