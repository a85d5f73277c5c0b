/* Operations: phases of independent tasks over the pool. No task's result depends on how the work
 * was split, so outputs are bit-equal for any number of threads and any batch. */
#include <math.h>
#include <string.h>

#include "em_math.h"
#include "ops_common.h"

em_matrix em_matrix_at(const uint64_t *segments, const int64_t *offsets, int stride, int level, int ahead,
                       int rows, int cols, int group_units) {
    em_matrix w = {.rows = rows, .cols = cols, .group_units = group_units};
    w.level = level + ahead < EM_LEVELS ? level + ahead : EM_LEVELS - 1;
    w.units = em_ceil_div(cols, EM_UNIT);
    w.groups = em_ceil_div(w.units, group_units);
    const uint8_t *scales = NULL; /* of the last step */
    for (int step = 0; step <= w.level; step++) {
        const uint8_t *segment = (const uint8_t *)(uintptr_t)segments[step > ahead ? step - ahead : 0];
        scales = segment + offsets[step * stride];
        w.plane[step] = segment + offsets[step * stride + 1];
    }
    const size_t padded_rows = (size_t)em_ceil_div(rows, EM_ROW_BLOCK) * EM_ROW_BLOCK;
    w.exponent = (const uint8_t *)(uintptr_t)segments[0] + offsets[0];
    w.step = w.exponent + em_padded(padded_rows);
    if (w.level == 0) {
        w.shift = w.step + em_padded(2 * padded_rows * (size_t)w.groups);
    } else if (w.level < EM_LEVELS - 1) {
        w.shift = scales;
    }
    return w;
}

typedef struct {
    const em_isa *isa;
    const float *x;
    int cols, ld;
    em_acts acts;
} quantize_ctx;

static void quantize_task(void *raw, int task, int worker) {
    (void)worker;
    const quantize_ctx *c = raw;
    c->isa->quantize(c->x + (size_t)task * (size_t)c->ld, c->cols, &c->acts, task);
}

void em_quantize_all(em_pool *p, const em_isa *isa, const float *x, int n, int cols, int ld, em_acts acts) {
    quantize_ctx c = {isa, x, cols, ld, acts};
    if (n == 1) {
        quantize_task(&c, 0, 0);
    } else {
        em_pool_run(p, quantize_task, &c, n);
    }
}

typedef struct {
    const em_isa *isa;
    em_acts acts;
    int n;
    const em_matrix *const *w;
    float *const *y;
    int count;
    int token_tiles;
} linear_ctx;

static void linear_task(void *raw, int task, int worker) {
    (void)worker;
    const linear_ctx *c = raw;
    const int first = task % c->token_tiles * TOKEN_TILE;
    int chunk = task / c->token_tiles;
    const int n = c->n - first < TOKEN_TILE ? c->n - first : TOKEN_TILE;
    for (int m = 0; m < c->count; m++) {
        const em_matrix *w = c->w[m];
        const int blocks = em_ceil_div(w->rows, EM_ROW_BLOCK);
        const int chunks = em_ceil_div(blocks, CHUNK_BLOCKS);
        if (chunk >= chunks) {
            chunk -= chunks;
            continue;
        }
        const int rb0 = chunk * CHUNK_BLOCKS;
        const int rb1 = rb0 + CHUNK_BLOCKS < blocks ? rb0 + CHUNK_BLOCKS : blocks;
        const em_acts a = em_acts_from(c->acts, first);
        c->isa->matmul(w, rb0, rb1, &a, NULL, n,
                       c->y[m] + (size_t)first * (size_t)w->rows + (size_t)rb0 * EM_ROW_BLOCK,
                       (size_t)w->rows);
        return;
    }
}

size_t em_linear_scratch(int n, int cols, int group_units) { return em_acts_bytes(n, cols, group_units); }

