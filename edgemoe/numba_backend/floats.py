"""Compiled float32 kernels and CRC-32C: native/em_math.h, ops.c, crc32c.c again.

A kernel computes the tasks [first, last) of an operation. Every reduction has the order that
native/edgemoe.h states.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from ..types import F32, I32, U8
from .jit import array_in, array_out, helper, kernel

LANES = 16

_INT, _F32 = types.int64, types.float32
_F32_1D, _F32_2D = array_in(_F32, 1), array_in(_F32, 2)
_OUT_2D, _OUT_3D = array_out(_F32, 2), array_out(_F32, 3)

_ZERO, _ONE = np.float32(0), np.float32(1)
_EXP_LO, _EXP_HI = np.float32(-87), np.float32(88)
_LOG2E = np.float32(1.44269504088896341)
_LN2_HI, _LN2_LO = np.float32(0.693359375), np.float32(-2.12194440e-4)
_C0, _C1, _C2 = (
    np.float32(1.9875691500e-4),
    np.float32(1.3981999507e-3),
    np.float32(8.3334519073e-3),
)
_C3, _C4, _C5 = (
    np.float32(4.1665795894e-2),
    np.float32(1.6666665459e-1),
    np.float32(5.0000001201e-1),
)


@helper
def _exp(x: Any) -> Any:
    """em_expf of native/em_math.h."""
    x = _EXP_LO if x < _EXP_LO else x
    x = _EXP_HI if x > _EXP_HI else x
    n = np.rint(x * _LOG2E)
    r = x - n * _LN2_HI
    r = r - n * _LN2_LO
    p = _C0
    p = p * r + _C1
    p = p * r + _C2
    p = p * r + _C3
    p = p * r + _C4
    p = p * r + _C5
    p = p * (r * r) + (r + _ONE)
    bits = np.int32((np.int32(n) + np.int32(127)) << np.int32(23))
    return p * bits.view(np.float32)


def _sum_products_of(typingctx: Any, a: Any, b: Any, count: Any, lanes: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = ir.VectorType(ir.FloatType(), LANES)

        def pointer(address: Any) -> Any:
            return builder.inttoptr(address, vector.as_pointer())

        def load(address: Any, i: Any) -> Any:
            step = builder.mul(i, ir.Constant(i.type, 4 * LANES))
            return builder.load(pointer(builder.add(address, step)), align=4)

        total = cgutils.alloca_once_value(builder, ir.Constant(vector, [0.0] * LANES))
        with cgutils.for_range(builder, args[2]) as loop:
            product = builder.fmul(load(args[0], loop.index), load(args[1], loop.index))
            builder.store(builder.fadd(builder.load(total), product), total)
        builder.store(builder.load(total), pointer(args[3]), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), generate


_sum_products = intrinsic(_sum_products_of)
"""lanes[0:16] = sum over i < count of a[16 * i : 16 * i + 16] * b[16 * i : 16 * i + 16].

