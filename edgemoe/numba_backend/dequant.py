"""Compiled decoders of GGML blocks: native/dequant.c again, bit for bit.

A kernel decodes the blocks [first, last). The layouts are described in native/dequant.c.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import types

from ..types import F32, U8
from .jit import Kernel, array_in, array_out, helper, kernel

ROW = 32
HALF_ROW = 16
SUPER = 256

_INT = types.int64
_BLOCKS = (_INT, _INT, array_in(types.uint8, 2), array_out(types.float32, 2))

_IQ4_NL = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)
_MXFP4 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)
_SMALLEST_HALF = np.float32(2.0**-24)


@helper
def _half(b: U8, at: int) -> Any:
    """The float16 at byte `at`; em_half_to_float of native/em_math.h."""
    half = np.uint32(b[at]) | np.uint32(b[at + 1]) << np.uint32(8)
    sign, exponent, mantissa = half >> 15, half >> 10 & 31, half & 1023
    if exponent == 0:
        tiny = np.float32(mantissa) * _SMALLEST_HALF
        return -tiny if sign else tiny
    if exponent == 31:
        exponent += 112
        mantissa |= 512 if mantissa else 0  # a quiet NaN
    return np.uint32(sign << 31 | (exponent + 112) << 23 | mantissa << 13).view(np.float32)


@helper
def _scaled(code: U8, zero: int, d: Any, y: F32) -> None:
    """y = d * (code - zero)"""
    for i in range(y.shape[0]):
        y[i] = d * np.float32(np.int32(code[i]) - zero)


@helper
def _shifted(code: U8, d: Any, m: Any, y: F32) -> None:
    """y = d * code + m"""
    for i in range(y.shape[0]):
        y[i] = d * np.float32(code[i]) + m


@helper
def _field(q: U8, place: int, bits: int, code: U8) -> None:
    """Codes from the `bits`-wide field at bit `place` of 32 bytes."""
    for i in range(ROW):
        code[i] = q[i] >> place & ((1 << bits) - 1)


@helper
def _field_above(q: U8, place: int, bits: int, to: int, code: U8) -> None:
    """Puts the `bits`-wide field at bit `place` of 32 bytes above the `to` bits of codes."""
    for i in range(ROW):
        code[i] |= (q[i] >> place & ((1 << bits) - 1)) << to


@helper
def _nibbles(q: U8, code: U8) -> None:
    """16 bytes of two nibbles: the low ones are the first 16 codes."""
    for i in range(HALF_ROW):
        code[i] = q[i] & 15
        code[HALF_ROW + i] = q[i] >> 4


@helper
def _fifth_bits(h: U8, code: U8) -> None:
    """Bit i of 4 bytes becomes bit 4 of code i."""
    for i in range(ROW):
        code[i] |= (h[i // 8] >> (i % 8) & 1) << 4


@kernel(*_BLOCKS)
def _f32(first: int, last: int, b: U8, y: F32) -> None:
    bits = y.view(np.uint8)
    for i in range(first, last):
        for k in range(4):
            bits[i, k] = b[i, k]


@kernel(*_BLOCKS)
def _f16(first: int, last: int, b: U8, y: F32) -> None:
    for i in range(first, last):
        y[i, 0] = _half(b[i], 0)


@kernel(*_BLOCKS)
def _bf16(first: int, last: int, b: U8, y: F32) -> None:
    bits = y.view(np.uint8)
    for i in range(first, last):
        bits[i, 0] = bits[i, 1] = 0
        bits[i, 2], bits[i, 3] = b[i, 0], b[i, 1]


@kernel(*_BLOCKS)
def _q8_0(first: int, last: int, b: U8, y: F32) -> None:
    for i in range(first, last):
        d = _half(b[i], 0)
        for k in range(ROW):
            y[i, k] = d * np.float32(np.int8(b[i, 2 + k]))


@kernel(*_BLOCKS)
def _q4_0(first: int, last: int, b: U8, y: F32) -> None:
    code = np.empty(ROW, np.uint8)
    for i in range(first, last):
        _nibbles(b[i, 2:], code)
        _scaled(code, 8, _half(b[i], 0), y[i])


@kernel(*_BLOCKS)
def _q4_1(first: int, last: int, b: U8, y: F32) -> None:
    code = np.empty(ROW, np.uint8)
    for i in range(first, last):
        _nibbles(b[i, 4:], code)
        _shifted(code, _half(b[i], 0), _half(b[i], 2), y[i])


@kernel(*_BLOCKS)
def _q5_0(first: int, last: int, b: U8, y: F32) -> None:
    code = np.empty(ROW, np.uint8)
    for i in range(first, last):
        _nibbles(b[i, 6:], code)
        _fifth_bits(b[i, 2:], code)
        _scaled(code, 16, _half(b[i], 0), y[i])


@kernel(*_BLOCKS)
def _q5_1(first: int, last: int, b: U8, y: F32) -> None:
    code = np.empty(ROW, np.uint8)
    for i in range(first, last):
        _nibbles(b[i, 8:], code)
        _fifth_bits(b[i, 4:], code)
        _shifted(code, _half(b[i], 0), _half(b[i], 2), y[i])


@kernel(*_BLOCKS)
def _iq4_nl(first: int, last: int, b: U8, y: F32) -> None:
    code = np.empty(ROW, np.uint8)
    for i in range(first, last):
        _nibbles(b[i, 2:], code)
        d = _half(b[i], 0)
        for k in range(ROW):
            y[i, k] = d * _IQ4_NL[code[k]]


@kernel(*_BLOCKS)
def _mxfp4(first: int, last: int, b: U8, y: F32) -> None:
    code = np.empty(ROW, np.uint8)
    for i in range(first, last):
        _nibbles(b[i, 1:], code)
        e = np.int64(b[i, 0])
        d = np.uint32(1 << 21 << e if e < 2 else (e - 1) << 23).view(np.float32)
        for k in range(ROW):
            y[i, k] = d * _MXFP4[code[k]]


@kernel(*_BLOCKS)
def _q2_k(first: int, last: int, b: U8, y: F32) -> None:
    code = np.empty(ROW, np.uint8)
    for i in range(first, last):
        d, m = _half(b[i], 80), _half(b[i], 82)
        for r in range(SUPER // ROW):
            _field(b[i, 16 + ROW * (r // 4) :], 2 * (r % 4), 2, code)
            for h in range(2):
                at, scales = ROW * r + HALF_ROW * h, b[i, 2 * r + h]
                scale, minimum = d * np.float32(scales & 15), m * np.float32(scales >> 4)
                _shifted(code[HALF_ROW * h :], scale, -minimum, y[i, at : at + HALF_ROW])


@kernel(*_BLOCKS)
def _q3_k(first: int, last: int, b: U8, y: F32) -> None:
    code = np.empty(ROW, np.uint8)
    for i in range(first, last):
        d = _half(b[i], 108)
        for r in range(SUPER // ROW):
            _field(b[i, 32 + ROW * (r // 4) :], 2 * (r % 4), 2, code)
            _field_above(b[i], r, 1, 2, code)
            for h in range(2):
                k = 2 * r + h
                nibble = np.int32(b[i, 96 + k % 8]) >> 4 * (k // 8) & 15
                above = np.int32(b[i, 104 + k % 4]) >> 2 * (k // 4) & 3
                scale = d * np.float32((nibble | above << 4) - 32)
                at = HALF_ROW * k
                _scaled(code[HALF_ROW * h :], 4, scale, y[i, at : at + HALF_ROW])


@helper
def _row_scales(b: U8, scale: F32, minimum: F32) -> None:
    """Scales and minima of the 8 rows of Q4_K and Q5_K."""
    d, m = _half(b, 0), _half(b, 2)
    for r in range(4):
        s, t, both = b[4 + r], b[8 + r], b[12 + r]
        scale[r] = d * np.float32(s & 63)
        minimum[r] = m * np.float32(t & 63)
        scale[4 + r] = d * np.float32(both & 15 | (s >> 6) << 4)
        minimum[4 + r] = m * np.float32(both >> 4 | (t >> 6) << 4)


@kernel(*_BLOCKS)
def _q4_k(first: int, last: int, b: U8, y: F32) -> None:
    code = np.empty(ROW, np.uint8)
    scale, minimum = np.empty(8, np.float32), np.empty(8, np.float32)
    for i in range(first, last):
        _row_scales(b[i], scale, minimum)
        for r in range(SUPER // ROW):
            _field(b[i, 16 + ROW * (r // 2) :], 4 * (r % 2), 4, code)
            _shifted(code, scale[r], -minimum[r], y[i, ROW * r : ROW * r + ROW])


@kernel(*_BLOCKS)
def _q5_k(first: int, last: int, b: U8, y: F32) -> None:
    code = np.empty(ROW, np.uint8)
    scale, minimum = np.empty(8, np.float32), np.empty(8, np.float32)
    for i in range(first, last):
        _row_scales(b[i], scale, minimum)
        for r in range(SUPER // ROW):
            _field(b[i, 48 + ROW * (r // 2) :], 4 * (r % 2), 4, code)
            _field_above(b[i, 16:], r, 1, 4, code)
            _shifted(code, scale[r], -minimum[r], y[i, ROW * r : ROW * r + ROW])


@kernel(*_BLOCKS)
def _q6_k(first: int, last: int, b: U8, y: F32) -> None:
    code = np.empty(ROW, np.uint8)
    for i in range(first, last):
        d = _half(b[i], 208)
        for r in range(SUPER // ROW):
            half, quarter = r // 4, r % 4
            _field(b[i, 64 * half + ROW * (quarter % 2) :], 4 * (quarter // 2), 4, code)
            _field_above(b[i, 128 + ROW * half :], 2 * quarter, 2, 4, code)
            for h in range(2):
                scale = d * np.float32(np.int8(b[i, 192 + 2 * r + h]))
                at = ROW * r + HALF_ROW * h
                _scaled(code[HALF_ROW * h :], 32, scale, y[i, at : at + HALF_ROW])


class BlockType(NamedTuple):
    """A block format: `size` bytes hold `weights` weights."""

    weights: int
    size: int
    decode: Kernel


BLOCK_TYPES = {
    "F32": BlockType(1, 4, _f32),
    "F16": BlockType(1, 2, _f16),
    "BF16": BlockType(1, 2, _bf16),
    "Q8_0": BlockType(ROW, 34, _q8_0),
    "Q6_K": BlockType(SUPER, 210, _q6_k),
    "Q5_K": BlockType(SUPER, 176, _q5_k),
    "Q4_K": BlockType(SUPER, 144, _q4_k),
    "Q3_K": BlockType(SUPER, 110, _q3_k),
    "Q2_K": BlockType(SUPER, 84, _q2_k),
    "Q4_0": BlockType(ROW, 18, _q4_0),
    "Q4_1": BlockType(ROW, 20, _q4_1),
    "Q5_0": BlockType(ROW, 22, _q5_0),
    "Q5_1": BlockType(ROW, 24, _q5_1),
    "IQ4_NL": BlockType(ROW, 18, _iq4_nl),
    "MXFP4": BlockType(ROW, 17, _mxfp4),
}
