/* Quantized products: codes of nested planes times int8 activations (edgemoe.h). Part of isa_body.h.
 *
 * One token is bound by reading planes: each cell is unpacked in registers, used once, and what comes
 * next is asked for early. Many tokens are bound by multiplying: cells are unpacked once for a tile of
 * tokens, and both codes and activations are loaded once for several products. */

/* Unit u of a row block whose planes begin at `block`. */
INLINE em_unit unit_of(const em_unit *block, int level, size_t u) {
    em_unit out = {{0}};
    for (int s = 0; s <= level; s++) out.p[s] = block->p[s] + u * (size_t)cell_bytes(s);
    return out;
}

/* The planes of row block rb from unit u0 on. */
INLINE em_unit block_of(const em_matrix *w, int level, int rb, int u0) {
    em_unit planes = {{0}};
    for (int s = 0; s <= level; s++) planes.p[s] = w->plane[s];
    return unit_of(&planes, level, (size_t)rb * (size_t)w->units + (size_t)u0);
}

/* What turns codes of 8 rows into weights, s * code + o, in the groups of a row block. */
typedef struct {
    i8x exponent;
    const uint8_t *steps, *shifts; /* of the next group */
} scales;

INLINE scales scales_of(const em_matrix *w, int level, int rb) {
    const size_t row = (size_t)rb * EM_ROW_BLOCK, group = (size_t)rb * (size_t)w->groups;
    scales r = {.exponent = i8x_bytes(w->exponent + row), .steps = w->step + group * 2 * EM_ROW_BLOCK};
    if (level < EM_LEVELS - 1) r.shifts = w->shift + group * EM_ROW_BLOCK / 2;
    return r;
}

/* s and o of the next group. */
INLINE void next_group(scales *r, int level, f8 *s, f8 *o) {
    const int bits = em_level_bits(level);
    const f8 step = f8_steps(r->exponent, i8x_bytes(r->steps));
    f8 from = f8_sub(f8_set1(em_first_centre(bits)), f8_ints(i8x_bytes(r->steps + EM_ROW_BLOCK)));
    r->steps += 2 * EM_ROW_BLOCK;
    if (level < EM_LEVELS - 1) {
        const f8 sixteenth = f8_set1(em_cell(bits) * 0.0625f);
        from = f8_add(from, f8_mul(f8_ints(i8x_nibbles(r->shifts)), sixteenth));
        r->shifts += EM_ROW_BLOCK / 2;
    }
    *s = f8_mul(step, f8_set1(em_cell(bits)));
    *o = f8_mul(step, from);
}

INLINE void store_rows(float *to, f8 y, int live) {
    if (live >= EM_ROW_BLOCK) {
        f8_store(to, y);
    } else {
        float all[EM_ROW_BLOCK];
        f8_store(all, y);
        memcpy(to, all, (size_t)live * sizeof(float));
    }
}

/* Cells ahead of the one in use that are asked for: two KiB of a plane of two bits. The processor's own
 * prefetching stops at page boundaries, and a task reads up to five planes at once. */
enum { CELLS_AHEAD = 24 };

/* Of a group: 128 columns, what models are quantized in unless told otherwise. */
enum { USUAL_UNITS = 4 };

INLINE void fetch_ahead(const em_unit *unit, int level) {
    for (int s = 0; s <= level; s++) __builtin_prefetch(unit->p[s] + CELLS_AHEAD * cell_bytes(s));
}

/* Dots of a unit with 32 activations; what is unpacked is used once and stays in registers. */
INLINE i8x unit_dots(const em_unit *unit, int level, const int8_t *q) {
    sums top, low;
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        const x16 x = x16_of(q + 16 * half);
        b32 v[4];
        unpack_top(unit, level, half, v);
        sums_add(&top, level, half, v, &x);
        if (level == EM_LEVELS - 1) {
            unpack_low(unit, half, v);
            sums_add(&low, level, half, v, &x);
        }
    }
    return sums_done(&top, &low, level);
}

/* t + scale * dots of a unit. */
INLINE f8 add_unit(f8 t, const em_unit *block, int level, size_t u, const int8_t *q, float scale) {
    const em_unit unit = unit_of(block, level, u);
    fetch_ahead(&unit, level);
    return f8_add(t, f8_mul(f8_set1(scale), f8_ints(unit_dots(&unit, level, q))));
}

