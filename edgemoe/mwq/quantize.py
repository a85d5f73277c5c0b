"""One 8-bit affine code a weight, whose top b bits are the code at level b.

A group of weights gets a step, rounded up to the five significant bits that a store keeps, and a
zero point that centres its range; the code is the rounded position. At level b the code names a
cell of 2^(8-b) positions, decoded as its centre (gain 1), moved by the mean error of the group, in
sixteenths of a cell: groups with one outlier, or of equal weights, lie in one cell. Centres are not
least squares, which would shrink weights, and outputs with them.
"""

from __future__ import annotations

import numpy as np

from .. import kernels
from ..errors import KernelError, UsageError
from ..types import F32, U8, NestedScales, QuantSpec


def quantize_matrix(
    w: F32, quant: QuantSpec, pool: kernels.Pool | None = None
) -> tuple[U8, NestedScales]:
    """Quantize one matrix, or any run of its rows (rows do not influence one another).

    Args:
        w: float32 [rows, cols], finite.
        quant: levels and group size.
        pool: threads to use; None: one.

    Returns:
        codes uint8 [rows, cols], and the scales of all levels.

    Raises:
        UsageError: w is not a float32 matrix, holds NaN or infinity, or spans so much in one group
            that decoding it could overflow float32.
    """
    if w.dtype != np.float32 or w.ndim != 2 or 0 in w.shape:
        raise UsageError(f"a float32 matrix is needed, not {w.dtype} of shape {w.shape}")
    try:
        return kernels.quantize_rows(pool or kernels.new_pool(1), np.ascontiguousarray(w), quant)
    except KernelError:
        raise UsageError(
            "weights hold NaN, infinity or values beyond 1e38: not a trained model"
        ) from None
