/* Replays a recorded decoder layer (tests/record_layer.py) on every instruction set and compares
 * every stage bit for bit. usage: test_layer RECORDING */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "edgemoe.h"

static uint8_t *file;
static size_t file_size;
static int failures;

/* What a replay takes is given back at its end. */
static void *taken[2048];
static int taken_count;

static void *keep(void *p) {
    if (!p || taken_count == (int)(sizeof taken / sizeof taken[0])) exit(2);
    return taken[taken_count++] = p;
}

/* The bytes of a named blob, copied so that they are aligned. */
static void *blob(const char *name, size_t *size) {
    for (size_t at = 0; at + 4 <= file_size;) {
        uint32_t length;
        uint64_t bytes;
        memcpy(&length, file + at, 4);
        const char *found = (const char *)file + at + 4;
        memcpy(&bytes, file + at + 4 + length, 8);
        const uint8_t *data = file + at + 12 + length;
        if (length == strlen(name) && !memcmp(found, name, length)) {
            void *copy = keep(aligned_alloc(64, (bytes + 63) / 64 * 64 + 64));
            memcpy(copy, data, bytes);
            if (size) *size = bytes;
            return copy;
        }
        at += 12 + length + bytes;
    }
    fprintf(stderr, "the recording has no %s\n", name);
    exit(2);
}

static void compare(const char *name, const void *got) {
    size_t size;
    const void *want = blob(name, &size);
    if (memcmp(got, want, size)) {
        failures++;
        printf("%s: differs on %s\n", name, em_isa_current()->name);
    }
}

static em_matrix matrix(const char *record, const int64_t *offsets, int matrices, int index, int level,
                        int ahead, int rows, int cols) {
    uint64_t segments[EM_LEVELS] = {0};
    for (int s = 0; s <= level; s++) {
        char name[64];
        if (snprintf(name, sizeof name, "%s.%d", record, s) >= (int)sizeof name) exit(2);
        segments[s] = (uint64_t)(uintptr_t)blob(name, NULL);
    }
    return em_matrix_at(segments, offsets + 2 * index, 2 * matrices, level, ahead, rows, cols, 2);
}

static em_matrix dense(const char *name, int level, int rows, int cols) {
    char offsets[32];
    snprintf(offsets, sizeof offsets, "%s.offsets", name);
    return matrix(name, blob(offsets, NULL), 1, 0, level, 0, rows, cols);
}

static float *floats(size_t n) { return keep(calloc(n, sizeof(float))); }

/* The same layer up to its experts in one call, as two sequences that happen to hold the same tokens. */
static void replay_at_once(int threads) {
    const int32_t *dims = blob("dims", NULL);
    const int n = dims[0], level = dims[9];
    em_layer l = {.hidden = dims[1],
                  .heads = dims[2],
                  .kv_heads = dims[3],
                  .d = dims[4],
                  .experts = dims[5],
                  .slots = dims[6],
                  .normalize = 1,
                  .eps = 1e-6f,
                  .residual = 1.0f};
    const int q_rows = l.heads * l.d, kv_rows = l.kv_heads * l.d;
    l.scale = 0.22360679774997896f;
    l.input_norm = l.post_norm = blob("norm", NULL);
    l.router = blob("router", NULL);
    l.q = dense("q", level, q_rows, l.hidden), l.k = dense("k", level, kv_rows, l.hidden);
    l.v = dense("v", level, kv_rows, l.hidden), l.o = dense("o", level, l.hidden, q_rows);
    const size_t row = (size_t)l.hidden, rows = (size_t)n, angles = rows * (size_t)(l.d / 2);
    float *x = floats(2 * rows * row), *add = floats(2 * rows * row);
    float *cos = floats(2 * angles), *sin = floats(2 * angles);
    const int blocks = (n + EM_KV_BLOCK - 1) / EM_KV_BLOCK;
    em_span spans[2];
    for (size_t s = 0; s < 2; s++) {
        memcpy(x + s * rows * row, blob("x", NULL), rows * row * sizeof(float));
        memcpy(cos + s * angles, blob("cos", NULL), angles * sizeof(float));
        memcpy(sin + s * angles, blob("sin", NULL), angles * sizeof(float));
        const size_t bytes = (size_t)(l.kv_heads * blocks) * em_kv_block_bytes(EM_KV_F16, l.d);
        spans[s] =
            (em_span){{(uint8_t *)floats(bytes / sizeof(float)), EM_KV_F16, l.kv_heads, l.d, blocks}, 0, n};
    }
    const size_t slots = 2 * rows * (size_t)l.slots;
    int32_t *ids = keep(calloc(slots, sizeof *ids));
    const em_routed out = {floats(2 * rows * row), ids, floats(slots), NULL, NULL};
    em_pool *pool = em_pool_new(threads);
    if (!pool || em_layer_run(pool, &l, x, add, 2 * n, cos, sin, spans, 2, &out)) exit(2);
    for (size_t s = 0; s < 2; s++) {
        compare("out.middle", x + s * rows * row);
        compare("out.ids", out.ids + s * slots / 2);
        compare("out.weights", out.weights + s * slots / 2);
    }
    em_pool_free(pool);
}

