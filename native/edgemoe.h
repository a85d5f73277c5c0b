/* edgemoe native core: types and functions shared by its C files and the binding.
 *
 * Numbers. Weights are nested codes (docs/FORMAT.md); activations are int8 with one float32 scale
 * for every 32 columns. Every float result has one fixed reduction order, the same for every
 * instruction set, thread count, batch size and prefill split, and no multiply-add is fused:
 *   - float32 dot products run in 16 lanes (element i goes to lane i mod 16), then lanes are summed
 *     as a tree: i with i+8, i with i+4, i with i+2, 0 with 1;
 *   - quantized products: for each group, t = sum over its 32-column units (ascending) of
 *     x_scale * float(integer dot); y = (y + s * t) + o * X with X = sum of x_scale * sum(q),
 *     s = step * C, o = step * (((C - 1) / 2 - zero) + (shift - 8) * C / 16), C = 2^(8 - b);
 *   - attention: see em_attention.
 * Functions return 0, or a negative em_status.
 */
#ifndef EDGEMOE_H
#define EDGEMOE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { EM_LEVELS = 5, EM_ROW_BLOCK = 8, EM_UNIT = 32, EM_MAX_GROUP_UNITS = 8 };

/* What keys and values are stored as: int8 with a float32 scale a head and position. */
enum em_kv_type { EM_KV_F32, EM_KV_F16, EM_KV_I8 };
/* Positions of a block, columns of a panel, positions of a split (em_attention). */
enum { EM_KV_BLOCK = 64, EM_KV_PANEL = 16, EM_KV_SPLIT = 256 };

enum { EM_PEAK_PRODUCTS = 512 }; /* of a round of em_isa.peak */

enum em_status { EM_OK = 0, EM_NO_MEMORY = -1, EM_BAD_WEIGHTS = -2, EM_NO_SUCH_EXPERT = -3, EM_TWICE = -4 };

/* A [rows, cols] matrix read at levels[level]: the plane of each step up to it, the shifts of the last,
 * and the exponents and steps of the first. */
typedef struct {
    const uint8_t *plane[EM_LEVELS];
    const uint8_t *exponent; /* [row_blocks * 8] */
    const uint8_t *step;     /* [row_blocks, groups, 2, 8]: steps, then zeros */
    const uint8_t *shift;    /* [row_blocks, groups, 4]: 4 bits a row; NULL at 8 bits */
    int level;
    int rows;
    int cols;
    int units;       /* of 32 columns, the last zero-padded */
    int group_units; /* units that share a scale; the last group may be shorter */
    int groups;
} em_matrix;

/* Matrix of a record that is read at `level`, so that its segments 0 .. level lie at these addresses. The
 * matrix is `ahead` levels (0 or 1) above; step k of it lies in segment k - ahead, the first two in segment
 * 0, where offsets + k * stride says: its scale block and its plane. */
em_matrix em_matrix_at(const uint64_t *segments, const int64_t *offsets, int stride, int level, int ahead,
                       int rows, int cols, int group_units);

/* Code bits at a level. */
static inline int em_level_bits(int level) {
    static const int bits[EM_LEVELS] = {2, 3, 4, 6, 8};
    return bits[level];
}

/* Quantized activations of a number of tokens, group by group, so that what many tokens need for one group of
 * weights lies together. */
typedef struct {
    int8_t *q;    /* [groups, tokens, group_units, 32] */
    float *scale; /* [groups, tokens, group_units] */
    float *gx;    /* [groups, tokens]: sum over the group of scale * sum(q) */
    int tokens;
    int units;
    int groups;
    int group_units;
} em_acts;

/* Where unit u of a token is among all units. */
static inline size_t em_acts_unit(const em_acts *a, size_t token, int u) {
    const size_t group = (size_t)(u / a->group_units), wide = (size_t)a->group_units;
    return (group * (size_t)a->tokens + token) * wide + (size_t)(u % a->group_units);
}

/* The same activations from a token on. */
static inline em_acts em_acts_from(em_acts a, int token) {
    const size_t units = (size_t)token * (size_t)a.group_units;
    a.q += units * EM_UNIT;
    a.scale += units;
    a.gx += token;
    return a;
}

