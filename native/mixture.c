/* The mixture part of a layer: pairs of a token and an expert grouped, computed and summed up. */
#include "clones.h"
#include "ops_common.h"

enum { COMBINED = 256 }; /* columns that a task of em_combine sums up */

typedef struct {
    const float *pair_out, *weights;
    const int32_t *position;
    int k, hidden, chunks;
    float *y;
} combine_ctx;

VECTOR_CLONES static void add_scaled(float *y, const float *x, float w, int n) {
    for (int i = 0; i < n; i++) y[i] += w * x[i];
}

static void combine_task(void *raw, int task, int worker) {
    (void)worker;
    const combine_ctx *c = raw;
    const size_t token = (size_t)(task / c->chunks), hidden = (size_t)c->hidden;
    const int first = task % c->chunks * COMBINED;
    const int cols = c->hidden - first < COMBINED ? c->hidden - first : COMBINED;
    float *y = c->y + token * hidden + (size_t)first;
    for (int i = 0; i < cols; i++) y[i] = 0.0f;
    for (size_t at = token * (size_t)c->k; at < (token + 1) * (size_t)c->k; at++)
        add_scaled(y, c->pair_out + (size_t)c->position[at] * hidden + (size_t)first, c->weights[at], cols);
}

void em_combine(em_pool *p, const float *pair_out, const int32_t *position, const float *weights, int n,
                int k, int hidden, float *y) {
    combine_ctx c = {pair_out, weights, position, k, hidden, em_ceil_div(hidden, COMBINED), y};
    em_pool_lock(p);
    em_run(p, combine_task, &c, n * c.chunks, (size_t)n * (size_t)k * (size_t)hidden);
    em_pool_unlock(p);
}

typedef struct {
    em_job *jobs;
    int32_t *count, *pair_token, *position;
    float *pair_out;
} mixture;

/* What every call needs: in one call for all jobs `whole`, the sums too. */
static size_t carve(mixture *m, em_carver *c, int n, int k, int jobs, int hidden, int whole) {
    const size_t pairs = (size_t)n * (size_t)k, few = (size_t)jobs < pairs ? (size_t)jobs : pairs;
    m->jobs = em_carve(c, few * sizeof *m->jobs);
    m->count = em_carve(c, (size_t)jobs * sizeof *m->count);
    m->pair_token = em_carve(c, pairs * sizeof *m->pair_token);
    if (whole) {
        m->position = em_carve(c, pairs * sizeof *m->position);
        m->pair_out = em_carve(c, pairs * (size_t)hidden * sizeof *m->pair_out);
    }
    return c->used;
}

static size_t scratch(int threads, int n, int k, int jobs, const em_record *r, int whole) {
    mixture m;
    return carve(&m, &(em_carver){0}, n, k, jobs, r->hidden, whole) +
           em_padded(
               em_experts_scratch(threads, n, n * k, r->hidden, r->intermediate, r->ahead, r->group_units));
}

size_t em_mixture_scratch(int threads, int n, int k, int jobs, int hidden, int intermediate, int ahead,
                          int group_units, int whole) {
    const em_record r = {NULL, 0, hidden, intermediate, ahead, group_units};
    return scratch(threads, n, k, jobs, &r, whole);
}

static int jobs_of(const em_mixture_of *of) { return of->experts * of->depth; }

/* The jobs of all pairs whose job has a count of 0, not less, and where each pair is put, from `first` on;
 * the number of jobs, or a status. */
static int group(mixture *m, const em_mixture_of *of, const int32_t *ids, const int32_t *levels, int pairs,
                 int k, int first) {
    for (int i = 0; i < pairs; i++) {
        if (ids[i] < 0 || ids[i] >= of->experts || levels[i] < 0 || levels[i] >= of->depth)
            return EM_NO_SUCH_EXPERT;
        int32_t *count = &m->count[ids[i] * of->depth + levels[i]];
        if (*count >= 0) ++*count;
    }
    /* Experts ascending: tasks are small, so an order by their pairs would not balance threads better. */
    int jobs = 0, at = 0;
    for (int j = 0; j < jobs_of(of); j++) {
        if (m->count[j] <= 0) continue;
        const int level = j % of->depth;
        const uint64_t *address = of->segments + (size_t)(j - level);
        for (int s = 0; s <= level; s++)
            if (!address[s]) return EM_NO_SUCH_EXPERT;
        em_job *job = &m->jobs[jobs++];
        *job = em_job_at(&of->record, address, level);
        job->first = at;
        job->count = m->count[j];
        m->count[j] = at; /* from here on: where its next pair goes */
        at += job->count;
    }
    for (int i = 0; i < pairs; i++) {
        int32_t *next = &m->count[ids[i] * of->depth + levels[i]];
        if (*next < 0) continue;
        const int where = (*next)++;
        m->position[i] = first + where;
        m->pair_token[where] = i / k;
    }
    return jobs;
}

/* Scratch for the call, with m carved out of what is held; NULL: there is no memory. */
static const char *begin(em_pool *p, mixture *m, const em_mixture_of *of, int n, int k, int whole) {
    em_carver c = {
        .at = em_pool_scratch(p, scratch(em_pool_threads(p), n, k, jobs_of(of), &of->record, whole))};
    if (c.at) em_pool_hold(p, carve(m, &c, n, k, jobs_of(of), of->record.hidden, whole));
    return c.at;
}

int em_mixture(em_pool *p, const em_mixture_of *of, const float *x, int n, int k, const int32_t *ids,
               const int32_t *levels, const float *weights, float *y) {
    em_pool_lock(p);
    mixture m;
    int status = EM_NO_MEMORY;
    if (begin(p, &m, of, n, k, 1)) {
        for (int j = 0; j < jobs_of(of); j++) m.count[j] = 0;
        status = group(&m, of, ids, levels, n * k, k, 0);
        if (status >= 0) status = em_experts(p, x, n, m.jobs, status, m.pair_token, n * k, m.pair_out);
        if (status == EM_OK) em_combine(p, m.pair_out, m.position, weights, n, k, of->record.hidden, y);
    }
    em_pool_hold(p, 0);
    em_pool_unlock(p);
    return status;
}

int em_mixture_part(em_pool *p, const em_mixture_of *of, const float *x, int n, int k, const int32_t *ids,
                    const int32_t *levels, const int32_t *chosen, int chosen_count, int done,
                    int32_t *position, float *pair_out) {
    for (int i = 0; i < chosen_count; i++)
        if (chosen[i] < 0 || chosen[i] >= jobs_of(of)) return EM_NO_SUCH_EXPERT;
    em_pool_lock(p);
    mixture m;
    int status = EM_NO_MEMORY;
    if (begin(p, &m, of, n, k, 0)) {
        m.position = position;
        for (int j = 0; j < jobs_of(of); j++) m.count[j] = -1;
        for (int i = 0; i < chosen_count; i++) m.count[chosen[i]] = 0;
        const int jobs = status = group(&m, of, ids, levels, n * k, k, done);
        if (jobs > 0) {
            const int pairs = m.jobs[jobs - 1].first + m.jobs[jobs - 1].count;
            status = EM_TWICE;
            if (pairs <= n * k - done)
                status = em_experts(p, x, n, m.jobs, jobs, m.pair_token, pairs,
                                    pair_out + (size_t)done * (size_t)of->record.hidden);
            if (status == EM_OK) status = pairs;
        }
    }
    em_pool_hold(p, 0);
    em_pool_unlock(p);
    return status;
}