/* The mixture in parts, from the last job to the first, is the mixture in one call. */
static void mix_in_parts(em_pool *pool, const em_mixture_of *of, const float *x, int n, int k,
                         const int32_t *ids, const int32_t *levels, const float *weights, const float *want) {
    const size_t h = (size_t)of->record.hidden, pairs = (size_t)n * (size_t)k;
    float *pair_out = floats(pairs * h), *got = floats((size_t)n * h);
    int32_t *position = keep(calloc(pairs, sizeof *position));
    int done = 0;
    for (int last = of->experts * of->depth; last > 0; last -= 2) {
        const int32_t chosen[] = {last - 1, last > 1 ? last - 2 : 0};
        const int pairs_done =
            em_mixture_part(pool, of, x, n, k, ids, levels, chosen, 2, done, position, pair_out);
        if (pairs_done < 0) exit(2);
        done += pairs_done;
    }
    em_combine(pool, pair_out, position, weights, n, k, of->record.hidden, got);
    const int32_t beyond = of->experts * of->depth;
    if (done != n * k || memcmp(got, want, (size_t)n * h * sizeof(float)) ||
        em_mixture_part(pool, of, x, n, k, ids, levels, &beyond, 1, 0, position, pair_out) !=
            EM_NO_SUCH_EXPERT) {
        failures++;
        printf("mixture in parts: differs on %s\n", em_isa_current()->name);
    }
}

/* The mixture in one call is its experts, each computed by itself at its level, and their sum. */
static void mix(em_pool *pool, int n, int k, int experts, int h, int inter, int ahead, const float *x,
                const int32_t *ids, const float *weights) {
    enum { LEVEL = 1 }; /* the highest that is there */
    const em_record record = {blob("expert.offsets", NULL), 4, h, inter, ahead, 2};
    uint64_t *table = keep(calloc((size_t)experts * EM_LEVELS, sizeof *table));
    for (int e = 0; e < experts; e++)
        for (int s = 0; s <= LEVEL; s++) {
            char name[64];
            snprintf(name, sizeof name, "expert%d.%d", e, s);
            table[e * EM_LEVELS + s] = (uint64_t)(uintptr_t)blob(name, NULL);
        }
    const size_t row = (size_t)h;
    const em_mixture_of of = {record, table, experts, EM_LEVELS};
    int32_t *levels = keep(calloc((size_t)(n * k), sizeof *levels));
    for (int i = 0; i < n * k; i++) levels[i] = (i / 2) % (LEVEL + 1);
    float *got = floats((size_t)n * row), *want = floats((size_t)n * row), *one = floats(row);
    if (em_mixture(pool, &of, x, n, k, ids, levels, weights, got)) exit(2);
    mix_in_parts(pool, &of, x, n, k, ids, levels, weights, got);
    const int32_t zero = 0;
    for (int i = 0; i < n * k; i++) {
        em_job job = em_job_at(&record, table + ids[i] * EM_LEVELS, levels[i]);
        job.count = 1;
        if (em_experts(pool, x + (size_t)(i / k) * row, 1, &job, 1, &zero, 1, one)) exit(2);
        for (size_t c = 0; c < row; c++) want[(size_t)(i / k) * row + c] += weights[i] * one[c];
    }
    if (memcmp(got, want, (size_t)n * row * sizeof(float))) {
        failures++;
        printf("mixture: differs on %s\n", em_isa_current()->name);
    }
    const int32_t beyond = experts;
    const int refused = em_mixture(pool, &of, x, 1, 1, &beyond, levels, weights, got);
    levels[n * k - 1] = LEVEL + 1;
    if (refused != EM_NO_SUCH_EXPERT ||
        em_mixture(pool, &of, x, n, k, ids, levels, weights, got) != EM_NO_SUCH_EXPERT) {
        failures++;
        printf("mixture: an expert that is not there was taken\n");
    }
}

