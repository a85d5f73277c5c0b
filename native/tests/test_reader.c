/* C tests of the read queue: the same bytes from both engines, order, cancelling, closing, many callers. */
#include "reader_check.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/vfs.h>

static void test_bytes(int engine, const test_file *f) {
    const size_t sizes[] = {100, 5000, 100000}, alignments[] = {64, 512, BLOCK};
    for (int s = 0; s < 3; s++)
        for (int a = 0; a < 3; a++)
            for (int direct = 0; direct < 2; direct++)
                for (int depth = 1; depth <= 8; depth += 7) {
                    em_reader_options o = options(engine);
                    o.depth = depth;
                    o.direct = direct;
                    o.chunk = s == 1 ? BLOCK : (size_t)64 << 10;
                    batch *b = segments(f, 60, sizes[s], alignments[a]);
                    em_reader *r = open_reader(f, &o);
                    CHECK(em_reader_submit(r, b->read, b->n, 0) == EM_READER_OK);
                    CHECK(collect(r, f, b) == 0);
                    em_reader_stats stats;
                    em_reader_get_stats(r, &stats);
                    uint64_t wanted = 0;
                    for (size_t i = 0; i < b->n; i++) wanted += b->read[i].size;
                    CHECK(stats.bytes_read >= wanted && stats.bytes_verified == wanted);
                    CHECK(stats.in_flight == 0 && stats.waiting == 0 && stats.busy_s > 0);
                    CHECK(direct || (!stats.direct && !stats.bytes_copied));
                    /* What is aligned is read to its place; small neighbours in one read. */
                    if (alignments[a] == BLOCK) CHECK(stats.bytes_copied == 0);
                    if (s == 0) CHECK(stats.reads < b->n);
                    if (s == 2) CHECK(stats.reads > b->n);
                    em_reader_free(r);
                    free_batch(b);
                }
}

/* A gate that reads wait at; what passed it, in order. */
static atomic_int gate_open, passed;
static uint64_t order[MAX_READS];

static int gate(uint64_t position, size_t *most) {
    (void)most;
    order[atomic_fetch_add(&passed, 1) % MAX_READS] = position;
    while (!atomic_load(&gate_open)) rest(0.001);
    return 0;
}

static void close_gate(void) {
    atomic_store(&gate_open, 0);
    atomic_store(&passed, 0);
    em_reader_fault = gate;
}

static void await_passed(int n) {
    for (int i = 0; i < 10000 && atomic_load(&passed) < n; i++) rest(0.001);
    CHECK(atomic_load(&passed) >= n);
}

static void test_order(int engine, const test_file *f) {
    em_reader_options o = options(engine);
    o.depth = 1;
    uint8_t *memory = need((size_t)16 * 8192);
    em_read w[10];
    for (size_t i = 0; i < 10; i++) /* apart, so that each is a read of its own */
        w[i] = (em_read){.offset = 3 * BLOCK * (i + 1),
                         .size = 100,
                         .room = 100,
                         .dest = memory + 8192 * i,
                         .tag = i,
                         .crc32c = em_crc32c(0, f->bytes + 3 * BLOCK * (i + 1), 100)};
    close_gate();
    em_reader *r = open_reader(f, &o);
    int waited;
    em_read_done d;
    em_reader_stats stats;
    CHECK(em_reader_submit(r, w, 1, 5) == EM_READER_OK);
    await_passed(1);
    CHECK(em_reader_submit(r, w + 1, 3, 5) == EM_READER_OK); /* 1 2 3 */
    CHECK(em_reader_submit(r, w + 4, 3, 2) == EM_READER_OK); /* 4 5 6, before them */
    CHECK(em_reader_submit(r, w + 7, 1, 9) == EM_READER_OK); /* 7 last */
    CHECK(em_reader_submit(r, w + 5, 2, 0) == EM_READER_DUPLICATE);
    CHECK(em_reader_cancel(r, 2, &waited) == EM_READER_OK && waited);
    CHECK(em_reader_cancel(r, 0, &waited) == EM_READER_OK && !waited);
    CHECK(em_reader_cancel(r, 99, &waited) == EM_READER_UNKNOWN);
    CHECK(em_reader_reprioritise(r, 3, -1, &waited) == EM_READER_OK && waited);
    CHECK(em_reader_reprioritise(r, 4, 5, &waited) == EM_READER_OK && waited);
    CHECK(em_reader_reprioritise(r, 1, 2, &waited) == EM_READER_OK && waited); /* as submitted: before 5 */
    CHECK(em_reader_reprioritise(r, 0, -9, &waited) == EM_READER_OK && !waited);
    CHECK(em_reader_wait(r, &w[0].tag, 0.02, &d) == EM_READER_TIMEOUT);
    CHECK(em_reader_wait(r, NULL, 0, &d) == EM_READER_TIMEOUT);
    CHECK(em_reader_wait(r, &w[2].tag, 1, &d) == EM_READER_UNKNOWN);
    em_reader_get_stats(r, &stats);
    CHECK(stats.in_flight == 1 && stats.waiting == 6 && stats.oldest_s > 0.01 && stats.waited_s > 0.01);
    atomic_store(&gate_open, 1);
    const size_t want[] = {0, 3, 1, 5, 6, 4, 7};
    for (size_t i = 0; i < 7; i++) CHECK(em_reader_wait(r, &w[want[i]].tag, 20, &d) == EM_READER_OK);
    for (size_t i = 0; i < 7; i++) CHECK(order[i] == w[want[i]].offset / 512 * 512);
    CHECK(atomic_load(&passed) == 7);
    CHECK(em_reader_wait(r, NULL, 1, &d) == EM_READER_UNKNOWN);
    em_reader_free(r);
    em_reader_fault = NULL;
    free(memory);
}

