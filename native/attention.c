/* Causal attention over the KV cache; edgemoe.h states the arithmetic.
 *
 * A unit is a tile of tokens at one KV head: its rows, the query heads of that head's group at each
 * token, share every block of keys and values that is read. Where there are many units a task walks
 * the splits of one (walk_task). Where there are few, as in decoding, a task is one split of a unit
 * (split_task), and the splits are merged afterwards: a long context keeps all threads busy. */
#include <float.h>
#include <string.h>

#include "em_math.h"
#include "ops_common.h"

enum {
    TILE_ROWS = 64,      /* rows of a tile: what makes a widened block pay */
    BALANCED = 64,       /* units a thread that need no splitting */
    ENOUGH = 4,          /* tasks a thread that can be balanced at all */
    PART_BYTES = 1 << 20 /* of the parts that wait to be merged, at most, if a thread gets ENOUGH */
};

typedef struct {
    const em_isa *isa;
    const float *q, *sinks;
    const em_kv *kv;
    float *out, *workers, *parts, *merged;
    size_t worker_floats, row_floats;
    int n, heads, group, tokens, tiles, start, window, width;
    int first_split, round; /* splits of one pool run */
    float scale;
} attention_ctx;

/* Tokens [at, at + tokens) of the batch at one KV head. A row's state is acc [width], top, sum. */
typedef struct {
    int head, at, tokens;
    const float *q;
    float *scores, *part, *merged;
} unit;

static int unit_count(const attention_ctx *c) { return c->tiles * c->kv->heads; }

static int first_seen(const attention_ctx *c, int position) {
    return c->window && position >= c->window ? position - c->window + 1 : 0;
}

static int smaller(int a, int b) { return a < b ? a : b; }
static int larger(int a, int b) { return a > b ? a : b; }

/* Unit `index`, its queries gathered into the worker's memory; late ones, which see most, come first. */
static unit take_unit(const attention_ctx *c, int index, int worker) {
    const size_t rows = (size_t)c->tokens * (size_t)c->group, d = (size_t)c->kv->d;
    unit u = {.head = index % c->kv->heads, .at = (c->tiles - 1 - index / c->kv->heads) * c->tokens};
    u.tokens = smaller(c->tokens, c->n - u.at);
    float *memory = c->workers + (size_t)worker * c->worker_floats;
    u.scores = memory;
    u.part = u.scores + rows * EM_KV_BLOCK;
    u.merged = u.part + rows * c->row_floats;
    float *q = u.merged + rows * c->row_floats;
    u.q = q;
    for (int i = 0; i < u.tokens; i++, q += (size_t)c->group * d) {
        const size_t row = (size_t)(u.at + i) * (size_t)c->heads + (size_t)(u.head * c->group);
        memcpy(q, c->q + row * d, (size_t)c->group * d * sizeof(float));
    }
    return u;
}

/* Scores of a row become weights of its values; what it holds so far is scaled down to match. */
static void soften_row(const attention_ctx *c, float *s, const float *scales, int first, int last,
                       float *row) {
    float *top = row + c->width, *sum = top + 1;
    const float before = *top;
    const float added =
        c->isa->soften(s, scales, scales ? scales + EM_KV_BLOCK : NULL, c->scale, first, last, top);
    if (*top != before) {
        const float a = em_expf(before - *top);
        *sum *= a;
        for (int i = 0; i < c->width; i++) row[i] *= a;
    }
    *sum += added;
}

