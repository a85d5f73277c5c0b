/* AVX-512 VNNI on 256-bit vectors: whole codes, four products an instruction, no saturation.
 *
 * Built twice: with the real flags for shipping, and through SIMDe (EM_SIMDE) so that machines
 * without the instructions can check the same source. */
#if defined(__x86_64__)

#include "isa_x86.h"

#ifdef EM_SIMDE
#define ISA_NAME "avx512vnni-simde"
#define ISA_SYMBOL em_isa_avx512_simde
static int supported(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"); }
#else
#define ISA_NAME "avx512vnni"
#define ISA_SYMBOL em_isa_avx512
static int supported(void) {
    return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("f16c");
}
#endif

/* all[t]: columns 4t .. 4t + 3 of 8 rows, the whole code at the level. */
typedef struct {
    __m256i all[8];
} codes;

INLINE void unpack(em_unit u, int level, codes *c) {
#pragma GCC unroll 8
    for (int t = 0; t < 8; t++) {
        c->all[t] = top_codes(&u, level, t);
        if (level == 4) /* six bits move up by two; they are below 64, so no byte spills over */
            c->all[t] = _mm256_or_si256(_mm256_slli_epi16(c->all[t], 2), low_codes(&u, t));
    }
}

INLINE __m256i dots(const codes *c, int level, const int8_t *q) {
    (void)level;
    __m256i sum = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int t = 0; t < 8; t++) sum = _mm256_dpbusd_epi32(sum, c->all[t], broadcast4(q + 4 * t));
    return sum;
}

/* Sixteen sums, so that none waits for the one before. */
static uint32_t peak(int code, int activation, int rounds) {
    __m256i c[4], q[4], sum[16];
    for (int i = 0; i < 16; i++) sum[i] = _mm256_setzero_si256();
    for (int i = 0; i < 4; i++) {
        c[i] = _mm256_set1_epi8((char)code);
        q[i] = renewed(_mm256_set1_epi8((char)activation));
    }
    for (int r = 0; r < rounds; r++) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const __m256i a = renewed(c[i]);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) sum[4 * i + j] = _mm256_dpbusd_epi32(sum[4 * i + j], a, q[j]);
        }
    }
    for (int i = 1; i < 16; i++) sum[0] = _mm256_add_epi32(sum[0], sum[i]);
    return i8x_sum(sum[0]);
}

#define ISA_BODY
#include "isa_body.h"

const em_isa ISA_SYMBOL = EM_ISA_TABLE(ISA_NAME);

#endif
