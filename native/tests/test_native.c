/* C tests: every table function of every instruction set equals scalar's bits; pool; arithmetic. */
#include "check.h"
#include "edgemoe.h"
#include "em_math.h"
#include <math.h>
#include <stdatomic.h>

static void test_half(void) {
    for (uint32_t h = 0; h < 0x10000; h++) {
        const uint32_t exponent = h >> 10 & 31, mantissa = h & 1023;
        const float sign = h & 0x8000 ? -1.0f : 1.0f;
        const float got = em_half_to_float((uint16_t)h);
        if (exponent == 31) {
            CHECK(mantissa ? isnan(got) : isinf(got) && got * sign > 0);
        } else {
            const float want = exponent ? ldexpf(1.0f + (float)mantissa / 1024.0f, (int)exponent - 15)
                                        : ldexpf((float)mantissa / 1024.0f, -14);
            CHECK(got == sign * want);
        }
    }
}

/* Every float16 survives; what lies between two goes to the nearer, the even one of a tie. */
static void test_to_half(void) {
    for (uint32_t h = 0; h < 0x10000; h++) {
        const float x = em_half_to_float((uint16_t)h), next_x = em_half_to_float((uint16_t)(h + 1));
        if ((h & 0x7fff) > 0x7c00) { /* NaN, of any kind */
            const uint16_t got = em_float_to_half(x);
            CHECK((got & 0x7e00) == 0x7e00 && (got & 0x8000) == (h & 0x8000));
        } else if ((h & 0x7fff) == 0x7c00) {
            CHECK(em_float_to_half(x) == (h & 0x8000) + 0x7bff);
        } else {
            CHECK(em_float_to_half(x) == h);
            if ((h & 0x7fff) == 0x7bff) continue;
            const float tie = 0.5f * x + 0.5f * next_x;
            CHECK(em_float_to_half(tie) == (h & 1 ? h + 1 : h));
            CHECK(em_float_to_half(nextafterf(tie, x)) == h);
            CHECK(em_float_to_half(nextafterf(tie, next_x)) == h + 1);
        }
    }
    CHECK(em_float_to_half(65519.0f) == 0x7bff && em_float_to_half(65520.0f) == 0x7bff);
    CHECK(em_float_to_half(1e30f) == 0x7bff && em_float_to_half(-1e30f) == 0xfbff);
    CHECK(em_float_to_half(1e-30f) == 0 && em_float_to_half(-1e-30f) == 0x8000);
}

static void test_exp(void) {
    for (int i = 0; i <= 200000; i++) {
        const float x = -87.0f + 175.0f * (float)i / 200000.0f;
        const double want = exp((double)x);
        CHECK(fabs((double)em_expf(x) - want) <= 3e-7 * want);
    }
    CHECK(em_expf(0.0f) == 1.0f);
    CHECK(em_expf(-1e30f) < 1e-37f);
    CHECK(isfinite(em_expf(1e30f)));
}

static void test_crc(void) {
    const char *text = "123456789";
    CHECK(em_crc32c(0, text, 9) == 0xe3069283u);
    CHECK(em_crc32c(em_crc32c(0, text, 4), text + 4, 5) == 0xe3069283u);
    CHECK(em_crc32c(0, text, 0) == 0);
}

static atomic_int hits[1000], stray_workers;

static void count_task(void *ctx, int task, int worker) {
    if (worker < 0 || worker >= *(int *)ctx) atomic_fetch_add(&stray_workers, 1);
    atomic_fetch_add(&hits[task], 1);
}

static void test_pool(void) {
    for (int threads = 1; threads <= 5; threads++) {
        em_pool *p = em_pool_new(threads);
        CHECK(p && em_pool_threads(p) == threads);
        if (!p) return;
        for (int round = 0; round < 300; round++) {
            const int tasks = (int)(next() % 1000);
            for (int i = 0; i < 1000; i++) atomic_store(&hits[i], 0);
            em_pool_run(p, count_task, &threads, tasks);
            int wrong = 0;
            for (int i = 0; i < 1000; i++) wrong += atomic_load(&hits[i]) != (i < tasks);
            CHECK(wrong == 0 && atomic_load(&stray_workers) == 0);
        }
        void *a = em_pool_scratch(p, 100);
        CHECK(a && (uintptr_t)a % 64 == 0);
        CHECK(em_pool_scratch(p, 50) == a);
        CHECK(em_pool_scratch(p, 1 << 20) && em_pool_scratch_bytes(p) == 1 << 20);
        char *all = em_pool_scratch(p, 1 << 20);
        em_pool_hold(p, 100);
        CHECK(em_pool_scratch(p, 50) == all + 128);
        CHECK(em_pool_scratch(p, 1 << 20) == NULL); /* would move what is held */
        em_pool_hold(p, 0);
        CHECK(em_pool_scratch(p, 50) == all);
        em_pool_lock(p), em_pool_lock(p); /* an operation made of others */
        em_pool_unlock(p), em_pool_unlock(p);
        em_pool_free(p);
    }
}

