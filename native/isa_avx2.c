/* AVX2. Compiled with -mavx2 -mf16c and without fused multiply-add (see edgemoe.h).
 *
 * Rows sit in lanes: a 32-byte vector of codes is 8 rows x 4 columns, multiplied with four
 * broadcast activations (maddubs), so that integer sums need no shuffle across rows. */
#if defined(__x86_64__)

#include "isa_x86.h"

static int supported(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"); }

/* Sums in int16, of fourfold codes apart, or, of six-bit codes, in int32. Eight products of a pair of
 * codes below 16, at most 15 * 127 * 2 each, fit in int16; of six-bit codes two. */
typedef struct {
    __m256i sum, fourfold;
} sums;

INLINE void sums_add(sums *s, int level, int half, const b32 v[4], const x16 *x) {
    __m256i p[4];
#pragma GCC unroll 4
    for (int t = 0; t < 4; t++) p[t] = _mm256_maddubs_epi16(v[t], x->v[t]);
    if (level == 3) {
        const __m256i ones = _mm256_set1_epi16(1);
        const __m256i four = _mm256_add_epi32(_mm256_madd_epi16(_mm256_add_epi16(p[0], p[1]), ones),
                                              _mm256_madd_epi16(_mm256_add_epi16(p[2], p[3]), ones));
        s->sum = half ? _mm256_add_epi32(s->sum, four) : four;
        return;
    }
    const __m256i even = _mm256_add_epi16(p[0], p[2]), odd = _mm256_add_epi16(p[1], p[3]);
    if (level == 0) {
        s->sum = half ? _mm256_add_epi16(s->sum, even) : even;
        s->fourfold = half ? _mm256_add_epi16(s->fourfold, odd) : odd;
    } else {
        s->sum = half ? _mm256_add_epi16(s->sum, _mm256_add_epi16(even, odd)) : _mm256_add_epi16(even, odd);
    }
}

INLINE void sums_two(sums *s, int level, int t, b32 v, b32 w, x4 x, x4 y) {
    const __m256i p = _mm256_maddubs_epi16(v, x), q = _mm256_maddubs_epi16(w, y);
    if (level == 3) {
        const __m256i both = _mm256_madd_epi16(_mm256_add_epi16(p, q), _mm256_set1_epi16(1));
        s->sum = t ? _mm256_add_epi32(s->sum, both) : both;
    } else {
        s->sum = _mm256_add_epi16(t ? _mm256_add_epi16(s->sum, p) : p, q);
    }
}

INLINE i8x sums_done(const sums *top, const sums *low, int level) {
    const __m256i ones = _mm256_set1_epi16(1);
    if (level == 0)
        return _mm256_madd_epi16(_mm256_add_epi16(top->sum, _mm256_srai_epi16(top->fourfold, 2)), ones);
    if (level == 1) return _mm256_srai_epi32(_mm256_madd_epi16(top->sum, ones), 1);
    if (level == 2) return _mm256_madd_epi16(top->sum, ones);
    if (level == 3) return top->sum;
    return _mm256_add_epi32(_mm256_madd_epi16(top->sum, _mm256_set1_epi16(16)),
                            _mm256_madd_epi16(low->sum, ones));
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
