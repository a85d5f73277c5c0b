/* NEON on 64-bit ARM, built three times: plain, with dotprod (EM_DOTPROD), with i8mm (EM_I8MM).
 * Eight rows are two vectors of four. */
#if defined(__aarch64__)

#include <arm_neon.h>

#include "isa_body.h"

#if defined(__linux__)
#include <sys/auxv.h>
#endif

#if defined(EM_I8MM)
#define ISA_NAME "neon-i8mm"
#define ISA_SYMBOL em_isa_neon_i8mm
#elif defined(EM_DOTPROD)
#define ISA_NAME "neon-dotprod"
#define ISA_SYMBOL em_isa_neon_dotprod
#else
#define ISA_NAME "neon"
#define ISA_SYMBOL em_isa_neon
#endif

static int supported(void) {
#if !defined(EM_I8MM) && !defined(EM_DOTPROD)
    return 1;
#elif defined(__linux__)
    const unsigned long dotprod = 1ul << 20, i8mm = 1ul << 13; /* HWCAP_ASIMDDP, HWCAP2_I8MM */
#if defined(EM_I8MM)
    return (getauxval(AT_HWCAP2) & i8mm) != 0 && (getauxval(AT_HWCAP) & dotprod) != 0;
#else
    (void)i8mm;
    return (getauxval(AT_HWCAP) & dotprod) != 0;
#endif
#elif defined(__APPLE__) && defined(EM_DOTPROD)
    return 1; /* every Apple core that runs 64-bit macOS has it */
#else
    return 0;
#endif
}

typedef struct {
    float32x4_t lo, hi;
} f8;
typedef struct {
    int32x4_t lo, hi;
} i8x;

