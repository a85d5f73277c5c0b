/* Planes of a cell -> bytes of codes. Written over b32, 32 bytes, which an instruction set's file
 * defines before it includes this one:
 *
 *   b32_load(p) b32_set1(byte) b32_and b32_or b32_xor
 *   b32_shl(v, n) b32_shr(v, n)  every byte moved by n bits; bits may come in from the next byte
 *   b32_look(v, table)           table[v] for bytes v below 16
 *
 * A vector holds four columns of eight rows: byte 4 * r + j is row r, column 4 * t + j of vector t.
 * Shifts and masks are what a product costs, so fields are brought side by side while they are still
 * packed, and parted last. */
#ifndef ISA_UNPACK_H
#define ISA_UNPACK_H

/* Two-bit fields of every byte, ascending; fields 1 and 3 stay at bits 2 and 3. */
INLINE void part_crumbs(b32 v, b32 out[4]) {
    const b32 up = b32_shr(v, 4);
    out[0] = b32_and(v, b32_set1(0x03));
    out[1] = b32_and(v, b32_set1(0x0c));
    out[2] = b32_and(up, b32_set1(0x03));
    out[3] = b32_and(up, b32_set1(0x0c));
}

/* Four-bit fields of two-bit ones of `high` and of `low`: 0 and 2 of every byte in *even, 1 and 3 in
 * *odd. The even fields of high change places with the odd ones of low. */
INLINE void pair_crumbs(b32 high, b32 low, b32 *even, b32 *odd) {
    const b32 swap = b32_and(b32_xor(b32_shr(low, 2), high), b32_set1(0x33));
    *even = b32_xor(low, b32_shl(swap, 2));
    *odd = b32_xor(high, swap);
}

INLINE void part_nibbles(b32 even, b32 odd, b32 out[4]) {
    const b32 mask = b32_set1(0x0f);
    out[0] = b32_and(even, mask);
    out[1] = b32_and(odd, mask);
    out[2] = b32_and(b32_shr(even, 4), mask);
    out[3] = b32_and(b32_shr(odd, 4), mask);
}

/* Six-bit fields: nibbles above, two-bit ones of `low` below. */
INLINE void part_six(b32 even, b32 odd, b32 low, b32 out[4]) {
    const b32 above = b32_set1(0x3c), below = b32_set1(0x03);
    out[0] = b32_or(b32_and(b32_shl(even, 2), above), b32_and(low, below));
    out[1] = b32_or(b32_and(b32_shl(odd, 2), above), b32_and(b32_shr(low, 2), below));
    out[2] = b32_or(b32_and(b32_shr(even, 2), above), b32_and(b32_shr(low, 4), below));
    out[3] = b32_or(b32_and(b32_shr(odd, 2), above), b32_and(b32_shr(low, 6), below));
}

/* What the one-bit planes hold for vectors 4 * half and on, as two-bit fields: the first plane's bit
 * above the second's, which is 0 at level 1. */
INLINE b32 pair_bits(const em_unit *u, int level, int half) {
    static const uint8_t above[16] = {0x00, 0x02, 0x08, 0x0a, 0x20, 0x22, 0x28, 0x2a,
                                      0x80, 0x82, 0x88, 0x8a, 0xa0, 0xa2, 0xa8, 0xaa};
    static const uint8_t below[16] = {0x00, 0x01, 0x04, 0x05, 0x10, 0x11, 0x14, 0x15,
                                      0x40, 0x41, 0x44, 0x45, 0x50, 0x51, 0x54, 0x55};
    const b32 mask = b32_set1(0x0f);
    b32 first = b32_load(u->p[1]);
    if (half) first = b32_shr(first, 4);
    first = b32_look(b32_and(first, mask), above);
    if (level == 1) return first;
    b32 second = b32_load(u->p[2]);
    if (half) second = b32_shr(second, 4);
    return b32_or(first, b32_look(b32_and(second, mask), below));
}

/* Vectors 4 * half and on of a cell:
 *   level 0  the codes, four times the code where the vector's number is odd
 *   level 1  twice the codes
 *   level 2, 3  the codes
 *   level 4  their upper four bits. */
INLINE void unpack_top(const em_unit *u, int level, int half, b32 top[4]) {
    const b32 high = b32_load(u->p[0] + 32 * half);
    if (level == 0) {
        part_crumbs(high, top);
        return;
    }
    b32 even, odd;
    pair_crumbs(high, pair_bits(u, level, half), &even, &odd);
    if (level == 3) {
        part_six(even, odd, b32_load(u->p[3] + 32 * half), top);
    } else {
        part_nibbles(even, odd, top);
    }
}

/* The lower four bits at level 4. */
INLINE void unpack_low(const em_unit *u, int half, b32 low[4]) {
    b32 even, odd;
    pair_crumbs(b32_load(u->p[3] + 32 * half), b32_load(u->p[4] + 32 * half), &even, &odd);
    part_nibbles(even, odd, low);
}

/* Codes of a cell as they are; at level 4 the upper four bits of each in `top`, the others in `low`. */
typedef struct {
    b32 top[8], low[8];
} codes;

INLINE void unpack(const em_unit *u, int level, codes *c) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        b32 *top = c->top + 4 * half;
        unpack_top(u, level, half, top);
        if (level == 0)
            for (int t = 1; t < 4; t += 2) top[t] = b32_shr(top[t], 2);
        if (level == 1)
            for (int t = 0; t < 4; t++) top[t] = b32_shr(top[t], 1);
        if (level == 4) unpack_low(u, half, c->low + 4 * half);
    }
}

#endif