int em_linear(em_pool *p, const float *x, int n, const em_matrix *const *w, float *const *y, int count) {
    const em_isa *isa = em_isa_current();
    em_pool_lock(p);
    em_carver c = {.at = em_pool_scratch(p, em_linear_scratch(n, w[0]->cols, w[0]->group_units))};
    if (!c.at) {
        em_pool_unlock(p);
        return EM_NO_MEMORY;
    }
    const em_acts acts = em_carve_acts(&c, n, w[0]->cols, w[0]->group_units);
    em_quantize_all(p, isa, x, n, w[0]->cols, w[0]->cols, acts);
    linear_ctx ctx = {isa, acts, n, w, y, count, em_ceil_div(n, TOKEN_TILE)};
    int chunks = 0;
    for (int m = 0; m < count; m++)
        chunks += em_ceil_div(em_ceil_div(w[m]->rows, EM_ROW_BLOCK), CHUNK_BLOCKS);
    em_pool_run(p, linear_task, &ctx, chunks * ctx.token_tiles);
    em_pool_unlock(p);
    return EM_OK;
}

int em_accumulate(em_pool *p, const float *x, int n, const em_matrix *w, int8_t *q, float *scale,
                  int32_t *out) {
    const em_isa *isa = em_isa_current();
    em_pool_lock(p);
    em_carver c = {.at = em_pool_scratch(p, em_linear_scratch(n, w->cols, w->group_units))};
    if (!c.at) {
        em_pool_unlock(p);
        return EM_NO_MEMORY;
    }
    const em_acts acts = em_carve_acts(&c, n, w->cols, w->group_units);
    em_quantize_all(p, isa, x, n, w->cols, w->cols, acts);
    isa->accumulate(w, 0, em_ceil_div(w->rows, EM_ROW_BLOCK), &acts, n, out);
    for (int i = 0; i < n; i++)
        for (int u = 0; u < acts.units; u++) {
            const size_t from = em_acts_unit(&acts, (size_t)i, u),
                         to = (size_t)i * (size_t)acts.units + (size_t)u;
            memcpy(q + to * EM_UNIT, acts.q + from * EM_UNIT, EM_UNIT);
            scale[to] = acts.scale[from];
        }
    em_pool_unlock(p);
    return EM_OK;
}

typedef struct {
    const em_isa *isa;
    const float *x, *w;
    float *y;
    int n, rows, cols;
} dense_ctx;

enum { DENSE_ROWS = 8 };

static void dense_task(void *raw, int task, int worker) {
    (void)worker;
    const dense_ctx *c = raw;
    const int chunks = em_ceil_div(c->rows, DENSE_ROWS);
    const int token = task / chunks, first = task % chunks * DENSE_ROWS;
    const int last = first + DENSE_ROWS < c->rows ? first + DENSE_ROWS : c->rows;
    const float *x = c->x + (size_t)token * (size_t)c->cols;
    for (int r = first; r < last; r++)
        c->y[(size_t)token * (size_t)c->rows + (size_t)r] =
            c->isa->dot(x, c->w + (size_t)r * (size_t)c->cols, c->cols);
}

void em_linear_f32(em_pool *p, const float *x, int n, const float *w, int rows, int cols, float *y) {
    dense_ctx c = {em_isa_current(), x, w, y, n, rows, cols};
    em_pool_lock(p);
    em_run(p, dense_task, &c, n * em_ceil_div(rows, DENSE_ROWS), (size_t)n * (size_t)rows * (size_t)cols);
    em_pool_unlock(p);
}

void em_decode_rows(const em_matrix *w, const int64_t *ids, int n, float *out) {
    static const int added[EM_LEVELS] = {2, 1, 1, 2, 2};
    const int bits = em_level_bits(w->level);
    for (int i = 0; i < n; i++) {
        const size_t rb = (size_t)(ids[i] / EM_ROW_BLOCK);
        const int r = (int)(ids[i] % EM_ROW_BLOCK);
        const uint8_t exponent = w->exponent[ids[i]];
        for (int c = 0; c < w->cols; c++) {
            const int u = c / EM_UNIT, t = c % EM_UNIT / 4, j = c % 4;
            const size_t at = rb * (size_t)w->units + (size_t)u;
            int code = 0;
            for (int s = 0; s <= w->level; s++) {
                const uint8_t *p = w->plane[s] + at * 32 * (size_t)added[s];
                code = added[s] == 1 ? code << 1 | (p[4 * r + j] >> t & 1)
                                     : code << 2 | (p[32 * (t / 4) + 4 * r + j] >> (2 * (t % 4)) & 3);
            }
            const size_t group = rb * (size_t)w->groups + (size_t)(u / w->group_units);
            const uint8_t *steps = w->step + group * 2 * EM_ROW_BLOCK;
            const uint8_t *shifts = w->shift ? w->shift + group * EM_ROW_BLOCK / 2 : NULL;
            const float step = em_step(exponent, steps[r]);
            out[(size_t)i * (size_t)w->cols + (size_t)c] =
                step * em_cell(bits) * (float)code +
                step * ((em_first_centre(bits) - (float)steps[EM_ROW_BLOCK + r]) + em_shift(shifts, r, bits));
        }
    }
}

