/* What the tests of the read queue share: a file, reads of it as those of a store, engines. */
#ifndef READER_CHECK_H
#define READER_CHECK_H

#define _GNU_SOURCE
#include "check.h"
#include "edgemoe.h"
#include "reader_core.h"

#include <errno.h>
#include <stdatomic.h>
#include <time.h>
#include <unistd.h>

enum { BLOCK = EM_READER_BLOCK, MAX_READS = 512, GUARD = 0xa5 };

int (*em_reader_fault)(uint64_t position, size_t *most);

typedef struct {
    int fd;
    uint8_t *bytes;
    size_t size;
} test_file;

static inline test_file new_file(size_t size) {
    test_file f = {.bytes = need(size), .size = size};
    for (size_t i = 0; i < size; i++) f.bytes[i] = (uint8_t)next();
    char name[] = "/tmp/test_reader.XXXXXX";
    f.fd = mkstemp(name);
    if (f.fd < 0 || unlink(name) || write(f.fd, f.bytes, size) != (ssize_t)size) abort();
    if (fsync(f.fd)) abort();
    return f;
}

static inline void free_file(test_file *f) {
    close(f->fd);
    free(f->bytes);
}

static inline em_reader_options options(int engine) {
    return (em_reader_options){
        .engine = engine, .depth = 4, .capacity = MAX_READS, .direct = 1, .chunk = (size_t)64 << 10};
}

static inline em_reader *open_reader(const test_file *f, const em_reader_options *o) {
    em_reader *r = NULL;
    CHECK(em_reader_new(f->fd, o, &r) == 0);
    if (!r) abort();
    return r;
}

/* Reads of a file and the memory they go to, guarded around every room. */
typedef struct {
    em_read read[MAX_READS];
    size_t n;
    uint8_t *memory;
    size_t bytes;
} batch;

/* Segments of about `size` bytes from `from` on, as in a store: one behind the other, each at a multiple of
 * `alignment`; now and then one is left out. */
static inline batch *segments(const test_file *f, size_t n, size_t size, size_t alignment) {
    batch *b = need(sizeof *b);
    size_t at = 2 * BLOCK, place = BLOCK;
    for (size_t i = 0; i < n; i++) {
        const size_t bytes = 1 + next() % (2 * size);
        if (at + bytes > f->size) break;
        const size_t room = (bytes + alignment - 1) / alignment * alignment;
        b->read[b->n++] = (em_read){.offset = at,
                                    .size = bytes,
                                    .room = room,
                                    .dest = (void *)place,
                                    .tag = 1000 + i,
                                    .crc32c = em_crc32c(0, f->bytes + at, bytes)};
        at += room * (next() % 8 ? 1 : 2);
        place += room + (next() % 3 ? 0 : alignment);
    }
    b->bytes = place + BLOCK;
    if (posix_memalign((void **)&b->memory, BLOCK, b->bytes)) abort();
    memset(b->memory, GUARD, b->bytes);
    for (size_t i = 0; i < b->n; i++) b->read[i].dest = b->memory + (size_t)b->read[i].dest;
    return b;
}

static inline void free_batch(batch *b) {
    free(b->memory);
    free(b);
}

static inline int guards_hold(const batch *b) {
    const uint8_t *at = b->memory;
    for (size_t i = 0; i <= b->n; i++) {
        const uint8_t *end = i < b->n ? b->read[i].dest : b->memory + b->bytes;
        for (; at < end; at++)
            if (*at != GUARD) return 0;
        if (i < b->n) at = end + b->read[i].room;
    }
    return 1;
}

static inline int arrived(const test_file *f, const em_read *w) {
    return same(w->dest, f->bytes + w->offset, (size_t)w->size);
}

/* Collects all and counts those that are not EM_READ_OK; whoever is OK has its bytes. */
static inline size_t collect(em_reader *r, const test_file *f, const batch *b) {
    size_t bad = 0, seen = 0;
    em_read_done d;
    while (em_reader_wait(r, NULL, 20, &d) == EM_READER_OK) {
        seen++;
        CHECK(d.tag >= 1000 && d.tag < 1000 + MAX_READS);
        if (d.status != EM_READ_OK)
            bad++;
        else
            for (size_t i = 0; i < b->n; i++)
                if (b->read[i].tag == d.tag) CHECK(arrived(f, &b->read[i]));
    }
    CHECK(seen == b->n);
    CHECK(guards_hold(b));
    return bad;
}

static inline void rest(double seconds) {
    const struct timespec t = {(time_t)seconds, (long)((seconds - (double)(time_t)seconds) * 1e9)};
    nanosleep(&t, NULL);
}

/* Runs the tests on one file with each engine that there is; the exit status. */
static inline int on_each_engine(void (*tests)(int engine, const test_file *f)) {
    test_file f = new_file((size_t)4 << 20);
    for (int engine = EM_ENGINE_URING; engine <= EM_ENGINE_THREADS; engine++) {
        em_reader *r;
        const em_reader_options o = options(engine);
        const int error = em_reader_new(f.fd, &o, &r);
        CHECK(!error || engine == EM_ENGINE_URING);
        if (error) {
            printf("io_uring is not tested: %s\n", strerror(error));
            continue;
        }
        em_reader_free(r);
        tests(engine, &f);
    }
    free_file(&f);
    printf("%d checks, %d failures\n", checks, failures);
    return failures != 0;
}

#endif
