/* Plain C bodies: what every other instruction set must equal bit for bit. */
#include "edgemoe.h"
#include "em_math.h"

static int supported(void) { return 1; }

static void quantize(const float *x, int cols, const em_acts *a, int row) {
    int8_t *q = a->q + (size_t)row * a->units * EM_UNIT;
    float *scale = a->scale + (size_t)row * a->units;
    float *gx = a->gx + (size_t)row * a->groups;
    for (int g = 0; g < a->groups; g++) gx[g] = 0.0f;
    for (int u = 0; u < a->units; u++) {
        const int first = u * EM_UNIT;
        const int n = cols - first < EM_UNIT ? cols - first : EM_UNIT;
        float amax = 0.0f;
        for (int i = 0; i < n; i++) {
            const float v = fabsf(x[first + i]);
            amax = v > amax ? v : amax;
        }
        const float inverse = amax > 0.0f ? 127.0f / amax : 0.0f;
        int32_t sum = 0;
        for (int i = 0; i < EM_UNIT; i++) {
            const int32_t v = i < n ? (int32_t)rintf(x[first + i] * inverse) : 0;
            q[first + i] = (int8_t)v;
            sum += v;
        }
        scale[u] = amax / 127.0f;
        gx[u / a->group_units] += scale[u] * (float)sum;
    }
}

/* Codes of 8 rows x 32 columns at the matrix's level. */
static void unit_codes(const em_matrix *w, int rb, int u, uint8_t code[EM_ROW_BLOCK][EM_UNIT]) {
    static const int bits[EM_LEVELS] = {2, 1, 1, 2, 2};
    const size_t at = (size_t)rb * (size_t)w->units + (size_t)u;
    for (int r = 0; r < EM_ROW_BLOCK; r++)
        for (int c = 0; c < EM_UNIT; c++) code[r][c] = 0;
    for (int s = 0; s <= w->level; s++) {
        const uint8_t *p = w->plane[s] + at * 32 * (size_t)bits[s];
        for (int r = 0; r < EM_ROW_BLOCK; r++) {
            for (int c = 0; c < EM_UNIT; c++) {
                const int t = c / 4, j = c % 4;
                const int add = bits[s] == 1 ? p[4 * r + j] >> t & 1
                                             : p[32 * (t / 4) + 4 * r + j] >> (2 * (t % 4)) & 3;
                code[r][c] = (uint8_t)(code[r][c] << bits[s] | add);
            }
        }
    }
}

static inline int32_t dot_codes(const uint8_t *code, const int8_t *q) {
    int32_t sum = 0;
    for (int c = 0; c < EM_UNIT; c++) sum += (int32_t)code[c] * (int32_t)q[c];
    return sum;
}

/* Scale and offset of the 8 rows of a block in one group. */
static void group_scales(const em_matrix *w, int rb, int g, float s[EM_ROW_BLOCK], float o[EM_ROW_BLOCK]) {
    float multiplier;
    memcpy(&multiplier, w->scale, sizeof multiplier);
    uint16_t half[2 * EM_ROW_BLOCK];
    memcpy(half, w->scale + EM_SCALE_HEAD + ((size_t)rb * (size_t)w->groups + (size_t)g) * sizeof half,
           sizeof half);
    for (int r = 0; r < EM_ROW_BLOCK; r++) {
        s[r] = em_half_to_float(half[r]) * multiplier;
        o[r] = em_half_to_float(half[EM_ROW_BLOCK + r]) * multiplier;
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
                uint8_t code[EM_MAX_GROUP_UNITS][EM_ROW_BLOCK][EM_UNIT];
                float s[EM_ROW_BLOCK], o[EM_ROW_BLOCK];
                for (int u = u0; u < u1; u++) unit_codes(w, rb, u, code[u - u0]);
                group_scales(w, rb, g, s, o);
                for (int i = 0; i < tile; i++) {
                    const size_t row = (size_t)(idx ? idx[first + i] : first + i);
                    const int8_t *q = a->q + row * (size_t)a->units * EM_UNIT;
                    const float *xs = a->scale + row * (size_t)a->units;
                    const float gx = a->gx[row * (size_t)a->groups + (size_t)g];
                    for (int r = 0; r < EM_ROW_BLOCK; r++) {
                        float t = 0.0f;
                        for (int u = u0; u < u1; u++)
                            t += xs[u] * (float)dot_codes(code[u - u0][r], q + u * EM_UNIT);
                        y[i][r] = (y[i][r] + s[r] * t) + o[r] * gx;
                    }
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
            uint8_t code[EM_ROW_BLOCK][EM_UNIT];
            unit_codes(w, rb, u, code);
            for (int i = 0; i < n; i++)
                for (int r = 0; r < EM_ROW_BLOCK; r++)
                    out[((size_t)i * rows + (size_t)(rb * EM_ROW_BLOCK + r)) * (size_t)w->units + (size_t)u] =
                        dot_codes(code[r], a->q + ((size_t)i * (size_t)a->units + (size_t)u) * EM_UNIT);
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

static float exp_sum(float *x, float m, int n) {
    float lane[16] = {0};
    for (int i = 0; i < n; i += 16)
        for (int l = 0; l < 16; l++) {
            if (i + l < n) {
                x[i + l] = em_expf(x[i + l] - m);
                lane[l] += x[i + l];
            } else {
                lane[l] += 0.0f;
            }
        }
    return em_tree16(lane);
}

static void weighted_sum(const float *p, const float *v, int n, int d, float sum, float *out) {
    for (int c = 0; c < d; c++) {
        float acc = 0.0f;
        for (int j = 0; j < n; j++) acc += p[j] * v[(size_t)j * (size_t)d + (size_t)c];
        out[c] = acc / sum;
    }
}

const em_isa em_isa_scalar = {"scalar",  supported, quantize, matmul,  accumulate,
                              dot,       scale_mul, silu_mul, exp_sum, weighted_sum};