INLINE f8 f8_set1(float x) { return (f8){vdupq_n_f32(x), vdupq_n_f32(x)}; }
INLINE f8 f8_zero(void) { return f8_set1(0.0f); }
INLINE f8 f8_load(const float *p) { return (f8){vld1q_f32(p), vld1q_f32(p + 4)}; }
INLINE void f8_store(float *p, f8 x) {
    vst1q_f32(p, x.lo);
    vst1q_f32(p + 4, x.hi);
}
INLINE f8 f8_add(f8 a, f8 b) { return (f8){vaddq_f32(a.lo, b.lo), vaddq_f32(a.hi, b.hi)}; }
INLINE f8 f8_sub(f8 a, f8 b) { return (f8){vsubq_f32(a.lo, b.lo), vsubq_f32(a.hi, b.hi)}; }
INLINE f8 f8_mul(f8 a, f8 b) { return (f8){vmulq_f32(a.lo, b.lo), vmulq_f32(a.hi, b.hi)}; }
INLINE f8 f8_div(f8 a, f8 b) { return (f8){vdivq_f32(a.lo, b.lo), vdivq_f32(a.hi, b.hi)}; }
INLINE f8 f8_max(f8 a, f8 b) { return (f8){vmaxq_f32(a.lo, b.lo), vmaxq_f32(a.hi, b.hi)}; }
INLINE f8 f8_neg(f8 x) { return (f8){vnegq_f32(x.lo), vnegq_f32(x.hi)}; }
INLINE f8 f8_abs(f8 x) { return (f8){vabsq_f32(x.lo), vabsq_f32(x.hi)}; }
INLINE f8 f8_below(f8 x, f8 limit, f8 other) {
    return (f8){vbslq_f32(vcltq_f32(x.lo, limit.lo), other.lo, x.lo),
                vbslq_f32(vcltq_f32(x.hi, limit.hi), other.hi, x.hi)};
}
INLINE f8 f8_above(f8 x, f8 limit, f8 other) {
    return (f8){vbslq_f32(vcgtq_f32(x.lo, limit.lo), other.lo, x.lo),
                vbslq_f32(vcgtq_f32(x.hi, limit.hi), other.hi, x.hi)};
}
INLINE f8 f8_round(f8 x) { return (f8){vrndnq_f32(x.lo), vrndnq_f32(x.hi)}; }
INLINE f8 f8_ints(i8x x) { return (f8){vcvtq_f32_s32(x.lo), vcvtq_f32_s32(x.hi)}; }
INLINE f8 f8_halves(const uint8_t *p) {
    const float16x8_t h = vreinterpretq_f16_u8(vld1q_u8(p));
    return (f8){vcvt_f32_f16(vget_low_f16(h)), vcvt_f32_f16(vget_high_f16(h))};
}
INLINE void f8_store_halves(uint16_t *p, f8 x) {
    vst1q_u16(p, vreinterpretq_u16_f16(vcombine_f16(vcvt_f16_f32(x.lo), vcvt_f16_f32(x.hi))));
}
INLINE f8 f8_signed(const int8_t *p) {
    const int16x8_t wide = vmovl_s8(vld1_s8(p));
    return (f8){vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(wide)))};
}
INLINE i8x i8x_bytes(const uint8_t *p) {
    const uint16x8_t wide = vmovl_u8(vld1_u8(p));
    return (i8x){vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(wide))),
                 vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(wide)))};
}
INLINE i8x i8x_nibbles(const uint8_t *p) {
    static const int32_t right[8] = {0, -4, -8, -12, -16, -20, -24, -28};
    uint32_t all;
    memcpy(&all, p, sizeof all);
    const uint32x4_t lo = vshlq_u32(vdupq_n_u32(all), vld1q_s32(right));
    const uint32x4_t hi = vshlq_u32(vdupq_n_u32(all), vld1q_s32(right + 4));
    const uint32x4_t mask = vdupq_n_u32(15);
    return (i8x){vsubq_s32(vreinterpretq_s32_u32(vandq_u32(lo, mask)), vdupq_n_s32(8)),
                 vsubq_s32(vreinterpretq_s32_u32(vandq_u32(hi, mask)), vdupq_n_s32(8))};
}
INLINE f8 f8_steps(i8x e, i8x s) {
    return (f8){vreinterpretq_f32_s32(vaddq_s32(vshlq_n_s32(e.lo, 23), vshlq_n_s32(s.lo, 19))),
                vreinterpretq_f32_s32(vaddq_s32(vshlq_n_s32(e.hi, 23), vshlq_n_s32(s.hi, 19)))};
}
INLINE f8 f8_pow2(f8 n) {
    const int32x4_t bias = vdupq_n_s32(127);
    return (f8){vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n.lo), bias), 23)),
                vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n.hi), bias), 23))};
}
INLINE float f8_peak(f8 x) { return vmaxvq_f32(vmaxq_f32(x.lo, x.hi)); }
INLINE float f8_tree(f8 lo, f8 hi) {
    const f8 s8 = f8_add(lo, hi);
    const float32x4_t s4 = vaddq_f32(s8.lo, s8.hi);
    const float32x2_t s2 = vadd_f32(vget_low_f32(s4), vget_high_f32(s4));
    return vget_lane_f32(s2, 0) + vget_lane_f32(s2, 1);
}
INLINE void i8x_store(int32_t *to, i8x v) {
    vst1q_s32(to, v.lo);
    vst1q_s32(to + 4, v.hi);
}
INLINE int32_t bytes_sum(const f8 v[4], int8_t *q) {
    int32_t sum = 0;
    for (int i = 0; i < 4; i++) {
        const int32x4_t lo = vcvtnq_s32_f32(v[i].lo), hi = vcvtnq_s32_f32(v[i].hi);
        vst1_s8(q + 8 * i, vmovn_s16(vcombine_s16(vmovn_s32(lo), vmovn_s32(hi))));
        sum += vaddvq_s32(vaddq_s32(lo, hi));
    }
    return sum;
}

/* v[h]: bytes of rows 4h .. 4h + 3. */
typedef struct {
    uint8x16_t v[2];
} b32;

