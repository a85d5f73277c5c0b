/* The KV cache: how keys and values lie in memory, and how they get there. */
#include <math.h>
#include <string.h>

#include "em_math.h"
#include "ops_common.h"

static size_t element_bytes(int type) { return type == EM_KV_F32 ? 4 : type == EM_KV_F16 ? 2 : 1; }

static size_t padded(int d) { return (size_t)em_ceil_div(d, EM_KV_PANEL) * EM_KV_PANEL; }

size_t em_kv_block_bytes(int type, int d) {
    const size_t scales = type == EM_KV_I8 ? 2 * EM_KV_BLOCK * sizeof(float) : 0;
    return EM_KV_BLOCK * ((size_t)d + padded(d)) * element_bytes(type) + scales;
}

typedef struct {
    const em_isa *isa;
    const em_kv *kv;
    const float *k, *v;
    int n, start, first_block;
} write_ctx;

static float row_scale(const float *x, int d) {
    float most = 0.0f;
    for (int c = 0; c < d; c++) most = fabsf(x[c]) > most ? fabsf(x[c]) : most;
    return most / 127.0f;
}

/* 16 columns of a row, zeros beyond d, as elements of the type. */
static void convert(const em_isa *isa, int type, const float *x, int left, float scale, uint8_t *to) {
    float in[EM_KV_PANEL] = {0};
    memcpy(in, x, (size_t)(left < EM_KV_PANEL ? left : EM_KV_PANEL) * sizeof(float));
    if (type == EM_KV_F32) {
        memcpy(to, in, sizeof in);
    } else if (type == EM_KV_F16) {
        uint16_t half[EM_KV_PANEL];
        isa->to_half(in, half);
        memcpy(to, half, sizeof half);
    } else {
        for (int l = 0; l < EM_KV_PANEL; l++) {
            float code = scale > 0.0f ? in[l] / scale : 0.0f;
            /* a subnormal scale is coarse; NaN fails the first comparison */
            code = code > -127.0f ? code : -127.0f;
            code = code < 127.0f ? code : 127.0f;
            to[l] = (uint8_t)(int8_t)em_round(code);
        }
    }
}

static void write_position(const write_ctx *c, uint8_t *block, int j, const float *k, const float *v) {
    const int type = c->kv->type, d = c->kv->d;
    const size_t size = element_bytes(type), values = (size_t)d * EM_KV_BLOCK * size;
    float scale[2] = {0};
    if (type == EM_KV_I8) {
        float *scales = (float *)(void *)(block + values + padded(d) * EM_KV_BLOCK * size);
        scale[0] = scales[j] = row_scale(k, d);
        scale[1] = scales[EM_KV_BLOCK + j] = row_scale(v, d);
    }
    uint8_t *key = block + ((size_t)(j / EM_KV_PANEL * d) * EM_KV_PANEL + (size_t)(j % EM_KV_PANEL)) * size;
    uint8_t *value = block + values + (size_t)j * EM_KV_PANEL * size;
    for (int at = 0; at < d; at += EM_KV_PANEL) {
        uint8_t part[EM_KV_PANEL * sizeof(float)];
        convert(c->isa, type, k + at, d - at, scale[0], part);
        for (int l = 0; l < EM_KV_PANEL && at + l < d; l++)
            memcpy(key + (size_t)(at + l) * EM_KV_PANEL * size, part + (size_t)l * size, size);
        convert(c->isa, type, v + at, d - at, scale[1], value + (size_t)at * EM_KV_BLOCK * size);
    }
}

static void write_task(void *raw, int task, int worker) {
    (void)worker;
    const write_ctx *c = raw;
    const em_kv *kv = c->kv;
    const int head = task % kv->heads, block = c->first_block + task / kv->heads;
    const size_t at = (size_t)head * (size_t)kv->blocks + (size_t)block;
    const int base = block * EM_KV_BLOCK;
    const int first = c->start > base ? c->start : base;
    const int end = c->start + c->n < base + EM_KV_BLOCK ? c->start + c->n : base + EM_KV_BLOCK;
    for (int j = first; j < end; j++) {
        const size_t row = ((size_t)(j - c->start) * (size_t)kv->heads + (size_t)head) * (size_t)kv->d;
        write_position(c, kv->data + at * em_kv_block_bytes(kv->type, kv->d), j - base, c->k + row,
                       c->v + row);
    }
}

void em_kv_write(em_pool *p, const em_kv *kv, const float *k, const float *v, int n, int start) {
    const int first = start / EM_KV_BLOCK, end = em_ceil_div(start + n, EM_KV_BLOCK);
    write_ctx c = {em_isa_current(), kv, k, v, n, start, first};
    em_pool_lock(p);
    if ((size_t)n * (size_t)(kv->heads * kv->d) < EM_LITTLE / 8) { /* each column goes to a line of its own */
        for (int i = 0; i < (end - first) * kv->heads; i++) write_task(&c, i, 0);
    } else {
        em_pool_run(p, write_task, &c, (end - first) * kv->heads);
    }
    em_pool_unlock(p);
}
