/* Causal attention over the KV cache: one task a (token, head). */
#include "ops_common.h"

typedef struct {
    const em_isa *isa;
    const float *q, *k, *v;
    float *out;
    float *scores; /* [threads, positions] */
    size_t positions;
    int heads, kv_heads, d, capacity, start, window;
    float scale;
} attention_ctx;

static void attention_task(void *raw, int task, int worker) {
    const attention_ctx *c = raw;
    const int token = task / c->heads, head = task % c->heads;
    const int last = c->start + token;
    const int first = c->window && last >= c->window ? last - c->window + 1 : 0;
    const int n = last - first + 1;
    const size_t d = (size_t)c->d;
    const size_t slab = (size_t)(head / (c->heads / c->kv_heads)) * (size_t)c->capacity;
    const float *q = c->q + (size_t)task * d;
    const float *k = c->k + (slab + (size_t)first) * d, *v = c->v + (slab + (size_t)first) * d;
    float *s = c->scores + (size_t)worker * c->positions;
    float m = -3.4028234663852886e38f;
    for (int j = 0; j < n; j++) {
        s[j] = c->isa->dot(q, k + (size_t)j * d, c->d) * c->scale;
        m = s[j] > m ? s[j] : m;
    }
    const float sum = c->isa->exp_sum(s, m, n);
    c->isa->weighted_sum(s, v, n, c->d, sum, c->out + (size_t)task * d);
}

size_t em_attention_scratch(int threads, int positions) {
    return (size_t)threads * em_padded((size_t)positions * sizeof(float));
}

int em_attention(em_pool *p, const float *q, const float *k, const float *v, int n, int heads, int kv_heads,
                 int d, int capacity, int start, int window, float scale, float *out) {
    em_pool_lock(p);
    const size_t bytes = em_attention_scratch(em_pool_threads(p), start + n);
    float *scores = em_pool_scratch(p, bytes);
    if (!scores) {
        em_pool_unlock(p);
        return EM_NO_MEMORY;
    }
    attention_ctx c = {em_isa_current(),
                       q,
                       k,
                       v,
                       out,
                       scores,
                       bytes / sizeof(float) / (size_t)em_pool_threads(p),
                       heads,
                       kv_heads,
                       d,
                       capacity,
                       start,
                       window,
                       scale};
    em_pool_run(p, attention_task, &c, n * heads);
    em_pool_unlock(p);
    return EM_OK;
}