INLINE b32 b32_load(const uint8_t *p) { return (b32){{vld1q_u8(p), vld1q_u8(p + 16)}}; }
INLINE b32 b32_set1(uint8_t x) { return (b32){{vdupq_n_u8(x), vdupq_n_u8(x)}}; }
INLINE b32 b32_and(b32 a, b32 b) { return (b32){{vandq_u8(a.v[0], b.v[0]), vandq_u8(a.v[1], b.v[1])}}; }
INLINE b32 b32_or(b32 a, b32 b) { return (b32){{vorrq_u8(a.v[0], b.v[0]), vorrq_u8(a.v[1], b.v[1])}}; }
INLINE b32 b32_xor(b32 a, b32 b) { return (b32){{veorq_u8(a.v[0], b.v[0]), veorq_u8(a.v[1], b.v[1])}}; }
INLINE b32 b32_shl(b32 a, int n) {
    const int8x16_t by = vdupq_n_s8((int8_t)n);
    return (b32){{vshlq_u8(a.v[0], by), vshlq_u8(a.v[1], by)}};
}
INLINE b32 b32_shr(b32 a, int n) { return b32_shl(a, -n); }
INLINE b32 b32_look(b32 a, const uint8_t table[16]) {
    const uint8x16_t t = vld1q_u8(table);
    return (b32){{vqtbl1q_u8(t, a.v[0]), vqtbl1q_u8(t, a.v[1])}};
}

#include "isa_unpack.h"

typedef int8x16_t x16;

INLINE x16 x16_of(const int8_t *q) { return vld1q_s8(q); }

/* Four activations, once for each of four rows. */
typedef int8x16_t x4;

INLINE x4 x4_of(const int8_t *q) {
    int32_t four;
    memcpy(&four, q, sizeof four);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
}

/* Sums in int32 of rows 4h .. 4h + 3, of fourfold codes apart. All codes are below 128, so that they
 * are signed bytes too. */
typedef struct {
    int32x4_t sum[2], fourfold[2];
} sums;

/* to + products of 16 codes with as many activations, of four alike rows. */
#if defined(EM_I8MM)
#define ADD(to, codes, acts) vusdotq_s32(to, codes, acts)
#define ADD_LANE(to, codes, acts, lane) vusdotq_laneq_s32(to, codes, acts, lane)
#elif defined(EM_DOTPROD)
#define ADD(to, codes, acts) vdotq_s32(to, vreinterpretq_s8_u8(codes), acts)
#define ADD_LANE(to, codes, acts, lane) vdotq_laneq_s32(to, vreinterpretq_s8_u8(codes), acts, lane)
#endif

/* to + v * x + w * y of four rows. */
INLINE int32x4_t add_two(int32x4_t to, uint8x16_t v, uint8x16_t w, x4 x, x4 y) {
#if defined(ADD)
    return ADD(ADD(to, v, x), w, y);
#else
    /* Two products of at most 63 * 127 fit in int16. */
    const int8x16_t a = vreinterpretq_s8_u8(v), b = vreinterpretq_s8_u8(w);
    const int16x8_t lo = vmlal_s8(vmull_s8(vget_low_s8(a), vget_low_s8(x)), vget_low_s8(b), vget_low_s8(y));
    const int16x8_t hi = vmlal_high_s8(vmull_high_s8(a, x), b, y);
    return vaddq_s32(to, vpaddq_s32(vpaddlq_s16(lo), vpaddlq_s16(hi)));
#endif
}

/* to + vectors `first` and `second` of codes times theirs of activations. */
#if defined(ADD)
#define ADD_TWO(to, first, second)                                                                           \
    ADD_LANE(ADD_LANE(to, v[first].v[h], *x, first), v[second].v[h], *x, second)
