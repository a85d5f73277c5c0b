"""Compiled attention and the KV cache it reads: native/attention.c and kv.c again.

native/edgemoe.h states the arithmetic, edgemoe/kv_layout.py how a cache lies in memory. A kernel
computes the tasks [first, last) of an operation. A block of keys and values is made float32 once
for all rows of a tile, so that every type is computed by the same loops.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types

from ..types import F32, U8
from .jit import array_in, array_out, helper, kernel, pointer

BLOCK, PANEL, SPLIT, LANES = 64, 16, 256, 16
TILE = 16
"""Tokens that share the blocks they read."""
FLOAT, HALF = 0, 1

_INT, _F32 = types.int64, types.float32
_F32_1D, _F32_3D, _OUT_3D = array_in(_F32, 1), array_in(_F32, 3), array_out(_F32, 3)
_DATA_IN, _DATA_OUT = array_in(types.uint8, 3), array_out(types.uint8, 3)

_ZERO, _ONE, _HALF, _INT8_MAX = np.float32(0), np.float32(1), np.float32(0.5), np.float32(127)
_LOWEST = np.finfo(np.float32).min


# A copy of floats._exp: what numba keeps on disk does not notice a change in another file.
@helper
def _exp(x: Any) -> Any:
    """em_expf of native/em_math.h."""
    x = np.float32(-87) if x < np.float32(-87) else x
    x = np.float32(88) if x > np.float32(88) else x
    n = np.rint(x * np.float32(1.44269504088896341))
    r = x - n * np.float32(0.693359375)
    r = r - n * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * (r * r) + (r + _ONE)
    bits = np.int32((np.int32(n) + np.int32(127)) << np.int32(23))
    return p * bits.view(np.float32)


@helper
def _half_to_float(half: Any) -> Any:
    """em_half_to_float: without a branch, so that loops of it become vectors."""
    magnitude = np.uint32(np.uint32(half & np.uint16(0x7FFF)) << np.uint32(13))
    special = np.uint32(magnitude >= np.uint32(31 << 23)) * np.uint32(112 << 23)
    tiny = np.uint32(magnitude < np.uint32(1 << 23))
    bits = np.uint32(magnitude + np.uint32(112 << 23) + special + tiny * np.uint32(1 << 23))
    one = np.uint32(tiny * np.uint32(113 << 23))
    out = np.float32(bits.view(np.float32) - one.view(np.float32))
    sign = np.uint32(np.uint32(half & np.uint16(0x8000)) << np.uint32(16))
    return np.uint32(out.view(np.uint32) | sign).view(np.float32)


@helper
def _float_to_half(x: Any) -> Any:
    """em_float_to_half: to nearest, ties to even, within +-65504."""
    bits = np.float32(x).view(np.uint32)
    sign = np.uint32(bits >> np.uint32(16)) & np.uint32(0x8000)
    bits = np.uint32(bits & np.uint32(0x7FFFFFFF))
    if bits > np.uint32(0x7F800000):
        return np.uint16(sign | np.uint32(0x7E00) | ((bits >> np.uint32(13)) & np.uint32(0x3FF)))
    if bits >= np.uint32(0x477FE000):
        return np.uint16(sign | np.uint32(0x7BFF))
    if bits < np.uint32(113 << 23):
        step = np.float32(bits.view(np.float32) + _HALF)
        return np.uint16(sign | np.uint32(step.view(np.uint32) - np.uint32(126 << 23)))
    odd = (bits >> np.uint32(13)) & np.uint32(1)
    bits = np.uint32(bits + np.uint32(0xFFF) + odd - np.uint32(112 << 23))
    return np.uint16(sign | np.uint32(bits >> np.uint32(13)))


@helper
def _padded(d: int) -> int:
    return (d + PANEL - 1) // PANEL * PANEL


@helper
def _scales(address: int, kind: int, d: int) -> Any:
    """Scales float32 [2, 64] of a block; of other types than int8 anything, not to be used."""
    at = address + BLOCK * (d + _padded(d)) if kind > HALF else address
    return numba.carray(pointer(at), (2, BLOCK), np.float32)


@helper
def _row_scale(x: F32) -> Any:
    largest = _ZERO
    for c in range(x.shape[0]):
        if abs(x[c]) > largest:
            largest = abs(x[c])
    return largest / _INT8_MAX


@helper
def _store(address: int, kind: int, at: int, x: Any, scale: Any) -> None:
    """Element `at` of a block becomes x."""
    if kind == FLOAT:
        numba.carray(pointer(address), at + 1, np.float32)[at] = x
    elif kind == HALF:
        numba.carray(pointer(address), at + 1, np.uint16)[at] = _float_to_half(x)
    else:
        code = x / scale if scale > _ZERO else _ZERO
        code = code if code > -_INT8_MAX else -_INT8_MAX
        code = code if code < _INT8_MAX else _INT8_MAX
        numba.carray(pointer(address), at + 1, np.int8)[at] = np.int8(np.rint(code))


@kernel(_INT, _INT, _DATA_OUT, _INT, _F32_3D, _F32_3D, _INT)
def write(first: int, last: int, data: U8, kind: int, k: F32, v: F32, start: int) -> None:
    """Store keys and values [n, kv_heads, d] of positions start, ...; one task a (token, head)."""
    heads, d = k.shape[1], k.shape[2]
    for task in range(first, last):
        i, h = task // heads, task % heads
        block, j = (start + i) // BLOCK, (start + i) % BLOCK
        address = data[h, block].ctypes.data
        ks, vs = _ONE, _ONE
        if kind > HALF:
            ks, vs = _row_scale(k[i, h]), _row_scale(v[i, h])
            scales = _scales(address, kind, d)
            scales[0, j], scales[1, j] = ks, vs
        for c in range(d):
            _store(address, kind, (j // PANEL * d + c) * PANEL + j % PANEL, k[i, h, c], ks)
        for c in range(_padded(d)):
            at = d * BLOCK + (c // PANEL * BLOCK + j) * PANEL + c % PANEL
            _store(address, kind, at, v[i, h, c] if c < d else _ZERO, vs)


@helper
def _widen(address: int, kind: int, wide: F32) -> None:
    """The elements of a block as float32 [elements]."""
    if kind == FLOAT:
        wide[:] = numba.carray(pointer(address), wide.shape[0], np.float32)
    elif kind == HALF:
        halves = numba.carray(pointer(address), wide.shape[0], np.uint16)
        for i in range(wide.shape[0]):
            wide[i] = _half_to_float(halves[i])
    else:
        codes = numba.carray(pointer(address), wide.shape[0], np.int8)
        for i in range(wide.shape[0]):
            wide[i] = np.float32(codes[i])


@helper
def _tree(lanes: F32) -> Any:
    half = LANES // 2
    while half:
        for i in range(half):
            lanes[i] += lanes[i + half]
        half //= 2
    return lanes[0]


@helper
def _attend_block(
    q: F32, wide: F32, scales: F32, scaled: bool, begin: int, end: int, scale: Any, s: F32, row: F32
) -> None:
    """A row sees the positions [begin, end) of a block; its state `row` is acc, top, sum."""
    d, width = q.shape[0], row.shape[0] - 2
    for j in range(BLOCK):
        s[j] = _ZERO
    for p in range(begin // PANEL, (end - 1) // PANEL + 1):
        for c in range(d):
            w, at = q[c], (p * d + c) * PANEL
            for j in range(PANEL):
                s[p * PANEL + j] += w * wide[at + j]
    before = row[width]
    top = before
    for j in range(begin, end):
        score = s[j] * scale
        if scaled:
            score = score * scales[0, j]
        s[j] = score
        top = score if score > top else top
    lanes = np.zeros(LANES, np.float32)
    for j in range(begin, end):
        s[j] = _exp(s[j] - top)
        lanes[j % LANES] += s[j]
    a = _exp(before - top)
    row[width] = top
    row[width + 1] = row[width + 1] * a + _tree(lanes)
    for c in range(width):
        row[c] *= a
    for j in range(begin, end):
        w = s[j] * scales[1, j] if scaled else s[j]
        for p in range(width // PANEL):
            at = d * BLOCK + (p * BLOCK + j) * PANEL
            for c in range(PANEL):
                row[p * PANEL + c] += w * wide[at + c]


@helper
def _first_seen(position: int, window: int) -> int:
    if window and position >= window:
        return position - window + 1
    return 0


@helper
def _merge(into: F32, part: F32) -> None:
    """A row's part of a split joins what the splits before it made."""
    width = into.shape[0] - 2
    if part[width + 1] == _ZERO:  # it sees nothing of this split
        return
    if into[width + 1] == _ZERO:
        into[:] = part
        return
    top = part[width] if part[width] > into[width] else into[width]
    a, b = _exp(into[width] - top), _exp(part[width] - top)
    into[width] = top
    into[width + 1] = into[width + 1] * a + part[width + 1] * b
    for c in range(width):
        into[c] = into[c] * a + part[c] * b


