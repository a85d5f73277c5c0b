/* Plain C bodies: what every other instruction set must equal bit for bit. */
#include "edgemoe.h"
#include "em_math.h"

static int supported(void) { return 1; }

static void quantize(const float *x, int cols, const em_acts *a, int token) {
    for (int g = 0; g < a->groups; g++) a->gx[(size_t)g * (size_t)a->tokens + (size_t)token] = 0.0f;
    for (int u = 0; u < a->units; u++) {
        const int first = u * EM_UNIT;
        const int n = cols - first < EM_UNIT ? cols - first : EM_UNIT;
        float amax = 0.0f;
        for (int i = 0; i < n; i++) {
            const float v = fabsf(x[first + i]);
            amax = v > amax ? v : amax;
        }
        const float inverse = amax >= EM_SMALLEST_PEAK ? 127.0f / amax : 0.0f;
        const size_t at = em_acts_unit(a, (size_t)token, u);
        int32_t sum = 0;
        for (int i = 0; i < EM_UNIT; i++) {
            const int32_t v = i < n ? (int32_t)rintf(x[first + i] * inverse) : 0;
            a->q[at * EM_UNIT + (size_t)i] = (int8_t)v;
            sum += v;
        }
        a->scale[at] = amax / 127.0f;
        a->gx[(size_t)(u / a->group_units) * (size_t)a->tokens + (size_t)token] += a->scale[at] * (float)sum;
    }
}

/* Codes of one unit of a row block as they lie in the planes: code[t][4 * r + j] is row r, column
 * 4 * t + j. */
typedef uint8_t unit_codes[8][4 * EM_ROW_BLOCK];

static void unpack_unit(const em_matrix *w, int rb, int u, unit_codes code) {
    static const int bits[EM_LEVELS] = {2, 1, 1, 2, 2};
    const size_t at = (size_t)rb * (size_t)w->units + (size_t)u;
    memset(code, 0, sizeof(unit_codes));
    for (int s = 0; s <= w->level; s++) {
        const int width = bits[s], per_vector = 8 / width, mask = (1 << width) - 1;
        const uint8_t *p = w->plane[s] + at * 32 * (size_t)width;
        for (int t = 0; t < 8; t++) {
            const uint8_t *v = p + 32 * (t / per_vector);
            const int shift = width * (t % per_vector);
            for (int b = 0; b < 32; b++) code[t][b] = (uint8_t)(code[t][b] << width | (v[b] >> shift & mask));
        }
    }
}

/* Dots of the 8 rows with 32 activations, in a form that compilers turn into vectors. */
static void dot_unit(unit_codes code, const int8_t *q, int32_t dots[EM_ROW_BLOCK]) {
    /* Eight products of a nibble and 127 fit in int16, of a whole code they would not. */
    int16_t lane[2][4 * EM_ROW_BLOCK] = {{0}};
    int32_t sum[4 * EM_ROW_BLOCK] = {0};
    for (int t = 0; t < 8; t++) {
        int8_t four[4 * EM_ROW_BLOCK];
        for (int r = 0; r < EM_ROW_BLOCK; r++) memcpy(four + 4 * r, q + 4 * t, 4);
        for (int b = 0; b < 4 * EM_ROW_BLOCK; b++) {
            lane[0][b] = (int16_t)(lane[0][b] + (code[t][b] & 15) * four[b]);
            lane[1][b] = (int16_t)(lane[1][b] + (code[t][b] >> 4) * four[b]);
        }
    }
    for (int b = 0; b < 4 * EM_ROW_BLOCK; b++) sum[b] = lane[0][b] + 16 * lane[1][b];
    for (int r = 0; r < EM_ROW_BLOCK; r++)
        dots[r] = sum[4 * r] + sum[4 * r + 1] + sum[4 * r + 2] + sum[4 * r + 3];
}

