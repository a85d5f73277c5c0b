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

/* Sums in int32, of fourfold codes apart. */
typedef struct {
    __m256i sum, fourfold;
} sums;

INLINE void sums_add(sums *s, int level, int half, const b32 v[4], const x16 *x) {
    if (!half) s->sum = s->fourfold = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int t = 0; t < 4; t++) {
        __m256i *to = level == 0 && t % 2 ? &s->fourfold : &s->sum;
        *to = _mm256_dpbusd_epi32(*to, v[t], x->v[t]);
    }
}

INLINE void sums_two(sums *s, int level, int t, b32 v, b32 w, x4 x, x4 y) {
    (void)level;
    const __m256i from = t ? s->sum : _mm256_setzero_si256();
    s->sum = _mm256_dpbusd_epi32(_mm256_dpbusd_epi32(from, v, x), w, y);
}

INLINE i8x sums_done(const sums *top, const sums *low, int level) {
    if (level == 0) return _mm256_add_epi32(top->sum, _mm256_srai_epi32(top->fourfold, 2));
    if (level == 1) return _mm256_srai_epi32(top->sum, 1);
    if (level == 4) return _mm256_add_epi32(_mm256_slli_epi32(top->sum, 4), low->sum);
    return top->sum;
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
