#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "edgemoe.h"

/* Long enough to bridge the gap between two operations of one token, short enough that an idle
 * process costs nothing that shows. */
enum { SPINS = 4000 };

struct em_pool {
    int threads;
    pthread_t *workers;
    int started;
    pthread_mutex_t op;    /* held for a whole operation: one at a time */
    pthread_mutex_t sleep; /* guards the condition below */
    pthread_cond_t wake;
    pthread_cond_t done;
    atomic_uint generation; /* rises by one with every run */
    atomic_int next;        /* next task to claim */
    atomic_int busy;        /* workers that have not finished this run */
    atomic_int quit;
    em_task fn;
    void *ctx;
    int tasks;
    void *scratch;
    size_t scratch_bytes;
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

static void work(em_pool *p, int worker) {
    for (;;) {
        const int task = atomic_fetch_add_explicit(&p->next, 1, memory_order_relaxed);
        if (task >= p->tasks) return;
        p->fn(p->ctx, task, worker);
    }
}

static void *worker_main(void *raw) {
    worker_arg arg = *(worker_arg *)raw;
    free(raw);
    em_pool *p = arg.pool;
    unsigned seen = 0;
    for (;;) {
        int spins = 0;
        while (atomic_load_explicit(&p->generation, memory_order_acquire) == seen) {
            if (++spins < SPINS) {
                relax();
                continue;
            }
            pthread_mutex_lock(&p->sleep);
            while (atomic_load_explicit(&p->generation, memory_order_acquire) == seen)
                pthread_cond_wait(&p->wake, &p->sleep);
            pthread_mutex_unlock(&p->sleep);
        }
        seen++;
        if (atomic_load_explicit(&p->quit, memory_order_relaxed)) return NULL;
        work(p, arg.index);
        if (atomic_fetch_sub_explicit(&p->busy, 1, memory_order_acq_rel) == 1) {
            /* Under the mutex, for the same reason as in announce. */
            pthread_mutex_lock(&p->sleep);
            pthread_cond_signal(&p->done);
            pthread_mutex_unlock(&p->sleep);
        }
    }
}

static void announce(em_pool *p) {
    /* Under the mutex, so that a worker between its last look and its wait cannot miss it. */
    pthread_mutex_lock(&p->sleep);
    atomic_fetch_add_explicit(&p->generation, 1, memory_order_release);
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->sleep);
}

em_pool *em_pool_new(int threads) {
    em_pool *p = calloc(1, sizeof *p);
    if (!p) return NULL;
    p->threads = threads;
    pthread_mutex_init(&p->op, NULL);
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
    announce(p);
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
    atomic_store_explicit(&p->next, 0, memory_order_relaxed);
    atomic_store_explicit(&p->busy, p->started, memory_order_relaxed);
    announce(p);
    work(p, 0);
    for (int spins = 0; spins < SPINS; spins++) {
        if (!atomic_load_explicit(&p->busy, memory_order_acquire)) return;
        relax();
    }
    pthread_mutex_lock(&p->sleep);
    while (atomic_load_explicit(&p->busy, memory_order_acquire)) pthread_cond_wait(&p->done, &p->sleep);
    pthread_mutex_unlock(&p->sleep);
}

void *em_pool_scratch(em_pool *p, size_t bytes) {
    if (bytes > p->scratch_bytes) {
        void *fresh = NULL;
        if (posix_memalign(&fresh, 64, (bytes + 63) & ~(size_t)63)) return NULL;
        free(p->scratch);
        p->scratch = fresh;
        p->scratch_bytes = bytes;
    }
    return p->scratch;
}