/* Scale and offset of the 8 rows of a block in one group. */
static void group_scales(const em_matrix *w, int rb, int g, float s[EM_ROW_BLOCK], float o[EM_ROW_BLOCK]) {
    const int bits = em_level_bits(w->level);
    const size_t row = (size_t)rb * EM_ROW_BLOCK;
    const uint8_t *steps = w->step + (row * (size_t)w->groups + (size_t)g * EM_ROW_BLOCK) * 2;
    const uint8_t *shifts = w->shift ? w->shift + ((size_t)rb * (size_t)w->groups + (size_t)g) * 4 : NULL;
    for (int r = 0; r < EM_ROW_BLOCK; r++) {
        const float step = em_step(w->exponent[row + (size_t)r], steps[r]);
        s[r] = step * em_cell(bits);
        o[r] = step * ((em_first_centre(bits) - (float)steps[EM_ROW_BLOCK + r]) + em_shift(shifts, r, bits));
    }
}

/* Tokens that share one unpacking; bounds the accumulators kept on the stack. */
enum { TILE = 64 };

static void matmul(const em_matrix *w, int rb0, int rb1, const em_acts *a, const int32_t *idx, int n,
                   float *out, size_t ld) {
    for (int first = 0; first < n; first += TILE) {
        const int tile = n - first < TILE ? n - first : TILE;
        for (int rb = rb0; rb < rb1; rb++) {
            float y[TILE][EM_ROW_BLOCK] = {{0}};
            for (int g = 0; g < w->groups; g++) {
                const int u0 = g * w->group_units;
                const int u1 = u0 + w->group_units < w->units ? u0 + w->group_units : w->units;
                unit_codes code[EM_MAX_GROUP_UNITS];
                float s[EM_ROW_BLOCK], o[EM_ROW_BLOCK];
                for (int u = u0; u < u1; u++) unpack_unit(w, rb, u, code[u - u0]);
                group_scales(w, rb, g, s, o);
                for (int i = 0; i < tile; i++) {
                    const size_t row = (size_t)(idx ? idx[first + i] : first + i);
                    const float gx = a->gx[(size_t)g * (size_t)a->tokens + row];
                    float t[EM_ROW_BLOCK] = {0};
                    for (int u = u0; u < u1; u++) {
                        const size_t at = em_acts_unit(a, row, u);
                        int32_t dots[EM_ROW_BLOCK];
                        dot_unit(code[u - u0], a->q + at * EM_UNIT, dots);
                        for (int r = 0; r < EM_ROW_BLOCK; r++) t[r] += a->scale[at] * (float)dots[r];
                    }
                    for (int r = 0; r < EM_ROW_BLOCK; r++) y[i][r] = (y[i][r] + s[r] * t[r]) + o[r] * gx;
                }
            }
            const int live =
                w->rows - rb * EM_ROW_BLOCK < EM_ROW_BLOCK ? w->rows - rb * EM_ROW_BLOCK : EM_ROW_BLOCK;
            for (int i = 0; i < tile; i++)
                memcpy(out + (size_t)(first + i) * ld + (size_t)(rb - rb0) * EM_ROW_BLOCK, y[i],
                       (size_t)live * sizeof(float));
        }
    }
}

static void accumulate(const em_matrix *w, int rb0, int rb1, const em_acts *a, int n, int32_t *out) {
    const size_t rows = (size_t)(w->rows + EM_ROW_BLOCK - 1) / EM_ROW_BLOCK * EM_ROW_BLOCK;
    for (int rb = rb0; rb < rb1; rb++) {
        for (int u = 0; u < w->units; u++) {
            unit_codes code;
            unpack_unit(w, rb, u, code);
            for (int i = 0; i < n; i++) {
                int32_t dots[EM_ROW_BLOCK];
                dot_unit(code, a->q + em_acts_unit(a, (size_t)i, u) * EM_UNIT, dots);
                for (int r = 0; r < EM_ROW_BLOCK; r++)
                    out[((size_t)i * rows + (size_t)(rb * EM_ROW_BLOCK + r)) * (size_t)w->units + (size_t)u] =
                        dots[r];
            }
        }
    }
}