#else
#define ADD_TWO(to, first, second)                                                                           \
    add_two(to, v[first].v[h], v[second].v[h],                                                               \
            vreinterpretq_s8_s32(vdupq_laneq_s32(vreinterpretq_s32_s8(*x), first)),                          \
            vreinterpretq_s8_s32(vdupq_laneq_s32(vreinterpretq_s32_s8(*x), second)))
#endif

INLINE void sums_add(sums *s, int level, int half, const b32 v[4], const x16 *x) {
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
        if (!half) s->sum[h] = s->fourfold[h] = vdupq_n_s32(0);
        s->sum[h] = ADD_TWO(s->sum[h], 0, 2);
        if (level == 0) {
            s->fourfold[h] = ADD_TWO(s->fourfold[h], 1, 3);
        } else {
            s->sum[h] = ADD_TWO(s->sum[h], 1, 3);
        }
    }
}

INLINE void sums_two(sums *s, int level, int t, b32 v, b32 w, x4 x, x4 y) {
    (void)level;
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) s->sum[h] = add_two(t ? s->sum[h] : vdupq_n_s32(0), v.v[h], w.v[h], x, y);
}

INLINE i8x sums_done(const sums *top, const sums *low, int level) {
    int32x4_t d[2];
    for (int h = 0; h < 2; h++) {
        d[h] = top->sum[h];
        if (level == 0) d[h] = vsraq_n_s32(d[h], top->fourfold[h], 2);
        if (level == 1) d[h] = vshrq_n_s32(d[h], 1);
        if (level == 4) d[h] = vaddq_s32(vshlq_n_s32(d[h], 4), low->sum[h]);
    }
    return (i8x){d[0], d[1]};
}

/* v, which the compiler must take for a new value every time. */
INLINE int8x16_t renewed(int8x16_t v) {
    __asm__ volatile("" : "+w"(v));
    return v;
}

/* Sixteen sums, so that none waits for the one before. */
static uint32_t peak(int code, int activation, int rounds) {
#if defined(EM_I8MM)
    enum { PRODUCTS = 16 * 32 }; /* of a pass: a matrix product of 2 x 8 and 8 x 2 has 32 */
#else
    enum { PRODUCTS = 16 * 16 };
#endif
    int8x16_t c[4], q[4];
    int32x4_t sum[16];
    for (int i = 0; i < 16; i++) sum[i] = vdupq_n_s32(0);
    for (int i = 0; i < 4; i++) {
        c[i] = vdupq_n_s8((int8_t)code);
        q[i] = renewed(vdupq_n_s8((int8_t)activation));
    }
    for (int r = 0; r < rounds * (EM_PEAK_PRODUCTS / PRODUCTS); r++) {
        for (int i = 0; i < 4; i++) {
            const int8x16_t a = renewed(c[i]);
            int32x4_t *s = sum + 4 * i;
#if defined(EM_I8MM)
            for (int j = 0; j < 4; j++) s[j] = vusmmlaq_s32(s[j], vreinterpretq_u8_s8(a), q[j]);
#elif defined(EM_DOTPROD)
            for (int j = 0; j < 4; j++) s[j] = vdotq_s32(s[j], a, q[j]);
#else
            for (int j = 0; j < 4; j += 2) { /* two products of a nibble fit in int16 */
                const int16x8_t lo = vmull_s8(vget_low_s8(a), vget_low_s8(q[j]));
                const int16x8_t hi = vmull_high_s8(a, q[j]);
                s[j] = vpadalq_s16(s[j], vmlal_s8(lo, vget_low_s8(a), vget_low_s8(q[j + 1])));
                s[j + 1] = vpadalq_s16(s[j + 1], vmlal_high_s8(hi, a, q[j + 1]));
            }
#endif
        }
    }
    uint32_t total = 0;
    for (int i = 0; i < 16; i++) total += (uint32_t)vaddvq_s32(sum[i]);
    return total;
}

#define ISA_BODY
#include "isa_body.h"

const em_isa ISA_SYMBOL = EM_ISA_TABLE(ISA_NAME);

#endif