/* Neighbours of one priority are read at once; those of another by themselves. */
static void test_neighbours(int engine, const test_file *f) {
    em_reader_options o = options(engine);
    o.depth = 1;
    uint8_t *memory = NULL;
    if (posix_memalign((void **)&memory, BLOCK, (size_t)5 * BLOCK)) abort();
    em_read w[5];
    for (size_t i = 0; i < 5; i++) {
        const size_t at = (i ? 3 + i : 0) * BLOCK, size = BLOCK - 100;
        const uint32_t crc = em_crc32c(0, f->bytes + at, size);
        w[i] = (em_read){at, size, BLOCK, memory + i * BLOCK, i, crc};
    }
    close_gate();
    em_reader *r = open_reader(f, &o);
    CHECK(em_reader_submit(r, w, 1, 0) == EM_READER_OK);
    await_passed(1);
    CHECK(em_reader_submit(r, w + 1, 2, 0) == EM_READER_OK);
    CHECK(em_reader_submit(r, w + 3, 1, 1) == EM_READER_OK);
    CHECK(em_reader_submit(r, w + 4, 1, 1) == EM_READER_OK);
    atomic_store(&gate_open, 1);
    em_read_done d;
    while (em_reader_wait(r, NULL, 20, &d) == EM_READER_OK)
        CHECK(d.status == EM_READ_OK && arrived(f, &w[d.tag]));
    CHECK(atomic_load(&passed) == 3 && order[1] == w[1].offset && order[2] == w[3].offset);
    em_reader_free(r);
    em_reader_fault = NULL;
    free(memory);
}

/* As many reads are in flight as asked for: each waits for the others. */
static void test_depth(const test_file *f) {
    const em_reader_options o = options(EM_ENGINE_THREADS);
    batch *b = segments(f, 20, 100000, BLOCK);
    close_gate();
    em_reader *r = open_reader(f, &o);
    CHECK(em_reader_submit(r, b->read, b->n, 0) == EM_READER_OK);
    await_passed(o.depth);
    rest(0.02);
    CHECK(atomic_load(&passed) == o.depth);
    atomic_store(&gate_open, 1);
    CHECK(collect(r, f, b) == 0);
    em_reader_free(r);
    em_reader_fault = NULL;
    free_batch(b);
}

