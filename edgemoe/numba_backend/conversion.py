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
FRACTION = 4096

_EVERY_BYTE = np.uint64(0x0101010101010101)
_LARGEST = np.finfo(np.float32).max
_LARGEST_SPAN = 2.0**127

_INT = types.int64
_LEVELS = array_in(types.int32, 1)


@helper
def _round_to_stored(s: float) -> float:
    """Nearest value of 11 significant bits: what float16 keeps of a normal number."""
    mantissa, exponent = math.frexp(s)
    return math.ldexp(np.rint(mantissa * 2048.0), exponent - 11)


@kernel(
    *(_INT, _INT, array_in(types.float32, 2), _INT, _LEVELS),
    *(array_out(types.uint8, 2), array_out(types.float32, 4), array_out(types.boolean, 1)),
)
def quantize_rows(
    first: int, last: int, w: F32, group: int, levels: I32, codes: U8, fits: F32, bad: Any
) -> None:
    """Rows of w to 8-bit codes and least-squares fits [levels, 2, rows, groups].

    bad [rows]: whether a row holds what cannot be quantized.
    """
    t = np.empty(group, np.int32)
    for row in range(first, last):
        bad[row] = False
        for g in range(fits.shape[3]):
            at = g * group
            n = min(group, w.shape[1] - at)
            low = high = w[row, at]
            finite = True
            for i in range(at, at + n):
                v = w[row, i]
                low = v if v < low else low
                high = v if v > high else high
                finite &= abs(v) <= _LARGEST
            span = np.float64(high) - np.float64(low)
            if not finite or span > _LARGEST_SPAN:
                bad[row] = True
                continue
            inverse = 255.0 / span if span > 0 else 0.0
            sum_t = np.int64(0)
            for i in range(n):
                place = (np.float64(w[row, at + i]) - np.float64(low)) * inverse * FRACTION
                t[i] = np.int32(np.rint(place))
                codes[row, at + i] = (t[i] + FRACTION // 2) // FRACTION
                sum_t += t[i]
            unit = span / 255.0
            mean_w = np.float64(low) + unit * (np.float64(sum_t) / FRACTION / n)
            for level in range(levels.shape[0]):
                shift = 8 - levels[level]
                sum_tc = sum_c = sum_cc = np.int64(0)
                for i in range(n):
                    c = np.int64(codes[row, at + i] >> shift)
                    sum_c += c
                    sum_cc += c * c
                    sum_tc += t[i] * c
                cov = n * sum_tc - sum_t * sum_c
                var = n * sum_cc - sum_c * sum_c
                s = 0.0
                if var:
                    s = _round_to_stored(np.float64(cov) / (np.float64(var) * FRACTION) * unit)
                fits[level, 0, row, g] = s
                fits[level, 1, row, g] = mean_w - s * (np.float64(sum_c) / n)


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
