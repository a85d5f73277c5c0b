/* C tests of attention and its cache: every instruction set gives scalar's bits, whatever the number
 * of threads and however the tokens are cut up, and all are near a plain sum in double precision. */
#include <math.h>
#include <time.h>

#include "check.h"
#include "edgemoe.h"
#include "em_math.h"

static void test_parts(const em_isa *isa) {
    const em_isa *plain = &em_isa_scalar;
    for (int type = EM_KV_F32; type <= EM_KV_I8; type++)
        for (int rows = 1; rows <= 13; rows++)
            for (int depth = 1; depth < 300; depth += depth < 20 ? 1 : 61) {
                const int count = 1 + rows % 3;
                const size_t stride = (size_t)(depth + 2) * EM_KV_PANEL, lda = (size_t)depth + 3,
                             ldc = 16 * 3 + 5;
                const size_t size = type == EM_KV_F32 ? 4 : type == EM_KV_F16 ? 2 : 1;
                uint8_t *b = need(stride * (size_t)count * size);
                for (size_t i = 0; i < stride * (size_t)count; i++) {
                    const float x = uniform(-3, 3);
                    const uint16_t half = em_float_to_half(x);
                    if (type == EM_KV_F32) memcpy(b + 4 * i, &x, 4);
                    if (type == EM_KV_F16) memcpy(b + 2 * i, &half, 2);
                    if (type == EM_KV_I8) b[i] = (uint8_t)next();
                }
                float *a = floats((size_t)rows * lda, -1, 1);
                float *c = floats((size_t)rows * ldc, -1, 1), *d = need((size_t)rows * ldc * 4);
                memcpy(d, c, (size_t)rows * ldc * 4);
                plain->panels(type, a, lda, rows, b, stride, depth, count, c, ldc);
                isa->panels(type, a, lda, rows, b, stride, depth, count, d, ldc);
                CHECK(same(c, d, (size_t)rows * ldc * 4));
                free(a), free(b), free(c), free(d);
            }
    for (int round = 0; round < 2000; round++) {
        float s[2][EM_KV_BLOCK], top[2], scales[2 * EM_KV_BLOCK];
        for (int j = 0; j < EM_KV_BLOCK; j++) s[0][j] = s[1][j] = uniform(-40, 40);
        for (int j = 0; j < 2 * EM_KV_BLOCK; j++) scales[j] = uniform(0, 2);
        int first = (int)(next() % EM_KV_BLOCK),
            last = first + 1 + (int)(next() % (uint32_t)(EM_KV_BLOCK - first));
        if (round % 3 == 0) first = 0, last = EM_KV_BLOCK;
        for (int j = 0; j < EM_KV_BLOCK; j++) /* what is not seen is anything */
            if (j < first || j >= last) s[0][j] = s[1][j] = NAN;
        const float *by = round % 2 ? scales : NULL;
        top[0] = top[1] = round % 5 ? uniform(-40, 40) : -3.4028235e38f;
        const float x = plain->soften(s[0], by, by ? by + EM_KV_BLOCK : NULL, 0.7f, first, last, top);
        const float y = isa->soften(s[1], by, by ? by + EM_KV_BLOCK : NULL, 0.7f, first, last, top + 1);
        CHECK(same(&x, &y, 4) && same(top, top + 1, 4) && isfinite(x));
        CHECK(same(s[0] + first, s[1] + first, (size_t)(last - first) * 4));
    }
    for (uint32_t bits = 0; bits < 0xffff0000u; bits += 0x10000u / 5u * 16u) {
        float x[EM_KV_PANEL];
        uint16_t a[EM_KV_PANEL], b[EM_KV_PANEL];
        for (uint32_t l = 0; l < EM_KV_PANEL; l++) {
            const uint32_t each = bits + l * (0x10000u / 5u);
            memcpy(x + l, &each, 4);
        }
        plain->to_half(x, a);
        isa->to_half(x, b);
        CHECK(same(a, b, sizeof a));
    }
}

typedef struct {
    int type, heads, kv_heads, d, before, n, window;
    float *q, *k, *v, *sinks;
} problem;

