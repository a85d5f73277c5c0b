/* C tests of the read queue when reads fail, stop short or bring the wrong bytes. */
#include "reader_check.h"

/* Faults, each by the number of the call. */
static atomic_int calls, fault_at, fault_error;

static int fail_one(uint64_t position, size_t *most) {
    (void)position, (void)most;
    return atomic_fetch_add(&calls, 1) == atomic_load(&fault_at) ? atomic_load(&fault_error) : 0;
}

static int shorten(uint64_t position, size_t *most) {
    const int call = atomic_fetch_add(&calls, 1);
    if (call % 5 == 4) return EINTR;
    if (call % 11 == 10) return EAGAIN;
    /* A file system stops at a block in direct reads; otherwise anywhere. */
    const size_t unit = atomic_load(&fault_at) ? 512 : 1, n = (1 + position / 7 % 40) * unit;
    if (n < *most && call % 3) *most = n;
    return 0;
}

static void set_fault(int (*fault)(uint64_t, size_t *), int at, int error) {
    atomic_store(&calls, 0);
    atomic_store(&fault_at, at);
    atomic_store(&fault_error, error);
    em_reader_fault = fault;
}

static void test_short_reads(int engine, const test_file *f) {
    for (int direct = 0; direct < 2; direct++)
        for (size_t alignment = 64; alignment <= BLOCK; alignment *= 64) {
            em_reader_options o = options(engine);
            o.direct = direct;
            batch *b = segments(f, 40, 3000, alignment);
            set_fault(shorten, direct, 0);
            em_reader *r = open_reader(f, &o);
            em_reader_stats before, stats;
            em_reader_get_stats(r, &before);
            CHECK(em_reader_submit(r, b->read, b->n, 0) == EM_READER_OK);
            CHECK(collect(r, f, b) == 0);
            em_reader_get_stats(r, &stats);
            CHECK(stats.retries > 0 && stats.direct == before.direct);
            em_reader_free(r);
            set_fault(NULL, 0, 0);
            free_batch(b);
        }
}

/* The N-th call fails, for every N: what it was to bring is told, all else arrives. */
static void test_errors(int engine, const test_file *f) {
    const int errors[] = {EIO, EINTR, EINVAL};
    for (int e = 0; e < 3; e++)
        for (int n = 0;; n++) {
            em_reader_options o = options(engine);
            batch *b = segments(f, 30, 40000, n % 2 ? 64 : BLOCK);
            set_fault(fail_one, n, errors[e]);
            em_reader *r = open_reader(f, &o);
            em_reader_stats stats;
            em_reader_get_stats(r, &stats);
            const int direct = stats.direct;
            CHECK(em_reader_submit(r, b->read, b->n, 0) == EM_READER_OK);
            size_t bad = 0, seen = 0;
            em_read_done d;
            for (; em_reader_wait(r, NULL, 20, &d) == EM_READER_OK; seen++) {
                const em_read *w = &b->read[d.tag - 1000];
                if (d.status == EM_READ_OK) {
                    CHECK(arrived(f, w));
                    continue;
                }
                bad++;
                CHECK(d.status == EM_READ_FAILED && d.error == errors[e]);
                CHECK(d.at >= w->offset && d.at < w->offset + w->size);
            }
            const int reached = atomic_load(&calls) > n;
            em_reader_get_stats(r, &stats);
            em_reader_free(r);
            set_fault(NULL, 0, 0);
            CHECK(seen == b->n && guards_hold(b));
            free_batch(b);
            if (!reached) {
                CHECK(bad == 0 && n > 10);
                break;
            }
            if (errors[e] == EIO) CHECK(bad > 0);
            if (errors[e] == EINTR) CHECK(bad == 0 && stats.retries > 0);
            /* Direct reads refused: the file is read through the cache from then on. */
            if (errors[e] == EINVAL && direct) CHECK(bad == 0 && !stats.direct);
        }
}

static int always_again(uint64_t position, size_t *most) {
    (void)position, (void)most;
    return EAGAIN;
}

