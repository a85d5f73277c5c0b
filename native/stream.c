/* Reading memory and nothing else: what a sweep over weights or keys is held against. */
#include <stdatomic.h>

#include "edgemoe.h"

/* Bytes that one task of em_stream_read adds up. */
#define STREAM_CHUNK ((size_t)1 << 18)

typedef struct {
    const uint64_t *words;
    size_t count;
    atomic_uint_least64_t sum;
} stream_ctx;

static void stream_task(void *raw, int task, int worker) {
    (void)worker;
    stream_ctx *c = raw;
    const size_t chunk = STREAM_CHUNK / sizeof(uint64_t), first = (size_t)task * chunk;
    const size_t end = c->count - first < chunk ? c->count : first + chunk;
    uint64_t sum[16] = {0};
    size_t i = first;
    for (; i + 16 <= end; i += 16)
        for (size_t l = 0; l < 16; l++) sum[l] += c->words[i + l];
    for (; i < end; i++) sum[0] += c->words[i];
    for (size_t l = 1; l < 16; l++) sum[0] += sum[l];
    atomic_fetch_add_explicit(&c->sum, sum[0], memory_order_relaxed);
}

uint64_t em_stream_read(em_pool *p, const void *data, size_t bytes) {
    stream_ctx c = {.words = data, .count = bytes / sizeof(uint64_t)};
    em_pool_lock(p);
    em_pool_run(p, stream_task, &c, (int)((bytes + STREAM_CHUNK - 1) / STREAM_CHUNK));
    em_pool_unlock(p);
    return atomic_load(&c.sum);
}