static void replay(int threads) {
    const int32_t *dims = blob("dims", NULL);
    const int n = dims[0], h = dims[1], heads = dims[2], kv = dims[3], d = dims[4], experts = dims[5],
              k = dims[6], inter = dims[7], level = dims[9], ahead = dims[10];
    const size_t rows = (size_t)n;
    em_pool *pool = em_pool_new(threads);
    if (!pool) exit(2);
    float *x = blob("x", NULL), *norm = blob("norm", NULL);
    float *normed = floats(rows * (size_t)h), *y = floats(rows * (size_t)h);
    float *q = floats(rows * (size_t)(heads * d)), *attended = floats(rows * (size_t)(heads * d));
    float *keys = floats(rows * (size_t)(kv * d)), *values = floats(rows * (size_t)(kv * d));
    const em_matrix wq = dense("q", level, heads * d, h), wk = dense("k", level, kv * d, h),
                    wv = dense("v", level, kv * d, h), wo = dense("o", level, h, heads * d);
    const float *cos = blob("cos", NULL), *sin = blob("sin", NULL);

    em_rmsnorm(pool, x, norm, n, h, 1e-6f, normed);
    const em_matrix *qkv[3] = {&wq, &wk, &wv};
    float *const to[3] = {q, keys, values};
    em_linear(pool, normed, n, qkv, to, 3);
    em_rope(pool, q, n, heads, d, cos, sin);
    em_rope(pool, keys, n, kv, d, cos, sin);
    compare("out.q", q);
    em_kv cache = {NULL, EM_KV_F16, kv, d, (n + EM_KV_BLOCK - 1) / EM_KV_BLOCK};
    cache.data =
        (uint8_t *)floats((size_t)(kv * cache.blocks) * em_kv_block_bytes(EM_KV_F16, d) / sizeof(float));
    em_kv_write(pool, &cache, keys, values, n, 0);
    const float scale = 0.22360679774997896f; /* 20 ** -0.5 */
    em_attention(pool, q, &cache, n, heads, 0, 0, scale, NULL, attended);
    compare("out.attended", attended);
    const em_matrix *out[1] = {&wo};
    float *const to_y[1] = {y};
    em_linear(pool, attended, n, out, to_y, 1);
    for (int i = 0; i < n * h; i++) x[i] += y[i];
    compare("out.middle", x);

    em_rmsnorm(pool, x, norm, n, h, 1e-6f, normed);
    float *logits = floats(rows * (size_t)experts), *weights = floats(rows * (size_t)k);
    int32_t *ids = keep(calloc(rows * (size_t)k, 4)), *position = keep(calloc(rows * (size_t)k, 4)),
            *token = keep(calloc(rows * (size_t)k, 4));
    em_linear_f32(pool, normed, n, blob("router", NULL), experts, h, logits);
    em_route(logits, n, experts, k, 1, ids, weights);
    compare("out.ids", ids);
    compare("out.weights", weights);

    em_job jobs[16] = {0};
    int job_count = 0, pairs = 0;
    const int32_t *levels = blob("expert_levels", NULL);
    const int64_t *offsets = blob("expert.offsets", NULL);
    for (int e = 0; e < experts; e++) {
        em_job job = {.first = pairs};
        for (int p = 0; p < n * k; p++)
            if (ids[p] == e) {
                token[pairs] = p / k;
                position[p] = pairs++;
            }
        job.count = pairs - job.first;
        if (!job.count) continue;
        char name[64];
        snprintf(name, sizeof name, "expert%d", e);
        job.gate = matrix(name, offsets, 4, 0, levels[e], 0, inter, h);
        job.up = matrix(name, offsets, 4, 1, levels[e], 0, inter, h);
        job.down[0] = matrix(name, offsets, 4, 2, levels[e], 1, h, ahead);
        job.down[1] = matrix(name, offsets, 4, 3, levels[e], 0, h, inter - ahead);
        job.downs = 2;
        jobs[job_count++] = job;
    }
    float *pair_out = floats((size_t)pairs * (size_t)h);
    em_experts(pool, normed, n, jobs, job_count, token, pairs, pair_out);
    compare("out.pairs", pair_out);
    em_combine(pool, pair_out, position, weights, n, k, h, y);
    for (int i = 0; i < n * h; i++) x[i] += y[i];
    compare("out.x", x);
    mix(pool, n, k, experts, h, inter, ahead, normed, ids, weights);
    em_pool_free(pool);
    replay_at_once(threads);
    while (taken_count) free(taken[--taken_count]);
}

int main(int argc, char **argv) {
    FILE *f = argc == 2 ? fopen(argv[1], "rb") : NULL;
    if (!f) {
        fprintf(stderr, "usage: test_layer RECORDING\n");
        return 2;
    }
    file = malloc(1 << 24);
    if (!file) return 2;
    file_size = fread(file, 1, 1 << 24, f);
    fclose(f);
    for (int i = 0; i < em_isa_count(); i++) {
        const em_isa *isa = em_isa_at(i);
        if (!isa->supported()) {
            printf("skipped: %s (this machine lacks it)\n", isa->name);
            continue;
        }
        em_isa_set(isa);
        for (int threads = 1; threads <= 3; threads++) replay(threads);
        printf("ran: %s\n", isa->name);
    }
    free(file);
    printf("%d failures\n", failures);
    return failures != 0;
}