/* One instruction set's bodies. */
typedef struct {
    const char *name;
    int (*supported)(void);
    /* x [cols] -> q, scale and gx of a token of a. */
    void (*quantize)(const float *x, int cols, const em_acts *a, int token);
    /* out[i * ld + r - 8 * rb0] = w[r, :] . x[idx ? idx[i] : i] for the rows r of blocks [rb0, rb1)
     * and i < n. */
    void (*matmul)(const em_matrix *w, int rb0, int rb1, const em_acts *a, const int32_t *idx, int n,
                   float *out, size_t ld);
    /* Integer dots before any scale: out [n, row_blocks * 8, units]; row blocks [rb0, rb1). */
    void (*accumulate)(const em_matrix *w, int rb0, int rb1, const em_acts *a, int n, int32_t *out);
    float (*dot)(const float *a, const float *b, int n);
    /* y[i] = x[i] * r * w[i] */
    void (*scale_mul)(const float *x, float r, const float *w, int n, float *y);
    /* g[i] = silu(g[i]) * u[i] */
    void (*silu_mul)(float *g, const float *u, int n);
    /* c[r * ldc + 16 * p + l] += sum over k ascending of a[r * lda + k] * b[p * stride + 16 * k + l] for
     * p < count, l < 16, k < depth; b is of an em_kv_type, stride in elements of it. */
    void (*panels)(int type, const float *a, size_t lda, int rows, const uint8_t *b, size_t stride, int depth,
                   int count, float *c, size_t ldc);
    /* One row of scores of a block, s [64], of which [first, last) are visible: s = s * scale (then
     * * key_scale), *top = the largest of it and these, s = exp(s - *top), 0 where not visible; their
     * 16-lane sum is returned; then s = s * value_scale. Scales [64] or NULL. */
    float (*soften)(float *s, const float *key_scale, const float *value_scale, float scale, int first,
                    int last, float *top);
    /* 16 floats -> float16, as em_float_to_half. */
    void (*to_half)(const float *x, uint16_t *h);
    /* The sum modulo 2^32 of rounds * EM_PEAK_PRODUCTS products of a code below 16 and an activation, each of
     * them computed, from registers: as fast as this set of instructions can. */
    uint32_t (*peak)(int code, int activation, int rounds);
} em_isa;

const em_isa *em_isa_current(void);
const em_isa *em_isa_find(const char *name); /* NULL if unknown or unsupported here */
int em_isa_count(void);
const em_isa *em_isa_at(int i);
void em_isa_set(const em_isa *isa);

extern const em_isa em_isa_scalar;
#if defined(__x86_64__)
extern const em_isa em_isa_avx2, em_isa_avx512;
#ifdef EM_SIMDE
extern const em_isa em_isa_avx512_simde; /* the same source as avx512, its instructions emulated */
#endif
#elif defined(__aarch64__)
extern const em_isa em_isa_neon, em_isa_neon_dotprod, em_isa_neon_i8mm;
#endif

/* A pool of worker threads. Who waits, workers for a task and callers for the workers, spins for some
 * hundreds of microseconds, then sleeps. */
typedef struct em_pool em_pool;
typedef void (*em_task)(void *ctx, int task, int worker);

em_pool *em_pool_new(int threads); /* NULL: no memory or no threads to be had */
void em_pool_free(em_pool *p);
int em_pool_threads(const em_pool *p);
/* Runs fn(ctx, 0..tasks-1, worker) over the pool, the calling thread included; returns when all are
 * done. Calls from several threads are served one after the other. */
void em_pool_run(em_pool *p, em_task fn, void *ctx, int tasks);
/* Scratch of at least `bytes`, 64-byte aligned, kept for the pool's life; NULL: no memory. Valid
 * until the next call; operations on one pool are serialised by em_pool_lock. */
void *em_pool_scratch(em_pool *p, size_t bytes);
/* The first `bytes` of the scratch last given stay valid: until em_pool_hold(p, 0), what others are given
 * comes after them and must fit what there is. For operations made of others, which lock the pool themselves
 * too. */
