/* A decoder layer without its experts, in one call: between its operations workers find the next one while
 * they still spin. */
#include "clones.h"
#include "ops_common.h"

typedef struct {
    const em_isa *isa;
    float *y;
    const float *x;
    float factor;
    int cols;
} rows_ctx;

VECTOR_CLONES static void add_rows(float *y, const float *x, float factor, int n) {
    for (int i = 0; i < n; i++) y[i] += x[i] * factor;
}

VECTOR_CLONES static void clip_rows(float *y, float most, int n) {
    for (int i = 0; i < n; i++) {
        const float low = y[i] < -most ? -most : y[i];
        y[i] = low > most ? most : low;
    }
}

static void residual_task(void *raw, int task, int worker) {
    (void)worker;
    const rows_ctx *c = raw;
    const size_t at = (size_t)task * (size_t)c->cols;
    add_rows(c->y + at, c->x + at, c->factor, c->cols);
}

static void bias_task(void *raw, int task, int worker) {
    (void)worker;
    const rows_ctx *c = raw;
    add_rows(c->y + (size_t)task * (size_t)c->cols, c->x, 1.0f, c->cols);
}

static void clip_task(void *raw, int task, int worker) {
    (void)worker;
    const rows_ctx *c = raw;
    clip_rows(c->y + (size_t)task * (size_t)c->cols, c->factor, c->cols);
}

static void silu_task(void *raw, int task, int worker) {
    (void)worker;
    const rows_ctx *c = raw;
    const size_t at = (size_t)task * (size_t)c->cols;
    c->isa->silu_mul(c->y + at, c->x + at, c->cols);
}

static void each_row(em_pool *p, em_task fn, float *y, const float *x, float factor, int n, int cols) {
    rows_ctx c = {em_isa_current(), y, x, factor, cols};
    em_run(p, fn, &c, n, (size_t)n * (size_t)cols);
}

typedef struct {
    float *q, *k, *v, *attended, *y, *gate, *up, *logits;
} buffers;

static size_t carve(buffers *b, em_carver *c, int n, int hidden, int heads, int kv_heads, int d, int mlp,
                    int experts) {
    const size_t row = (size_t)n * sizeof(float), width = row * (size_t)d;
    b->q = em_carve(c, width * (size_t)heads);
    b->k = em_carve(c, width * (size_t)kv_heads);
    b->v = em_carve(c, width * (size_t)kv_heads);
    b->attended = em_carve(c, width * (size_t)heads);
    b->y = em_carve(c, row * (size_t)hidden);
    b->gate = em_carve(c, row * (size_t)mlp);
    b->up = em_carve(c, row * (size_t)mlp);
    b->logits = em_carve(c, row * (size_t)experts);
    return c->used;
}

static size_t larger(size_t a, size_t b) { return a > b ? a : b; }

size_t em_layer_scratch(int threads, int n, int hidden, int heads, int kv_heads, int d, int mlp, int experts,
                        int group_units) {
    buffers b;
    size_t most = em_attention_scratch(threads, n, heads, kv_heads, d);
    most = larger(most, em_linear_scratch(n, hidden, group_units));
    most = larger(most, em_linear_scratch(n, heads * d, group_units));
    most = larger(most, em_linear_scratch(n, mlp, group_units));
    return carve(&b, &(em_carver){0}, n, hidden, heads, kv_heads, d, mlp, experts) + em_padded(most);
}