/* What was read through the page cache is not left there. */
static void test_cache(int engine) {
    test_file f = new_file((size_t)1 << 20);
    struct statfs fs;
    em_reader_options o = options(engine);
    o.direct = 0;
    uint8_t *memory = need(f.size);
    const em_read all = {0, f.size, f.size, memory, 1, em_crc32c(0, f.bytes, f.size)};
    /* Large pages of another's cannot be dropped piece by piece. */
    if (posix_fadvise(f.fd, 0, 0, POSIX_FADV_DONTNEED)) abort();
    em_reader *r = open_reader(&f, &o);
    em_read_done d;
    CHECK(em_reader_submit(r, &all, 1, 0) == EM_READER_OK);
    CHECK(em_reader_wait(r, NULL, 20, &d) == EM_READER_OK && d.status == EM_READ_OK);
    unsigned char resident[256];
    void *map = mmap(NULL, f.size, PROT_READ, MAP_SHARED, f.fd, 0);
    if (map == MAP_FAILED || mincore(map, f.size, resident) || fstatfs(f.fd, &fs)) abort();
    size_t left = 0;
    for (size_t i = 0; i < f.size / BLOCK; i++) left += resident[i] & 1;
    if (fs.f_type != TMPFS_MAGIC) CHECK(left == 0);
    munmap(map, f.size);
    em_reader_free(r);
    free(memory);
    free_file(&f);
}

/* The reader if its read 1 could be taken back. */
static void *cancel_main(void *r) {
    int waited = 0;
    rest(0.02);
    return em_reader_cancel(r, 1, &waited) == EM_READER_OK && waited ? r : NULL;
}

/* Who waits for a read that is taken back hears of it. */
static void test_cancelled_while_waited_for(int engine, const test_file *f) {
    em_reader_options o = options(engine);
    o.depth = 1;
    uint8_t byte[2];
    const em_read w[2] = {{0, 1, 1, byte, 0, em_crc32c(0, f->bytes, 1)}, {99999, 1, 1, byte + 1, 1, 0}};
    close_gate();
    em_reader *r = open_reader(f, &o);
    CHECK(em_reader_submit(r, w, 1, 0) == EM_READER_OK);
    await_passed(1);
    CHECK(em_reader_submit(r, w + 1, 1, 0) == EM_READER_OK);
    pthread_t thread;
    if (pthread_create(&thread, NULL, cancel_main, r)) abort();
    const uint64_t begun = em_now_ns();
    em_read_done d;
    CHECK(em_reader_wait(r, &w[1].tag, 20, &d) == EM_READER_UNKNOWN);
    CHECK(em_now_ns() - begun < 10000000000u);
    void *cancelled;
    pthread_join(thread, &cancelled);
    CHECK(cancelled == r);
    atomic_store(&gate_open, 1);
    em_reader_free(r);
    em_reader_fault = NULL;
}

/* One read has been begun, wholly or the first of its pieces; two wait. */
static void test_cancel_all(int engine, const test_file *f) {
    em_reader_options o = options(engine);
    o.depth = 1;
    uint8_t *memory = NULL;
    if (posix_memalign((void **)&memory, BLOCK, 4 * o.chunk)) abort();
    for (size_t pieces = 1; pieces <= 2; pieces++) {
        em_read w[3];
        for (size_t i = 0; i < 3; i++) {
            const size_t bytes = i ? o.chunk : pieces * o.chunk, at = 4 * o.chunk * i;
            uint8_t *dest = memory + (i ? (i + 1) * o.chunk : 0);
            w[i] = (em_read){at, bytes, bytes, dest, i, em_crc32c(0, f->bytes + at, bytes)};
        }
        close_gate();
        em_reader *r = open_reader(f, &o);
        const uint64_t before = em_monotonic_ns();
        CHECK(em_reader_submit(r, w, 3, 0) == EM_READER_OK);
        await_passed(1);
        uint64_t tags[3];
        size_t n;
        CHECK(em_reader_cancel_all(r, tags, 3, &n) == EM_READER_OK);
        CHECK(n == 2 && tags[0] == 1 && tags[1] == 2);
        em_read_done d;
        for (size_t i = 1; i < 3; i++) CHECK(em_reader_wait(r, &w[i].tag, 1, &d) == EM_READER_UNKNOWN);
        atomic_store(&gate_open, 1);
        CHECK(em_reader_wait(r, NULL, 20, &d) == EM_READER_OK && d.tag == 0);
        CHECK(before < d.begun_ns && d.begun_ns < d.ended_ns && d.ended_ns <= em_monotonic_ns());
        if (pieces == 1)
            CHECK(d.status == EM_READ_OK && arrived(f, w));
        else
            CHECK(d.status == EM_READ_FAILED && d.error == ECANCELED && d.at == w[0].offset + o.chunk);
        CHECK(atomic_load(&passed) == 1);
        CHECK(em_reader_submit(r, w, 3, 0) == EM_READER_OK);
        while (em_reader_wait(r, NULL, 20, &d) == EM_READER_OK)
            CHECK(d.status == EM_READ_OK && arrived(f, &w[d.tag]));
        CHECK(atomic_load(&passed) == (int)(1 + pieces + 2));
        em_reader_close(r);
        CHECK(em_reader_cancel_all(r, tags, 3, &n) == EM_READER_CLOSED && n == 0);
        em_reader_free(r);
    }
    em_reader_fault = NULL;
    free(memory);
}

