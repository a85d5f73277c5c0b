/* Quantized products: codes of nested planes times int8 activations (edgemoe.h). Part of isa_body.h.
 *
 * One token is bound by reading planes: each cell is unpacked in registers, used once, and what comes
 * next is asked for early. Many tokens are bound by multiplying: cells are unpacked once for a tile of
 * tokens, and activations are spread out once for a run of row blocks. */

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

INLINE void one_token(const em_matrix *w, int level, int rb, const em_acts *a, size_t row, float *out) {
    const int8_t *q = a->q + row * (size_t)a->units * EM_UNIT;
    const float *xs = a->scale + row * (size_t)a->units, *gx = a->gx + row * (size_t)a->groups;
    const em_unit block = block_of(w, level, rb, 0);
    scales r = scales_of(w, level, rb);
    f8 y = f8_zero(), s, o;
    size_t u = 0;
    for (int g = 0; g < w->groups; g++) {
        const size_t stop = g + 1 < w->groups ? u + (size_t)w->group_units : (size_t)w->units;
        f8 t = f8_zero();
#pragma GCC unroll 4
        for (; u < stop; u++) {
            const em_unit unit = unit_of(&block, level, u);
            fetch_ahead(&unit, level);
            t = f8_add(t, f8_mul(f8_set1(xs[u]), f8_ints(unit_dots(&unit, level, q + u * EM_UNIT))));
        }
        next_group(&r, level, &s, &o);
        y = f8_add(f8_add(y, f8_mul(s, t)), f8_mul(o, f8_set1(gx[g])));
    }
    store_rows(out, y, w->rows - rb * EM_ROW_BLOCK);
}

/* Activations of one unit and token, as the sums take them. */
typedef struct {
    x16 half[2];
    f8 scale;
} spread;

INLINE spread spread_out(const int8_t *q, float scale) {
    return (spread){{x16_of(q), x16_of(q + 16)}, f8_set1(scale)};
}

INLINE i8x dots(const codes *c, int level, const spread *x) {
    sums top, low;
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        sums_add(&top, level, half, c->top + 4 * half, &x->half[half]);
        if (level == EM_LEVELS - 1) sums_add(&low, level, half, c->low + 4 * half, &x->half[half]);
    }
    return sums_done(&top, &low, level);
}

/* Up to FEW tokens share an unpacking; planes are still read from end to end, since memory binds. */
enum { FEW = 16 };

INLINE void few_tokens(const em_matrix *w, int level, int rb, const em_acts *a, const int32_t *idx, int n,
                       float *out, size_t ld) {
    const em_unit block = block_of(w, level, rb, 0);
    scales r = scales_of(w, level, rb);
    f8 y[FEW], t[FEW], s, o;
    for (int i = 0; i < n; i++) y[i] = f8_zero();
    int u = 0;
    for (int g = 0; g < w->groups; g++) {
        const int stop = g + 1 < w->groups ? u + w->group_units : w->units;
        for (int i = 0; i < n; i++) t[i] = f8_zero();
        for (; u < stop; u++) {
            const em_unit unit = unit_of(&block, level, (size_t)u);
            codes c;
            fetch_ahead(&unit, level);
            unpack(&unit, level, &c);
            for (int i = 0; i < n; i++) {
                const size_t at = (size_t)(idx ? idx[i] : i) * (size_t)a->units + (size_t)u;
                const spread x = spread_out(a->q + at * EM_UNIT, a->scale[at]);
                t[i] = f8_add(t[i], f8_mul(x.scale, f8_ints(dots(&c, level, &x))));
            }
        }
        next_group(&r, level, &s, &o);
        for (int i = 0; i < n; i++) {
            const f8 gx = f8_set1(a->gx[(size_t)(idx ? idx[i] : i) * (size_t)a->groups + (size_t)g]);
            y[i] = f8_add(f8_add(y[i], f8_mul(s, t[i])), f8_mul(o, gx));
        }
    }
    for (int i = 0; i < n; i++) store_rows(out + (size_t)i * ld, y[i], w->rows - rb * EM_ROW_BLOCK);
}

/* Tokens that share one unpacking, units of a panel of them, and row blocks that share its spreading. */
enum { TILE = 32, TILE_UNITS = 2, TILE_BLOCKS = 8 };

