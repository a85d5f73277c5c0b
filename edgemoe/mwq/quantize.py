"""One 8-bit affine code a weight, whose top b bits are the code at level b.

A group of weights gets a step, rounded up to the five significant bits that a store keeps, and a
zero point that centres its range; the code is the rounded position. At level b the code names a
cell of 2^(8-b) positions, decoded as its centre, moved by the mean error of the group, in
sixteenths of a cell: groups with one outlier, or of equal weights, lie in one cell. Centres are not
least squares, which would shrink weights, and outputs with them.

Where calibration says how the columns of a matrix work together, codes are chosen again, for all
levels at once: a weight near the edge of a cell may go to the next one where that serves the lower
levels' outputs more than it costs the higher ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .. import kernels
from ..errors import KernelError, UsageError
from ..layout import CODE_BITS, RecordLayout
from ..types import F32, I32, U8, NestedScales
from .packing import affine

REACH = 64
"""Steps that a code may lie from the nearest one: the width of a cell of level 2."""

SWEEPS = 8
"""Over the columns of a row; more of them change little."""


Worth = Mapping[int, float]
"""What an error counts at each level, in units of a cell's width; nothing at levels not there."""

EXPERTS: Worth = {1: 6.0, 2: 6.0, 3: 1.2, 4: 1.5, 5: 0.3, 6: 0.3, 7: 0.01, 8: 0.01}
"""At 2 bits, where a model's output moves most, more; above 4, where it hardly does, less."""

DENSE: Worth = {4: 0.3, 5: 0.5, 6: 0.5, 7: 1.0, 8: 1.0}
"""Matrices that all tokens share are small beside the experts, and seldom read below 6 bits."""


def level_weights(levels: Sequence[int], worth: Worth) -> F32:
    """What a squared error counts at each level when codes are chosen for all: float32 [levels]."""
    return np.array([worth.get(b, 0.0) / 4.0 ** (CODE_BITS - b) for b in levels], np.float32)


def quantize_matrix(
    w: F32,
    layout: RecordLayout,
    whole: int = 0,
    pool: kernels.Pool | None = None,
    coupling: tuple[F32, F32] | None = None,
    worth: Worth = EXPERTS,
) -> list[tuple[U8, NestedScales]]:
    """Quantize one whole matrix of a record, or any run of its rows.

    Rows do not influence one another.

    Args:
        w: float32 [rows, cols], finite.
        layout: of the record; says which columns are stored together, and its levels.
        whole: which of its matrices: 0, 1, 2 of an expert are gate, up, down.
        pool: threads to use; None: one.
        coupling: float32 ([cols, cols], [cols, cols]), calibrate.Coupling; None: nearest codes.
        worth: of the levels, where codes are chosen for all of them.

    Returns:
        For each stored matrix that the whole one is made of, codes uint8 [rows, cols of it] and the
        scales of all levels.

    Raises:
        UsageError: w is not a float32 matrix of so many columns, holds NaN or infinity, or spans so
            much in one group that decoding it could overflow float32.
    """
    parts = layout.wholes[whole]
    cols = sum(layout.matrices[m].cols for m in parts)
    if w.dtype != np.float32 or w.ndim != 2 or w.shape[1] != cols or not len(w):
        raise UsageError(f"a float32 matrix of {cols} columns is needed, not {w.dtype} {w.shape}")
    pool, w = pool or kernels.new_pool(1), np.ascontiguousarray(w)
    try:
        pieces = [np.ascontiguousarray(w[:, columns(layout, m)]) for m in parts]
        out = [kernels.quantize_rows(pool, piece, layout.quant) for piece in pieces]
    except KernelError:
        raise UsageError(
            "weights hold NaN, infinity or values beyond 1e38: not a trained model"
        ) from None
    if coupling is None:
        return out
    codes = np.concatenate([part for part, _ in out], axis=1)
    starts, bits = _groups(layout, parts)
    scales = [by_level(layout, m, scales) for m, (_, scales) in zip(parts, out, strict=True)]
    s, o = (np.concatenate(pair, axis=2) for pair in zip(*scales, strict=True))
    weight = level_weights(layout.levels, worth)
    kernels.nest_rows(pool, w, codes, starts, bits, (s, o), coupling, weight, REACH, SWEEPS)
    return [
        (np.ascontiguousarray(codes[:, columns(layout, m)]), scales)
        for m, (_, scales) in zip(parts, out, strict=True)
    ]


def columns(layout: RecordLayout, m: int) -> slice:
    """Those of its whole matrix that stored matrix m of a record holds."""
    part = layout.matrices[m]
    return slice(part.first_col, part.first_col + part.cols)


def by_level(layout: RecordLayout, m: int, scales: NestedScales) -> tuple[F32, F32]:
    """(s, o) of stored matrix m at each level of its record: float32 [levels, rows, groups]."""
    steps = [layout.matrix_level(m, i) for i in range(layout.depth)]
    pairs = [affine(scales, layout.quant.levels[k], k) for k in steps]
    s, o = (np.stack(values) for values in zip(*pairs, strict=True))
    return s, o


def _groups(layout: RecordLayout, parts: Sequence[int]) -> tuple[I32, I32]:
    """First column of every group, and the end; bits that each is read at at every level."""
    starts: list[int] = []
    bits: list[list[int]] = []
    for m in parts:
        part = layout.matrices[m]
        starts += [part.first_col + g * part.group_size for g in range(part.groups)]
        steps = [layout.matrix_level(m, i) for i in range(layout.depth)]
        bits += [[layout.quant.levels[k] for k in steps]] * part.groups
    starts.append(columns(layout, parts[-1]).stop)
    return np.array(starts, np.int32), np.array(bits, np.int32).T.copy()
