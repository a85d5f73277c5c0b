"""A plain NumPy twin of every kernel: same signature as in kernels/, float64 inside.

Integer results equal the kernels' exactly; float results are what the kernels approximate. A
nested matrix comes decoded into codes and scales, so that the twins know nothing of bit layouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import KernelError
from .layout import ROW_BLOCK, UNIT
from .types import F32, F64, I8, I32, I64, U8, NestedScales, QuantSpec


@dataclass(frozen=True)
class CodedMatrix:
    """codes uint8 [rows, cols] of one level; scale, offset float32 [rows, groups]."""

    codes: U8
    scale: F32
    offset: F32
    group_size: int

    def decode(self) -> F64:
        """Weights float64 [rows, cols]: scale * code + offset."""
        cols = self.codes.shape[1]
        spread = np.arange(cols) // self.group_size
        return self.scale[:, spread].astype(np.float64) * self.codes + self.offset[:, spread]


def quantize_activations(x: F32) -> tuple[I8, F32]:
    """int8 codes [n, units * 32] and float32 scales [n, units] of x [n, cols].

    scale = max|x| / 127 over 32 columns; code = x * (127 / max|x|) in float32, rounded to nearest,
    ties to even; all zero where max|x| < 1e-36, whose reciprocal would overflow.
    """
    n, cols = x.shape
    units = -(-cols // UNIT)
    padded = np.zeros((n, units * UNIT), np.float32)
    padded[:, :cols] = x
    blocks = padded.reshape(n, units, UNIT)
    amax = np.abs(blocks).max(axis=2)
    inverse = np.divide(
        np.float32(127), amax, out=np.zeros_like(amax), where=amax >= np.float32(1e-36)
    )
    q = np.rint(blocks * inverse[:, :, None]).astype(np.int8)
    return q.reshape(n, -1), amax / np.float32(127)


def accumulate(x: F32, matrix: CodedMatrix) -> tuple[I8, F32, I32]:
    """Integer dots of every row with every unit of 32 columns: int32 [n, rows, units]."""
    q, scale = quantize_activations(x)
    rows, cols = matrix.codes.shape
    units = scale.shape[1]
    codes = np.zeros((rows, units * UNIT), np.int32)
    codes[:, :cols] = matrix.codes
    dots = np.einsum(
        "nuc,ruc->nru",
        q.reshape(len(x), units, UNIT).astype(np.int32),
        codes.reshape(rows, units, UNIT),
    )
    return q, scale, dots.astype(np.int32)


def linear(x: F32, matrix: CodedMatrix) -> F64:
    """x @ w.T with activations rounded as the kernels round them: [n, rows]."""
    q, scale = quantize_activations(x)
    rounded = q.astype(np.float64) * np.repeat(scale.astype(np.float64), UNIT, axis=1)
    return np.asarray(rounded[:, : matrix.codes.shape[1]] @ matrix.decode().T)


def linear_f32(x: F32, w: F32) -> F64:
    """x @ w.T: [n, rows]."""
    return np.asarray(x.astype(np.float64) @ w.astype(np.float64).T)


def decode_rows(matrix: CodedMatrix, ids: I64) -> F64:
    """Rows of the decoded matrix: [n, cols]."""
    return matrix.decode()[ids]


def rmsnorm(x: F32, w: F32, eps: float) -> F64:
    """x / sqrt(mean(x^2) + eps) * w: [n, d]."""
    wide = x.astype(np.float64)
    return np.asarray(wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + eps) * w)


def rope(x: F32, cos: F32, sin: F32) -> F64:
    """x [n, heads, d] with the two halves of every head rotated against each other."""
    half = x.shape[2] // 2
    a, b = x[..., :half].astype(np.float64), x[..., half:].astype(np.float64)
    c, s = cos[:, None, :], sin[:, None, :]
    return np.concatenate([a * c - b * s, b * c + a * s], axis=-1)


def softmax(z: NDArray[Any]) -> F64:
    """Softmax over the last axis."""
    e = np.exp(z.astype(np.float64) - z.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def silu(x: F64) -> F64:
    """x * sigmoid(x)."""
    return x / (1.0 + np.exp(-x))


def silu_mul(gate: F32, up: F32) -> F64:
    """silu(gate) * up: [n, d]."""
    return silu(gate.astype(np.float64)) * up


def gated_add(y: F32, gate: F32, x: F32) -> F64:
    """y + sigmoid(gate) * x: [n, d]."""
    return np.asarray(y + x / (1.0 + np.exp(-gate.astype(np.float64))))


def route(logits: F32, k: int, normalize: bool) -> tuple[I32, F64]:
    """(ids, weights) [n, k] of the k most likely experts in falling order, ties: lower index."""
    ids = np.argsort(-logits, axis=-1, kind="stable")[:, :k]
    weights = np.take_along_axis(softmax(logits), ids, axis=-1)
    if normalize:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return ids.astype(np.int32), weights


def expert(x: F32, gate: CodedMatrix, up: CodedMatrix, *down: CodedMatrix) -> F64:
    """down(silu(gate x) * (up x)), the middle rounded to int8 as the kernels do: [n, hidden].

    Several down matrices are side by side.
    """
    mid, first = (silu(linear(x, gate)) * linear(x, up)).astype(np.float32), 0
    y = np.zeros((len(x), len(down[0].codes)))
    for part in down:
        cols = part.codes.shape[1]
        y += linear(mid[:, first : first + cols], part)
        first += cols
    return y


def experts(
    x: F32,
    jobs: Sequence[tuple[CodedMatrix, ...]],
    first_pair: I32,
    pair_token: I32,
) -> F64:
    """Expert outputs of every (expert, token) pair: [pairs, hidden]."""
    out = np.empty((len(pair_token), x.shape[1]))
    for j, matrices in enumerate(jobs):
        pairs = slice(first_pair[j], first_pair[j + 1])
        out[pairs] = expert(x[pair_token[pairs]], *matrices)
    return out


def combine(pair_out: F32, position: I32, weights: F32) -> F64:
    """Sum over slots of weight * pair output: [n, hidden]."""
    return np.asarray(np.einsum("nk,nkh->nh", weights.astype(np.float64), pair_out[position]))


def attention(
    q: F32,
    k: F32,
    v: F32,
    start: int,
    scale: float,
    window: int | None = None,
    sinks: F32 | None = None,
) -> F64:
    """Causal attention of n new tokens, k and v [positions, kv_heads, d]: [n, heads, d].

    reference_attention.py is the twin that has the kernels' bits.
    """
    n, heads, _ = q.shape
    out = np.empty(q.shape)
    for i in range(n):
        last = start + i
        first = 0 if window is None else max(0, last - window + 1)
        for h in range(heads):
            g = h // (heads // k.shape[1])
            keys, values = (a[first : last + 1, g].astype(np.float64) for a in (k, v))
            scores = keys @ q[i, h].astype(np.float64) * scale
            if sinks is not None:
                scores = np.append(scores, sinks[h])
            out[i, h] = softmax(scores)[: len(values)] @ values
    return out


def quantize_rows(w: F32, quant: QuantSpec) -> tuple[U8, NestedScales]:
    """Codes [rows, cols] and scales; sums are exact integers, as the kernels'."""
    rows, cols = w.shape
    width = quant.group_size
    starts = range(0, cols, width)
    parts = [w[:, at : at + width].astype(np.float64) for at in starts]
    low = np.stack([np.minimum(p.min(axis=1), 0.0) for p in parts], axis=1)
    high = np.stack([np.maximum(p.max(axis=1), 0.0) for p in parts], axis=1)
    span = high - low
    if not (span <= 2.0**127).all():  # NaN compares false
        raise KernelError("w: holds NaN, infinity or values beyond 1e38")
    # The smallest storable step that reaches: five significant bits, rounded up.
    fraction, exponent = np.frexp(span / 255.0)
    _, exponent = np.frexp(np.ldexp(np.ceil(fraction * 32.0) / 32.0, exponent))
    mantissa = np.ceil(np.ldexp(span / 255.0, 5 - exponent)).astype(np.int64)
    exponent = np.where(span > 0, exponent - 1, -126)
    mantissa = np.where(span > 0, mantissa - 16, 0)
    base = np.maximum(exponent.max(axis=1) - 15, -126)
    octave = exponent - base[:, None]
    mantissa = np.where(octave < 0, 0, mantissa)
    octave = np.maximum(octave, 0)
    inverse = 1.0 / np.ldexp(1.0 + mantissa / 16.0, base[:, None] + octave)
    zero = np.clip(np.rint(127.5 - (low + high) * 0.5 * inverse), 0.0, 255.0)
    codes = np.empty((rows, cols), np.uint8)
    shift = np.full((len(quant.levels), *zero.shape), 8, np.uint8)
    for g, (at, part) in enumerate(zip(starts, parts, strict=True)):
        place = part * inverse[:, g, None] + zero[:, g, None]
        code = np.clip(np.rint(place), 0.0, 255.0).astype(np.int64)
        codes[:, at : at + width] = code
        # In 1/256 of a position, so that sums are exact.
        total = np.clip(np.rint(place * 256.0), -256.0, 65536.0).astype(np.int64).sum(axis=1)
        for i, bits in enumerate(quant.levels[:-1]):
            cell = 1 << (8 - bits)
            centre = ((code & -cell) * 256 + (cell - 1) * 128).sum(axis=1)
            mean = (total - centre) / (part.shape[1] * cell * 16.0)  # in sixteenths of a cell
            shift[i, :, g] = np.clip(np.rint(mean) + 8, 0, 15)
    step = (octave * 16 + mantissa).astype(np.uint8)
    exponents = (base + 127).astype(np.uint8)
    return codes, NestedScales(exponents, step, zero.astype(np.uint8), shift)


