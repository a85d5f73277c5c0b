/* All experts of a token or a batch in one call: gate and up with SiLU, then down. */
#include "ops_common.h"

typedef struct {
    const em_isa *isa;
    const em_job *jobs;
    int job_count;
    const int *first_task; /* [job_count + 1] of the phase that runs */
    const int32_t *pair_token;
    em_acts in, mid[2]; /* mid: what each of the down matrices reads */
    float *h;           /* [pairs, intermediate] */
    float *temp;        /* [threads, TOKEN_TILE, CHUNK_ROWS] */
    int intermediate, hidden;
    float *out;
} experts_ctx;

typedef struct {
    const em_job *job;
    int rb0, rb1;     /* row blocks */
    int first, count; /* pairs */
} part;

/* Task number -> job, chunk of rows and tile of pairs. */
static part locate(const experts_ctx *c, int task, int rows) {
    int lo = 0, hi = c->job_count - 1;
    while (lo < hi) {
        const int mid = (lo + hi + 1) / 2;
        if (c->first_task[mid] <= task) {
            lo = mid;
        } else {
            hi = mid - 1;
        }
    }
    const em_job *job = &c->jobs[lo];
    const int tiles = em_ceil_div(job->count, TOKEN_TILE), blocks = em_ceil_div(rows, EM_ROW_BLOCK);
    const int local = task - c->first_task[lo], tile = local % tiles * TOKEN_TILE;
    part out = {job, local / tiles * CHUNK_BLOCKS, 0, job->first + tile, job->count - tile};
    out.rb1 = out.rb0 + CHUNK_BLOCKS < blocks ? out.rb0 + CHUNK_BLOCKS : blocks;
    if (out.count > TOKEN_TILE) out.count = TOKEN_TILE;
    return out;
}

static int plan_tasks(const em_job *jobs, int count, int rows, int *first_task) {
    const int chunks = em_ceil_div(em_ceil_div(rows, EM_ROW_BLOCK), CHUNK_BLOCKS);
    int total = 0;
    for (int j = 0; j < count; j++) {
        first_task[j] = total;
        total += chunks * em_ceil_div(jobs[j].count, TOKEN_TILE);
    }
    return first_task[count] = total;
}

em_job em_job_at(const em_record *r, const uint64_t *segments, int level) {
    const int stride = 2 * r->matrices, rest = r->intermediate - r->ahead;
    const int64_t *o = r->offsets;
    em_job job = {0};
    job.gate = em_matrix_at(segments, o, stride, level, 0, r->intermediate, r->hidden, r->group_units);
    job.up = em_matrix_at(segments, o + 2, stride, level, 0, r->intermediate, r->hidden, r->group_units);
    if (r->ahead > 0)
        job.down[job.downs++] =
            em_matrix_at(segments, o + 4, stride, level, 1, r->hidden, r->ahead, r->group_units);
    if (rest > 0) {
        o += 4 + 2 * job.downs;
        job.down[job.downs++] = em_matrix_at(segments, o, stride, level, 0, r->hidden, rest, r->group_units);
    }
    return job;
}

static void gate_up_task(void *raw, int task, int worker) {
    const experts_ctx *c = raw;
    const part p = locate(c, task, c->intermediate);
    const int row = p.rb0 * EM_ROW_BLOCK;
    const int rows = c->intermediate - row < CHUNK_ROWS ? c->intermediate - row : CHUNK_ROWS;
    float *gate = c->h + (size_t)p.first * (size_t)c->intermediate + row;
    float *up = c->temp + (size_t)worker * TOKEN_TILE * CHUNK_ROWS;
    const int32_t *tokens = c->pair_token + p.first;
    c->isa->matmul(&p.job->gate, p.rb0, p.rb1, &c->in, tokens, p.count, gate, (size_t)c->intermediate);
    c->isa->matmul(&p.job->up, p.rb0, p.rb1, &c->in, tokens, p.count, up, CHUNK_ROWS);
    for (int i = 0; i < p.count; i++)
        c->isa->silu_mul(gate + (size_t)i * (size_t)c->intermediate, up + (size_t)i * CHUNK_ROWS, rows);
}