static void attend_block(const attention_ctx *c, const unit *u, int block) {
    const em_kv *kv = c->kv;
    const size_t size = kv->type == EM_KV_F32 ? 4 : kv->type == EM_KV_F16 ? 2 : 1;
    const size_t d = (size_t)kv->d, group = (size_t)c->group, values = d * EM_KV_BLOCK * size;
    const int base = block * EM_KV_BLOCK, position = c->start + u->at;
    const uint8_t *data = kv->data + ((size_t)u->head * (size_t)kv->blocks + (size_t)block) *
                                         em_kv_block_bytes(kv->type, kv->d);
    const float *scales = kv->type == EM_KV_I8
                              ? (const float *)(const void *)(data + values + (size_t)c->width * EM_KV_BLOCK)
                              : NULL;
    const int from = larger(0, base - position);
    int to = u->tokens;
    if (c->window) to = smaller(to, base + EM_KV_BLOCK + c->window - 1 - position);
    if (from >= to) return;
    float *scores = u->scores + (size_t)from * group * EM_KV_BLOCK;
    memset(scores, 0, (size_t)(to - from) * group * EM_KV_BLOCK * sizeof(float));
    c->isa->panels(kv->type, u->q + (size_t)from * group * d, d, (to - from) * c->group, data,
                   d * EM_KV_PANEL, kv->d, EM_KV_BLOCK / EM_KV_PANEL, scores, EM_KV_BLOCK);
    for (int i = from; i < to;) {
        /* tokens that see the same of this block share its values too */
        const int first = larger(0, first_seen(c, position + i) - base);
        const int last = smaller(EM_KV_BLOCK, position + i + 1 - base);
        int next = i + 1;
        while (next < to && larger(0, first_seen(c, position + next) - base) == first &&
               smaller(EM_KV_BLOCK, position + next + 1 - base) == last)
            next++;
        const int rows = (next - i) * c->group;
        float *s = u->scores + (size_t)i * group * EM_KV_BLOCK,
              *row = u->part + (size_t)i * group * c->row_floats;
        for (int r = 0; r < rows; r++)
            soften_row(c, s + (size_t)r * EM_KV_BLOCK, scales, first, last, row + (size_t)r * c->row_floats);
        c->isa->panels(kv->type, s + first, EM_KV_BLOCK, rows,
                       data + values + (size_t)(first * EM_KV_PANEL) * size, EM_KV_BLOCK * EM_KV_PANEL,
                       last - first, c->width / EM_KV_PANEL, row, c->row_floats);
        i = next;
    }
}

/* A unit over one split alone, into part. */
static void attend_split(const attention_ctx *c, const unit *u, int split, float *part) {
    const int position = c->start + u->at, end = smaller(position + u->tokens, (split + 1) * EM_KV_SPLIT);
    const size_t rows = (size_t)u->tokens * (size_t)c->group;
    memset(part, 0, rows * c->row_floats * sizeof(float));
    for (size_t r = 0; r < rows; r++) part[r * c->row_floats + (size_t)c->width] = -FLT_MAX;
    unit here = *u;
    here.part = part;
    const int first = larger(first_seen(c, position), split * EM_KV_SPLIT);
    for (int block = first / EM_KV_BLOCK; block * EM_KV_BLOCK < end; block++) attend_block(c, &here, block);
}

static void merge_rows(const attention_ctx *c, size_t rows, float *into, const float *part) {
    const size_t width = (size_t)c->width;
    for (; rows; rows--, into += c->row_floats, part += c->row_floats) {
        if (part[width + 1] == 0.0f) continue; /* the row sees nothing of this split */
        if (into[width + 1] == 0.0f) {
            memcpy(into, part, c->row_floats * sizeof(float));
            continue;
        }
        const float top = part[width] > into[width] ? part[width] : into[width];
        const float a = em_expf(into[width] - top), b = em_expf(part[width] - top);
        for (size_t i = 0; i < width; i++) into[i] = into[i] * a + part[i] * b;
        into[width] = top;
        into[width + 1] = into[width + 1] * a + part[width + 1] * b;
    }
}

static void finish(const attention_ctx *c, const unit *u, float *merged) {
    const size_t d = (size_t)c->kv->d, width = (size_t)c->width;
    for (int i = 0; i < u->tokens; i++)
        for (int g = 0; g < c->group; g++, merged += c->row_floats) {
            const int head = u->head * c->group + g;
            float sum = merged[width + 1];
            if (c->sinks) {
                const float sink = c->sinks[head], top = sink > merged[width] ? sink : merged[width];
                const float a = em_expf(merged[width] - top);
                sum = sum * a + em_expf(sink - top);
                for (size_t k = 0; k < d; k++) merged[k] *= a;
            }
            float *out = c->out + ((size_t)(u->at + i) * (size_t)c->heads + (size_t)head) * d;
            for (size_t k = 0; k < d; k++) out[k] = merged[k] / sum;
        }
}

static void walk_task(void *raw, int task, int worker) {
    const attention_ctx *c = raw;
    const unit u = take_unit(c, task, worker);
    const size_t rows = (size_t)u.tokens * (size_t)c->group;
    const int position = c->start + u.at, last = (position + u.tokens - 1) / EM_KV_SPLIT;
    for (size_t r = 0; r < rows; r++) u.merged[r * c->row_floats + (size_t)c->width + 1] = 0.0f;
    for (int split = first_seen(c, position) / EM_KV_SPLIT; split <= last; split++) {
        attend_split(c, &u, split, u.part);
        merge_rows(c, rows, u.merged, u.part);
    }
    finish(c, &u, u.merged);
}

static size_t unit_floats(const attention_ctx *c) {
    return (size_t)c->tokens * (size_t)c->group * c->row_floats;
}