static int project(em_pool *p, const em_layer *l, const float *h, int n, const float *cos, const float *sin,
                   const buffers *b) {
    const em_matrix *w[] = {&l->q, &l->k, &l->v};
    float *y[] = {b->q, b->k, b->v};
    const float *bias[] = {l->q_bias, l->k_bias, l->v_bias};
    const int cols = l->heads * l->d, kv_cols = l->kv_heads * l->d;
    const int status = em_linear(p, h, n, w, y, 3);
    if (status) return status;
    for (int m = 0; m < 3; m++)
        if (bias[m]) each_row(p, bias_task, y[m], bias[m], 0.0f, n, w[m]->rows);
    if (l->q_norm) em_rmsnorm(p, b->q, l->q_norm, n * (cols / l->q_norm_cols), l->q_norm_cols, l->eps, b->q);
    if (l->k_norm)
        em_rmsnorm(p, b->k, l->k_norm, n * (kv_cols / l->k_norm_cols), l->k_norm_cols, l->eps, b->k);
    if (l->clip > 0.0f)
        for (int m = 0; m < 3; m++) each_row(p, clip_task, y[m], NULL, l->clip, n, w[m]->rows);
    em_rope(p, b->q, n, l->heads, l->d, cos, sin);
    em_rope(p, b->k, n, l->kv_heads, l->d, cos, sin);
    return EM_OK;
}

static int attend(em_pool *p, const em_layer *l, const em_span *spans, int span_count, const buffers *b) {
    const size_t cols = (size_t)l->heads * (size_t)l->d, kv_cols = (size_t)l->kv_heads * (size_t)l->d;
    size_t row = 0;
    for (const em_span *s = spans; s < spans + span_count; s++) {
        em_kv_write(p, &s->kv, b->k + row * kv_cols, b->v + row * kv_cols, s->count, s->start);
        const int status = em_attention(p, b->q + row * cols, &s->kv, s->count, l->heads, s->start, l->window,
                                        l->scale, NULL, b->attended + row * cols);
        if (status) return status;
        row += (size_t)s->count;
    }
    return EM_OK;
}

static int route(em_pool *p, const em_layer *l, int n, const buffers *b, const em_routed *out) {
    if (l->mlp) {
        const em_matrix *w[] = {&l->gate, &l->up}, *down[] = {&l->down};
        float *y[] = {b->gate, b->up};
        int status = em_linear(p, out->h, n, w, y, 2);
        if (status) return status;
        each_row(p, silu_task, b->gate, b->up, 0.0f, n, l->mlp);
        status = em_linear(p, b->gate, n, down, &(float *){out->mlp}, 1);
        if (status) return status;
    }
    if (l->router) {
        em_linear_f32(p, out->h, n, l->router, l->experts, l->hidden, b->logits);
        em_route(b->logits, n, l->experts, l->slots, l->normalize, out->ids, out->weights);
    }
    if (l->shared_router) em_linear_f32(p, out->h, n, l->shared_router, 1, l->hidden, out->mlp_gate);
    return EM_OK;
}

int em_layer_run(em_pool *p, const em_layer *l, float *x, const float *add, int n, const float *cos,
                 const float *sin, const em_span *spans, int span_count, const em_routed *out) {
    em_pool_lock(p);
    em_carver c = {
        .at = em_pool_scratch(p, em_layer_scratch(em_pool_threads(p), n, l->hidden, l->heads, l->kv_heads,
                                                  l->d, l->mlp, l->experts, l->q.group_units))};
    if (!c.at) {
        em_pool_unlock(p);
        return EM_NO_MEMORY;
    }
    buffers b;
    em_pool_hold(p, carve(&b, &c, n, l->hidden, l->heads, l->kv_heads, l->d, l->mlp, l->experts));
    if (add) each_row(p, residual_task, x, add, l->residual, n, l->hidden);
    em_rmsnorm(p, x, l->input_norm, n, l->hidden, l->eps, out->h);
    int status = project(p, l, out->h, n, cos, sin, &b);
    if (!status) status = attend(p, l, spans, span_count, &b);
    if (!status) status = em_linear(p, b.attended, n, &(const em_matrix *){&l->o}, &b.y, 1);
    if (!status) {
        if (l->o_bias) each_row(p, bias_task, b.y, l->o_bias, 0.0f, n, l->hidden);
        each_row(p, residual_task, x, b.y, l->residual, n, l->hidden);
        em_rmsnorm(p, x, l->post_norm, n, l->hidden, l->eps, out->h);
        status = route(p, l, n, &b, out);
    }
    em_pool_hold(p, 0);
    em_pool_unlock(p);
    return status;
}
