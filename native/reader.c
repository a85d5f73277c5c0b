/* The queue of reads: requests by tag, their order, what is done, who waits. */
#include "reader_core.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* The clock of timed waits. */
#ifdef __APPLE__
#define CLOCK CLOCK_REALTIME
#else
#define CLOCK CLOCK_MONOTONIC
#endif

/* Longest wait of one call: a time that every clock can hold. */
#define MAX_WAIT_S 1e8

uint64_t em_now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

uint64_t em_monotonic_ns(void) {
#ifdef __APPLE__
    return clock_gettime_nsec_np(CLOCK_UPTIME_RAW);
#else
    return em_now_ns();
#endif
}

void em_list_remove(em_request *q) {
    q->prev->next = q->next;
    q->next->prev = q->prev;
}

static void insert_after(em_request *at, em_request *q) {
    q->prev = at;
    q->next = at->next;
    at->next->prev = q;
    at->next = q;
}

void em_list_append(em_request *head, em_request *q) { insert_after(head->prev, q); }

static em_request **bucket(em_reader *r, uint64_t tag) {
    const uint64_t mixed = tag * 0x9e3779b97f4a7c15u;
    return &r->buckets[(mixed >> 32) & r->bucket_mask];
}

static em_request *find(em_reader *r, uint64_t tag) {
    em_request *q = *bucket(r, tag);
    while (q && q->want.tag != tag) q = q->chain;
    return q;
}

/* The request is in no list any more. */
static void forget(em_reader *r, em_request *q) {
    em_request **at = bucket(r, q->want.tag);
    while (*at != q) at = &(*at)->chain;
    *at = q->chain;
    q->state = EM_FREE;
    q->next = r->unused;
    r->unused = q;
    r->outstanding--;
}

/* Most come in order: the place is looked for from the end. */
static void enqueue(em_reader *r, em_request *q) {
    em_request *at = r->waiting.prev;
    while (at != &r->waiting &&
           (at->priority > q->priority || (at->priority == q->priority && at->serial > q->serial)))
        at = at->prev;
    insert_after(at, q);
    q->queued = 1;
}

static int valid(const em_read *w) {
    return w->size && w->dest && w->room >= w->size && w->size <= (uint64_t)INT64_MAX - EM_READER_BLOCK &&
           w->offset <= (uint64_t)INT64_MAX - EM_READER_BLOCK - w->size;
}

static void take_back(em_reader *r, size_t n, const em_read *reads) {
    for (size_t i = 0; i < n; i++) forget(r, find(r, reads[i].tag));
}

int em_reader_submit(em_reader *r, const em_read *reads, size_t n, int64_t priority) {
    for (size_t i = 0; i < n; i++)
        if (!valid(&reads[i])) return EM_READER_INVALID;
    pthread_mutex_lock(&r->lock);
    int status = EM_READER_OK;
    if (r->closed)
        status = EM_READER_CLOSED;
    else if (n > (size_t)(r->options.capacity - r->outstanding))
        status = EM_READER_FULL;
    for (size_t i = 0; !status && i < n; i++) {
        if (find(r, reads[i].tag)) {
            take_back(r, i, reads);
            status = EM_READER_DUPLICATE;
            break;
        }
        em_request *q = r->unused, **at = bucket(r, reads[i].tag);
        r->unused = q->next;
        *q = (em_request){.chain = *at, .want = reads[i], .priority = priority, .state = EM_WAITING};
        q->done.tag = reads[i].tag;
        *at = q;
        r->outstanding++;
    }
    if (!status && n) {
        for (size_t i = 0; i < n; i++) {
            em_request *q = find(r, reads[i].tag);
            q->serial = r->serial++;
            enqueue(r, q);
        }
        r->untouched += (int)n;
        r->engine->wake(r);
    }
    pthread_mutex_unlock(&r->lock);
    return status;
}