static void split_task(void *raw, int task, int worker) {
    const attention_ctx *c = raw;
    const unit u = take_unit(c, task / c->round, worker);
    attend_split(c, &u, c->first_split + task % c->round, c->parts + (size_t)task * unit_floats(c));
}

static void merge_task(void *raw, int task, int worker) {
    const attention_ctx *c = raw;
    const unit u = take_unit(c, task, worker);
    const size_t rows = (size_t)u.tokens * (size_t)c->group, floats = unit_floats(c);
    float *merged = c->merged + (size_t)task * floats;
    for (int i = 0; i < c->round; i++)
        merge_rows(c, rows, merged, c->parts + ((size_t)task * (size_t)c->round + (size_t)i) * floats);
    if ((c->first_split + c->round) * EM_KV_SPLIT >= c->start + c->n) finish(c, &u, merged);
}

static attention_ctx shape(int n, int heads, int kv_heads, int d) {
    attention_ctx c = {.n = n, .heads = heads, .group = heads / kv_heads};
    c.tokens = smaller(n, larger(1, TILE_ROWS / c.group));
    c.tiles = em_ceil_div(n, c.tokens);
    c.width = em_ceil_div(d, EM_KV_PANEL) * EM_KV_PANEL;
    c.row_floats = (size_t)c.width + EM_KV_PANEL;
    c.worker_floats = (size_t)c.tokens * (size_t)c.group * (EM_KV_BLOCK + 2 * c.row_floats + (size_t)d);
    c.worker_floats = em_padded(c.worker_floats * sizeof(float)) / sizeof(float);
    return c;
}

/* Splits a round of all units, 0: each unit is walked; bounded as em_attention_scratch says. */
static int splits_a_round(const attention_ctx *c, int units, int threads, int splits) {
    if (threads == 1 || splits == 1 || units >= BALANCED * threads) return 0;
    const size_t fit = PART_BYTES / (unit_floats(c) * sizeof(float) * (size_t)units);
    if (units >= ENOUGH * threads && fit < ENOUGH) return 0;
    return smaller(splits, larger((int)fit, em_ceil_div(ENOUGH * threads, units)));
}

size_t em_attention_scratch(int threads, int n, int heads, int kv_heads, int d) {
    const attention_ctx c = shape(n, heads, kv_heads, d);
    const size_t one = unit_floats(&c) * sizeof(float), few = (size_t)(ENOUGH * threads) * one;
    const size_t parts = 2 * few > PART_BYTES ? 2 * few : PART_BYTES;
    const size_t merged = few > PART_BYTES / ENOUGH ? few : PART_BYTES / ENOUGH;
    return (size_t)threads * c.worker_floats * sizeof(float) + em_padded(parts) + em_padded(merged);
}

int em_attention(em_pool *p, const float *q, const em_kv *kv, int n, int heads, int start, int window,
                 float scale, const float *sinks, float *out) {
    attention_ctx c = shape(n, heads, kv->heads, kv->d);
    c.isa = em_isa_current();
    c.q = q;
    c.sinks = sinks;
    c.kv = kv;
    c.out = out;
    c.start = start;
    c.window = window;
    c.scale = scale;
    c.first_split = first_seen(&c, start) / EM_KV_SPLIT;
    const int threads = em_pool_threads(p), units = unit_count(&c);
    const int end = em_ceil_div(start + n, EM_KV_SPLIT);
    c.round = splits_a_round(&c, units, threads, end - c.first_split);
    const size_t one = unit_floats(&c) * sizeof(float), worker = c.worker_floats * sizeof(float);
    const size_t parts = em_padded((size_t)(units * c.round) * one);
    const size_t merged = c.round ? em_padded((size_t)units * one) : 0;
    em_pool_lock(p);
    char *scratch = em_pool_scratch(p, (size_t)threads * worker + parts + merged);
    if (!scratch) {
        em_pool_unlock(p);
        return EM_NO_MEMORY;
    }
    em_carver carver = {.at = scratch};
    c.workers = em_carve(&carver, (size_t)threads * worker);
    if (c.round) {
        c.parts = em_carve(&carver, parts);
        c.merged = em_carve(&carver, merged);
        memset(c.merged, 0, merged);
        for (const int step = c.round; c.first_split < end; c.first_split += step) {
            c.round = smaller(step, end - c.first_split);
            em_pool_run(p, split_task, &c, units * c.round);
            em_run(p, merge_task, &c, units, (size_t)units * (size_t)c.round * unit_floats(&c));
        }
    } else {
        em_pool_run(p, walk_task, &c, units);
    }
    em_pool_unlock(p);
    return EM_OK;
}
