/* Plain loops compiled twice: for any x86-64, and for AVX2, taken where the machine has it. */
#ifndef CLONES_H
#define CLONES_H

/* ThreadSanitizer is not up yet when the loader asks which clone to take. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__SANITIZE_THREAD__)
#define VECTOR_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define VECTOR_CLONES
#endif

#endif