@kernel(_INT, _INT, _F32_3D, _DATA_IN, _INT, _INT, _INT, _F32, _F32_1D, _OUT_3D)
def attention(
    first: int,
    last: int,
    q: F32,
    data: U8,
    kind: int,
    start: int,
    window: int,
    scale: Any,
    sinks: F32,
    out: F32,
) -> None:
    """Causal attention; one task a (tile of tokens, KV head). window 0 and empty sinks are none."""
    n, heads, d = q.shape
    kv_heads = data.shape[0]
    group, width = heads // kv_heads, _padded(d)
    wide = np.empty(BLOCK * (d + width), np.float32)
    s = np.empty(BLOCK, np.float32)
    part = np.empty((TILE * group, width + 2), np.float32)
    merged = np.empty((TILE * group, width + 2), np.float32)
    for task in range(first, last):
        g, at = task % kv_heads, task // kv_heads * TILE
        tokens = min(TILE, n - at)
        position = start + at
        seen = _first_seen(position, window)
        merged[:] = _ZERO
        for split in range(seen // SPLIT, (position + tokens - 1) // SPLIT + 1):
            part[:] = _ZERO
            part[:, width] = _LOWEST
            stop = min(position + tokens, (split + 1) * SPLIT)
            for block in range(max(seen, split * SPLIT) // BLOCK, (stop - 1) // BLOCK + 1):
                address = data[g, block].ctypes.data
                _widen(address, kind, wide)
                scales = _scales(address, kind, d)
                for i in range(tokens):
                    begin = max(0, _first_seen(position + i, window) - block * BLOCK)
                    end = min(BLOCK, position + i + 1 - block * BLOCK)
                    if begin < end:
                        for h in range(group):
                            _attend_block(
                                q[at + i, g * group + h],
                                wide,
                                scales,
                                kind > HALF,
                                begin,
                                end,
                                scale,
                                s,
                                part[i * group + h],
                            )
            for r in range(tokens * group):
                _merge(merged[r], part[r])
        for r in range(tokens * group):
            row, head = merged[r], g * group + r % group
            total = row[width + 1]
            if sinks.shape[0]:
                top = sinks[head] if sinks[head] > row[width] else row[width]
                a = _exp(row[width] - top)
                total = total * a + _exp(sinks[head] - top)
                for c in range(d):
                    row[c] *= a
            for c in range(d):
                out[at + r // group, head, c] = row[c] / total


def workspace_bytes(heads: int, kv_heads: int, d: int) -> int:
    """Bytes of the arrays that `attention` makes for itself."""
    width = -(-d // PANEL) * PANEL
    rows = TILE * (heads // kv_heads)
    return 4 * (BLOCK * (d + width + 1) + 2 * rows * (width + 2))
