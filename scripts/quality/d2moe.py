"""D2MoE's own nested quantization (arXiv 2504.15299, section on MWQ), as a baseline.

A base of b1 bits, asymmetric, a scale and a zero point a group; then for each further bit a plane
of +-1, the signs of what is left over, with a scale a group of its own. What is below stays as it
is when a plane is added. The errors minimised are those of outputs: e^T H e a row, H = 2 X X^T.

Where the paper leaves a choice, it is made in the baseline's favour:
- Scale and zero point of the base: the best of a series of clipped ranges, then least squares in
  turn with rounding, by e^T H e of the group's own block of H; a plane's scale by least squares.
- Column-level compensation is dropped, as the paper says. Block-level compensation (a block is a
  group) is exact: the block's error goes to later columns through the inverse of its triangle of
  the Cholesky factor, not only through its diagonal. Each level compensates its own errors, as a
  pass of its own: signs and scales of a plane see targets that earlier blocks have moved.
- The zero point is not a whole step but takes all 256 values of its byte, over the code's range.

Bits a weight, scales counted: base b1 + (16 + 8) / group (a float16 scale, a zero point of 8 bits),
each plane 1 + 16 / group (a float16 scale).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.types import F32

GROUP = 128
DAMP = 0.01
"""Added to H's diagonal, as a share of its mean: GPTQ's."""

CLIPS = tuple(float(c) for c in np.linspace(1.0, 0.4, 13))
ROUNDS = 3
"""Of least squares and rounding in turn, after the best clip is known."""

ZERO_STEPS = 255
SMALLEST = float(np.finfo(np.float16).smallest_normal)

Array = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Variant:
    """levels: base bits, and the bits with each further plane."""

    name: str
    levels: tuple[int, ...]

    def bits(self, level: int, group: float = GROUP) -> float:
        """Bits a weight of a level, scales counted; group: weights that share one, on average."""
        planes = level - self.levels[0]
        return self.levels[0] + 24 / group + planes * (1 + 16 / group)


V1 = Variant("V1", (2, 3, 4))
V2 = Variant("V2", (5, 6, 7, 8))


def quantize(
    w: F32, hessian: F32, levels: Sequence[int], group: int = GROUP, damp: float = DAMP
) -> Mapping[int, F32]:
    """Decoded weights of one matrix at a variant's levels.

    Args:
        w: [rows, cols]. hessian: [cols, cols], of the inputs, any positive factor; all zero where
            nothing is known, then all inputs count alike.
        levels: of a Variant: one bit a step.

    Returns:
        float32 [rows, cols] a level.
    """
    h, upper = _prepared(hessian, damp)
    blocks = [slice(at, min(at + group, w.shape[1])) for at in range(0, w.shape[1], group)]
    out: dict[int, F32] = {}
    below = np.zeros_like(w)
    for level in levels:
        target, decoded = w.astype(np.float32, copy=True), np.empty_like(w)
        for block in blocks:
            own, wanted = h[block, block], target[:, block]
            if level == levels[0]:
                decoded[:, block] = base(wanted, own, level)
            else:
                decoded[:, block] = below[:, block] + plane(wanted - below[:, block], own)
            error = np.linalg.solve(upper[block, block].T, (wanted - decoded[:, block]).T).T
            target[:, block.stop :] -= error @ upper[block, block.stop :]
        out[level] = below = decoded
    return out


def _prepared(hessian: F32, damp: float) -> tuple[F32, F32]:
    """H with its damping, of mean diagonal 1, and the upper Cholesky factor of its inverse."""
    n = len(hessian)
    mean = float(np.trace(hessian)) / n
    h = hessian.astype(np.float64) / mean if mean > 0 else np.eye(n)
    h[np.diag_indices(n)] += damp
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    return h.astype(np.float32), np.ascontiguousarray(upper, np.float32)


def base(w: F32, h: F32, bits: int) -> F32:
    """One group's weights [rows, n] at `bits`: (Q - z) s, decoded. h: [n, n]."""
    top = 2**bits - 1
    low, high = np.minimum(w.min(axis=1), 0.0), np.maximum(w.max(axis=1), 0.0)
    best, least, codes = np.zeros_like(w), np.full(len(w), np.inf), np.zeros_like(w)

    def consider(s: Array, z: Array) -> None:
        nonlocal best, least, codes
        s = np.maximum(s, SMALLEST).astype(np.float16).astype(np.float32)[:, None]
        z = (np.rint(np.clip(z / top, 0, 1) * ZERO_STEPS) / ZERO_STEPS * top).astype(np.float32)
        q = np.clip(np.rint(w / s + z[:, None]), 0, top)
        decoded = (q - z[:, None]) * s
        error = weighted_error(w - decoded, h)
        better = (error < least)[:, None]
        least = np.minimum(error, least)
        best, codes = np.where(better, decoded, best), np.where(better, q, codes)

    for clip in CLIPS:
        s = np.maximum(clip * (high - low) / top, SMALLEST)
        consider(s, -clip * low / s)
    for _ in range(ROUNDS):
        s, offset = _least_squares(w, codes, h)
        s = np.maximum(s, SMALLEST)
        consider(s, -offset / s)
    return best


def _least_squares(w: F32, q: F32, h: F32) -> tuple[Array, Array]:
    """s, o a row that minimise e^T h e of e = w - s q - o; s = 0 where all codes are one."""
    weights = h.sum(axis=1, dtype=np.float64)
    total, qh = weights.sum(), (q @ h).astype(np.float64)
    qq, qw = (qh * q).sum(axis=1), (qh * w).sum(axis=1)
    mean_q, mean_w = q @ weights / total, w @ weights / total
    spread = qq - total * mean_q**2
    flat = spread <= 1e-9 * np.maximum(qq, 1e-30)
    s = np.where(flat, 0.0, (qw - total * mean_q * mean_w) / np.where(flat, 1.0, spread))
    return s, mean_w - s * mean_q


def plane(residual: F32, h: F32) -> F32:
    """One group's plane: signs of the residual [rows, n] times a scale a row."""
    signs = np.where(residual < 0, np.float32(-1), np.float32(1))
    weighted = signs @ h
    scale = (weighted * residual).sum(axis=1) / np.maximum((weighted * signs).sum(axis=1), 1e-30)
    # A scale below zero would say that the signs make it worse: then the plane adds nothing.
    scale = np.maximum(scale, 0.0).astype(np.float16).astype(np.float32)
    out: F32 = signs * scale[:, None]
    return out


def weighted_error(error: F32, h: F32) -> F32:
    """e^T h e of each row of [rows, n]: [rows]."""
    out: F32 = ((error @ h) * error).sum(axis=1)
    return out
