/* GGML block formats to float32: a run of whole blocks a task.
 *
 * A block is codes of 2 to 8 bits and scales for its weights; where a byte holds fields of several
 * weights, these lie 16 or 32 apart. Fields are read byte by byte, so blocks may start anywhere. A
 * decoder first spreads the codes of 32 weights, a byte each, then scales them. The order of the
 * multiplications is part of a format: scale * sub-scale first, then times the code, then minus the
 * minimum. */
#include "clones.h"
#include "em_math.h"
#include "ops_common.h"

enum { SUPER = 256, ROW = 32, HALF_ROW = 16, SUPER_ROWS = SUPER / ROW };

/* Weights a task decodes: a multiple of every block, and small enough for the L2 cache. */
enum { TASK_WEIGHTS = 128 * SUPER };

#define DECODER(name) VECTOR_CLONES static void name(const uint8_t *b, size_t blocks, float *restrict y)

static inline float half_at(const uint8_t *p) {
    uint16_t half;
    memcpy(&half, p, sizeof half);
    return em_half_to_float(half);
}

/* y = d * (code - zero) */
static inline void scaled(const uint8_t *code, int n, int zero, float d, float *restrict y) {
    for (int i = 0; i < n; i++) y[i] = d * (float)(code[i] - zero);
}

/* y = d * code + m */
static inline void shifted(const uint8_t *code, int n, float d, float m, float *restrict y) {
    for (int i = 0; i < n; i++) y[i] = d * (float)code[i] + m;
}

/* The `bits`-wide field at bit `from` of 32 bytes. */
static inline void field(const uint8_t *q, int from, int bits, uint8_t *restrict code) {
    for (int i = 0; i < ROW; i++) code[i] = (uint8_t)(q[i] >> from & ((1 << bits) - 1));
}

/* Puts the `bits`-wide field at bit `from` of 32 bytes above the `to` bits that codes have. */
static inline void field_above(const uint8_t *q, int from, int bits, int to, uint8_t *restrict code) {
    for (int i = 0; i < ROW; i++) code[i] = (uint8_t)(code[i] | (q[i] >> from & ((1 << bits) - 1)) << to);
}

#define EVERY_BYTE UINT64_C(0x0101010101010101)

/* 16 bytes of two nibbles: the low ones are the first 16 codes. */
static inline void nibbles(const uint8_t *q, uint8_t *restrict code) {
    for (int i = 0; i < HALF_ROW; i += 8) {
        uint64_t eight;
        memcpy(&eight, q + i, sizeof eight);
        const uint64_t low = eight & 15 * EVERY_BYTE, high = eight >> 4 & 15 * EVERY_BYTE;
        memcpy(code + i, &low, sizeof low);
        memcpy(code + HALF_ROW + i, &high, sizeof high);
    }
}

/* Bit i of 4 bytes becomes bit 4 of code i. */
static inline void fifth_bits(const uint8_t *h, uint8_t *restrict code) {
    for (int i = 0; i < 4; i++) {
        uint64_t eight;
        memcpy(&eight, code + 8 * i, sizeof eight);
        const uint64_t own = h[i] * EVERY_BYTE & 0x8040201008040201u;
        eight |= (own + 0x7f * EVERY_BYTE) >> 3 & 0x10 * EVERY_BYTE;
        memcpy(code + 8 * i, &eight, sizeof eight);
    }
}

static void decode_f32(const uint8_t *b, size_t blocks, float *restrict y) {
    memcpy(y, b, blocks * sizeof *y);
}

DECODER(decode_f16) {
    for (size_t i = 0; i < blocks; i++) y[i] = half_at(b + 2 * i);
}

DECODER(decode_bf16) {
    for (size_t i = 0; i < blocks; i++) {
        uint16_t top;
        memcpy(&top, b + 2 * i, sizeof top);
        const uint32_t bits = (uint32_t)top << 16;
        memcpy(y + i, &bits, sizeof bits);
    }
}

/* Half scale, then 32 signed bytes. */
DECODER(decode_q8_0) {
    for (; blocks--; b += 34, y += ROW) {
        const float d = half_at(b);
        for (int i = 0; i < ROW; i++) y[i] = d * (float)(int8_t)b[2 + i];
    }
}

/* Half scale, then nibbles around 8. */
DECODER(decode_q4_0) {
    for (; blocks--; b += 18, y += ROW) {
        uint8_t code[ROW];
        nibbles(b + 2, code);
        scaled(code, ROW, 8, half_at(b), y);
    }
}

/* Half scale, half minimum, nibbles. */
DECODER(decode_q4_1) {
    for (; blocks--; b += 20, y += ROW) {
        uint8_t code[ROW];
        nibbles(b + 4, code);
        shifted(code, ROW, half_at(b), half_at(b + 2), y);
    }
}