def nest_rows(
    w: F32,
    codes: U8,
    starts: I32,
    bits: I32,
    affine: tuple[F32, F32],
    coupling: tuple[F32, F32],
    weight: F32,
    reach: int,
    sweeps: int,
) -> U8:
    """Codes chosen for all levels together, every row at once; the kernels' float32 operations."""
    moment, feedback = coupling
    out: U8 = codes.copy()
    levels = range(len(weight))

    def decoded(level: int, code: I64, i: int) -> F32:
        g = int(np.searchsorted(starts, i, "right")) - 1
        s, o = (a[level, :, g, None] for a in affine)
        value: F32 = s * (code >> (8 - bits[level, g])).astype(np.float32) + o
        return value

    def choose(i: int, target: list[F32]) -> I64:
        now = out[:, i, None].astype(np.int64)
        code = codes[:, i, None] + np.arange(-reach, reach + 1, dtype=np.int64)
        cost = np.zeros(code.shape, np.float32)
        for level in levels:
            d = decoded(level, code, i) - target[level]
            cost += weight[level] * (d * d)
        cost[(code < 0) | (code > 255) | np.isnan(cost)] = np.inf
        best = np.take_along_axis(code, cost.argmin(axis=1)[:, None], axis=1)
        at_now = np.take_along_axis(cost, now - code[:, :1], axis=1)[:, 0]
        kept = ~(cost.min(axis=1) < at_now)  # ties, and huge weights, whose costs are inf
        best[kept] = now[kept]
        out[:, i] = best[:, 0]
        return best

    state = [w.copy() for _ in levels]
    for i in range(w.shape[1]):
        target = [state[level][:, i, None] for level in levels]
        best = choose(i, target)
        for level in levels:
            error = decoded(level, best, i) - target[level]
            state[level][:, i + 1 :] += error * feedback[i, i + 1 :]
    state = [np.zeros_like(w) for _ in levels]
    for step in range(-1, sweeps):  # gradients first
        for i in range(w.shape[1]):
            near = out[:, i, None].astype(np.int64)
            before = [w[:, i, None] if step < 0 else decoded(level, near, i) for level in levels]
            if step >= 0:
                pull = [state[level][:, i, None] / moment[i, i] for level in levels]
                near = choose(i, [before[level] - pull[level] for level in levels])
            for level in levels:
                state[level] += (decoded(level, near, i) - before[level]) * moment[i]
    return out


def pack_rows(codes: U8, levels: Sequence[int]) -> list[U8]:
    """Plane bytes of whole row blocks, bit by bit as docs/FORMAT.md says."""
    rows, cols = codes.shape
    blocks, units = -(-rows // ROW_BLOCK), -(-cols // UNIT)
    padded = np.zeros((blocks * ROW_BLOCK, units * UNIT), np.uint8)
    padded[:rows, :cols] = codes
    # [block, lane r, unit, t, j] -> [block, unit, t, 4 * r + j]
    cells = padded.reshape(blocks, ROW_BLOCK, units, 8, 4).transpose(0, 2, 3, 1, 4)
    cells = cells.reshape(blocks, units, 8, 4 * ROW_BLOCK)
    planes = []
    for level, below in zip(levels, (0, *levels), strict=False):
        bits = level - below
        field = cells >> (8 - level) & ((1 << bits) - 1)
        plane = np.zeros((blocks, units, bits, 4 * ROW_BLOCK), np.uint8)
        for t in range(8):
            plane[:, :, t // (8 // bits)] |= field[:, :, t] << (bits * (t % (8 // bits)))
        planes.append(plane.reshape(-1))
    return planes