static problem make(int type, int heads, int kv_heads, int d, int before, int n, int window, int sinks) {
    const size_t all = (size_t)(before + n);
    problem p = {type, heads, kv_heads, d, before, n, window, NULL, NULL, NULL, NULL};
    p.q = floats((size_t)n * (size_t)(heads * d), -3, 3);
    p.k = floats(all * (size_t)(kv_heads * d), -2, 2);
    p.v = floats(all * (size_t)(kv_heads * d), -2, 2);
    if (sinks) p.sinks = floats((size_t)heads, -3, 3);
    return p;
}

static void drop(problem *p) { free(p->q), free(p->k), free(p->v), free(p->sinks); }

/* Tokens come `step` at a time, after the first `before`. */
static float *solve(const problem *p, em_pool *pool, int step) {
    const int all = p->before + p->n, blocks = (all + EM_KV_BLOCK - 1) / EM_KV_BLOCK;
    const size_t row = (size_t)(p->kv_heads * p->d), bytes = em_kv_block_bytes(p->type, p->d);
    em_kv kv = {NULL, p->type, p->kv_heads, p->d, blocks};
    const size_t size = bytes * (size_t)(p->kv_heads * blocks);
    kv.data = aligned_alloc(64, size);
    if (!kv.data) abort();
    memset(kv.data, 0xff, size); /* NaN, but for int8 codes: must not matter */
    em_kv_write(pool, &kv, p->k, p->v, p->before, 0);
    float *out = need((size_t)p->n * (size_t)(p->heads * p->d) * 4);
    for (int at = 0; at < p->n; at += step) {
        const int n = p->n - at < step ? p->n - at : step, start = p->before + at;
        em_kv_write(pool, &kv, p->k + (size_t)start * row, p->v + (size_t)start * row, n, start);
        const size_t q = (size_t)at * (size_t)(p->heads * p->d);
        CHECK(em_attention(pool, p->q + q, &kv, n, p->heads, start, p->window, 0.11f, p->sinks, out + q) ==
              EM_OK);
        CHECK(em_pool_scratch_bytes(pool) <=
              em_attention_scratch(em_pool_threads(pool), step, p->heads, p->kv_heads, p->d));
    }
    free(kv.data);
    return out;
}

/* Largest difference from sums in double precision over exact keys and values. */
static double error(const problem *p, const float *out) {
    double worst = 0;
    const int d = p->d, all = p->before + p->n;
    double *w = need((size_t)all * sizeof *w);
    for (int i = 0; i < p->n; i++)
        for (int h = 0; h < p->heads; h++) {
            const int g = h / (p->heads / p->kv_heads), last = p->before + i;
            const int first = p->window && last >= p->window ? last - p->window + 1 : 0;
            double top = p->sinks ? (double)p->sinks[h] : -1e300, sum = 0;
            for (int j = first; j <= last; j++) {
                w[j] = 0;
                for (int c = 0; c < d; c++)
                    w[j] += (double)p->q[(i * p->heads + h) * d + c] *
                            (double)p->k[(j * p->kv_heads + g) * d + c];
                w[j] *= (double)0.11f;
                top = w[j] > top ? w[j] : top;
            }
            for (int j = first; j <= last; j++) sum += w[j] = exp(w[j] - top);
            if (p->sinks) sum += exp((double)p->sinks[h] - top);
            for (int c = 0; c < d; c++) {
                double x = 0;
                for (int j = first; j <= last; j++) x += w[j] * (double)p->v[(j * p->kv_heads + g) * d + c];
                x = fabs(x / sum - (double)out[(i * p->heads + h) * d + c]);
                worst = x > worst ? x : worst;
            }
        }
    free(w);
    return worst;
}

