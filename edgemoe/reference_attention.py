"""The plain NumPy twin of attention, bit for bit: float32, every sum in the order of the kernels.

native/edgemoe.h (em_attention, em_kv) states the arithmetic that this computes. A float32 operation
of NumPy rounds as the kernels' does; what it would add in an order of its own is added here one by
one. Keys and values come as rows, so that the twin knows nothing of how a cache lies in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .types import F32

BLOCK, SPLIT, LANES = 64, 256, 16

_LOWEST = np.finfo(np.float32).min
_F = np.float32
_EXP = [
    _F(c)
    for c in (
        *(1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3),
        *(4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1),
    )
]


def exp(x: F32) -> F32:
    """em_expf of native/em_math.h."""
    x = np.clip(x, _F(-87), _F(88))
    n = np.rint(x * _F(1.44269504088896341))
    r = x - n * _F(0.693359375)
    r = r - n * _F(-2.12194440e-4)
    p = np.full_like(x, _EXP[0])
    for c in _EXP[1:]:
        p = p * r + c
    p = p * (r * r) + (r + _F(1))
    return np.asarray(p * ((n.astype(np.int32) + np.int32(127)) << 23).view(np.float32))


def tree(lanes: F32) -> F32:
    """Sum of 16 lanes [..., 16]: i with i + 8, i with i + 4, i with i + 2, 0 with 1."""
    half = LANES // 2
    while half:
        lanes = lanes[..., :half] + lanes[..., half : 2 * half]
        half //= 2
    return lanes[..., 0]


@dataclass(frozen=True)
class Stored:
    """Rows as a cache keeps them: element times scale is the value; scale [...], or None for 1."""

    elements: F32
    scale: F32 | None


def stored(x: F32, kv_type: str) -> Stored:
    """Rows x float32 [..., d] as kept in a cache of the type (kv_layout.py)."""
    if kv_type == "f32":
        return Stored(x, None)
    if kv_type == "f16":
        kept = np.clip(x, _F(-65504), _F(65504)).astype(np.float16)
        return Stored(kept.astype(np.float32), None)
    scale = np.abs(x).max(axis=-1) / _F(127)
    known = np.where(scale > 0, scale, _F(1))[..., None]
    codes = np.rint(np.clip(x / known, _F(-127), _F(127)))
    return Stored(np.where(scale[..., None] > 0, codes, _F(0)), scale)


def attention(
    q: F32,
    k: F32,
    v: F32,
    start: int,
    scale: float,
    window: int | None = None,
    sinks: F32 | None = None,
    kv_type: str = "f32",
) -> F32:
    """Causal attention of n tokens at positions start, ...: float32 [n, heads, d].

    q: float32 [n, heads, d]; k, v: float32 [positions, kv_heads, d], rounded to `kv_type` here.
    """
    n, heads, _ = q.shape
    group = heads // k.shape[1]
    out = np.empty_like(q)
    for g in range(k.shape[1]):
        mine = slice(g * group, (g + 1) * group)
        keys, values = stored(k[:, g], kv_type), stored(v[:, g], kv_type)
        for i in range(n):
            last = start + i
            first = 0 if window is None else max(0, last - window + 1)
            out[i, mine] = _rows(
                q[i, mine],
                keys,
                values,
                first,
                last,
                _F(scale),
                None if sinks is None else sinks[mine],
            )
    return out


def _rows(
    q: F32,
    keys: Stored,
    values: Stored,
    first: int,
    last: int,
    scale: np.float32,
    sinks: F32 | None,
) -> F32:
    """Heads q [group, d] of one token that sees positions first .. last."""
    merged: tuple[F32, F32, F32] | None = None
    for split in range(first // SPLIT, last // SPLIT + 1):
        seen = max(first, split * SPLIT), min(last + 1, (split + 1) * SPLIT)
        part = _split(q, keys, values, *seen, scale)
        merged = part if merged is None else _merge(merged, part)
    assert merged is not None
    top, total, acc = merged
    if sinks is not None:
        higher = np.maximum(top, sinks)
        a = exp(top - higher)
        total = total * a + exp(sinks - higher)
        acc = acc * a[:, None]
    return acc / total[:, None]


def _merge(x: tuple[F32, F32, F32], y: tuple[F32, F32, F32]) -> tuple[F32, F32, F32]:
    top = np.maximum(x[0], y[0])
    a, b = exp(x[0] - top), exp(y[0] - top)
    return top, x[1] * a + y[1] * b, x[2] * a[:, None] + y[2] * b[:, None]


def _split(
    q: F32, keys: Stored, values: Stored, first: int, end: int, scale: np.float32
) -> tuple[F32, F32, F32]:
    """(top [group], sum [group], acc [group, d]) of the positions first .. end - 1 of a split."""
    group, d = q.shape
    top = np.full(group, _LOWEST, np.float32)
    total, acc = np.zeros(group, np.float32), np.zeros((group, d), np.float32)
    for base in range(first // BLOCK * BLOCK, end, BLOCK):
        seen = slice(max(first, base), min(end, base + BLOCK))
        scores = np.zeros((group, seen.stop - seen.start), np.float32)
        for c in range(d):
            scores = scores + q[:, c, None] * keys.elements[None, seen, c]
        scores = scores * scale
        if keys.scale is not None:
            scores = scores * keys.scale[seen]
        higher = np.maximum(top, scores.max(axis=1))
        e, a = exp(scores - higher[:, None]), exp(top - higher)
        block = np.zeros((group, BLOCK), np.float32)
        block[:, seen.start - base : seen.stop - base] = e
        lanes = np.zeros((group, LANES), np.float32)
        for at in range(0, BLOCK, LANES):
            lanes = lanes + block[:, at : at + LANES]
        top, total, acc = higher, total * a + tree(lanes), acc * a[:, None]
        if values.scale is not None:
            e = e * values.scale[seen]
        for j in range(seen.stop - seen.start):
            acc = acc + e[:, j, None] * values.elements[seen.start + j]
    return top, total, acc