static int withdraw(em_reader *r, uint64_t tag, int *waited, const int64_t *priority) {
    pthread_mutex_lock(&r->lock);
    em_request *q = find(r, tag);
    int status = EM_READER_OK;
    *waited = 0;
    if (r->closed) {
        status = EM_READER_CLOSED;
    } else if (!q) {
        status = EM_READER_UNKNOWN;
    } else if (q->state == EM_WAITING) {
        *waited = 1;
        em_list_remove(q);
        if (priority) {
            q->priority = *priority;
            enqueue(r, q);
        } else {
            r->untouched--;
            forget(r, q);
            pthread_cond_broadcast(&r->done); /* whoever waits for it shall learn that it is gone */
        }
    }
    pthread_mutex_unlock(&r->lock);
    return status;
}

int em_reader_cancel(em_reader *r, uint64_t tag, int *waited) { return withdraw(r, tag, waited, NULL); }

int em_reader_reprioritise(em_reader *r, uint64_t tag, int64_t priority, int *waited) {
    return withdraw(r, tag, waited, &priority);
}

/* What is not in flight of a read that has been begun will not be read. */
static void cut_short(em_reader *r, em_request *q) {
    const uint64_t at = q->want.offset + q->taken;
    em_list_remove(q);
    q->queued = 0;
    q->done.status = EM_READ_FAILED;
    q->done.error = ECANCELED;
    q->done.at = at;
    if (q->open) return; /* reported when that has landed */
    q->state = EM_DONE;
    em_list_append(&r->finished, q);
}

int em_reader_cancel_all(em_reader *r, uint64_t *tags, size_t most, size_t *n) {
    *n = 0;
    pthread_mutex_lock(&r->lock);
    const int status = r->closed ? EM_READER_CLOSED : EM_READER_OK;
    em_request *next;
    for (em_request *q = r->waiting.next; !status && q != &r->waiting; q = next) {
        next = q->next;
        if (q->state == EM_STARTED) {
            cut_short(r, q);
        } else if (*n < most) {
            tags[(*n)++] = q->want.tag;
            em_list_remove(q);
            r->untouched--;
            forget(r, q);
        }
    }
    pthread_cond_broadcast(&r->done);
    pthread_mutex_unlock(&r->lock);
    return status;
}

int em_reader_wait(em_reader *r, const uint64_t *tag, double seconds, em_read_done *out) {
    const double patience = seconds < 0 ? 0 : seconds < MAX_WAIT_S ? seconds : MAX_WAIT_S;
    const uint64_t begun = em_now_ns(), until = begun + (uint64_t)(patience * 1e9);
    const struct timespec at = {(time_t)(until / 1000000000u), (long)(until % 1000000000u)};
    int status, late = patience <= 0;
    pthread_mutex_lock(&r->lock);
    for (;;) {
        em_request *q = tag ? find(r, *tag) : r->finished.next;
        if (r->closed) {
            status = EM_READER_CLOSED;
            break;
        }
        if (!q || !r->outstanding) {
            status = EM_READER_UNKNOWN;
            break;
        }
        if (q->state == EM_DONE) { /* the head of the list never is */
            *out = q->done;
            em_list_remove(q);
            forget(r, q);
            status = EM_READER_OK;
            break;
        }
        if (late) {
            status = EM_READER_TIMEOUT;
            break;
        }
        if (em_op_finish_oldest(r)) {
            /* Without an op its thread could not go on. */
            if (r->idle_count == 1 && r->waiting.next != &r->waiting) r->engine->wake(r);
            continue;
        }
        late = pthread_cond_timedwait(&r->done, &r->lock, &at) == ETIMEDOUT;
    }
    if (patience > 0) r->waited_ns += em_now_ns() - begun;
    pthread_mutex_unlock(&r->lock);
    return status;
}