typedef struct {
    const em_isa *isa;
    const float *x, *w;
    float *y;
    int d;
    float eps;
} norm_ctx;

static void norm_task(void *raw, int task, int worker) {
    (void)worker;
    const norm_ctx *c = raw;
    const float *x = c->x + (size_t)task * (size_t)c->d;
    const float mean = c->isa->dot(x, x, c->d) / (float)c->d;
    c->isa->scale_mul(x, 1.0f / sqrtf(mean + c->eps), c->w, c->d, c->y + (size_t)task * (size_t)c->d);
}

void em_rmsnorm(em_pool *p, const float *x, const float *w, int n, int d, float eps, float *y) {
    norm_ctx c = {em_isa_current(), x, w, y, d, eps};
    /* A row is too little work to wake a worker for. */
    if ((size_t)n * (size_t)d < 65536) {
        for (int i = 0; i < n; i++) norm_task(&c, i, 0);
        return;
    }
    em_pool_lock(p);
    em_pool_run(p, norm_task, &c, n);
    em_pool_unlock(p);
}

void em_gated_add(float *y, const float *gate, const float *x, int n, int d) {
    for (int i = 0; i < n; i++) {
        const float g = 1.0f / (1.0f + em_expf(-gate[i]));
        const size_t row = (size_t)i * (size_t)d;
        for (int c = 0; c < d; c++) y[row + (size_t)c] += g * x[row + (size_t)c];
    }
}

typedef struct {
    float *x;
    const float *cos, *sin;
    int heads, d;
} rope_ctx;

static void rope_task(void *raw, int task, int worker) {
    (void)worker;
    const rope_ctx *c = raw;
    const int half = c->d / 2;
    const float *cos = c->cos + (size_t)task * (size_t)half, *sin = c->sin + (size_t)task * (size_t)half;
    for (int h = 0; h < c->heads; h++) {
        float *a = c->x + ((size_t)task * (size_t)c->heads + (size_t)h) * (size_t)c->d, *b = a + half;
        for (int i = 0; i < half; i++) {
            const float lo = a[i], hi = b[i];
            a[i] = lo * cos[i] - hi * sin[i];
            b[i] = hi * cos[i] + lo * sin[i];
        }
    }
}

void em_rope(em_pool *p, float *x, int n, int heads, int d, const float *cos, const float *sin) {
    rope_ctx c = {x, cos, sin, heads, d};
    if ((size_t)n * (size_t)heads * (size_t)d < 65536) {
        for (int i = 0; i < n; i++) rope_task(&c, i, 0);
        return;
    }
    em_pool_lock(p);
    em_pool_run(p, rope_task, &c, n);
    em_pool_unlock(p);
}

void em_route(const float *logits, int n, int experts, int k, int normalize, int32_t *ids, float *weights) {
    for (int i = 0; i < n; i++) {
        const float *z = logits + (size_t)i * (size_t)experts;
        int32_t *id = ids + (size_t)i * (size_t)k;
        float *w = weights + (size_t)i * (size_t)k;
        float m = z[0], sum = 0.0f, kept = 0.0f;
        for (int e = 1; e < experts; e++) m = z[e] > m ? z[e] : m;
        for (int e = 0; e < experts; e++) sum += em_expf(z[e] - m);
        int count = 0;
        for (int e = 0; e < experts; e++) { /* insertion into the k best so far; earlier wins ties */
            int at = count;
            while (at > 0 && z[e] > z[id[at - 1]]) at--;
            if (at >= k) continue;
            if (count < k) count++;
            for (int s = count - 1; s > at; s--) id[s] = id[s - 1];
            id[at] = e;
        }
        for (int s = 0; s < k; s++) {
            w[s] = em_expf(z[id[s]] - m) / sum;
            kept += w[s];
        }
        if (normalize)
            for (int s = 0; s < k; s++) w[s] /= kept;
    }
}