static void test_no_progress(int engine, const test_file *f) {
    em_reader_options o = options(engine);
    batch *b = segments(f, 3, 3000, 64);
    set_fault(always_again, 0, 0);
    em_reader *r = open_reader(f, &o);
    CHECK(em_reader_submit(r, b->read, b->n, 0) == EM_READER_OK);
    CHECK(collect(r, f, b) == b->n);
    em_reader_free(r);
    set_fault(NULL, 0, 0);
    free_batch(b);
}

/* Once a piece of a read has failed, what is left of it is not read. */
static void test_rest_is_dropped(int engine, const test_file *f) {
    em_reader_options o = options(engine);
    o.depth = 1;
    batch *b = segments(f, 1, 10, BLOCK);
    uint8_t *memory = need((size_t)1 << 20);
    const em_read big = {.size = 1 << 20, .room = 1 << 20, .dest = memory, .tag = 1};
    set_fault(fail_one, 1, EIO);
    em_reader *r = open_reader(f, &o);
    em_read_done d;
    CHECK(em_reader_submit(r, &big, 1, 0) == EM_READER_OK);
    CHECK(em_reader_wait(r, NULL, 20, &d) == EM_READER_OK);
    CHECK(d.status == EM_READ_FAILED && d.error == EIO && d.at >= o.chunk && d.at < 2 * o.chunk);
    CHECK(em_reader_submit(r, b->read, b->n, 0) == EM_READER_OK);
    CHECK(collect(r, f, b) == 0);
    CHECK(atomic_load(&calls) < 8); /* one or two may have begun before the failure was known */
    em_reader_free(r);
    set_fault(NULL, 0, 0);
    free(memory);
    free_batch(b);
}

static void test_truncated(int engine) {
    for (int direct = 0; direct < 2; direct++)
        for (size_t alignment = 64; alignment <= BLOCK; alignment *= 64) {
            test_file f = new_file((size_t)1 << 20);
            em_reader_options o = options(engine);
            o.direct = direct;
            batch *b = segments(&f, 40, 120000, alignment);
            em_reader *r = open_reader(&f, &o);
            const uint64_t cut = b->read[b->n / 2].offset + b->read[b->n / 2].size / 2;
            if (ftruncate(f.fd, (off_t)cut)) abort();
            CHECK(em_reader_submit(r, b->read, b->n, 0) == EM_READER_OK);
            em_read_done d;
            while (em_reader_wait(r, NULL, 20, &d) == EM_READER_OK) {
                const em_read *w = &b->read[d.tag - 1000];
                const int whole = w->offset + w->size <= cut;
                CHECK(d.status == (whole ? EM_READ_OK : EM_READ_TRUNCATED));
                if (whole)
                    CHECK(arrived(&f, w));
                else if (w->offset < cut)
                    CHECK(d.at == cut);
            }
            em_reader_free(r);
            free_batch(b);
            free_file(&f);
        }
}

static void test_damaged(int engine, const test_file *f) {
    const em_reader_options o = options(engine);
    batch *b = segments(f, 20, 90000, BLOCK);
    b->read[3].crc32c ^= 1;
    em_reader *r = open_reader(f, &o);
    CHECK(em_reader_submit(r, b->read, b->n, 0) == EM_READER_OK);
    for (size_t i = 0; i < b->n; i++) {
        em_read_done d;
        CHECK(em_reader_wait(r, &b->read[i].tag, 20, &d) == EM_READER_OK);
        CHECK(d.tag == b->read[i].tag && d.status == (i == 3 ? EM_READ_DAMAGED : EM_READ_OK));
        if (i == 3) CHECK(d.at == b->read[i].offset);
    }
    em_reader_free(r);
    free_batch(b);
}

static void tests(int engine, const test_file *f) {
    test_short_reads(engine, f);
    test_errors(engine, f);
    test_no_progress(engine, f);
    test_rest_is_dropped(engine, f);
    test_truncated(engine);
    test_damaged(engine, f);
}

int main(void) { return on_each_engine(tests); }
