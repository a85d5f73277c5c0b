"""A plain NumPy twin of every kernel: same signature as in kernels.py, float64 inside.

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
from .types import F32, I8, I32, I64, U8, QuantSpec

F64 = NDArray[np.float64]


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


def expert(x: F32, gate: CodedMatrix, up: CodedMatrix, down: CodedMatrix) -> F64:
    """down(silu(gate x) * (up x)), the middle rounded to int8 as the kernels do: [n, hidden]."""
    mid = silu(linear(x, gate)) * linear(x, up)
    return linear(mid.astype(np.float32), down)


def experts(
    x: F32,
    jobs: Sequence[tuple[CodedMatrix, CodedMatrix, CodedMatrix]],
    first_pair: I32,
    pair_token: I32,
) -> F64:
    """Expert outputs of every (expert, token) pair: [pairs, hidden]."""
    out = np.empty((len(pair_token), x.shape[1]))
    for j, (gate, up, down) in enumerate(jobs):
        pairs = slice(first_pair[j], first_pair[j + 1])
        out[pairs] = expert(x[pair_token[pairs]], gate, up, down)
    return out


def combine(pair_out: F32, position: I32, weights: F32) -> F64:
    """Sum over slots of weight * pair output: [n, hidden]."""
    return np.asarray(np.einsum("nk,nkh->nh", weights.astype(np.float64), pair_out[position]))


def attention(q: F32, k: F32, v: F32, start: int, scale: float, window: int | None = None) -> F64:
    """Causal attention of n new tokens over the cache: [n, heads, d]."""
    n, heads, _ = q.shape
    out = np.empty(q.shape)
    for i in range(n):
        last = start + i
        first = 0 if window is None else max(0, last - window + 1)
        for h in range(heads):
            g = h // (heads // k.shape[0])
            keys, values = k[g, first : last + 1], v[g, first : last + 1]
            p = softmax(keys.astype(np.float64) @ q[i, h].astype(np.float64) * scale)
            out[i, h] = p @ values
    return out


def quantize_rows(w: F32, quant: QuantSpec) -> tuple[U8, F32]:
    """Codes [rows, cols] and fits [levels, 2, rows, groups], with exact integer sums.

    A weight's position in its group's range, 0 .. 255, is kept in 1/4096 of a step.
    """
    rows, cols = w.shape
    width = quant.group_size
    groups = -(-cols // width)
    codes = np.empty((rows, cols), np.uint8)
    fits = np.empty((len(quant.levels), 2, rows, groups), np.float32)
    for g in range(groups):
        part = w[:, g * width : (g + 1) * width]
        n = part.shape[1]
        low = part.min(axis=1).astype(np.float64)
        span = part.max(axis=1) - low
        if not (span <= 2.0**127).all():  # NaN compares false
            raise KernelError("w: holds NaN, infinity or values beyond 1e38")
        inverse = np.divide(255.0, span, out=np.zeros_like(span), where=span > 0)
        t = np.rint((part - low[:, None]) * inverse[:, None] * 4096).astype(np.int64)
        code = (t + 2048) // 4096
        codes[:, g * width : (g + 1) * width] = code
        sum_t, unit = t.sum(axis=1), span / 255.0
        mean_w = low + unit * (sum_t / 4096 / n)
        for i, bits in enumerate(quant.levels):
            c = code >> (8 - bits)
            sum_c = c.sum(axis=1)
            cov = n * (t * c).sum(axis=1) - sum_t * sum_c
            var = n * (c * c).sum(axis=1) - sum_c * sum_c
            slope = np.divide(cov, var * 4096.0, out=np.zeros_like(span), where=var > 0)
            mantissa, exponent = np.frexp(slope * unit)
            s = np.ldexp(np.rint(mantissa * 2048.0), exponent - 11)
            fits[i, 0, :, g] = s
            fits[i, 1, :, g] = mean_w - s * (sum_c / n)
    return codes, fits


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
