"""One 8-bit affine code a weight, whose top b bits are the code at level b.

A group of weights gets a step, rounded up to the five significant bits that a store keeps, and a
zero point that centres its range; the code is the rounded position. At level b the code names a
cell of 2^(8-b) positions, decoded as its centre (gain 1), moved by the mean error of the group, in
sixteenths of a cell: groups with one outlier, or of equal weights, lie in one cell. Centres are not
least squares, which would shrink weights, and outputs with them.

Where calibration says how the columns of a matrix work together, codes are chosen again, for all
levels at once: a weight near the edge of a cell may go to the next one where that serves the lower
levels' outputs more than it costs the higher ones.
"""

from __future__ import annotations

import numpy as np

from .. import kernels
from ..errors import KernelError, UsageError
from ..types import F32, U8, NestedScales, QuantSpec
from .packing import affine

REACH = 64
"""Steps that a code may lie from the nearest one: the width of a cell of level 2."""


def level_weights(quant: QuantSpec) -> F32:
    """What an error counts at each level when codes are chosen for all: float32 [levels].

    In units of a cell's width, errors count the same at up to 4 bits; above, where a model's output
    hardly moves, less; and nothing at levels that are not stored.
    """
    worth = [
        0.0 if level > quant.max_level else 1.0 if level <= 4 else 0.3 if level <= 6 else 0.03
        for level in quant.levels
    ]
    cells = [4.0 ** (8 - level) for level in quant.levels]
    return np.divide(worth, cells).astype(np.float32)


def quantize_matrix(
    w: F32, quant: QuantSpec, pool: kernels.Pool | None = None, feedback: F32 | None = None
) -> tuple[U8, NestedScales]:
    """Quantize one matrix, or any run of its rows (rows do not influence one another).

    Args:
        w: float32 [rows, cols], finite.
        quant: levels and group size.
        pool: threads to use; None: one.
        feedback: float32 [cols, cols], see calibrate.feedback; None: nearest codes.

    Returns:
        codes uint8 [rows, cols], and the scales of all levels.

    Raises:
        UsageError: w is not a float32 matrix, holds NaN or infinity, or spans so much in one group
            that decoding it could overflow float32.
    """
    if w.dtype != np.float32 or w.ndim != 2 or 0 in w.shape:
        raise UsageError(f"a float32 matrix is needed, not {w.dtype} of shape {w.shape}")
    pool, w = pool or kernels.new_pool(1), np.ascontiguousarray(w)
    try:
        codes, scales = kernels.quantize_rows(pool, w, quant)
    except KernelError:
        raise UsageError(
            "weights hold NaN, infinity or values beyond 1e38: not a trained model"
        ) from None
    if feedback is not None:
        pairs = [affine(scales, level, i) for i, level in enumerate(quant.levels)]
        s, o = (np.stack(parts) for parts in zip(*pairs, strict=True))
        kernels.nest_rows(pool, w, codes, quant, (s, o), feedback, level_weights(quant), REACH)
    return codes, scales
