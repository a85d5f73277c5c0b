/* AVX2 bodies. Compiled with -mavx2 -mf16c and without fused multiply-add (see edgemoe.h).
 *
 * Rows sit in lanes: a 32-byte vector of codes is 8 rows x 4 columns, multiplied with four
 * broadcast activations (maddubs), so that integer sums need no shuffle across rows. */
#if defined(__x86_64__)

#include <immintrin.h>

#include "edgemoe.h"
#include "em_math.h"

#define INLINE static inline __attribute__((always_inline))

static int supported(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"); }

static void quantize(const float *x, int cols, const em_acts *a, int row) {
    int8_t *q = a->q + (size_t)row * (size_t)a->units * EM_UNIT;
    float *scale = a->scale + (size_t)row * (size_t)a->units;
    float *gx = a->gx + (size_t)row * (size_t)a->groups;
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    for (int g = 0; g < a->groups; g++) gx[g] = 0.0f;
    for (int u = 0; u < a->units; u++) {
        const int first = u * EM_UNIT;
        float tail[EM_UNIT] = {0};
        const float *from = x + first;
        if (cols - first < EM_UNIT) {
            memcpy(tail, from, (size_t)(cols - first) * sizeof(float));
            from = tail;
        }
        __m256 v[4];
        for (int i = 0; i < 4; i++) v[i] = _mm256_loadu_ps(from + 8 * i);
        __m256 m =
            _mm256_max_ps(_mm256_max_ps(_mm256_and_ps(v[0], magnitude), _mm256_and_ps(v[1], magnitude)),
                          _mm256_max_ps(_mm256_and_ps(v[2], magnitude), _mm256_and_ps(v[3], magnitude)));
        __m128 h = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
        h = _mm_max_ps(h, _mm_movehl_ps(h, h));
        h = _mm_max_ss(h, _mm_shuffle_ps(h, h, 1));
        const float amax = _mm_cvtss_f32(h);
        const __m256 inverse = _mm256_set1_ps(amax > 0.0f ? 127.0f / amax : 0.0f);
        __m256i k[4];
        for (int i = 0; i < 4; i++) k[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], inverse));
        __m256i sum = _mm256_add_epi32(_mm256_add_epi32(k[0], k[1]), _mm256_add_epi32(k[2], k[3]));
        __m128i s4 = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
        s4 = _mm_add_epi32(s4, _mm_shuffle_epi32(s4, 0x4e));
        s4 = _mm_add_epi32(s4, _mm_shuffle_epi32(s4, 0xb1));
        /* packs interleaves 128-bit halves; the permutation puts the 4-byte runs back in order. */
        const __m256i bytes =
            _mm256_packs_epi16(_mm256_packs_epi32(k[0], k[1]), _mm256_packs_epi32(k[2], k[3]));
        _mm256_storeu_si256((__m256i *)(q + first),
                            _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
        scale[u] = amax / 127.0f;
        gx[u / a->group_units] += scale[u] * (float)_mm_cvtsi128_si32(s4);
    }
}

/* The `bits`-wide field at bit `from` of every byte, moved to bit `to`. */
INLINE __m256i field(__m256i v, int from, int to, int bits) {
    const __m256i mask = _mm256_set1_epi8((char)(((1 << bits) - 1) << to));
    if (from > to) v = _mm256_srli_epi16(v, from - to);
    if (to > from) v = _mm256_slli_epi16(v, to - from);
    return _mm256_and_si256(v, mask);
}

INLINE __m256i load(const uint8_t *p) { return _mm256_loadu_si256((const __m256i *)p); }

/* Where the planes of one unit of a row block lie. */
typedef struct {
    const uint8_t *p[EM_LEVELS];
} unit_planes;

INLINE unit_planes unit_at(const em_matrix *w, int level, int rb, int u) {
    static const int bytes[EM_LEVELS] = {64, 32, 32, 64, 64};
    const size_t at = (size_t)rb * (size_t)w->units + (size_t)u;
    unit_planes out = {{0}};
    for (int s = 0; s <= level; s++) out.p[s] = w->plane[s] + at * (size_t)bytes[s];
    return out;
}

/* Columns 4t .. 4t + 3 of 8 rows: the top six bits (fewer at lower levels) of every code. */
INLINE __m256i top_codes(const unit_planes *u, int level, int t) {
    const int width = level == 0 ? 2 : level == 1 ? 3 : level == 2 ? 4 : 6;
    const int in_pair = 2 * (t % 4), half = 32 * (t / 4);
    __m256i c = field(load(u->p[0] + half), in_pair, width - 2, 2);
    if (level >= 1) c = _mm256_or_si256(c, field(load(u->p[1]), t, width - 3, 1));
    if (level >= 2) c = _mm256_or_si256(c, field(load(u->p[2]), t, width - 4, 1));
    if (level >= 3) c = _mm256_or_si256(c, field(load(u->p[3] + half), in_pair, 0, 2));
    return c;
}