static void down_task(void *raw, int task, int worker) {
    const experts_ctx *c = raw;
    const part p = locate(c, task, c->hidden);
    const int row = p.rb0 * EM_ROW_BLOCK;
    const int rows = c->hidden - row < CHUNK_ROWS ? c->hidden - row : CHUNK_ROWS;
    const size_t ld = (size_t)c->hidden;
    float *out = c->out + (size_t)p.first * ld + row;
    float *more = c->temp + (size_t)worker * TOKEN_TILE * CHUNK_ROWS;
    for (int d = 0; d < p.job->downs; d++) {
        const em_acts mid = em_acts_from(c->mid[d], p.first);
        if (d == 0) {
            c->isa->matmul(&p.job->down[0], p.rb0, p.rb1, &mid, NULL, p.count, out, ld);
            continue;
        }
        c->isa->matmul(&p.job->down[d], p.rb0, p.rb1, &mid, NULL, p.count, more, CHUNK_ROWS);
        for (int i = 0; i < p.count; i++)
            for (int r = 0; r < rows; r++) out[(size_t)i * ld + (size_t)r] += more[i * CHUNK_ROWS + r];
    }
}

static size_t experts_scratch(int threads, int n, int pairs, int jobs, int hidden, int intermediate,
                              int ahead, int group_units) {
    return em_acts_bytes(n, hidden, group_units) + em_acts_bytes(pairs, ahead, group_units) +
           em_acts_bytes(pairs, intermediate - ahead, group_units) +
           em_padded((size_t)pairs * (size_t)intermediate * sizeof(float)) +
           em_padded((size_t)threads * TOKEN_TILE * CHUNK_ROWS * sizeof(float)) +
           em_padded(((size_t)jobs + 1) * sizeof(int));
}

size_t em_experts_scratch(int threads, int n, int pairs, int hidden, int intermediate, int ahead,
                          int group_units) {
    return experts_scratch(threads, n, pairs, pairs, hidden, intermediate, ahead, group_units);
}

int em_experts(em_pool *p, const float *x, int n, const em_job *jobs, int job_count,
               const int32_t *pair_token, int pairs, float *pair_out) {
    if (job_count == 0) return EM_OK;
    const em_matrix *up = &jobs[0].up, *down = jobs[0].down;
    const int downs = jobs[0].downs, ahead = downs > 1 ? down[0].cols : 0;
    em_pool_lock(p);
    em_carver c = {.at = em_pool_scratch(p, experts_scratch(em_pool_threads(p), n, pairs, job_count, up->cols,
                                                            up->rows, ahead, up->group_units))};
    if (!c.at) {
        em_pool_unlock(p);
        return EM_NO_MEMORY;
    }
    experts_ctx ctx = {.isa = em_isa_current(),
                       .jobs = jobs,
                       .job_count = job_count,
                       .pair_token = pair_token,
                       .intermediate = up->rows,
                       .hidden = up->cols,
                       .out = pair_out};
    ctx.in = em_carve_acts(&c, n, up->cols, up->group_units);
    for (int d = 0; d < downs; d++) ctx.mid[d] = em_carve_acts(&c, pairs, down[d].cols, down[d].group_units);
    ctx.h = em_carve(&c, (size_t)pairs * (size_t)ctx.intermediate * sizeof(float));
    ctx.temp = em_carve(&c, (size_t)em_pool_threads(p) * TOKEN_TILE * CHUNK_ROWS * sizeof(float));
    int *first_task = em_carve(&c, ((size_t)job_count + 1) * sizeof(int));
    ctx.first_task = first_task;
    em_quantize_all(p, ctx.isa, x, n, ctx.hidden, ctx.hidden, ctx.in);
    em_pool_run(p, gate_up_task, &ctx, plan_tasks(jobs, job_count, ctx.intermediate, first_task));
    for (int d = 0; d < downs; d++)
        em_quantize_all(p, ctx.isa, ctx.h + d * ahead, pairs, down[d].cols, ctx.intermediate, ctx.mid[d]);
    em_pool_run(p, down_task, &ctx, plan_tasks(jobs, job_count, ctx.hidden, first_task));
    em_pool_unlock(p);
    return EM_OK;
}
