"""A plain NumPy twin of kernels.dequantize: GGML block formats to float32, field by field.

Blocks come as uint8 [n, bytes] and weights go as float32 [n, weights]. Unlike the other twins these
compute in float32, in the order of ggml, and the kernel has to give the same bits; which NaN comes
of a NaN scale is left open. Layouts: ggml's ggml-common.h and ggml-quants.c.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .types import F32, U8

IQ4_NL_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
MXFP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""The 4-bit floats (a sign, 2 bits of exponent, 1 of mantissa), doubled to be whole."""


def _half(b: U8, at: int) -> F32:
    """The float16 at byte `at` of every block: [n, 1]."""
    halves: NDArray[np.float16] = b[:, at : at + 2].copy().view(np.float16)
    return halves.astype(np.float32)


def _fields(b: U8, run: int, bits: int) -> U8:
    """Fields of `bits` bits: for every run of `run` bytes their lowest ones, then the next.

    b: uint8 [n, bytes]. Returns uint8 [n, bytes * 8 / bits].
    """
    n, size = b.shape
    runs = b.reshape(n, size // run, 1, run)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    fields: U8 = runs >> shifts & np.uint8((1 << bits) - 1)
    return fields.reshape(n, size * 8 // bits)


def _bits(b: U8) -> U8:
    """Single bits, the lowest of each byte first: [n, 8 * bytes]."""
    return np.unpackbits(b, axis=1, bitorder="little")


def _spread(scale: F32, run: int) -> F32:
    """Each of the scales [n, k] for `run` weights: [n, k * run]."""
    return np.repeat(scale, run, axis=1)


def _minus(code: U8, zero: int) -> F32:
    """code - zero, exactly."""
    return (code.astype(np.int32) - zero).astype(np.float32)


def _f32(b: U8) -> F32:
    return b.view(np.float32)


def _f16(b: U8) -> F32:
    return b.view(np.float16).astype(np.float32)


def _bf16(b: U8) -> F32:
    """The upper half of a float32."""
    return (b.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _q8_0(b: U8) -> F32:
    return _half(b, 0) * b[:, 2:].view(np.int8).astype(np.float32)


def _q4_0(b: U8) -> F32:
    return _half(b, 0) * _minus(_fields(b[:, 2:], 16, 4), 8)


def _q4_1(b: U8) -> F32:
    return _half(b, 0) * _fields(b[:, 4:], 16, 4).astype(np.float32) + _half(b, 2)


def _q5_0(b: U8) -> F32:
    code = _fields(b[:, 6:], 16, 4) + 16 * _bits(b[:, 2:6])
    return _half(b, 0) * _minus(code, 16)


def _q5_1(b: U8) -> F32:
    code = _fields(b[:, 8:], 16, 4) + 16 * _bits(b[:, 4:8])
    return _half(b, 0) * code.astype(np.float32) + _half(b, 2)


def _iq4_nl(b: U8) -> F32:
    return _half(b, 0) * np.array(IQ4_NL_VALUES, np.float32)[_fields(b[:, 2:], 16, 4)]


def _mxfp4(b: U8) -> F32:
    """The scale is the power of two of the exponent byte, halved as the values are doubled."""
    scale: F32 = np.ldexp(np.float32(1), b[:, :1].astype(np.int32) - 128)
    values: F32 = np.array(MXFP4_VALUES, np.float32)
    return scale * values[_fields(b[:, 1:], 16, 4)]


def _q2_k(b: U8) -> F32:
    """Every 16 weights have a 4-bit scale and a 4-bit minimum."""
    scale = _half(b, 80) * (b[:, :16] & 15).astype(np.float32)
    minimum = _half(b, 82) * (b[:, :16] >> 4).astype(np.float32)
    code = _fields(b[:, 16:80], 32, 2).astype(np.float32)
    return _spread(scale, 16) * code - _spread(minimum, 16)


def _q3_k(b: U8) -> F32:
    """Every 16 weights have a 6-bit scale: 4 bits in the first 8 bytes, 2 in the last 4."""
    sixes = _fields(b[:, 96:104], 8, 4) + 16 * _fields(b[:, 104:108], 4, 2)
    code = _fields(b[:, 32:96], 32, 2) + 4 * _fields(b[:, :32], 32, 1)
    return _spread(_half(b, 108) * _minus(sixes, 32), 16) * _minus(code, 4)


def _row_scales(b: U8) -> tuple[F32, F32]:
    """Scales and minima of the 8 rows of 32 weights of Q4_K and Q5_K: 6 bits each, [n, 8].

    Those of the first 4 rows are the low 6 bits of bytes 4 to 7 and 8 to 11. The others have their
    upper 2 bits on top of these, and the lower 4 in the low and the high nibbles of bytes 12 to 15.
    """
    sixes = []
    for first, nibbles in ((4, b[:, 12:16] & 15), (8, b[:, 12:16] >> 4)):
        own = b[:, first : first + 4]
        sixes.append(np.concatenate([own & 63, nibbles | own >> 6 << 4], axis=1))
    return _half(b, 0) * sixes[0].astype(np.float32), _half(b, 2) * sixes[1].astype(np.float32)


def _q4_k(b: U8) -> F32:
    scale, minimum = _row_scales(b)
    code = _fields(b[:, 16:], 32, 4).astype(np.float32)
    return _spread(scale, 32) * code - _spread(minimum, 32)


def _q5_k(b: U8) -> F32:
    scale, minimum = _row_scales(b)
    code = _fields(b[:, 48:], 32, 4) + 16 * _fields(b[:, 16:48], 32, 1)
    return _spread(scale, 32) * code.astype(np.float32) - _spread(minimum, 32)


def _q6_k(b: U8) -> F32:
    """Every 16 weights have a signed 8-bit scale."""
    scale = _half(b, 208) * b[:, 192:208].view(np.int8).astype(np.float32)
    code = _fields(b[:, :128], 64, 4) + 16 * _fields(b[:, 128:192], 32, 2)
    return _spread(scale, 16) * _minus(code, 32)


class BlockType(NamedTuple):
    """A block format: `size` bytes hold `weights` weights."""

    weights: int
    size: int
    decode: Callable[[U8], F32]


BLOCK_TYPES = {
    "F32": BlockType(1, 4, _f32),
    "F16": BlockType(1, 2, _f16),
    "BF16": BlockType(1, 2, _bf16),
    "Q8_0": BlockType(32, 34, _q8_0),
    "Q6_K": BlockType(256, 210, _q6_k),
    "Q5_K": BlockType(256, 176, _q5_k),
    "Q4_K": BlockType(256, 144, _q4_k),
    "Q3_K": BlockType(256, 110, _q3_k),
    "Q2_K": BlockType(256, 84, _q2_k),
    "Q4_0": BlockType(32, 18, _q4_0),
    "Q4_1": BlockType(32, 20, _q4_1),
    "Q5_0": BlockType(32, 22, _q5_0),
    "Q5_1": BlockType(32, 24, _q5_1),
    "IQ4_NL": BlockType(32, 18, _iq4_nl),
    "MXFP4": BlockType(32, 17, _mxfp4),
}


def dequantize(data: U8, type_name: str) -> F32:
    """The weights of whole blocks of a type: data uint8 [n / weights * size] -> float32 [n]."""
    block = BLOCK_TYPES[type_name]
    with np.errstate(invalid="ignore", over="ignore"):  # of scales that are NaN or infinite
        return block.decode(data.reshape(-1, block.size)).reshape(-1)
