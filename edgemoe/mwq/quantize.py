"""One 8-bit affine code a weight, and for every level the scale and offset that fit it best.

The code is the rounded position of a weight between its group's smallest and largest value. Level b
keeps the top b bits, c = code >> (8 - b), and gets its own (s, o): ordinary least squares of the
group's weights on c,

    s = cov(w, c) / var(c)        o = mean(w) - s * mean(c)

s is rounded to the 11 significant bits that a store keeps before o is derived, so that o makes up
for that rounding. A group without spread gets s = 0.
"""

from __future__ import annotations

import numpy as np

from .. import kernels
from ..errors import KernelError, UsageError
from ..types import F32, U8, QuantSpec


def quantize_matrix(
    w: F32, quant: QuantSpec, pool: kernels.Pool | None = None
) -> tuple[U8, list[tuple[F32, F32]]]:
    """Quantize one matrix, or any run of its rows (rows do not influence one another).

    Args:
        w: float32 [rows, cols], finite.
        quant: levels and group size.
        pool: threads to use; None: one.

    Returns:
        codes uint8 [rows, cols], and for each level (s, o), float32 [rows, groups]:
        w ~ s * (code >> (8 - level)) + o.

    Raises:
        UsageError: w is not a float32 matrix, holds NaN or infinity, or spans so much in one group
            that s * code could overflow float32.
    """
    if w.dtype != np.float32 or w.ndim != 2 or 0 in w.shape:
        raise UsageError(f"a float32 matrix is needed, not {w.dtype} of shape {w.shape}")
    try:
        codes, fits = kernels.quantize_rows(
            pool or kernels.new_pool(1), np.ascontiguousarray(w), quant
        )
    except KernelError:
        raise UsageError(
            "weights hold NaN, infinity or values beyond 1e38: not a trained model"
        ) from None
    return codes, [(fits[i, 0], fits[i, 1]) for i in range(len(quant.levels))]