The arrays are given by their addresses. One LLVM vector of 16 lanes: numba would keep them apart.
"""


@helper
def _tree(lanes: F32) -> Any:
    """Sum of 16 lanes: i with i + 8, i with i + 4, i with i + 2, 0 with 1."""
    half = LANES // 2
    while half:
        for i in range(half):
            lanes[i] += lanes[i + half]
        half //= 2
    return lanes[0]


@helper
def _dot(a: F32, b: F32, lanes: F32) -> Any:
    """Dot of two rows in 16 lanes; element i goes to lane i mod 16."""
    whole = a.shape[0] // LANES * LANES
    _sum_products(a.ctypes.data, b.ctypes.data, whole // LANES, lanes.ctypes.data)
    for i in range(whole, a.shape[0]):
        lanes[i - whole] += a[i] * b[i]
    return _tree(lanes)


@kernel(_INT, _INT, _F32_2D, _F32_2D, _OUT_2D)
def linear(first: int, last: int, x: F32, w: F32, y: F32) -> None:
    """y [n, rows] = x [n, cols] w [rows, cols]^T; one task a result."""
    rows = w.shape[0]
    lanes = np.empty(LANES, np.float32)
    for task in range(first, last):
        i, r = task // rows, task % rows
        y[i, r] = _dot(x[i], w[r], lanes)


@kernel(_INT, _INT, _F32_2D, _F32_1D, _F32, _OUT_2D)
def rmsnorm(first: int, last: int, x: F32, w: F32, eps: Any, y: F32) -> None:
    """Rows x / sqrt(mean(x^2) + eps) * w."""
    lanes = np.empty(LANES, np.float32)
    for i in range(first, last):
        mean = _dot(x[i], x[i], lanes) / np.float32(x.shape[1])
        r = _ONE / np.sqrt(mean + eps)
        for c in range(x.shape[1]):
            y[i, c] = (x[i, c] * r) * w[c]


@kernel(_INT, _INT, _OUT_2D, _F32_2D)
def silu_mul(first: int, last: int, gate: F32, up: F32) -> None:
    """gate = silu(gate) * up in rows, in place."""
    for i in range(first, last):
        for c in range(gate.shape[1]):
            g = gate[i, c]
            gate[i, c] = g / (_ONE + _exp(-g)) * up[i, c]


@kernel(_OUT_2D, _F32_2D, _F32_2D)
def gated_add(y: F32, gate: F32, x: F32) -> None:
    """y += sigmoid(gate) * x; gate [n, 1]."""
    for i in range(y.shape[0]):
        g = _ONE / (_ONE + _exp(-gate[i, 0]))
        for c in range(y.shape[1]):
            y[i, c] += g * x[i, c]


@kernel(_INT, _INT, _OUT_3D, _F32_2D, _F32_2D)
def rope(first: int, last: int, x: F32, cos: F32, sin: F32) -> None:
    """Rotate the halves of every head of tokens, in place."""
    half = cos.shape[1]
    for i in range(first, last):
        for h in range(x.shape[1]):
            for c in range(half):
                low, high = x[i, h, c], x[i, h, half + c]
                x[i, h, c] = low * cos[i, c] - high * sin[i, c]
                x[i, h, half + c] = high * cos[i, c] + low * sin[i, c]


@kernel(_F32_2D, types.boolean, array_out(types.int32, 2), _OUT_2D)
def route(logits: F32, normalize: bool, ids: I32, weights: F32) -> None:
    """Softmax over experts, the k largest in falling order; ties: the lower index."""
    experts, k = logits.shape[1], ids.shape[1]
    for i in range(logits.shape[0]):
        z = logits[i]
        largest = z[0]
        for e in range(1, experts):
            largest = z[e] if z[e] > largest else largest
        total, kept = _ZERO, _ZERO
        for e in range(experts):
            total += _exp(z[e] - largest)
        count = 0
        for e in range(experts):  # insertion into the k best so far; the earlier wins ties
            at = count
            while at > 0 and z[e] > z[ids[i, at - 1]]:
                at -= 1
            if at >= k:
                continue
            count = min(count + 1, k)
            for s in range(count - 1, at, -1):
                ids[i, s] = ids[i, s - 1]
            ids[i, at] = e
        for s in range(k):
            weights[i, s] = _exp(z[ids[i, s]] - largest) / total
            kept += weights[i, s]
        if normalize:
            for s in range(k):
                weights[i, s] /= kept


@kernel(_INT, _INT, _F32_2D, array_in(types.int32, 2), _F32_2D, _OUT_2D)
def combine(first: int, last: int, pair_out: F32, position: I32, weights: F32, y: F32) -> None:
    """Rows of y: the sum over slots ascending of weight * pair_out[position]."""
    for i in range(first, last):
        for c in range(y.shape[1]):
            y[i, c] = _ZERO
        for s in range(position.shape[1]):
            p, w = position[i, s], weights[i, s]
            for c in range(y.shape[1]):
                y[i, c] += w * pair_out[p, c]


def _crc_tables() -> NDArray[np.uint32]:
    """Slicing-by-8 tables uint32 [8, 256] of CRC-32C, reflected."""
    table = np.zeros((8, 256), np.uint32)
    c = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        c = np.where(c & 1, c >> 1 ^ 0x82F63B78, c >> 1).astype(np.uint32)
    table[0] = c
    for t in range(1, 8):
        table[t] = table[t - 1] >> 8 ^ table[0][table[t - 1] & 255]
    return table


_CRC = _crc_tables()


@kernel(array_in(types.uint8, 1), types.uint32, returns=types.uint32)
def crc32c(data: U8, seed: Any) -> Any:
    """CRC-32C of bytes that follow those whose CRC is `seed`."""
    c = ~seed
    whole = data.shape[0] // 8 * 8
    for i in range(0, whole, 8):
        c ^= np.uint32(data[i]) | np.uint32(data[i + 1]) << np.uint32(8)
        c ^= np.uint32(data[i + 2]) << np.uint32(16) | np.uint32(data[i + 3]) << np.uint32(24)
        low = _CRC[7, c & 255] ^ _CRC[6, c >> 8 & 255] ^ _CRC[5, c >> 16 & 255] ^ _CRC[4, c >> 24]
        high = _CRC[3, data[i + 4]] ^ _CRC[2, data[i + 5]]
        c = low ^ high ^ _CRC[1, data[i + 6]] ^ _CRC[0, data[i + 7]]
    for i in range(whole, data.shape[0]):
        c = c >> np.uint32(8) ^ _CRC[0, (c ^ data[i]) & 255]
    return ~c