typedef struct {
    em_matrix w;
    uint8_t *bytes[EM_LEVELS + 4];
} random_matrix;

static random_matrix make(int rows, int cols, int group_units, int level) {
    static const size_t cell[EM_LEVELS] = {64, 32, 32, 64, 64};
    random_matrix m = {.w = {.level = level, .rows = rows, .cols = cols, .group_units = group_units}};
    m.w.units = (cols + EM_UNIT - 1) / EM_UNIT;
    m.w.groups = (m.w.units + group_units - 1) / group_units;
    const size_t blocks = (size_t)(rows + EM_ROW_BLOCK - 1) / EM_ROW_BLOCK;
    for (int s = 0; s <= level; s++) {
        const size_t n = blocks * (size_t)m.w.units * cell[s];
        m.bytes[s] = need(n);
        const int extreme = next() % 3 == 0;
        for (size_t i = 0; i < n; i++) m.bytes[s][i] = extreme ? 0xff : (uint8_t)next();
        m.w.plane[s] = m.bytes[s];
    }
    const size_t padded = blocks * EM_ROW_BLOCK, steps = padded * (size_t)m.w.groups * 2;
    uint8_t *exponent = m.bytes[EM_LEVELS] = need(padded);
    uint8_t *step = m.bytes[EM_LEVELS + 1] = need(steps);
    for (size_t i = 0; i < padded; i++) exponent[i] = (uint8_t)(100 + next() % 8);
    for (size_t i = 0; i < steps; i++) step[i] = (uint8_t)next();
    m.w.exponent = exponent;
    m.w.step = step;
    if (level < EM_LEVELS - 1) {
        uint8_t *shift = m.bytes[EM_LEVELS + 2] = need(steps / 4);
        for (size_t i = 0; i < steps / 4; i++) shift[i] = (uint8_t)next();
        m.w.shift = shift;
    }
    return m;
}

static void drop(random_matrix *m) {
    for (int i = 0; i < EM_LEVELS + 3; i++) free(m->bytes[i]);
}

static size_t acts_units(const em_acts *a) {
    return (size_t)a->tokens * (size_t)a->groups * (size_t)a->group_units;
}

static em_acts make_acts(const em_matrix *w, int n) {
    em_acts a = {.tokens = n, .units = w->units, .groups = w->groups, .group_units = w->group_units};
    a.q = need(acts_units(&a) * EM_UNIT);
    a.scale = need(acts_units(&a) * sizeof(float));
    a.gx = need((size_t)n * (size_t)w->groups * sizeof(float));
    return a;
}

static void drop_acts(em_acts *a) {
    free(a->q);
    free(a->scale);
    free(a->gx);
}