INLINE void one_token(const em_matrix *w, int level, int rb, const em_acts *a, size_t token, float *out) {
    const em_unit block = block_of(w, level, rb, 0);
    scales r = scales_of(w, level, rb);
    f8 y = f8_zero(), s, o;
    size_t u = 0;
    for (int g = 0; g < w->groups; g++) {
        const size_t stop = g + 1 < w->groups ? u + (size_t)w->group_units : (size_t)w->units;
        const size_t at = (size_t)g * (size_t)a->tokens + token, first = at * (size_t)w->group_units;
        const int8_t *q = a->q + first * EM_UNIT;
        const float *xs = a->scale + first;
        f8 t = f8_zero();
        if (stop - u == USUAL_UNITS) { /* a number that is known needs no loop */
#pragma GCC unroll 4
            for (int i = 0; i < USUAL_UNITS; i++)
                t = add_unit(t, &block, level, u + (size_t)i, q + i * EM_UNIT, xs[i]);
            u = stop;
        } else {
            for (; u < stop; u++, q += EM_UNIT) t = add_unit(t, &block, level, u, q, *xs++);
        }
        next_group(&r, level, &s, &o);
        y = f8_add(f8_add(y, f8_mul(s, t)), f8_mul(o, f8_set1(a->gx[at])));
    }
    store_rows(out, y, w->rows - rb * EM_ROW_BLOCK);
}

/* Tokens that share one unpacking; row blocks and tokens of a grid, whose sums are kept in registers. */
enum { TILE = 64, GRID_BLOCKS = 2, GRID_TOKENS = 4 };

/* Codes of two row blocks in one group. */
typedef codes group_codes[EM_MAX_GROUP_UNITS][GRID_BLOCKS];

/* sum[b][i]: products of row block b's codes, the `low` ones or the top ones, with 32 activations of token i.
 */
INLINE void grid_sums(const codes c[GRID_BLOCKS], int level, int low, const int8_t *const q[GRID_TOKENS],
                      int tokens, size_t at, sums sum[GRID_BLOCKS][GRID_TOKENS]) {
#pragma GCC unroll 4
    for (int t = 0; t < 8; t += 2)
#pragma GCC unroll 4
        for (int i = 0; i < tokens; i++) {
            const x4 x = x4_of(q[i] + at + 4 * t), next = x4_of(q[i] + at + 4 * t + 4);
#pragma GCC unroll 2
            for (int b = 0; b < GRID_BLOCKS; b++) {
                const b32 *v = low ? c[b].low : c[b].top;
                sums_two(&sum[b][i], level, t, v[t], v[t + 1], x, next);
            }
        }
}

