/* What the C tests share: checks that are counted, random numbers, memory. */
#ifndef CHECK_H
#define CHECK_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int checks, failures;

#define CHECK(condition)                                                                                     \
    do {                                                                                                     \
        checks++;                                                                                            \
        if (!(condition)) {                                                                                  \
            if (failures++ < 20) printf("%s:%d: failed: %s\n", __FILE__, __LINE__, #condition);              \
        }                                                                                                    \
    } while (0)

static uint64_t state = 0x9e3779b97f4a7c15u;

static uint32_t next(void) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)(state >> 32);
}

static float uniform(float low, float high) { return low + (high - low) * (float)next() * 2.3283064e-10f; }

static void *need(size_t bytes) {
    void *p = calloc(1, bytes ? bytes : 1);
    if (!p) abort();
    return p;
}

static inline float *floats(size_t n, float low, float high) {
    float *x = need(n * sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = uniform(low, high);
    return x;
}

static int same(const void *a, const void *b, size_t bytes) { return memcmp(a, b, bytes) == 0; }

#endif