static void test_products(const em_isa *isa, int rows, int cols, int group_units, int n) {
    const em_isa *plain = &em_isa_scalar;
    for (int level = 0; level < EM_LEVELS; level++) {
        random_matrix m = make(rows, cols, group_units, level);
        float *x = floats((size_t)n * (size_t)cols, -3, 3);
        for (int i = 0; i < cols; i++) x[i] = next() & 1 ? 2.0f : -2.0f; /* all codes +-127 */
        em_acts a = make_acts(&m.w, n), b = make_acts(&m.w, n);
        for (int i = 0; i < n; i++) {
            plain->quantize(x + (size_t)i * (size_t)cols, cols, &a, i);
            isa->quantize(x + (size_t)i * (size_t)cols, cols, &b, i);
        }
        CHECK(same(a.q, b.q, acts_units(&a) * EM_UNIT));
        CHECK(same(a.scale, b.scale, acts_units(&a) * sizeof(float)));
        CHECK(same(a.gx, b.gx, (size_t)n * (size_t)a.groups * sizeof(float)));
        const int blocks = (rows + EM_ROW_BLOCK - 1) / EM_ROW_BLOCK;
        const size_t padded = (size_t)blocks * EM_ROW_BLOCK;
        const size_t dots = (size_t)n * padded * (size_t)m.w.units;
        int32_t *ia = need(dots * 4), *ib = need(dots * 4);
        plain->accumulate(&m.w, 0, blocks, &a, n, ia);
        isa->accumulate(&m.w, 0, blocks, &a, n, ib);
        CHECK(same(ia, ib, dots * 4));
        const size_t outs = (size_t)n * (size_t)rows;
        float *ya = need(outs * 4), *yb = need(outs * 4);
        plain->matmul(&m.w, 0, blocks, &a, NULL, n, ya, (size_t)rows);
        isa->matmul(&m.w, 0, blocks, &a, NULL, n, yb, (size_t)rows);
        CHECK(same(ya, yb, outs * 4));
        for (int i = 0; i < n; i++) { /* one by one, through an index */
            const int32_t idx = i;
            isa->matmul(&m.w, 0, blocks, &a, &idx, 1, yb, (size_t)rows);
            CHECK(same(ya + (size_t)i * (size_t)rows, yb, (size_t)rows * 4));
        }
        int32_t *back = need((size_t)n * sizeof *back); /* all at once, in falling order */
        for (int i = 0; i < n; i++) back[i] = n - 1 - i;
        isa->matmul(&m.w, 0, blocks, &a, back, n, yb, (size_t)rows);
        for (int i = 0; i < n; i++)
            CHECK(same(ya + (size_t)back[i] * (size_t)rows, yb + (size_t)i * (size_t)rows, (size_t)rows * 4));
        free(back);
        if (blocks > 1) { /* a chunk of rows lands at the start */
            const size_t live = (size_t)(rows - EM_ROW_BLOCK);
            isa->matmul(&m.w, 1, blocks, &a, NULL, 1, yb, live);
            CHECK(same(ya + EM_ROW_BLOCK, yb, live * 4));
        }
        free(ia), free(ib), free(ya), free(yb), free(x);
        drop_acts(&a), drop_acts(&b);
        drop(&m);
    }
}

static void test_floats(const em_isa *isa, int n) {
    const em_isa *plain = &em_isa_scalar;
    float *a = floats((size_t)n, -9, 9), *b = floats((size_t)n, -2, 2);
    float *c = need((size_t)n * 4), *d = need((size_t)n * 4);
    const float dot_a = plain->dot(a, b, n), dot_b = isa->dot(a, b, n);
    CHECK(same(&dot_a, &dot_b, 4));
    plain->scale_mul(a, 0.3f, b, n, c);
    isa->scale_mul(a, 0.3f, b, n, d);
    CHECK(same(c, d, (size_t)n * 4));
    memcpy(c, a, (size_t)n * 4);
    memcpy(d, a, (size_t)n * 4);
    plain->silu_mul(c, b, n);
    isa->silu_mul(d, b, n);
    CHECK(same(c, d, (size_t)n * 4));
    free(a), free(b), free(c), free(d);
}

/* No product of the peak is left out; its rate is one. */
static void test_peak(const em_isa *isa) {
    static const int values[3][2] = {{15, 127}, {15, -127}, {7, 3}};
    for (int i = 0; i < 3; i++)
        for (int rounds = 0; rounds < 6000; rounds += 1999) {
            const uint32_t each = (uint32_t)(values[i][0] * values[i][1]);
            CHECK(isa->peak(values[i][0], values[i][1], rounds) ==
                  (uint32_t)rounds * EM_PEAK_PRODUCTS * each);
        }
    const em_isa *before = em_isa_current();
    em_isa_set(isa);
    em_pool *p = em_pool_new(2);
    if (!p) abort();
    const double rate = em_int8_peak(p, 0.002);
    CHECK(rate > 1e6 && rate < 1e15);
    em_pool_free(p);
    em_isa_set(before);
}

/* Every GGML type: blocks of equal bytes give the values worked out by hand, one decode of many
 * blocks equals many of one, at any address and number of threads, and nothing beyond is written. */
