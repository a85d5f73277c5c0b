/* The vector bodies of attention, part of isa_body.h. Sixteen columns, a panel, make two f8. */

/* Rows of a panel that are kept as float32 for more rows of a: 16 KiB, half of the smallest L1. */
enum { WIDE_ROWS = 256 };

/* How far ahead of its use a panel is asked for: about what memory sends while it is awaited. */
enum { AHEAD = 2048 };

INLINE f8 kv_load(int type, const uint8_t *b, size_t at) {
    if (type == EM_KV_F32) return f8_load((const float *)b + at);
    if (type == EM_KV_F16) return f8_halves(b + 2 * at);
    return f8_signed((const int8_t *)b + at);
}

INLINE size_t kv_size(int type) { return type == EM_KV_F32 ? 4 : type == EM_KV_F16 ? 2 : 1; }

/* c [rows, 16] += a [rows, depth] . b [depth, 16]; `rows` is a constant, at most 4. The panel as
 * float32 goes to `wide`, if any. */
INLINE void panel_rows(int type, int rows, const float *a, size_t lda, const uint8_t *b, int depth, float *c,
                       size_t ldc, float *wide) {
    f8 lo[4], hi[4];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        lo[r] = f8_load(c + (size_t)r * ldc);
        hi[r] = f8_load(c + (size_t)r * ldc + 8);
    }
    for (int k = 0; k < depth; k++) {
        const size_t at = (size_t)k * EM_KV_PANEL;
        const f8 x = kv_load(type, b, at), y = kv_load(type, b, at + 8);
        if (type != EM_KV_F32) __builtin_prefetch(b + at * kv_size(type) + AHEAD);
        if (wide) {
            f8_store(wide + at, x);
            f8_store(wide + at + 8, y);
        }
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            const f8 w = f8_set1(a[(size_t)r * lda + (size_t)k]);
            lo[r] = f8_add(lo[r], f8_mul(w, x));
            hi[r] = f8_add(hi[r], f8_mul(w, y));
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        f8_store(c + (size_t)r * ldc, lo[r]);
        f8_store(c + (size_t)r * ldc + 8, hi[r]);
    }
}

INLINE void rows_from(int type, int r, const float *a, size_t lda, int rows, const uint8_t *b, int depth,
                      float *c, size_t ldc) {
    for (; r + 4 <= rows; r += 4)
        panel_rows(type, 4, a + (size_t)r * lda, lda, b, depth, c + (size_t)r * ldc, ldc, NULL);
    if (r + 2 <= rows) {
        panel_rows(type, 2, a + (size_t)r * lda, lda, b, depth, c + (size_t)r * ldc, ldc, NULL);
        r += 2;
    }
    if (r < rows) panel_rows(type, 1, a + (size_t)r * lda, lda, b, depth, c + (size_t)r * ldc, ldc, NULL);
}

INLINE void panels_of(int type, const float *a, size_t lda, int rows, const uint8_t *b, size_t stride,
                      int depth, int count, float *c, size_t ldc) {
    _Alignas(64) float wide[WIDE_ROWS * EM_KV_PANEL];
    for (int p = 0; p < count; p++, b += stride * kv_size(type), c += EM_KV_PANEL) {
        if (type == EM_KV_F32 || rows <= 4 || depth > WIDE_ROWS) {
            rows_from(type, 0, a, lda, rows, b, depth, c, ldc);
        } else {
            panel_rows(type, 4, a, lda, b, depth, c, ldc, wide);
            rows_from(EM_KV_F32, 4, a, lda, rows, (const uint8_t *)wide, depth, c, ldc);
        }
    }
}

static void panels(int type, const float *a, size_t lda, int rows, const uint8_t *b, size_t stride, int depth,
                   int count, float *c, size_t ldc) {
    switch (type) {
    case EM_KV_F32: panels_of(EM_KV_F32, a, lda, rows, b, stride, depth, count, c, ldc); break;
    case EM_KV_F16: panels_of(EM_KV_F16, a, lda, rows, b, stride, depth, count, c, ldc); break;
    default: panels_of(EM_KV_I8, a, lda, rows, b, stride, depth, count, c, ldc); break;
    }
}

static float soften(float *s, const float *key_scale, const float *value_scale, float scale, int first,
                    int last, float *top) {
    float most = *top;
    f8 peak = f8_set1(most);
    for (int j = 0; j < EM_KV_BLOCK; j += 8) {
        f8 x = f8_mul(f8_load(s + j), f8_set1(scale));
        if (key_scale) x = f8_mul(x, f8_load(key_scale + j));
        f8_store(s + j, x);
        peak = f8_max(peak, x);
    }
    if (last - first == EM_KV_BLOCK) {
        most = f8_peak(peak);
    } else { /* what lies outside is anything */
        for (int j = first; j < last; j++) most = s[j] > most ? s[j] : most;
    }
    *top = most;
    for (int j = 0; j < EM_KV_BLOCK; j += 8) f8_store(s + j, exp8(f8_sub(f8_load(s + j), f8_set1(most))));
    for (int j = 0; j < first; j++) s[j] = 0.0f;
    for (int j = last; j < EM_KV_BLOCK; j++) s[j] = 0.0f;
    f8 lo = f8_zero(), hi = f8_zero();
    for (int j = 0; j < EM_KV_BLOCK; j += 16) {
        lo = f8_add(lo, f8_load(s + j));
        hi = f8_add(hi, f8_load(s + j + 8));
    }
    if (value_scale)
        for (int j = 0; j < EM_KV_BLOCK; j += 8)
            f8_store(s + j, f8_mul(f8_load(s + j), f8_load(value_scale + j)));
    return f8_tree(lo, hi);
}

static void to_half(const float *x, uint16_t *h) {
    const f8 most = f8_set1(EM_HALF_MAX), least = f8_set1(-EM_HALF_MAX);
    for (int i = 0; i < EM_KV_PANEL; i += 8)
        f8_store_halves(h + i, f8_above(f8_below(f8_load(x + i), least, least), most, most));
}
