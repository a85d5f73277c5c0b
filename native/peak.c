/* Multiplying integers and nothing else: what a prefill is held against. */
#define _GNU_SOURCE
#include <time.h>

#include "edgemoe.h"

/* Rounds of one task: some 20 microseconds of AVX2, enough to make claiming a task free. */
enum { ROUNDS = 8192, MOST_TASKS = 1 << 24 };

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void peak_task(void *raw, int task, int worker) {
    const em_isa *isa = raw;
    (void)worker;
    isa->peak(15, task % 127 + 1, ROUNDS);
}

double em_int8_peak(em_pool *p, double seconds) {
    em_isa isa = *em_isa_current();
    double took = 0;
    em_pool_lock(p);
    int tasks = em_pool_threads(p);
    for (;; tasks *= 2) { /* the short runs that come first also wake the threads */
        const double start = now();
        em_pool_run(p, peak_task, &isa, tasks);
        took = now() - start;
        if (took >= seconds || tasks >= MOST_TASKS) break;
    }
    em_pool_unlock(p);
    return (double)tasks * ROUNDS * EM_PEAK_PRODUCTS / took;
}