/* The last two bits of every level-8 code. */
INLINE __m256i low_codes(const unit_planes *u, int t) {
    return field(load(u->p[4] + 32 * (t / 4)), 2 * (t % 4), 0, 2);
}

INLINE __m256i broadcast4(const int8_t *q) {
    int32_t four;
    memcpy(&four, q, 4);
    return _mm256_set1_epi32(four);
}

/* int32 dots of 8 rows with 32 activations. Products of codes below 16 are at most 15 * 127 * 2 a
 * pair, so eight of them fit in int16; six-bit codes allow two. */
INLINE __m256i dot_unit(const __m256i top[8], const __m256i low[8], int level, const int8_t *q) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i sum = _mm256_setzero_si256();
    if (level <= 2) {
        __m256i s16 = _mm256_setzero_si256();
#pragma GCC unroll 8
        for (int t = 0; t < 8; t++)
            s16 = _mm256_add_epi16(s16, _mm256_maddubs_epi16(top[t], broadcast4(q + 4 * t)));
        return _mm256_madd_epi16(s16, ones);
    }
#pragma GCC unroll 4
    for (int t = 0; t < 8; t += 2) {
        const __m256i s16 = _mm256_add_epi16(_mm256_maddubs_epi16(top[t], broadcast4(q + 4 * t)),
                                             _mm256_maddubs_epi16(top[t + 1], broadcast4(q + 4 * t + 4)));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(s16, ones));
    }
    if (level == 4) {
        __m256i s16 = _mm256_setzero_si256();
#pragma GCC unroll 8
        for (int t = 0; t < 8; t++)
            s16 = _mm256_add_epi16(s16, _mm256_maddubs_epi16(low[t], broadcast4(q + 4 * t)));
        sum = _mm256_add_epi32(_mm256_slli_epi32(sum, 2), _mm256_madd_epi16(s16, ones));
    }
    return sum;
}

INLINE void unpack_unit(const em_matrix *w, int level, int rb, int u, __m256i top[8], __m256i low[8]) {
    const unit_planes planes = unit_at(w, level, rb, u);
#pragma GCC unroll 8
    for (int t = 0; t < 8; t++) {
        top[t] = top_codes(&planes, level, t);
        if (level == 4) low[t] = low_codes(&planes, t);
    }
}

INLINE void group_scales(const em_matrix *w, __m256 multiplier, int rb, int g, __m256 *s, __m256 *o) {
    const uint8_t *at =
        w->scale + EM_SCALE_HEAD + ((size_t)rb * (size_t)w->groups + (size_t)g) * 4 * EM_ROW_BLOCK;
    *s = _mm256_mul_ps(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)at)), multiplier);
    *o = _mm256_mul_ps(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(at + 16))), multiplier);
}

INLINE void store_rows(float *out, __m256 y, int live) {
    if (live >= EM_ROW_BLOCK) {
        _mm256_storeu_ps(out, y);
        return;
    }
    float all[EM_ROW_BLOCK];
    _mm256_storeu_ps(all, y);
    memcpy(out, all, (size_t)live * sizeof(float));
}

enum { TILE = 64 };