void em_reader_get_stats(em_reader *r, em_reader_stats *out) {
    pthread_mutex_lock(&r->lock);
    const uint64_t now = em_now_ns();
    *out = r->stats;
    uint64_t busy = r->busy_ns, oldest = now;
    if (r->in_flight) busy += now - r->busy_since_ns;
    for (int i = 0; i < r->op_count; i++)
        if (r->ops[i]->begun_ns && r->ops[i]->begun_ns < oldest) oldest = r->ops[i]->begun_ns;
    out->busy_s = (double)busy * 1e-9;
    out->waited_s = (double)r->waited_ns * 1e-9;
    out->verify_s = (double)r->verify_ns * 1e-9;
    out->oldest_s = (double)(now - oldest) * 1e-9;
    out->memory_bytes += sizeof *r + (size_t)r->op_count * sizeof(em_op) +
                         (size_t)r->options.capacity * sizeof(em_request) +
                         (r->bucket_mask + 1) * sizeof *r->buckets;
    out->in_flight = r->in_flight;
    out->waiting = r->untouched;
    out->direct = atomic_load(&r->direct);
    out->engine = r->engine->name;
    pthread_mutex_unlock(&r->lock);
}

static void init_sync(em_reader *r) {
    pthread_condattr_t timed;
    pthread_condattr_init(&timed);
#ifndef __APPLE__
    pthread_condattr_setclock(&timed, CLOCK);
#endif
    pthread_mutex_init(&r->lock, NULL);
    pthread_cond_init(&r->work, &timed);
    pthread_cond_init(&r->done, &timed);
    pthread_condattr_destroy(&timed);
}

static int init_requests(em_reader *r) {
    size_t buckets = 64;
    while (buckets < (size_t)r->options.capacity) buckets *= 2;
    r->requests = calloc((size_t)r->options.capacity, sizeof *r->requests);
    r->buckets = calloc(buckets, sizeof *r->buckets);
    if (!r->requests || !r->buckets) return ENOMEM;
    r->bucket_mask = buckets - 1;
    r->waiting.prev = r->waiting.next = &r->waiting;
    r->finished.prev = r->finished.next = &r->finished;
    for (int i = r->options.capacity; i--;) {
        r->requests[i].next = r->unused;
        r->unused = &r->requests[i];
    }
    return 0;
}

static int start_engine(em_reader *r) {
    int error = 0;
    if (r->options.engine != EM_ENGINE_THREADS) {
        r->engine = &em_engine_uring;
        error = r->engine->start(r);
        if (!error || r->options.engine == EM_ENGINE_URING) return error;
    }
    r->engine = &em_engine_threads;
    return r->engine->start(r);
}

static void destroy(em_reader *r) {
    em_reader_file_close(&r->file);
    pthread_cond_destroy(&r->done);
    pthread_cond_destroy(&r->work);
    pthread_mutex_destroy(&r->lock);
    for (int i = 0; i < r->op_count; i++) {
        free(r->ops[i]->buffer);
        free(r->ops[i]);
    }
    free(r->buckets);
    free(r->requests);
    free(r);
}

int em_reader_new(int fd, const em_reader_options *o, em_reader **out) {
    if (o->depth < 1 || o->depth > EM_READER_MAX_DEPTH || o->capacity < 1 || !o->chunk ||
        o->chunk % EM_READER_BLOCK || o->chunk > (size_t)1 << 30 || !(o->bytes_per_second >= 0))
        return EINVAL;
    em_reader *r = calloc(1, sizeof *r);
    if (!r) return ENOMEM;
    r->options = *o;
    init_sync(r);
    int error = em_reader_file_open(&r->file, fd, o->direct);
    atomic_store(&r->direct, r->file.direct >= 0);
    if (!error) error = init_requests(r);
    if (!error) error = start_engine(r);
    if (error) {
        destroy(r);
        return error;
    }
    *out = r;
    return 0;
}

void em_reader_close(em_reader *r) {
    pthread_mutex_lock(&r->lock);
    const int first = !r->quit;
    r->quit = 1;
    if (first) r->engine->wake(r);
    /* A second caller may not return before the first has seen the last read land. */
    while (!first && !r->closed) pthread_cond_wait(&r->done, &r->lock);
    pthread_mutex_unlock(&r->lock);
    if (!first) return;
    r->engine->stop(r);
    pthread_mutex_lock(&r->lock);
    while (r->finishing) pthread_cond_wait(&r->done, &r->lock);
    r->closed = 1;
    pthread_cond_broadcast(&r->done);
    pthread_mutex_unlock(&r->lock);
}

void em_reader_free(em_reader *r) {
    if (!r) return;
    em_reader_close(r);
    destroy(r);
}