void em_pool_hold(em_pool *p, size_t bytes);
size_t em_pool_scratch_bytes(const em_pool *p);
void em_pool_lock(em_pool *p);
void em_pool_unlock(em_pool *p);

uint32_t em_crc32c(uint32_t crc, const void *data, size_t n);

/* Operations over a pool. Row-major float32 unless said. */

/* y_m [n, rows_m] = x [n, cols] . w_m^T for m < count; x is quantized once. All matrices have the
 * same cols and group_units. */
int em_linear(em_pool *p, const float *x, int n, const em_matrix *const *w, float *const *y, int count);
/* y [n, rows] = x [n, cols] . w [rows, cols]^T in float32. */
void em_linear_f32(em_pool *p, const float *x, int n, const float *w, int rows, int cols, float *y);
int em_accumulate(em_pool *p, const float *x, int n, const em_matrix *w, int8_t *q, float *scale,
                  int32_t *out);
/* out [n, cols] = rows ids[i] of w, decoded. */
void em_decode_rows(const em_matrix *w, const int64_t *ids, int n, float *out);
void em_rmsnorm(em_pool *p, const float *x, const float *w, int n, int d, float eps, float *y);
/* y [n, d] += sigmoid(gate [n]) * x [n, d]. */
void em_gated_add(float *y, const float *gate, const float *x, int n, int d);
/* In place on x [n, heads, d]; cos, sin [n, d / 2]; halves rotate against each other. */
void em_rope(em_pool *p, float *x, int n, int heads, int d, const float *cos, const float *sin);
/* Softmax over experts, the k largest (ties: lower index first), in falling order. */
void em_route(const float *logits, int n, int experts, int k, int normalize, int32_t *ids, float *weights);

/* One expert at one level with the (token) pairs it serves. Its down matrix is one, or two side by side
 * of which the first ends with a whole unit; products of the two are added, the first one's first. */
typedef struct {
    em_matrix gate, up, down[2];
    int downs;
    int first, count; /* its pairs are first .. first + count - 1 */
} em_job;

/* Where the matrices of a layer's experts lie in their records: offsets [levels, matrices, 2] as em_matrix_at
 * takes them, of gate, up and one or two downs. The first `ahead` columns of down are one level ahead. */
typedef struct {
    const int64_t *offsets;
    int matrices, hidden, intermediate, ahead, group_units;
} em_record;

/* The expert whose segments lie at these addresses, without any pairs. */
em_job em_job_at(const em_record *r, const uint64_t *segments, int level);
/* pair_out [pairs, hidden] = down(silu(gate x) * up x) for every pair of every job;
 * pair_token[i] is the row of x that pair i reads. */
int em_experts(em_pool *p, const float *x, int n, const em_job *jobs, int job_count,
               const int32_t *pair_token, int pairs, float *pair_out);
/* y [n, hidden] = sum over slots ascending of weights [n, k] * pair_out[position [n, k]]. */
void em_combine(em_pool *p, const float *pair_out, const int32_t *position, const float *weights, int n,
                int k, int hidden, float *y);
/* The experts of a layer: addresses of their segments [experts, depth], 0 where absent. A job is an expert at
 * a level; it has the number expert * depth + level. */
typedef struct {
    em_record record;
    const uint64_t *segments;
    int experts, depth;
} em_mixture_of;

/* y [n, hidden] = sum over slots of weights [n, k] * expert(x), each expert of ids [n, k] at its level of
 * levels [n, k]: em_experts, jobs ascending, then em_combine. EM_NO_SUCH_EXPERT: an id of no expert, or
 * a level of none, or an address that is needed is 0. */
int em_mixture(em_pool *p, const em_mixture_of *of, const float *x, int n, int k, const int32_t *ids,
               const int32_t *levels, const float *weights, float *y);
/* The pairs of some jobs, those `chosen`: their rows go to pair_out [n * k, hidden] from row `done` on,
 * and position [n, k] tells for each of them which; other pairs are left as they are. The number of pairs, or
 * a status; EM_TWICE: with `done` they are more than n * k. Called for all jobs in any parts, em_combine
 * then gives the bits of em_mixture. */