static void test_refusals(int engine, const test_file *f) {
    em_reader_options o = options(engine);
    em_reader *r = NULL;
    const int bad_depths[] = {0, -1, EM_READER_MAX_DEPTH + 1};
    for (int i = 0; i < 3; i++) {
        o.depth = bad_depths[i];
        CHECK(em_reader_new(f->fd, &o, &r) == EINVAL);
    }
    o = options(engine);
    o.chunk = BLOCK + 512;
    CHECK(em_reader_new(f->fd, &o, &r) == EINVAL);
    o = options(engine);
    CHECK(em_reader_new(-1, &o, &r) == EBADF);
    o.capacity = 2;
    r = open_reader(f, &o);
    uint8_t byte[8];
    em_read w[3] = {{.size = 4, .room = 4, .dest = byte, .tag = 1, .crc32c = em_crc32c(0, f->bytes, 4)}};
    w[2] = w[1] = w[0];
    w[1].tag = 2, w[2].tag = 3;
    CHECK(em_reader_submit(r, w, 3, 0) == EM_READER_FULL);
    const em_read none = {.dest = byte, .tag = 1}, tight = {.size = 4, .room = 3, .dest = byte, .tag = 1};
    const em_read far = {.offset = UINT64_MAX - 2, .size = 4, .room = 4, .dest = byte, .tag = 1};
    CHECK(em_reader_submit(r, &none, 1, 0) == EM_READER_INVALID);
    CHECK(em_reader_submit(r, &tight, 1, 0) == EM_READER_INVALID);
    CHECK(em_reader_submit(r, &far, 1, 0) == EM_READER_INVALID);
    w[1].tag = 1;
    CHECK(em_reader_submit(r, w, 2, 0) == EM_READER_DUPLICATE);
    em_read_done d;
    CHECK(em_reader_wait(r, NULL, 1, &d) == EM_READER_UNKNOWN); /* nothing of all that was queued */
    CHECK(em_reader_submit(r, w, 1, 0) == EM_READER_OK);
    CHECK(em_reader_wait(r, NULL, 20, &d) == EM_READER_OK && d.tag == 1 && same(byte, f->bytes, 4));
    em_reader_free(r);
}

static int delay(uint64_t position, size_t *most) {
    (void)position, (void)most;
    atomic_fetch_add(&passed, 1);
    rest(0.02);
    return 0;
}

static void *close_main(void *r) {
    em_reader_close(r);
    return NULL;
}

/* Closed twice at once, with reads in flight, and the memory freed at once: the sanitizer sees who writes to
 * it. */
static void test_close(int engine, const test_file *f) {
    for (int wait_first = 0; wait_first < 2; wait_first++) {
        const em_reader_options o = options(engine);
        batch *b = segments(f, 60, 50000, wait_first ? 64 : BLOCK);
        atomic_store(&passed, 0);
        em_reader_fault = delay;
        em_reader *r = open_reader(f, &o);
        CHECK(em_reader_submit(r, b->read, b->n, 0) == EM_READER_OK);
        if (wait_first) await_passed(2);
        pthread_t other;
        if (pthread_create(&other, NULL, close_main, r)) abort();
        rest(0.005);
        em_reader_close(r);
        free_batch(b);
        pthread_join(other, NULL);
        em_read_done d;
        em_read one = {.size = 1, .room = 1, .dest = &d, .tag = 1};
        int waited;
        CHECK(em_reader_wait(r, NULL, 1, &d) == EM_READER_CLOSED);
        CHECK(em_reader_submit(r, &one, 1, 0) == EM_READER_CLOSED);
        CHECK(em_reader_cancel(r, 1000, &waited) == EM_READER_CLOSED);
        em_reader_stats stats;
        em_reader_get_stats(r, &stats);
        CHECK(stats.in_flight == 0);
        em_reader_close(r);
        em_reader_free(r);
        em_reader_fault = NULL;
    }
}

