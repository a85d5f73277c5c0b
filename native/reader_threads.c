/* Reads by a thread each, with preadv. */
#include "reader_core.h"

#include <errno.h>
#include <stdlib.h>

/* Threads beyond those that read: the device shall not wait for work while checksums are computed. */
enum { VERIFIERS = 2 };

typedef struct {
    int started;
    pthread_t *threads;
} em_threads;

typedef struct {
    em_reader *r;
    em_op *op;
} em_thread_arg;

static void read_all(em_reader *r, em_op *op) {
    ssize_t got;
    do {
        uint64_t position;
        size_t most = op->length;
        int fault = EM_FAULT(op->offset + op->arrived, &most);
        const int fd = em_op_aim(r, op, most, &position);
        if (fd < 0) fault = ENOMEM;
        got = fault ? -fault : preadv(fd, op->iov, op->iovs, (off_t)position);
        if (!fault && got < 0) got = -errno;
    } while (!em_op_result(r, op, got));
}

static void wait_until(em_reader *r, uint64_t until) {
    if (!until) {
        pthread_cond_wait(&r->work, &r->lock);
        return;
    }
    const struct timespec at = {(time_t)(until / 1000000000u), (long)(until % 1000000000u)};
    pthread_cond_timedwait(&r->work, &r->lock, &at);
}

static void *thread_main(void *raw) {
    const em_thread_arg arg = *(em_thread_arg *)raw;
    em_reader *r = arg.r;
    em_op *op = arg.op;
    free(raw);
    pthread_mutex_lock(&r->lock);
    while (!r->quit) {
        uint64_t until;
        if (!em_op_take(r, op, &until)) {
            wait_until(r, until);
            continue;
        }
        /* Whoever takes work wakes the next: no more threads run than have something to read. */
        if (r->waiting.next != &r->waiting) pthread_cond_signal(&r->work);
        pthread_mutex_unlock(&r->lock);
        read_all(r, op);
        pthread_mutex_lock(&r->lock);
        em_op_landed(r, op);
        pthread_mutex_unlock(&r->lock);
        em_op_finish(r, op);
        pthread_mutex_lock(&r->lock);
    }
    pthread_mutex_unlock(&r->lock);
    return NULL;
}

static void threads_stop(em_reader *r) {
    em_threads *t = r->engine_data;
    if (!t) return;
    for (int i = 0; i < t->started; i++) pthread_join(t->threads[i], NULL);
    free(t->threads);
    free(t);
    r->engine_data = NULL;
}

static int threads_start(em_reader *r) {
    const int count = r->options.depth + VERIFIERS;
    em_threads *t = calloc(1, sizeof *t);
    if (!t) return ENOMEM;
    r->engine_data = t;
    t->threads = calloc((size_t)count, sizeof *t->threads);
    int error = t->threads ? em_ops_new(r, count) : ENOMEM;
    pthread_attr_t small;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, EM_READER_STACK);
    for (int i = 0; !error && i < count; i++) {
        em_thread_arg *arg = malloc(sizeof *arg);
        if (!arg) {
            error = ENOMEM;
            break;
        }
        *arg = (em_thread_arg){r, r->ops[i]};
        error = pthread_create(&t->threads[i], &small, thread_main, arg);
        if (error)
            free(arg);
        else
            t->started++;
    }
    pthread_attr_destroy(&small);
    if (error) {
        pthread_mutex_lock(&r->lock);
        r->quit = 1;
        pthread_cond_broadcast(&r->work);
        pthread_mutex_unlock(&r->lock);
        threads_stop(r);
    }
    return error;
}

static void threads_wake(em_reader *r) {
    if (r->quit)
        pthread_cond_broadcast(&r->work);
    else
        pthread_cond_signal(&r->work);
}

const em_engine em_engine_threads = {"threads", threads_start, threads_wake, threads_stop};