static void test_whole(const em_isa *isa, em_pool *const *pools) {
    static const struct {
        int heads, kv_heads, d, before, n, window;
    } cases[] = {{4, 4, 64, 0, 70, 0},    {8, 1, 128, 700, 1, 0},  {6, 2, 80, 300, 9, 290},
                 {3, 1, 20, 250, 12, 5},  {5, 5, 1, 60, 8, 0},     {16, 2, 256, 500, 3, 64},
                 {64, 1, 16, 130, 4, 65}, {2, 2, 72, 63, 66, 300}, {130, 1, 8, 5, 2, 0}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        for (int type = EM_KV_F32; type <= EM_KV_I8; type++) {
            problem p = make(type, cases[i].heads, cases[i].kv_heads, cases[i].d, cases[i].before, cases[i].n,
                             cases[i].window, (int)i % 2);
            const size_t bytes = (size_t)p.n * (size_t)(p.heads * p.d) * 4;
            em_isa_set(&em_isa_scalar);
            float *want = solve(&p, pools[0], p.n);
            const double limit = type == EM_KV_F32 ? 2e-5 : type == EM_KV_F16 ? 4e-3 : 6e-2;
            if (isa == &em_isa_scalar) CHECK(error(&p, want) < limit);
            em_isa_set(isa);
            for (int t = 0; t < 3; t++)
                for (int step = p.n; step > 0; step = step == 1 ? 0 : step > 5 ? 5 : 1) {
                    float *got = solve(&p, pools[t], step);
                    CHECK(same(want, got, bytes));
                    free(got);
                }
            free(want);
            drop(&p);
        }
}

/* int8 rows: scale = max / 127, codes to nearest, ties to even; rows of zeros and of subnormals. */
static void test_codes(void) {
    float k[3 * 16] = {0}, v[3 * 16] = {0};
    for (int c = 0; c < 16; c++) k[c] = (float)c - 7.5f;
    k[0] = -127.0f; /* scale 1: halves are ties */
    for (int c = 0; c < 16; c++) v[c] = (float)c * 1e-45f;
    for (int c = 0; c < 16; c++) k[32 + c] = INFINITY, v[32 + c] = NAN;
    em_pool *pool = em_pool_new(1);
    em_kv kv = {NULL, EM_KV_I8, 1, 16, 1};
    kv.data = need(em_kv_block_bytes(EM_KV_I8, 16));
    CHECK(em_kv_block_bytes(EM_KV_I8, 16) == 64 * 32 + 512);
    em_kv_write(pool, &kv, k, v, 3, 0);
    const float *scales = (const float *)(void *)(kv.data + 64 * 32);
    const int8_t *codes = (const int8_t *)kv.data;
    static const int want[16] = {-127, -6, -6, -4, -4, -2, -2, 0, 0, 2, 2, 4, 4, 6, 6, 8};
    for (int c = 0; c < 16; c++) CHECK(codes[c * EM_KV_PANEL] == want[c]);
    CHECK(scales[0] == 1.0f && scales[1] == 0.0f);
    for (int c = 0; c < 16; c++) CHECK(codes[c * EM_KV_PANEL + 1] == 0);
    for (int c = 0; c < 16; c++) CHECK(abs(codes[64 * 16 + c]) <= 127);
    free(kv.data);
    em_pool_free(pool);
}

static void test_stream(em_pool *pool) {
    const size_t words = 200003;
    uint64_t *data = need(words * 8), sum = 0;
    for (size_t i = 0; i < words; i++) sum += data[i] = (uint64_t)next() << 20;
    CHECK(em_stream_read(pool, data, words * 8) == sum);
    free(data);
}

static void slow_task(void *ctx, int task, int worker) {
    (void)ctx, (void)worker;
    const struct timespec pause = {0, 50 * 1000 * 1000};
    if (task) nanosleep(&pause, NULL);
}

/* Whoever waits for the workers, or for work, uses no time of the processor. */
static void test_waiting(void) {
    em_pool *pool = em_pool_new(3);
    const clock_t start = clock();
    for (int i = 0; i < 5; i++) em_pool_run(pool, slow_task, NULL, 3);
    const struct timespec pause = {0, 250 * 1000 * 1000};
    nanosleep(&pause, NULL);
    /* half a second has gone by; sanitizers and emulation are slow */
    CHECK((double)(clock() - start) / CLOCKS_PER_SEC < 0.2);
    em_pool_free(pool);
}

int main(void) {
    em_pool *pools[3];
    for (int t = 0; t < 3; t++) pools[t] = em_pool_new(t < 2 ? t + 1 : 5);
    test_codes();
    test_stream(pools[2]);
    test_waiting();
    for (int i = 0; i < em_isa_count(); i++) {
        const em_isa *isa = em_isa_at(i);
        if (!isa->supported()) {
            printf("skipped: %s (this machine lacks it)\n", isa->name);
            continue;
        }
        test_parts(isa);
        test_whole(isa, pools);
        printf("ran: %s\n", isa->name);
    }
    for (int t = 0; t < 3; t++) em_pool_free(pools[t]);
    printf("%d checks, %d failures\n", checks, failures);
    return failures != 0;
}
