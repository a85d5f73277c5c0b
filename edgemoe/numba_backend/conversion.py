"""Compiled kernels of conversion: native/quantize.c again, bit for bit.

A kernel computes the tasks [first, last) of an operation.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from numba import types

from ..types import F32, I32, I64, U8
from .jit import array_in, array_out, helper, kernel, pointer

ROW_BLOCK = 8
UNIT = 32

_EVERY_BYTE = np.uint64(0x0101010101010101)
_LARGEST = np.finfo(np.float32).max
_LARGEST_SPAN = 2.0**127
_SMALLEST_EXPONENT, _OCTAVES = -126, 15

_INT = types.int64
_LEVELS = array_in(types.int32, 1)


@helper
def _storable_step(span: float) -> tuple[int, int]:
    """(exponent, sixteenths) of the smallest storable step that is span / 255 or more."""
    if span == 0:
        return _SMALLEST_EXPONENT, 0
    fraction, exponent = math.frexp(span / 255.0)
    mantissa = np.int64(math.ceil(fraction * 32.0))
    if mantissa == 32:
        return exponent, 0
    return exponent - 1, mantissa - 16


@kernel(
    *(_INT, _INT, array_in(types.float32, 2), _INT, _LEVELS, array_out(types.uint8, 2)),
    *(array_out(types.uint8, 1), array_out(types.uint8, 2), array_out(types.uint8, 2)),
    *(array_out(types.uint8, 3), array_out(types.boolean, 1)),
)
def quantize_rows(
    first: int,
    last: int,
    w: F32,
    group: int,
    levels: I32,
    codes: U8,
    exponent: U8,
    step: U8,
    zero: U8,
    shift: U8,
    bad: Any,
) -> None:
    """Rows of w to codes, exponents [rows], steps, zeros [rows, groups], shifts of all levels.

    bad [rows]: whether a row holds what cannot be quantized.
    """
    groups = step.shape[1]
    lows, highs = np.empty(groups, np.float32), np.empty(groups, np.float32)
    exponents, mantissas = np.empty(groups, np.int64), np.empty(groups, np.int64)
    for row in range(first, last):
        bad[row] = False
        largest = _SMALLEST_EXPONENT
        for g in range(groups):
            at = g * group
            n = min(group, w.shape[1] - at)
            low = high = np.float32(0)
            finite = True
            for i in range(at, at + n):
                v = w[row, i]
                low = v if v < low else low
                high = v if v > high else high
                finite &= abs(v) <= _LARGEST
            span = np.float64(high) - np.float64(low)
            if not finite or span > _LARGEST_SPAN:
                bad[row] = True
                break
            lows[g], highs[g] = low, high
            exponents[g], mantissas[g] = _storable_step(span)
            largest = max(largest, exponents[g])
        if bad[row]:
            continue
        base = max(largest - _OCTAVES, _SMALLEST_EXPONENT)
        exponent[row] = base + 127
        for g in range(groups):
            octave, sixteenths = exponents[g] - base, mantissas[g]
            if octave < 0:
                octave = sixteenths = 0
            inverse = 1.0 / math.ldexp(1.0 + sixteenths / 16.0, np.int32(base + octave))
            middle = (np.float64(lows[g]) + np.float64(highs[g])) * 0.5
            z = min(max(np.rint(127.5 - middle * inverse), 0.0), 255.0)
            step[row, g] = octave * 16 + sixteenths
            zero[row, g] = np.uint8(z)
            begin, end = g * group, min((g + 1) * group, w.shape[1])
            total = np.int64(0)
            for i in range(begin, end):
                p = np.float64(w[row, i]) * inverse + z
                codes[row, i] = np.uint8(min(max(np.rint(p), 0.0), 255.0))
                total += np.int64(min(max(np.rint(p * 256.0), -256.0), 65536.0))
            for level in range(levels.shape[0]):
                shift[level, row, g] = 8
                if levels[level] < 8:
                    cell = np.int64(1) << np.int64(8 - levels[level])
                    kept = np.int64(0)
                    for i in range(begin, end):
                        kept += np.int64(codes[row, i]) & -cell
                    centre = kept * 256 + (end - begin) * (cell - 1) * 128
                    mean = np.float64(total - centre) / (np.float64(end - begin) * cell * 16.0)
                    shift[level, row, g] = np.uint8(min(max(np.rint(mean) + 8.0, 0.0), 15.0))


@helper
def _decoded(level: int, row: int, g: int, code: int, bits: I32, s: F32, o: F32) -> Any:
    value = s[level, row, g] * np.float32(code >> (8 - np.int64(bits[level, g])))
    return value + o[level, row, g]


@kernel(
    *(_INT, _INT, array_in(types.float32, 2), array_in(types.int32, 1), array_in(types.int32, 2)),
    *(array_in(types.float32, 2), array_in(types.float32, 2), array_in(types.float32, 3)),
    *(array_in(types.float32, 3), array_in(types.float32, 1), _INT, _INT),
    array_out(types.uint8, 2),
)
def nest_rows(
    first: int,
    last: int,
    w: F32,
    starts: I32,
    bits: I32,
    feedback: F32,
    moment: F32,
    s: F32,
    o: F32,
    weight: F32,
    reach: int,
    sweeps: int,
    codes: U8,
) -> None:
    """Rows of codes, chosen for all levels together: em_nest_rows."""
    count, cols = len(weight), w.shape[1]
    state, costs = np.empty((count, cols), np.float32), np.empty(256, np.float32)
    target, nearest = np.empty(count, np.float32), np.empty(cols, np.int64)
    for row in range(first, last):
        nearest[:] = codes[row]
        for k in range(count):
            state[k] = w[row]
        for step in range(-2, sweeps):  # along the feedback, gradients, descents
            if step == -1:
                state[:] = np.float32(0)
            by = feedback if step == -2 else moment
            g = 0
            for i in range(cols):
                if i == starts[g + 1]:
                    g += 1
                now = np.int64(codes[row, i])
                best = now
                for k in range(count):
                    target[k] = state[k, i]
                    if step > -2:
                        target[k] = _decoded(k, row, g, now, bits, s, o) - state[k, i] / by[i, i]
                if step != -1:
                    low, stop = max(nearest[i] - reach, 0), min(nearest[i] + reach, 255) + 1
                    for code in range(low, stop):
                        costs[code] = np.float32(0)
                        for k in range(count):
                            d = _decoded(k, row, g, code, bits, s, o) - target[k]
                            costs[code] += weight[k] * (d * d)
                    for code in range(low, stop):
                        if costs[code] < costs[best]:
                            best = code
                    codes[row, i] = best
                for k in range(count):
                    before = w[row, i]
                    if step == -2:
                        before = target[k]
                    elif step >= 0:
                        before = _decoded(k, row, g, now, bits, s, o)
                    change = _decoded(k, row, g, best, bits, s, o) - before
                    for j in range(i + 1 if step == -2 else 0, cols):
                        state[k, j] += change * by[i, j]


@kernel(_INT, _INT, array_in(types.uint8, 2), _LEVELS, array_in(types.int64, 1))
def pack_rows(first: int, last: int, codes: U8, levels: I32, planes: I64) -> None:
    """Row blocks of codes [rows, cols] to the bytes they add to each plane, given by address."""
    rows, cols = codes.shape
    units = (cols + UNIT - 1) // UNIT
    quads = np.empty((8, 4 * ROW_BLOCK), np.uint8)  # [t, 4 * r + j] is row r, column 4 * t + j
    words = quads.view(np.uint64)
    for block in range(first, last):
        for u in range(units):
            quads[:] = 0
            for r in range(min(ROW_BLOCK, rows - block * ROW_BLOCK)):
                for c in range(min(UNIT, cols - u * UNIT)):
                    quads[c // 4, 4 * r + c % 4] = codes[block * ROW_BLOCK + r, u * UNIT + c]
            below = 0
            for level in range(levels.shape[0]):
                bits = levels[level] - below
                below = levels[level]
                mask = _EVERY_BYTE * np.uint64((1 << bits) - 1)
                shift = np.uint64(8 - below)
                at = planes[level] + (block * units + u) * 32 * bits
                cell = numba.carray(pointer(at), 4 * bits, np.uint64)
                cell[:] = np.uint64(0)
                for t in range(8):
                    vector, to = t * bits // 8, np.uint64(t * bits % 8)
                    for k in range(4):
                        cell[4 * vector + k] |= (words[t, k] >> shift & mask) << to
