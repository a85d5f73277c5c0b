#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "ops_common.h"

/* Looks at what is waited for before going to sleep. A worker's bridge what happens between two operations
 * and, in Python, two layers: some hundred microseconds, which an idle process does not show. A caller's
 * bridge the last task of a run; where that takes longer, its worker needs the processor more than the caller
 * does. */
enum { WORKER_SPINS = 8000, CALLER_SPINS = 1000 };

/* A run is its tasks: whoever takes the last one ends it, and a worker that sleeps or was put off the
 * processor is not waited for. What every thread writes has a cache line to itself. */
struct em_pool {
    int threads;
    pthread_t *workers;
    int started;
    pthread_mutex_t op;    /* held for a whole operation, and by those it is made of */
    pthread_mutex_t sleep; /* guards the conditions below */
    pthread_cond_t wake;
    pthread_cond_t done;
    atomic_int quit;
    em_task fn;
    void *ctx;
    int tasks;
    char *scratch;
    size_t scratch_bytes, held;
    _Alignas(64) atomic_int left; /* tasks that nobody has taken; below zero if many looked */
    _Alignas(64) atomic_int unfinished;
    _Alignas(64) atomic_int sleepers;
};

typedef struct {
    em_pool *pool;
    int index;
} worker_arg;

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Takes tasks until none is left; the number done. What em_pool_run wrote is read only once a task is taken:
 * until that is done, the run cannot end and nothing of it changes. */
static int work(em_pool *p, int worker) {
    for (int done = 0;; done++) {
        const int left = atomic_fetch_sub_explicit(&p->left, 1, memory_order_acq_rel);
        if (left <= 0) return done;
        p->fn(p->ctx, p->tasks - left, worker);
    }
}

static int nothing_to_do(em_pool *p) { return atomic_load(&p->left) <= 0 && !atomic_load(&p->quit); }

static void *worker_main(void *raw) {
    worker_arg arg = *(worker_arg *)raw;
    free(raw);
    em_pool *p = arg.pool;
    for (;;) {
        for (int spins = 0; spins < WORKER_SPINS && nothing_to_do(p); spins++) relax();
        if (nothing_to_do(p)) {
            pthread_mutex_lock(&p->sleep);
            /* First this is told, then looked for work; em_pool_run does it the other way round. */
            atomic_fetch_add(&p->sleepers, 1);
            while (nothing_to_do(p)) pthread_cond_wait(&p->wake, &p->sleep);
            atomic_fetch_sub(&p->sleepers, 1);
            pthread_mutex_unlock(&p->sleep);
        }
        if (atomic_load(&p->quit)) return NULL;
        const int done = work(p, arg.index);
        if (done && atomic_fetch_sub(&p->unfinished, done) == done) {
            /* Under the mutex, so that a caller between its last look and its wait cannot miss it. */
            pthread_mutex_lock(&p->sleep);
            pthread_cond_signal(&p->done);
            pthread_mutex_unlock(&p->sleep);
        }
    }
}

static void wake_all(em_pool *p) {
    if (!atomic_load(&p->sleepers)) return;
    pthread_mutex_lock(&p->sleep);
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->sleep);
}

em_pool *em_pool_new(int threads) {
    em_pool *p = aligned_alloc(64, sizeof *p);
    if (!p) return NULL;
    memset(p, 0, sizeof *p);
    p->threads = threads;
    pthread_mutexattr_t again;
    pthread_mutexattr_init(&again);
    pthread_mutexattr_settype(&again, PTHREAD_MUTEX_RECURSIVE);
    pthread_mutex_init(&p->op, &again);
    pthread_mutexattr_destroy(&again);
    pthread_mutex_init(&p->sleep, NULL);
    pthread_cond_init(&p->wake, NULL);
    pthread_cond_init(&p->done, NULL);
    p->workers = calloc((size_t)threads, sizeof *p->workers);
    int ok = p->workers != NULL;
    for (int i = 1; ok && i < threads; i++) {
        worker_arg *arg = malloc(sizeof *arg);
        if (!arg) {
            ok = 0;
            break;
        }
        *arg = (worker_arg){p, i};
        if (pthread_create(&p->workers[p->started], NULL, worker_main, arg)) {
            free(arg);
            ok = 0;
            break;
        }
        p->started++;
    }
    if (!ok) {
        em_pool_free(p);
        return NULL;
    }
    return p;
}

void em_pool_free(em_pool *p) {
    if (!p) return;
    atomic_store(&p->quit, 1);
    wake_all(p);
    for (int i = 0; i < p->started; i++) pthread_join(p->workers[i], NULL);
    pthread_cond_destroy(&p->done);
    pthread_cond_destroy(&p->wake);
    pthread_mutex_destroy(&p->sleep);
    pthread_mutex_destroy(&p->op);
    free(p->workers);
    free(p->scratch);
    free(p);
}

int em_pool_threads(const em_pool *p) { return p->threads; }
size_t em_pool_scratch_bytes(const em_pool *p) { return p->scratch_bytes; }
void em_pool_lock(em_pool *p) { pthread_mutex_lock(&p->op); }
void em_pool_unlock(em_pool *p) { pthread_mutex_unlock(&p->op); }

void em_pool_run(em_pool *p, em_task fn, void *ctx, int tasks) {
    if (tasks <= 0) return;
    if (tasks == 1 || p->started == 0) {
        for (int i = 0; i < tasks; i++) fn(ctx, i, 0);
        return;
    }
    p->fn = fn;
    p->ctx = ctx;
    p->tasks = tasks;
    atomic_store_explicit(&p->unfinished, tasks, memory_order_relaxed);
    atomic_store(&p->left, tasks);
    wake_all(p);
    const int done = work(p, 0);
    if (atomic_fetch_sub(&p->unfinished, done) == done) return;
    for (int spins = 0; spins < CALLER_SPINS; spins++) {
        if (!atomic_load_explicit(&p->unfinished, memory_order_acquire)) return;
        relax();
    }
    pthread_mutex_lock(&p->sleep);
    while (atomic_load(&p->unfinished)) pthread_cond_wait(&p->done, &p->sleep);
    pthread_mutex_unlock(&p->sleep);
}

void *em_pool_scratch(em_pool *p, size_t bytes) {
    const size_t needed = p->held + em_padded(bytes);
    if (needed > p->scratch_bytes) {
        void *fresh = NULL;
        if (p->held || posix_memalign(&fresh, 64, needed)) return NULL;
        free(p->scratch);
        p->scratch = fresh;
        p->scratch_bytes = needed;
    }
    return p->scratch + p->held;
}

void em_pool_hold(em_pool *p, size_t bytes) { p->held = em_padded(bytes); }