static void test_ggml(void) {
    static const struct {
        const char *name;
        float ones;  /* weight 0 of a block of bytes 0x11 but scales 0.5 and minima 0.25 */
        int half[2]; /* where scale and minimum lie; -1: no such field */
    } expected[] = {
        {"F32", 0x1.222222p-93f, {-1, -1}},
        {"F16", 0.5f, {0, -1}},
        {"BF16", 0x1.22p-93f, {-1, -1}},
        {"Q8_0", 8.5f, {0, -1}},
        {"Q6_K", -127.5f, {208, -1}},
        {"Q5_K", 140.25f, {0, 2}},
        {"Q4_K", 4.25f, {0, 2}},
        {"Q3_K", -7.5f, {108, -1}},
        {"Q2_K", 0.25f, {80, 82}},
        {"Q4_0", -3.5f, {0, -1}},
        {"Q4_1", 0.75f, {0, 2}},
        {"Q5_0", 0.5f, {0, -1}},
        {"Q5_1", 8.75f, {0, 2}},
        {"IQ4_NL", -52.0f, {0, -1}},
        {"MXFP4", 0x1p-111f, {-1, -1}},
    };
    CHECK(em_ggml_count() == sizeof expected / sizeof expected[0]);
    CHECK(em_ggml_find("Q4_k") == NULL);
    em_pool *one = em_pool_new(1), *three = em_pool_new(3);
    if (!one || !three) abort();
    for (int i = 0; i < em_ggml_count(); i++) {
        const em_ggml_type *type = em_ggml_at(i);
        const size_t bytes = (size_t)type->bytes, weights = (size_t)type->weights;
        const size_t blocks = 100000 / weights + 1, n = blocks * weights;
        CHECK(em_ggml_find(expected[i].name) == type);
        uint8_t *data = need(blocks * bytes + 1), *odd = data + 1;
        for (size_t at = 0; at < blocks * bytes; at++) odd[at] = at < bytes ? 0x11 : (uint8_t)next();
        for (int f = 0; f < 2; f++)
            for (size_t b = 0; b < blocks && expected[i].half[f] >= 0; b++) {
                const uint16_t half = f ? 0x3400 : 0x3800;
                memcpy(odd + b * bytes + (size_t)expected[i].half[f], &half, sizeof half);
            }
        float *a = need((n + 1) * 4), *c = need(n * 4);
        a[n] = 3.0f;
        em_dequantize(three, type, odd, blocks, a);
        em_dequantize(one, type, odd, blocks, c);
        CHECK(same(a, c, n * 4));
        CHECK(a[n] == 3.0f);
        CHECK(a[0] == expected[i].ones);
        for (size_t b = 0; b < blocks; b++) type->decode(odd + b * bytes, 1, c + b * weights);
        CHECK(same(a, c, n * 4));
        free(data), free(a), free(c);
    }
    em_pool_free(one), em_pool_free(three);
}

static void test_route(void) {
    const float logits[6] = {1, 3, 3, -2, 3, 0};
    int32_t ids[4];
    float w[4];
    em_route(logits, 1, 6, 4, 1, ids, w);
    CHECK(ids[0] == 1 && ids[1] == 2 && ids[2] == 4 && ids[3] == 0);
    CHECK(w[0] == w[1] && w[1] == w[2] && w[2] > w[3]);
    CHECK(fabsf(w[0] + w[1] + w[2] + w[3] - 1.0f) < 1e-6f);
}

int main(void) {
    test_half();
    test_to_half();
    test_exp();
    test_crc();
    test_pool();
    test_route();
    test_ggml();
    CHECK(em_isa_find("scalar") == &em_isa_scalar);
    CHECK(em_isa_find("nosuch") == NULL);
    for (int i = 0; i < em_isa_count(); i++) {
        const em_isa *isa = em_isa_at(i);
        if (!isa->supported()) {
            printf("skipped: %s (this machine lacks it)\n", isa->name);
            continue;
        }
        test_products(isa, 8, 32, 4, 1);
        test_products(isa, 13, 37, 4, 3);
        test_products(isa, 1, 1, 1, 2);
        test_products(isa, 65, 704, 4, 70);
        test_products(isa, 24, 288, 8, 5);
        test_products(isa, 76, 160, 3, 17); /* more row blocks than a tile, groups of odd length */
        for (int n = 1; n < 130; n++) test_floats(isa, n);
        test_peak(isa);
        printf("ran: %s\n", isa->name);
    }
    printf("%d checks, %d failures\n", checks, failures);
    return failures != 0;
}