int em_mixture_part(em_pool *p, const em_mixture_of *of, const float *x, int n, int k, const int32_t *ids,
                    const int32_t *levels, const int32_t *chosen, int chosen_count, int done,
                    int32_t *position, float *pair_out);
/* Keys and values of a sequence in one layer: data [heads, blocks, em_kv_block_bytes]. A block holds the
 * positions from a multiple of 64 on: keys [4, d, 16] (panels of 16 positions), values
 * [ceil(d / 16), 64, 16] (panels of 16 columns, zeros beyond d), then, of int8, float32 scales of the
 * keys [64] and of the values [64]. A row x of int8 has scale = max|x| / 127 and codes x / scale, to
 * nearest, ties to even (0 where the scale is 0); float16 is to nearest, ties to even, within +-65504. */
typedef struct {
    uint8_t *data;
    int type, heads, d, blocks;
} em_kv;

size_t em_kv_block_bytes(int type, int d);
/* Stores keys and values [n, heads, d] of positions start .. start + n - 1. */
void em_kv_write(em_pool *p, const em_kv *kv, const float *k, const float *v, int n, int start);

/* Causal attention of n new tokens of one sequence at positions start .. start + n - 1, whose keys
 * and values are stored already. q, out [n, heads, d]; window 0 = all; sinks [heads] or NULL: a score
 * that joins the softmax of its head without a value.
 *
 * The arithmetic, the same for every caller, batch, thread and instruction set; all is float32 and
 * aligned to absolute positions; positions a row does not see take no part in it:
 *   - in a block of 64 positions score = (sum over d ascending of q * k) * scale, with int8 times the
 *     key's scale; top' = max(top, scores), e = exp(score - top'), a = exp(top - top');
 *     sum = sum * a + (e in 16 lanes, position j in lane j mod 16); with int8 e = e * value's scale;
 *     acc = acc * a + each e * v, one after the other, positions ascending;
 *   - blocks ascend within a split of 256 positions, which starts at top = -FLT_MAX, sum = acc = 0;
 *   - splits are merged ascending, the first is taken as it is: top' = max(top, top_s),
 *     a = exp(top - top'), b = exp(top_s - top'), sum = sum * a + sum_s * b, acc = acc * a + acc_s * b;
 *   - a sink: top' = max(top, sink), a = exp(top - top'), sum = sum * a + exp(sink - top'),
 *     acc = acc * a; at last out = acc / sum. */
int em_attention(em_pool *p, const float *q, const em_kv *kv, int n, int heads, int start, int window,
                 float scale, const float *sinks, float *out);

/* A decoder layer without its experts. What it lacks is NULL or 0. */
typedef struct {
    int hidden, heads, kv_heads, d;
    int window; /* 0 = all */
    float scale, eps, clip, residual;
    const float *input_norm, *post_norm;            /* [hidden] */
    const float *q_norm, *k_norm;                   /* [q_norm_cols], a head or the whole projection */
    int q_norm_cols, k_norm_cols;                   /* of which the projections' columns are multiples */
    const float *q_bias, *k_bias, *v_bias, *o_bias; /* [rows of the projection] */
    em_matrix q, k, v, o;
    const float *router;        /* [experts, hidden] */
    const float *shared_router; /* [hidden] */
    int experts, slots, normalize;
    em_matrix gate, up, down; /* of a plain MLP, or of the expert that all tokens share */
    int mlp;                  /* rows of gate and up */
} em_layer;

/* The next `count` rows of a batch continue the sequence of this cache at position `start`. */
typedef struct {
    em_kv kv;
    int start, count;
} em_span;

/* What the feed-forward part needs of n tokens: h [n, hidden], the normed residual stream; with a router ids
 * and weights [n, slots]; with an MLP its result, mlp [n, hidden], and with a shared router mlp_gate [n]. */
typedef struct {
    float *h;
    int32_t *ids;
    float *weights, *mlp, *mlp_gate;
} em_routed;

/* Everything of a layer up to its experts, in place on the residual stream x [n, hidden], to which what the
 * last layer's feed-forward part gave, `add` [n, hidden] or NULL, is added first: attention, whose keys and
 * values are stored, router and MLP. cos, sin [n, d / 2]. It is the operations above one after the other. */
