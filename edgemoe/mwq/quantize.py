"""One 8-bit affine code a weight, and for every level the scale and offset that fit it best.

The code is the rounded position of a weight between its group's smallest and largest value. Level b
keeps the top b bits, c = code >> (8 - b), and gets its own (s, o): ordinary least squares of the
group's weights on c,

    s = cov(w, c) / var(c)        o = mean(w) - s * mean(c)

s is rounded to the 11 significant bits that a store keeps before o is derived, so that o makes up
for that rounding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from ..types import F32, U8, QuantSpec

_CHUNK_WEIGHTS = 1 << 17
"""Weights in flight: float32 temporaries of this size stay in a core's L2 cache."""

_SMALLEST_SPAN = 2.0**-110
"""Range of a group below which the arithmetic needs float64, because float32 would underflow."""

_LARGEST_SPAN = 2.0**127
"""Range of a group above which s * code could leave float32 when a kernel decodes it."""

_Float = NDArray[Any]


def quantize_matrix(w: F32, quant: QuantSpec) -> tuple[U8, list[tuple[F32, F32]]]:
    """Quantize one matrix, or any run of its rows (rows do not influence one another).

    Args:
        w: float32 [rows, cols].
        quant: levels and group size.

    Returns:
        codes uint8 [rows, cols], and for each level (s, o), float32 [rows, groups]:
        w ~ s * (code >> (8 - level)) + o. A group without spread gets s = 0.

    Raises:
        UsageError: w is not a float32 matrix, or holds NaN, infinity or values beyond 1e38.
    """
    if w.dtype != np.float32 or w.ndim != 2 or 0 in w.shape:
        raise UsageError(f"a float32 matrix is needed, not {w.dtype} of shape {w.shape}")
    rows, cols = w.shape
    width = quant.group_size
    groups = -(-cols // width)
    whole = cols // width
    codes = np.empty((rows, cols), np.uint8)
    fits = np.empty((len(quant.levels), 2, rows, groups), np.float32)
    step = max(_CHUNK_WEIGHTS // cols, 1)
    for first in range(0, rows, step):
        part = slice(first, min(first + step, rows))
        n = part.stop - first
        if whole:
            block = w[part, : whole * width].reshape(n * whole, width)
            q, fit = _quantize_groups(block, quant.levels)
            codes[part, : whole * width] = q.reshape(n, whole * width)
            fits[:, :, part, :whole] = fit.reshape(-1, 2, n, whole)
        if whole < groups:
            tail = np.ascontiguousarray(w[part, whole * width :])
            q, fit = _quantize_groups(tail, quant.levels)
            codes[part, whole * width :] = q
            fits[:, :, part, whole] = fit
    return codes, [(fits[i, 0], fits[i, 1]) for i in range(len(quant.levels))]


def _quantize_groups(x: F32, levels: tuple[int, ...]) -> tuple[U8, NDArray[np.float64]]:
    """Codes uint8 [n, width] and fits float64 [levels, 2, n] of n groups x float32 [n, width]."""
    low, high = x.min(axis=1), x.max(axis=1)
    span = np.subtract(high, low, dtype=np.float64)
    if not (span <= _LARGEST_SPAN).all():  # NaN compares false
        raise UsageError("weights hold NaN, infinity or values beyond 1e38: not a trained model")
    flat = span == 0
    # groups of subnormal weights are rare: their chunk takes the same path in float64
    tiny = (span < _SMALLEST_SPAN) & ~flat
    dtype: type[np.floating[Any]] = np.float64 if tiny.any() else np.float32
    inverse = np.divide(255.0, span, out=np.zeros_like(span), where=~flat).astype(dtype)
    t: _Float = np.subtract(x, low[:, None], dtype=dtype)
    t *= inverse[:, None]  # position in the group's range, 0..255
    codes = np.rint(t).astype(np.uint8)
    n = x.shape[1]
    mean_t = np.einsum("ij->i", t).astype(np.float64) / n
    unit = span / 255.0
    mean_w = low + unit * mean_t
    fits = np.empty((len(levels), 2, len(x)))
    c: _Float = np.empty_like(t)
    for i, level in enumerate(levels):
        np.copyto(c, codes >> np.uint8(8 - level) if level < 8 else codes)
        mean_c = np.einsum("ij->i", c).astype(np.float64) / n
        cov = np.einsum("ij,ij->i", t, c) / n - mean_t * mean_c
        var = np.einsum("ij,ij->i", c, c).astype(np.float64) / n - mean_c * mean_c
        slope = np.divide(cov, var, out=np.zeros_like(var), where=~flat)
        s = _round_to_stored(slope * unit)
        fits[i, 0] = s
        fits[i, 1] = mean_w - s * mean_c
    return codes, fits


def _round_to_stored(s: NDArray[np.float64]) -> NDArray[np.float64]:
    """Nearest values of 11 significant bits, ties to even: what float16 keeps of them."""
    mantissa, exponent = np.frexp(s)
    rounded: NDArray[np.float64] = np.ldexp(np.rint(mantissa * 2048.0), exponent - 11)
    return rounded
