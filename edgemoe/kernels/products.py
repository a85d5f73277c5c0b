"""Products with nested matrices, single ones and those of experts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import KernelError
from ..layout import UNIT, MatrixLayout, RecordLayout
from ..types import F32, I8, I32, I64, LEVELS, U8, U64, ModelConfig
from . import dispatch
from .dispatch import Pool, check

if TYPE_CHECKING:
    from .. import _native


def _addresses(layout: RecordLayout, segments: Sequence[U8]) -> U64:
    out = np.zeros(layout.depth, np.uint64)
    for i, segment in enumerate(segments):
        check(f"segment {i}", segment, np.uint8, layout.segment_sizes[i])
        out[i] = segment.ctypes.data
    return out


AT_ONCE_PAIRS = 256
"""Pairs of a token and an expert up to which a mixture that is mostly computed in parts may be
computed in one call: its outputs then lie in the pool's scratch, which is set aside for so many."""

MAX_GROUP_SIZE = 256
"""Input columns that may share a scale; the kernels keep a group's codes on the stack."""


def group_units(layout: RecordLayout) -> int:
    quant = layout.quant
    if quant.levels != LEVELS or quant.group_size % UNIT or quant.group_size > MAX_GROUP_SIZE:
        raise KernelError(
            f"levels {quant.levels} in groups of {quant.group_size}: the kernels take {LEVELS} in "
            f"groups of a multiple of {UNIT} up to {MAX_GROUP_SIZE}"
        )
    return quant.group_size // UNIT


@dataclass(frozen=True)
class NestedMatrix:
    """One matrix of a record read at one level, with the memory it points into.

    segments: uint8 arrays, one a segment from the first to that of the level.
    """

    layout: MatrixLayout
    native: _native.Matrix
    segments: tuple[U8, ...]

    @classmethod
    def of(cls, layout: RecordLayout, segments: Sequence[U8], index: int = 0) -> NestedMatrix:
        """Matrix `index` of a record whose first len(segments) segments are given."""
        if not 1 <= len(segments) <= layout.depth:
            raise KernelError(f"expected 1 to {layout.depth} segments")
        mat = layout.matrices[index]
        native = dispatch.native.matrix(
            _addresses(layout, segments),
            layout.part_offsets,
            index,
            len(segments) - 1,
            mat.ahead,
            mat.rows,
            mat.cols,
            group_units(layout),
        )
        return cls(mat, native, tuple(segments))


def linear(pool: Pool, x: F32, matrices: Sequence[NestedMatrix]) -> list[F32]:
    """y_m = x @ w_m.T for matrices that share their input, which is quantized once.

    x: float32 [n, cols]. Returns float32 [n, rows_m] each. Activations are rounded to int8 with one
    scale for every 32 columns.
    """
    for m in matrices:
        check("x", x, np.float32, None, m.layout.cols)
    out = [np.empty((x.shape[0], m.layout.rows), np.float32) for m in matrices]
    dispatch.native.linear(pool, x, [m.native for m in matrices], out)
    return out


def accumulate(pool: Pool, x: F32, matrix: NestedMatrix) -> tuple[I8, F32, I32]:
    """The integer half of `linear`, for tests.

    Returns (q int8 [n, units * 32], scale float32 [n, units], dots int32 [n, padded rows, units]).
    """
    mat = matrix.layout
    check("x", x, np.float32, None, mat.cols)
    n = x.shape[0]
    q = np.empty((n, mat.units * UNIT), np.int8)
    scale = np.empty((n, mat.units), np.float32)
    dots = np.empty((n, mat.row_blocks * 8, mat.units), np.int32)
    dispatch.native.accumulate(pool, x, matrix.native, q, scale, dots)
    return q, scale, dots


def linear_f32(pool: Pool, x: F32, w: F32) -> F32:
    """x [n, cols] @ w [rows, cols].T in float32 -> [n, rows]."""
    check("w", w, np.float32, None, None)
    check("x", x, np.float32, None, w.shape[1])
    y = np.empty((x.shape[0], w.shape[0]), np.float32)
    dispatch.native.linear_f32(pool, x, w, y)
    return y


def decode_rows(matrix: NestedMatrix, ids: I64) -> F32:
    """Rows `ids` (int64 [n]) of a nested matrix, decoded -> float32 [n, cols]."""
    check("ids", ids, np.int64, None)
    rows = matrix.layout.rows
    if not all(0 <= i < rows for i in ids.tolist()):
        raise KernelError(f"ids: expected values in [0, {rows})")
    out = np.empty((ids.shape[0], matrix.layout.cols), np.float32)
    dispatch.native.decode_rows(matrix.native, ids, out)
    return out