/* t[b][i] += scale * dots of block rb0 + b and token i over units [u0, u0 + units). */
INLINE void tile_panel(const em_matrix *w, int level, int rb0, int blocks, const em_acts *a,
                       const int32_t *idx, int n, int u0, int units, f8 (*t)[TILE]) {
    spread x[TILE_UNITS][TILE];
    for (int i = 0; i < n; i++) {
        const size_t at = (size_t)(idx ? idx[i] : i) * (size_t)a->units + (size_t)u0;
        for (int u = 0; u < units; u++)
            x[u][i] = spread_out(a->q + (at + (size_t)u) * EM_UNIT, a->scale[at + (size_t)u]);
    }
    for (int b = 0; b < blocks; b++) {
        const em_unit block = block_of(w, level, rb0 + b, u0);
        for (int u = 0; u < units; u++) {
            codes c;
            const em_unit unit = unit_of(&block, level, (size_t)u);
            fetch_ahead(&unit, level);
            unpack(&unit, level, &c);
            for (int i = 0; i < n; i++)
                t[b][i] = f8_add(t[b][i], f8_mul(x[u][i].scale, f8_ints(dots(&c, level, &x[u][i]))));
        }
    }
}

INLINE void many_tokens(const em_matrix *w, int level, int rb0, int blocks, const em_acts *a,
                        const int32_t *idx, int n, float *out, size_t ld) {
    scales r[TILE_BLOCKS];
    f8 y[TILE_BLOCKS][TILE], t[TILE_BLOCKS][TILE];
    for (int b = 0; b < blocks; b++) {
        r[b] = scales_of(w, level, rb0 + b);
        for (int i = 0; i < n; i++) y[b][i] = f8_zero();
    }
    for (int g = 0; g < w->groups; g++) {
        const int u0 = g * w->group_units, left = w->units - u0;
        const int units = left < w->group_units ? left : w->group_units;
        for (int b = 0; b < blocks; b++)
            for (int i = 0; i < n; i++) t[b][i] = f8_zero();
        for (int u = 0; u < units; u += TILE_UNITS)
            tile_panel(w, level, rb0, blocks, a, idx, n, u0 + u,
                       units - u < TILE_UNITS ? units - u : TILE_UNITS, t);
        f8 gx[TILE];
        for (int i = 0; i < n; i++)
            gx[i] = f8_set1(a->gx[(size_t)(idx ? idx[i] : i) * (size_t)a->groups + (size_t)g]);
        for (int b = 0; b < blocks; b++) {
            f8 s, o;
            next_group(&r[b], level, &s, &o);
            for (int i = 0; i < n; i++)
                y[b][i] = f8_add(f8_add(y[b][i], f8_mul(s, t[b][i])), f8_mul(o, gx[i]));
        }
    }
    for (int b = 0; b < blocks; b++)
        for (int i = 0; i < n; i++)
            store_rows(out + (size_t)i * ld + (size_t)b * EM_ROW_BLOCK, y[b][i],
                       w->rows - (rb0 + b) * EM_ROW_BLOCK);
}

INLINE void matmul_level(const em_matrix *w, int level, int rb0, int rb1, const em_acts *a,
                         const int32_t *idx, int n, float *out, size_t ld) {
    if (n == 1) {
        const size_t row = idx ? (size_t)idx[0] : 0;
        for (int rb = rb0; rb < rb1; rb++)
            one_token(w, level, rb, a, row, out + (size_t)(rb - rb0) * EM_ROW_BLOCK);
        return;
    }
    if (n <= FEW) {
        for (int rb = rb0; rb < rb1; rb++)
            few_tokens(w, level, rb, a, idx, n, out + (size_t)(rb - rb0) * EM_ROW_BLOCK, ld);
        return;
    }
    for (int first = 0; first < n; first += TILE) {
        em_acts tile = *a;
        if (!idx) {
            tile.q += (size_t)first * (size_t)a->units * EM_UNIT;
            tile.scale += (size_t)first * (size_t)a->units;
            tile.gx += (size_t)first * (size_t)a->groups;
        }
        for (int rb = rb0; rb < rb1; rb += TILE_BLOCKS)
            many_tokens(w, level, rb, rb1 - rb < TILE_BLOCKS ? rb1 - rb : TILE_BLOCKS, &tile,
                        idx ? idx + first : NULL, n - first < TILE ? n - first : TILE,
                        out + (size_t)first * ld + (size_t)(rb - rb0) * EM_ROW_BLOCK, ld);
    }
}

INLINE void accumulate_level(const em_matrix *w, int level, int rb0, int rb1, const em_acts *a, int n,
                             int32_t *out) {
    const size_t rows = (size_t)(w->rows + EM_ROW_BLOCK - 1) / EM_ROW_BLOCK * EM_ROW_BLOCK;
    for (int rb = rb0; rb < rb1; rb++) {
        const em_unit block = block_of(w, level, rb, 0);
        for (int u = 0; u < w->units; u++) {
            codes c;
            const em_unit unit = unit_of(&block, level, (size_t)u);
            unpack(&unit, level, &c);
            for (int i = 0; i < n; i++) {
                int32_t lane[EM_ROW_BLOCK];
                const size_t at = (size_t)i * (size_t)a->units + (size_t)u;
                const spread x = spread_out(a->q + at * EM_UNIT, a->scale[at]);
                i8x_store(lane, dots(&c, level, &x));
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