/* Half scale, 4 bytes of fifth bits, nibbles; codes around 16. */
DECODER(decode_q5_0) {
    for (; blocks--; b += 22, y += ROW) {
        uint8_t code[ROW];
        nibbles(b + 6, code);
        fifth_bits(b + 2, code);
        scaled(code, ROW, 16, half_at(b), y);
    }
}

/* Half scale, half minimum, 4 bytes of fifth bits, nibbles. */
DECODER(decode_q5_1) {
    for (; blocks--; b += 24, y += ROW) {
        uint8_t code[ROW];
        nibbles(b + 8, code);
        fifth_bits(b + 4, code);
        shifted(code, ROW, half_at(b), half_at(b + 2), y);
    }
}

/* 32 nibbles that index 16 values, of which y gets d times each. */
static inline void looked_up(const uint8_t *q, const int8_t value[16], float d, float *restrict y) {
    float times[16];
    for (int k = 0; k < 16; k++) times[k] = d * (float)value[k];
    for (int i = 0; i < HALF_ROW; i++) {
        y[i] = times[q[i] & 15];
        y[HALF_ROW + i] = times[q[i] >> 4];
    }
}

/* Half scale, nibbles. */
DECODER(decode_iq4_nl) {
    static const int8_t value[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                     1,    13,   25,  38,  53,  69,  89,  113};
    for (; blocks--; b += 18, y += ROW) looked_up(b + 2, value, half_at(b), y);
}

/* Exponent byte e, nibbles: the scale is 2^(e - 127), halved because the values are twice those of
 * the 4-bit floats (sign, 2 bits of exponent, 1 of mantissa). */