def experts(
    pool: Pool,
    layout: RecordLayout,
    x: F32,
    segments: U64,
    levels: I32,
    first_pair: I32,
    pair_token: I32,
) -> F32:
    """down(silu(gate x) * (up x)) for every (expert at a level, token) pair, in one native call.

    x: float32 [n, hidden]. Job j is one expert at level index levels[j] (int32 [jobs]), whose
    segments lie at the addresses segments[j] (uint64 [jobs, levels], those above its level unused)
    and which serves pairs first_pair[j] .. first_pair[j + 1] (int32 [jobs + 1]); pair i reads row
    pair_token[i] of x (int32 [pairs]). Returns float32 [pairs, hidden].

    The addresses must stay valid and whole for the call: the caller pins them.
    """
    hidden = layout.matrices[0].cols
    jobs, pairs = levels.shape[0], pair_token.shape[0]
    depth = layout.depth
    check("x", x, np.float32, None, hidden)
    check("levels", levels, np.int32, None)
    check("segments", segments, np.uint64, jobs, depth)
    check("first_pair", first_pair, np.int32, jobs + 1)
    check("pair_token", pair_token, np.int32, None)
    if jobs:
        if not (int(levels.min()) >= 0 and int(levels.max()) < depth):
            raise KernelError(f"levels: expected indices in [0, {depth})")
        if first_pair[0] != 0 or first_pair[-1] != pairs or (np.diff(first_pair) < 1).any():
            raise KernelError("first_pair: expected a rising partition of the pairs")
        if not (int(pair_token.min()) >= 0 and int(pair_token.max()) < x.shape[0]):
            raise KernelError(f"pair_token: expected rows in [0, {x.shape[0]})")
        if (segments[np.arange(depth)[None, :] <= levels[:, None]] == 0).any():
            raise KernelError("segments: a segment at or below a job's level has no address")
    out = np.empty((pairs, hidden), np.float32)
    dispatch.native.experts(
        pool,
        x,
        segments,
        layout.part_offsets,
        levels,
        first_pair,
        pair_token,
        layout.matrices[0].rows,
        ahead_columns(layout),
        group_units(layout),
        out,
    )
    return out


def ahead_columns(layout: RecordLayout) -> int:
    """Columns of an expert's down that are one level ahead."""
    return sum(m.cols for m in layout.matrices if m.ahead)


def combine(pool: Pool, pair_out: F32, position: I32, weights: F32) -> F32:
    """Weighted sum over slots in ascending order: float32 [n, hidden].

    pair_out: float32 [pairs, hidden]; position: int32 [n, k], the pair of (token, slot);
    weights: float32 [n, k].
    """
    check("pair_out", pair_out, np.float32, None, None)
    check("position", position, np.int32, None, None)
    check("weights", weights, np.float32, *position.shape)
    if position.size and not (int(position.min()) >= 0 and int(position.max()) < pair_out.shape[0]):
        raise KernelError(f"position: expected pairs in [0, {pair_out.shape[0]})")
    y = np.empty((position.shape[0], pair_out.shape[1]), np.float32)
    dispatch.native.combine(pool, pair_out, position, weights, y)
    return y


def scratch_bytes(
    config: ModelConfig,
    experts: Collection[RecordLayout],
    dense: Collection[RecordLayout],
    threads: int,
    n: int,
    *,
    in_parts: bool = False,
) -> int:
    """Pool scratch that a forward pass of n tokens needs at most; in_parts: its mixtures are
    MixtureParts, but for the smallest batches."""
    native, k, fused = dispatch.native, config.num_experts_per_tok, dispatch.fused()
    heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    sizes = [native.attention_scratch(threads, n, *heads)]
    for layout in experts:
        gate, by = layout.matrices[0], (ahead_columns(layout), group_units(layout))
        shape = (gate.cols, gate.rows, *by)
        if fused:
            of = k, config.num_experts * layout.depth, *shape
            sizes.append(native.mixture_scratch(threads, n, *of, not in_parts))
            if in_parts:
                few = min(n, max(AT_ONCE_PAIRS // k, 1))
                sizes.append(native.mixture_scratch(threads, few, *of, True))
        else:
            sizes.append(native.experts_scratch(threads, n, n * k, *shape))
    mlp = max(config.shared_expert_intermediate_size, config.intermediate_size)
    for layout in dense:
        units = group_units(layout)
        sizes.append(native.linear_scratch(n, layout.matrices[0].cols, units))
        if fused:
            layer = (config.hidden_size, *heads, mlp, config.num_experts, units)
            sizes.append(native.layer_scratch(threads, n, *layer))
    return max(sizes)