int em_layer_run(em_pool *p, const em_layer *l, float *x, const float *add, int n, const float *cos,
                 const float *sin, const em_span *spans, int span_count, const em_routed *out);

/* Sum of the 64-bit words at data, 64-byte aligned: what reading memory alone takes. */
uint64_t em_stream_read(em_pool *p, const void *data, size_t bytes);

/* Multiply-adds a second of codes and activations on all threads, in a run of at least `seconds`. */
double em_int8_peak(em_pool *p, double seconds);

/* Weights w [rows, cols] -> 8-bit codes [rows, cols], exponents [rows], steps and zeros [rows, groups]
 * of groups of `group` columns, and shifts [levels, rows, groups]. EM_BAD_WEIGHTS if a weight is NaN
 * or infinite, or a group spans more than 2^127. */
int em_quantize_rows(em_pool *p, const float *w, int rows, int cols, int group, const int32_t *levels,
                     int count, uint8_t *codes, uint8_t *exponent, uint8_t *step, uint8_t *zero,
                     uint8_t *shift);
/* Better codes for w [rows, cols], whose nearest ones `codes` holds: column by column the code, at most
 * `reach` from the nearest, of the smallest sum over levels l of weight[l] * (s * (code >> (8 - bits)) +
 * o - target)^2. At first target is w less what is to make up for the errors of the columns before:
 * feedback [cols, cols], of which [i, i + 1 ..] is read, times their error at that level. Then, up to
 * `sweeps` times over all columns, it is what takes the row's error e to the least e * moment * e this column
 * can; moment [cols, cols] is symmetric, its diagonal above zero.
 * Group g is the columns starts[g] .. starts[g + 1] - 1; bits [levels, groups], 1 to 8, are what a group is
 * read at; s, o [levels, rows, groups]; weight [levels]; 1 to EM_LEVELS levels. */
int em_nest_rows(em_pool *p, const float *w, int rows, int cols, const int32_t *starts, int groups,
                 const int32_t *bits, const float *feedback, const float *moment, const float *s,
                 const float *o, const float *weight, int levels, int reach, int sweeps, uint8_t *codes);
/* Codes of whole row blocks -> the bytes they add to the plane of each level (docs/FORMAT.md). */
void em_pack_rows(em_pool *p, const uint8_t *codes, int rows, int cols, const int32_t *levels, int count,
                  uint8_t *const *planes);

/* A block format of GGML: `bytes` bytes hold `weights` weights. `decode` turns whole blocks, at any
 * alignment, into float32 [blocks * weights]. */
typedef struct {
    const char *name; /* as GGUF files name it: "Q4_K" */
    int weights, bytes;
    void (*decode)(const uint8_t *data, size_t blocks, float *out);
} em_ggml_type;

int em_ggml_count(void);
const em_ggml_type *em_ggml_at(int i);
const em_ggml_type *em_ggml_find(const char *name); /* NULL if unknown */
/* out [blocks * weights] = the blocks at `data`, decoded. */
void em_dequantize(em_pool *p, const em_ggml_type *type, const uint8_t *data, size_t blocks, float *out);

/* Bytes of pool scratch the operations above need. */
size_t em_linear_scratch(int n, int cols, int group_units);
size_t em_experts_scratch(int threads, int n, int pairs, int hidden, int intermediate, int ahead,
                          int group_units); /* ahead: columns of the first of two down matrices, or 0 */
/* jobs: experts * depth. whole: of em_mixture; else of em_mixture_part. */
size_t em_mixture_scratch(int threads, int n, int k, int jobs, int hidden, int intermediate, int ahead,
                          int group_units, int whole);
/* mlp, experts: the most a layer has, 0 for none. */
size_t em_layer_scratch(int threads, int n, int hidden, int heads, int kv_heads, int d, int mlp, int experts,
                        int group_units);
size_t em_attention_scratch(int threads, int n, int heads, int kv_heads, int d); /* of up to n tokens */

#ifdef __cplusplus
}
#endif
#endif