DECODER(decode_mxfp4) {
    static const int8_t value[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
    for (; blocks--; b += 17, y += ROW) {
        const uint32_t bits = b[0] < 2 ? 0x00200000u << b[0] : (b[0] - 1u) << 23;
        float d;
        memcpy(&d, &bits, sizeof d);
        looked_up(b + 1, value, d, y);
    }
}

/* Scales and minima of 16 weights as nibbles of 16 bytes, 64 bytes of 2-bit codes, half scale, half
 * minimum. */
DECODER(decode_q2_k) {
    for (; blocks--; b += 84) {
        const float d = half_at(b + 80), m = half_at(b + 82);
        float scale[2 * SUPER_ROWS], minimum[2 * SUPER_ROWS];
        for (int k = 0; k < 2 * SUPER_ROWS; k++) {
            scale[k] = d * (float)(b[k] & 15);
            minimum[k] = m * (float)(b[k] >> 4);
        }
        for (int r = 0; r < SUPER_ROWS; r++, y += ROW) {
            uint8_t code[ROW];
            field(b + 16 + ROW * (r / 4), 2 * (r % 4), 2, code);
            shifted(code, HALF_ROW, scale[2 * r], -minimum[2 * r], y);
            shifted(code + HALF_ROW, HALF_ROW, scale[2 * r + 1], -minimum[2 * r + 1], y + HALF_ROW);
        }
    }
}

/* 32 bytes of third bits, 64 bytes of 2-bit codes, 12 bytes of 6-bit scales of 16 weights (8 bytes of
 * their low nibbles, 4 of their top bits), half scale; codes around 4, scales around 32. */
DECODER(decode_q3_k) {
    for (; blocks--; b += 110) {
        const float d = half_at(b + 108);
        const uint8_t *low = b + 96, *top = b + 104;
        float scale[2 * SUPER_ROWS];
        for (int k = 0; k < 2 * SUPER_ROWS; k++) {
            const int nibble = low[k % 8] >> 4 * (k / 8) & 15, above = top[k % 4] >> 2 * (k / 4) & 3;
            scale[k] = d * (float)((nibble | above << 4) - 32);
        }
        for (int r = 0; r < SUPER_ROWS; r++, y += ROW) {
            uint8_t code[ROW];
            field(b + 32 + ROW * (r / 4), 2 * (r % 4), 2, code);
            field_above(b, r, 1, 2, code);
            scaled(code, HALF_ROW, 4, scale[2 * r], y);
            scaled(code + HALF_ROW, HALF_ROW, 4, scale[2 * r + 1], y + HALF_ROW);
        }
    }
}

/* Head of Q4_K and Q5_K: half scale, half minimum, 12 bytes with a 6-bit scale and a 6-bit minimum
 * for each of 8 rows: those of the first four rows whole, of the others the top two bits above these
 * and the low nibbles together in the last four bytes. */
static inline void row_scales(const uint8_t *b, float scale[SUPER_ROWS], float minimum[SUPER_ROWS]) {
    const float d = half_at(b), m = half_at(b + 2);
    const uint8_t *s = b + 4, *t = b + 8, *both = b + 12;
    for (int r = 0; r < 4; r++) {
        scale[r] = d * (float)(s[r] & 63);
        minimum[r] = m * (float)(t[r] & 63);
        scale[4 + r] = d * (float)((both[r] & 15) | (s[r] >> 6) << 4);
        minimum[4 + r] = m * (float)(both[r] >> 4 | (t[r] >> 6) << 4);
    }
}

/* Head, 128 bytes of nibbles. */
DECODER(decode_q4_k) {
    for (; blocks--; b += 144) {
        float scale[SUPER_ROWS], minimum[SUPER_ROWS];
        row_scales(b, scale, minimum);
        for (int r = 0; r < SUPER_ROWS; r++, y += ROW) {
            uint8_t code[ROW];
            field(b + 16 + ROW * (r / 2), 4 * (r % 2), 4, code);
            shifted(code, ROW, scale[r], -minimum[r], y);
        }
    }
}

/* Head, 32 bytes of fifth bits, 128 bytes of nibbles. */
DECODER(decode_q5_k) {
    for (; blocks--; b += 176) {
        float scale[SUPER_ROWS], minimum[SUPER_ROWS];
        row_scales(b, scale, minimum);
        for (int r = 0; r < SUPER_ROWS; r++, y += ROW) {
            uint8_t code[ROW];
            field(b + 48 + ROW * (r / 2), 4 * (r % 2), 4, code);
            field_above(b + 16, r, 1, 4, code);
            shifted(code, ROW, scale[r], -minimum[r], y);
        }
    }
}

/* 128 bytes of nibbles, 64 of the two bits above them, signed scales of 16 weights, half scale; codes
 * around 32. */
DECODER(decode_q6_k) {
    for (; blocks--; b += 210) {
        const float d = half_at(b + 208);
        float scale[2 * SUPER_ROWS];
        for (int k = 0; k < 2 * SUPER_ROWS; k++) scale[k] = d * (float)(int8_t)b[192 + k];
        for (int r = 0; r < SUPER_ROWS; r++, y += ROW) {
            const int half = r / 4, quarter = r % 4;
            uint8_t code[ROW];
            field(b + 64 * half + ROW * (quarter % 2), 4 * (quarter / 2), 4, code);
            field_above(b + 128 + ROW * half, 2 * quarter, 2, 4, code);
            scaled(code, HALF_ROW, 32, scale[2 * r], y);
            scaled(code + HALF_ROW, HALF_ROW, 32, scale[2 * r + 1], y + HALF_ROW);
        }
    }
}

static const em_ggml_type types[] = {
    {"F32", 1, 4, decode_f32},       {"F16", 1, 2, decode_f16},         {"BF16", 1, 2, decode_bf16},
    {"Q8_0", 32, 34, decode_q8_0},   {"Q6_K", 256, 210, decode_q6_k},   {"Q5_K", 256, 176, decode_q5_k},
    {"Q4_K", 256, 144, decode_q4_k}, {"Q3_K", 256, 110, decode_q3_k},   {"Q2_K", 256, 84, decode_q2_k},
    {"Q4_0", 32, 18, decode_q4_0},   {"Q4_1", 32, 20, decode_q4_1},     {"Q5_0", 32, 22, decode_q5_0},
    {"Q5_1", 32, 24, decode_q5_1},   {"IQ4_NL", 32, 18, decode_iq4_nl}, {"MXFP4", 32, 17, decode_mxfp4},
};

int em_ggml_count(void) { return (int)(sizeof types / sizeof types[0]); }

const em_ggml_type *em_ggml_at(int i) { return &types[i]; }

const em_ggml_type *em_ggml_find(const char *name) {
    for (int i = 0; i < em_ggml_count(); i++)
        if (strcmp(types[i].name, name) == 0) return &types[i];
    return NULL;
}

typedef struct {
    const em_ggml_type *type;
    const uint8_t *data;
    size_t blocks;
    float *out;
} dequantize_ctx;

static void dequantize_task(void *raw, int task, int worker) {
    (void)worker;
    const dequantize_ctx *c = raw;
    const size_t most = TASK_WEIGHTS / (size_t)c->type->weights, first = (size_t)task * most;
    const size_t left = c->blocks - first;
    c->type->decode(c->data + first * (size_t)c->type->bytes, left < most ? left : most,
                    c->out + first * (size_t)c->type->weights);
}

void em_dequantize(em_pool *p, const em_ggml_type *type, const uint8_t *data, size_t blocks, float *out) {
    const size_t most = TASK_WEIGHTS / (size_t)type->weights;
    dequantize_ctx c = {type, data, blocks, out};
    em_pool_lock(p);
    em_pool_run(p, dequantize_task, &c, (int)((blocks + most - 1) / most));
    em_pool_unlock(p);
}