INLINE void matmul_level(const em_matrix *w, int level, int rb0, int rb1, const em_acts *a,
                         const int32_t *idx, int n, float *out, size_t ld) {
    float head;
    memcpy(&head, w->scale, sizeof head);
    const __m256 multiplier = _mm256_set1_ps(head);
    for (int first = 0; first < n; first += TILE) {
        const int tile = n - first < TILE ? n - first : TILE;
        for (int rb = rb0; rb < rb1; rb++) {
            __m256 y[TILE];
            for (int i = 0; i < tile; i++) y[i] = _mm256_setzero_ps();
            for (int g = 0; g < w->groups; g++) {
                const int u0 = g * w->group_units;
                const int u1 = u0 + w->group_units < w->units ? u0 + w->group_units : w->units;
                __m256 s, o;
                group_scales(w, multiplier, rb, g, &s, &o);
                if (tile == 1) { /* codes stay in registers */
                    const size_t row = (size_t)(idx ? idx[first] : first);
                    const int8_t *q = a->q + row * (size_t)a->units * EM_UNIT;
                    const float *xs = a->scale + row * (size_t)a->units;
                    __m256 t = _mm256_setzero_ps();
                    for (int u = u0; u < u1; u++) {
                        __m256i top[8], low[8];
                        unpack_unit(w, level, rb, u, top, low);
                        const __m256i dots = dot_unit(top, low, level, q + (size_t)u * EM_UNIT);
                        t = _mm256_add_ps(t, _mm256_mul_ps(_mm256_set1_ps(xs[u]), _mm256_cvtepi32_ps(dots)));
                    }
                    const __m256 gx = _mm256_set1_ps(a->gx[row * (size_t)a->groups + (size_t)g]);
                    y[0] = _mm256_add_ps(_mm256_add_ps(y[0], _mm256_mul_ps(s, t)), _mm256_mul_ps(o, gx));
                    continue;
                }
                __m256i top[EM_MAX_GROUP_UNITS][8], low[EM_MAX_GROUP_UNITS][8];
                for (int u = u0; u < u1; u++) unpack_unit(w, level, rb, u, top[u - u0], low[u - u0]);
                for (int i = 0; i < tile; i++) {
                    const size_t row = (size_t)(idx ? idx[first + i] : first + i);
                    const int8_t *q = a->q + row * (size_t)a->units * EM_UNIT;
                    const float *xs = a->scale + row * (size_t)a->units;
                    __m256 t = _mm256_setzero_ps();
                    for (int u = u0; u < u1; u++) {
                        const __m256i dots =
                            dot_unit(top[u - u0], low[u - u0], level, q + (size_t)u * EM_UNIT);
                        t = _mm256_add_ps(t, _mm256_mul_ps(_mm256_set1_ps(xs[u]), _mm256_cvtepi32_ps(dots)));
                    }
                    const __m256 gx = _mm256_set1_ps(a->gx[row * (size_t)a->groups + (size_t)g]);
                    y[i] = _mm256_add_ps(_mm256_add_ps(y[i], _mm256_mul_ps(s, t)), _mm256_mul_ps(o, gx));
                }
            }
            for (int i = 0; i < tile; i++)
                store_rows(out + (size_t)(first + i) * ld + (size_t)(rb - rb0) * EM_ROW_BLOCK, y[i],
                           w->rows - rb * EM_ROW_BLOCK);
        }
    }
}

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

INLINE void accumulate_level(const em_matrix *w, int level, int rb0, int rb1, const em_acts *a, int n,
                             int32_t *out) {
    const size_t rows = (size_t)(w->rows + EM_ROW_BLOCK - 1) / EM_ROW_BLOCK * EM_ROW_BLOCK;
    for (int rb = rb0; rb < rb1; rb++) {
        for (int u = 0; u < w->units; u++) {
            __m256i top[8], low[8];
            unpack_unit(w, level, rb, u, top, low);
            for (int i = 0; i < n; i++) {
                int32_t lane[EM_ROW_BLOCK];
                _mm256_storeu_si256(
                    (__m256i *)lane,
                    dot_unit(top, low, level, a->q + ((size_t)i * (size_t)a->units + (size_t)u) * EM_UNIT));
                for (int r = 0; r < EM_ROW_BLOCK; r++)
                    out[((size_t)i * rows + (size_t)(rb * EM_ROW_BLOCK + r)) * (size_t)w->units + (size_t)u] =
                        lane[r];
            }
        }
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

/* Sum of the 16 lanes (a, b) in the tree order of em_tree16. */
INLINE float tree16(__m256 a, __m256 b) {
    const __m256 s8 = _mm256_add_ps(a, b);
    const __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
    const __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
    return _mm_cvtss_f32(_mm_add_ss(s2, _mm_shuffle_ps(s2, s2, 1)));
}

static float dot(const float *a, const float *b, int n) {
    __m256 lo = _mm256_setzero_ps(), hi = _mm256_setzero_ps();
    int i = 0;
    for (; i + 16 <= n; i += 16) {
        lo = _mm256_add_ps(lo, _mm256_mul_ps(_mm256_loadu_ps(a + i), _mm256_loadu_ps(b + i)));
        hi = _mm256_add_ps(hi, _mm256_mul_ps(_mm256_loadu_ps(a + i + 8), _mm256_loadu_ps(b + i + 8)));
    }
    if (i < n) {
        float ta[16] = {0}, tb[16] = {0};
        memcpy(ta, a + i, (size_t)(n - i) * sizeof(float));
        memcpy(tb, b + i, (size_t)(n - i) * sizeof(float));
        lo = _mm256_add_ps(lo, _mm256_mul_ps(_mm256_loadu_ps(ta), _mm256_loadu_ps(tb)));
        hi = _mm256_add_ps(hi, _mm256_mul_ps(_mm256_loadu_ps(ta + 8), _mm256_loadu_ps(tb + 8)));
    }
    return tree16(lo, hi);
}

static void scale_mul(const float *x, float r, const float *w, int n, float *y) {
    const __m256 rr = _mm256_set1_ps(r);
    int i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(y + i,
                         _mm256_mul_ps(_mm256_mul_ps(_mm256_loadu_ps(x + i), rr), _mm256_loadu_ps(w + i)));
    for (; i < n; i++) y[i] = (x[i] * r) * w[i];
}

/* em_expf on 8 lanes, operation for operation. */
INLINE __m256 exp8(__m256 x) {
    const __m256 lo = _mm256_set1_ps(EM_EXP_LO), hi = _mm256_set1_ps(EM_EXP_HI);
    x = _mm256_blendv_ps(x, lo, _mm256_cmp_ps(x, lo, _CMP_LT_OQ));
    x = _mm256_blendv_ps(x, hi, _mm256_cmp_ps(x, hi, _CMP_GT_OQ));
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(EM_LOG2E)),
                                     _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_sub_ps(x, _mm256_mul_ps(n, _mm256_set1_ps(EM_LN2_HI)));
    r = _mm256_sub_ps(r, _mm256_mul_ps(n, _mm256_set1_ps(EM_LN2_LO)));
    static const float c[5] = {EM_EXP_C1, EM_EXP_C2, EM_EXP_C3, EM_EXP_C4, EM_EXP_C5};
    __m256 p = _mm256_set1_ps(EM_EXP_C0);
#pragma GCC unroll 5
    for (int i = 0; i < 5; i++) p = _mm256_add_ps(_mm256_mul_ps(p, r), _mm256_set1_ps(c[i]));
    p = _mm256_add_ps(_mm256_mul_ps(p, _mm256_mul_ps(r, r)), _mm256_add_ps(r, _mm256_set1_ps(1.0f)));
    const __m256i bits =
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(p, _mm256_castsi256_ps(bits));
}

static void silu_mul(float *g, const float *u, int n) {
    const __m256 one = _mm256_set1_ps(1.0f), sign = _mm256_set1_ps(-0.0f);
    int i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m256 x = _mm256_loadu_ps(g + i);
        const __m256 silu = _mm256_div_ps(x, _mm256_add_ps(one, exp8(_mm256_xor_ps(x, sign))));
        _mm256_storeu_ps(g + i, _mm256_mul_ps(silu, _mm256_loadu_ps(u + i)));
    }
    for (; i < n; i++) g[i] = g[i] / (1.0f + em_expf(-g[i])) * u[i];
}

