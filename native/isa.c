#include <stdatomic.h>
#include <string.h>

#include "edgemoe.h"

/* Best first: the first supported one is the default. */
static const em_isa *const all[] = {
#if defined(__x86_64__)
    &em_isa_avx512,
    &em_isa_avx2,
#ifdef EM_SIMDE
    &em_isa_avx512_simde,
#endif
#elif defined(__aarch64__)
    &em_isa_neon_i8mm,
    &em_isa_neon_dotprod,
    &em_isa_neon,
#endif
    &em_isa_scalar,
};

static _Atomic(const em_isa *) current;

int em_isa_count(void) { return (int)(sizeof all / sizeof all[0]); }

const em_isa *em_isa_at(int i) { return all[i]; }

const em_isa *em_isa_find(const char *name) {
    for (int i = 0; i < em_isa_count(); i++)
        if (!strcmp(all[i]->name, name)) return all[i]->supported() ? all[i] : NULL;
    return NULL;
}

void em_isa_set(const em_isa *isa) { atomic_store(&current, isa); }

const em_isa *em_isa_current(void) {
    const em_isa *isa = atomic_load(&current);
    for (int i = 0; !isa; i++)
        if (all[i]->supported()) isa = all[i];
    return isa;
}