/* y[i][b] += s * t + o * gx of two row blocks in group g; tokens idx[0 .. tokens - 1]. */
INLINE void grid(const group_codes code, int level, int units, const em_acts *a, int g, const int32_t *idx,
                 int tokens, const f8 *s, const f8 *o, f8 (*y)[GRID_BLOCKS]) {
    const int plain = level < 2 ? 2 : level; /* unpacked, codes below 16 are all alike */
    const int8_t *q[GRID_TOKENS];
    const float *scale[GRID_TOKENS], *gx = a->gx + (size_t)g * (size_t)a->tokens;
    f8 t[GRID_BLOCKS][GRID_TOKENS];
    for (int i = 0; i < tokens; i++) {
        const size_t first = em_acts_unit(a, (size_t)idx[i], g * a->group_units);
        q[i] = a->q + first * EM_UNIT;
        scale[i] = a->scale + first;
        for (int b = 0; b < GRID_BLOCKS; b++) t[b][i] = f8_zero();
    }
    for (int u = 0; u < units; u++) {
        sums top[GRID_BLOCKS][GRID_TOKENS], low[GRID_BLOCKS][GRID_TOKENS];
        grid_sums(code[u], plain, 0, q, tokens, (size_t)u * EM_UNIT, top);
        if (level == EM_LEVELS - 1) grid_sums(code[u], plain, 1, q, tokens, (size_t)u * EM_UNIT, low);
#pragma GCC unroll 4
        for (int i = 0; i < tokens; i++) {
            const f8 xs = f8_set1(scale[i][u]);
#pragma GCC unroll 2
            for (int b = 0; b < GRID_BLOCKS; b++)
                t[b][i] = f8_add(t[b][i], f8_mul(xs, f8_ints(sums_done(&top[b][i], &low[b][i], plain))));
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < tokens; i++) {
        const f8 x = f8_set1(gx[idx[i]]);
#pragma GCC unroll 2
        for (int b = 0; b < GRID_BLOCKS; b++)
            y[i][b] = f8_add(f8_add(y[i][b], f8_mul(s[b], t[b][i])), f8_mul(o[b], x));
    }
}

/* Of row blocks rb and rb + 1, or twice of rb where that is the last. Tokens beyond n, up to the next
 * multiple of those a grid takes, are computed and not kept. */
INLINE void many_tokens(const em_matrix *w, int level, int rb, int rb1, const em_acts *a, const int32_t *idx,
                        int n, float *out, size_t ld) {
    const int blocks = rb1 - rb < GRID_BLOCKS ? rb1 - rb : GRID_BLOCKS;
    em_unit block[GRID_BLOCKS];
    scales r[GRID_BLOCKS];
    f8 y[TILE][GRID_BLOCKS];
    for (int b = 0; b < GRID_BLOCKS; b++) {
        block[b] = block_of(w, level, b < blocks ? rb + b : rb, 0);
        r[b] = scales_of(w, level, b < blocks ? rb + b : rb);
        for (int i = 0; i < n + GRID_TOKENS - 1 && i < TILE; i++) y[i][b] = f8_zero();
    }
    for (int g = 0; g < w->groups; g++) {
        const int u0 = g * w->group_units, left = w->units - u0;
        const int units = left < w->group_units ? left : w->group_units;
        group_codes code;
        f8 s[GRID_BLOCKS], o[GRID_BLOCKS];
        for (int b = 0; b < GRID_BLOCKS; b++) {
            for (int u = 0; u < units; u++) {
                const em_unit unit = unit_of(&block[b], level, (size_t)(u0 + u));
                fetch_ahead(&unit, level);
                unpack(&unit, level, &code[u][b]);
            }
            next_group(&r[b], level, &s[b], &o[b]);
        }
        if (n <= 2) {
            grid(code, level, units, a, g, idx, 2, s, o, y);
        } else {
            for (int i = 0; i < n; i += GRID_TOKENS)
                grid(code, level, units, a, g, idx + i, GRID_TOKENS, s, o, y + i);
        }
    }
    for (int b = 0; b < blocks; b++)
        for (int i = 0; i < n; i++)
            store_rows(out + (size_t)i * ld + (size_t)b * EM_ROW_BLOCK, y[i][b],
                       w->rows - (rb + b) * EM_ROW_BLOCK);
}

INLINE void matmul_level(const em_matrix *w, int level, int rb0, int rb1, const em_acts *a,
                         const int32_t *idx, int n, float *out, size_t ld) {
    if (n == 1) {
        const size_t token = idx ? (size_t)idx[0] : 0;
        for (int rb = rb0; rb < rb1; rb++)
            one_token(w, level, rb, a, token, out + (size_t)(rb - rb0) * EM_ROW_BLOCK);
        return;
    }
    for (int first = 0; first < n; first += TILE) {
        const int tile = n - first < TILE ? n - first : TILE;
        int32_t tokens[TILE + GRID_TOKENS];
        for (int i = 0; i < tile; i++) tokens[i] = idx ? idx[first + i] : first + i;
        for (int i = tile; i < tile + GRID_TOKENS; i++) tokens[i] = tokens[0];
        for (int rb = rb0; rb < rb1; rb += GRID_BLOCKS)
            many_tokens(w, level, rb, rb1, a, tokens, tile,
                        out + (size_t)first * ld + (size_t)(rb - rb0) * EM_ROW_BLOCK, ld);
    }
}

INLINE void accumulate_level(const em_matrix *w, int level, int rb0, int rb1, const em_acts *a, int n,
                             int32_t *out) {
    const size_t rows = (size_t)(w->rows + EM_ROW_BLOCK - 1) / EM_ROW_BLOCK * EM_ROW_BLOCK;
    for (int rb = rb0; rb < rb1; rb++) {
        const em_unit block = block_of(w, level, rb, 0);
        for (int u = 0; u < w->units; u++) {
            const em_unit unit = unit_of(&block, level, (size_t)u);
            for (int i = 0; i < n; i++) {
                int32_t lane[EM_ROW_BLOCK];
                const int8_t *q = a->q + em_acts_unit(a, (size_t)i, u) * EM_UNIT;
                i8x_store(lane, unit_dots(&unit, level, q));
                for (int r = 0; r < EM_ROW_BLOCK; r++)
                    out[((size_t)i * rows + (size_t)(rb * EM_ROW_BLOCK + r)) * (size_t)w->units + (size_t)u] =
                        lane[r];
            }
        }
    }
}

/* One body a level, so that the level is a constant in each. */
static void matmul(const em_matrix *w, int rb0, int rb1, const em_acts *a, const int32_t *idx, int n,
                   float *out, size_t ld) {
    switch (w->level) {
    case 0: matmul_level(w, 0, rb0, rb1, a, idx, n, out, ld); break;
    case 1: matmul_level(w, 1, rb0, rb1, a, idx, n, out, ld); break;
    case 2: matmul_level(w, 2, rb0, rb1, a, idx, n, out, ld); break;
    case 3: matmul_level(w, 3, rb0, rb1, a, idx, n, out, ld); break;
    default: matmul_level(w, 4, rb0, rb1, a, idx, n, out, ld); break;
    }
}

static void accumulate(const em_matrix *w, int rb0, int rb1, const em_acts *a, int n, int32_t *out) {
    switch (w->level) {
    case 0: accumulate_level(w, 0, rb0, rb1, a, n, out); break;
    case 1: accumulate_level(w, 1, rb0, rb1, a, n, out); break;
    case 2: accumulate_level(w, 2, rb0, rb1, a, n, out); break;
    case 3: accumulate_level(w, 3, rb0, rb1, a, n, out); break;
    default: accumulate_level(w, 4, rb0, rb1, a, n, out); break;
    }
}