static float exp_sum(float *x, float m, int n) {
    const __m256 mm = _mm256_set1_ps(m);
    __m256 lo = _mm256_setzero_ps(), hi = _mm256_setzero_ps();
    int i = 0;
    for (; i + 16 <= n; i += 16) {
        const __m256 a = exp8(_mm256_sub_ps(_mm256_loadu_ps(x + i), mm));
        const __m256 b = exp8(_mm256_sub_ps(_mm256_loadu_ps(x + i + 8), mm));
        _mm256_storeu_ps(x + i, a);
        _mm256_storeu_ps(x + i + 8, b);
        lo = _mm256_add_ps(lo, a);
        hi = _mm256_add_ps(hi, b);
    }
    if (i < n) {
        float tail[16] = {0};
        for (int l = 0; i + l < n; l++) tail[l] = x[i + l] = em_expf(x[i + l] - m);
        lo = _mm256_add_ps(lo, _mm256_loadu_ps(tail));
        hi = _mm256_add_ps(hi, _mm256_loadu_ps(tail + 8));
    }
    return tree16(lo, hi);
}

static void weighted_sum(const float *p, const float *v, int n, int d, float sum, float *out) {
    int c = 0;
    for (; c + 32 <= d; c += 32) {
        __m256 acc[4];
        for (int k = 0; k < 4; k++) acc[k] = _mm256_setzero_ps();
        for (int j = 0; j < n; j++) {
            const __m256 w = _mm256_set1_ps(p[j]);
            const float *row = v + (size_t)j * (size_t)d + c;
#pragma GCC unroll 4
            for (int k = 0; k < 4; k++)
                acc[k] = _mm256_add_ps(acc[k], _mm256_mul_ps(w, _mm256_loadu_ps(row + 8 * k)));
        }
        for (int k = 0; k < 4; k++)
            _mm256_storeu_ps(out + c + 8 * k, _mm256_div_ps(acc[k], _mm256_set1_ps(sum)));
    }
    for (; c < d; c++) {
        float acc = 0.0f;
        for (int j = 0; j < n; j++) acc += p[j] * v[(size_t)j * (size_t)d + (size_t)c];
        out[c] = acc / sum;
    }
}

const em_isa em_isa_avx2 = {"avx2", supported, quantize, matmul,  accumulate,
                            dot,    scale_mul, silu_mul, exp_sum, weighted_sum};

#endif