static float dot(const float *a, const float *b, int n) {
    float lane[16] = {0};
    int i = 0;
    for (; i + 16 <= n; i += 16)
        for (int l = 0; l < 16; l++) lane[l] += a[i + l] * b[i + l];
    if (i < n)
        for (int l = 0; l < 16; l++) lane[l] += i + l < n ? a[i + l] * b[i + l] : 0.0f;
    return em_tree16(lane);
}

static void scale_mul(const float *x, float r, const float *w, int n, float *y) {
    for (int i = 0; i < n; i++) y[i] = (x[i] * r) * w[i];
}

static void silu_mul(float *g, const float *u, int n) {
    for (int i = 0; i < n; i++) g[i] = g[i] / (1.0f + em_expf(-g[i])) * u[i];
}

static float element(int type, const uint8_t *b, size_t at) {
    if (type == EM_KV_I8) return (float)(int8_t)b[at];
    if (type == EM_KV_F16) {
        uint16_t half;
        memcpy(&half, b + 2 * at, sizeof half);
        return em_half_to_float(half);
    }
    float x;
    memcpy(&x, b + 4 * at, sizeof x);
    return x;
}

static void panels(int type, const float *a, size_t lda, int rows, const uint8_t *b, size_t stride, int depth,
                   int count, float *c, size_t ldc) {
    for (int p = 0; p < count; p++)
        for (int k = 0; k < depth; k++) {
            float x[EM_KV_PANEL];
            const size_t at = (size_t)p * stride + (size_t)k * EM_KV_PANEL;
            for (int l = 0; l < EM_KV_PANEL; l++) x[l] = element(type, b, at + (size_t)l);
            for (int r = 0; r < rows; r++) {
                const float w = a[(size_t)r * lda + (size_t)k];
                float *to = c + (size_t)r * ldc + (size_t)p * EM_KV_PANEL;
                for (int l = 0; l < EM_KV_PANEL; l++) to[l] += w * x[l];
            }
        }
}

static float soften(float *s, const float *key_scale, const float *value_scale, float scale, int first,
                    int last, float *top) {
    float lane[16] = {0};
    for (int j = first; j < last; j++) {
        s[j] = s[j] * scale;
        if (key_scale) s[j] = s[j] * key_scale[j];
        *top = s[j] > *top ? s[j] : *top;
    }
    for (int j = 0; j < EM_KV_BLOCK; j++) {
        s[j] = first <= j && j < last ? em_expf(s[j] - *top) : 0.0f;
        lane[j % 16] += s[j];
        if (value_scale) s[j] = s[j] * value_scale[j];
    }
    return em_tree16(lane);
}

static void to_half(const float *x, uint16_t *h) {
    for (int i = 0; i < EM_KV_PANEL; i++) h[i] = em_float_to_half(x[i]);
}

/* Lanes as in dot_unit. */
static uint32_t peak(int code, int activation, int rounds) {
    enum { LANES = 4 * EM_ROW_BLOCK };
    uint8_t c[4][LANES];
    int8_t q[4][LANES];
    uint32_t sum[LANES] = {0}, total = 0;
    memset(c, code, sizeof c);
    memset(q, activation, sizeof q);
    for (int r = 0; r < rounds; r++) {
        __asm__ volatile("" : : "r"(c), "r"(q) : "memory"); /* new ones, for all the compiler knows */
        for (int i = 0; i < 4; i += 2) {
            int16_t lane[LANES] = {0};
            for (int j = 0; j < 4; j++)
                for (int b = 0; b < LANES; b++)
                    lane[b] = (int16_t)(lane[b] + c[i][b] * q[j][b] + c[i + 1][b] * q[j][b]);
            for (int b = 0; b < LANES; b++) sum[b] += (uint32_t)lane[b];
        }
    }
    for (int b = 0; b < LANES; b++) total += sum[b];
    return total;
}

const em_isa em_isa_scalar = {"scalar",  supported, quantize, matmul, accumulate, dot,
                              scale_mul, silu_mul,  panels,   soften, to_half,    peak};