static void test_limit(int engine, const test_file *f) {
    em_reader_options o = options(engine);
    o.bytes_per_second = 10e6;
    batch *b = segments(f, 40, 50000, BLOCK);
    em_reader *r = open_reader(f, &o);
    const uint64_t begun = em_now_ns();
    CHECK(em_reader_submit(r, b->read, b->n, 0) == EM_READER_OK);
    CHECK(collect(r, f, b) == 0);
    const double took = (double)(em_now_ns() - begun) * 1e-9;
    em_reader_stats stats;
    em_reader_get_stats(r, &stats);
    /* The last read begins when all before it are paid for, less what may be caught up on. */
    const double due = ((double)stats.bytes_read - (double)o.chunk) / o.bytes_per_second - 0.02;
    CHECK(due > 0.05 && took >= due);
    em_reader_free(r);
    free_batch(b);
}

/* Two threads submit, cancel and collect by tag on one reader. */
typedef struct {
    em_reader *r;
    const test_file *f;
    batch *b;
    uint64_t first_tag;
    int bad;
} client;

static void *client_main(void *raw) {
    client *c = raw;
    for (size_t i = 0; i < c->b->n; i++) c->b->read[i].tag = c->first_tag + i;
    for (int round = 0; round < 5; round++) {
        for (size_t i = 0; i < c->b->n; i++)
            c->bad += em_reader_submit(c->r, &c->b->read[i], 1, (int64_t)i % 3) != EM_READER_OK;
        for (size_t i = 0; i < c->b->n; i++) {
            const em_read *w = &c->b->read[i];
            int waited = 0;
            em_read_done d;
            if (i % 4 == 1) c->bad += em_reader_cancel(c->r, w->tag, &waited) != EM_READER_OK;
            if (i % 4 == 2) c->bad += em_reader_reprioritise(c->r, w->tag, -1, &waited) != EM_READER_OK;
            if (i % 4 == 1 && waited) continue;
            c->bad += em_reader_wait(c->r, &w->tag, 20, &d) != EM_READER_OK || d.status != EM_READ_OK;
            c->bad += !arrived(c->f, w);
        }
    }
    return NULL;
}

static void test_clients(int engine, const test_file *f) {
    const em_reader_options o = options(engine);
    em_reader *r = open_reader(f, &o);
    client clients[3];
    pthread_t threads[3];
    for (int i = 0; i < 3; i++) {
        clients[i] = (client){r, f, segments(f, 50, 20000, i ? BLOCK : 64), 1000 * (uint64_t)i, 0};
        if (pthread_create(&threads[i], NULL, client_main, &clients[i])) abort();
    }
    em_reader_stats stats;
    for (int i = 0; i < 20; i++) em_reader_get_stats(r, &stats);
    for (int i = 0; i < 3; i++) {
        pthread_join(threads[i], NULL);
        CHECK(clients[i].bad == 0 && guards_hold(clients[i].b));
        free_batch(clients[i].b);
    }
    em_reader_free(r);
}

/* Long runs of bytes are summed another way than short ones. */
static void test_checksums(void) {
    const size_t size = (size_t)1 << 20;
    uint8_t *bytes = need(size + 7);
    for (size_t i = 0; i < size + 7; i++) bytes[i] = (uint8_t)next();
    for (size_t n = 1; n <= size; n += n / 3 + 1) {
        const uint8_t *p = bytes + n % 7;
        uint32_t crc = 0;
        for (size_t at = 0; at < n; at += 1000) crc = em_crc32c(crc, p + at, n - at < 1000 ? n - at : 1000);
        CHECK(em_crc32c(0, p, n) == crc);
    }
    free(bytes);
}

static void tests(int engine, const test_file *f) {
    test_bytes(engine, f);
    test_order(engine, f);
    test_neighbours(engine, f);
    test_cache(engine);
    test_cancelled_while_waited_for(engine, f);
    test_cancel_all(engine, f);
    test_refusals(engine, f);
    test_close(engine, f);
    test_limit(engine, f);
    test_clients(engine, f);
    if (engine == EM_ENGINE_THREADS) test_depth(f); /* the gate holds io_uring's one thread */
}

int main(void) {
    test_checksums();
    return on_each_engine(tests);
}
