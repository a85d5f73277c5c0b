"""Sizes and offsets of nested records: arithmetic shared by packer, store, loader and kernels.

A record is one or more matrices ([gate, up, down] for an expert, one matrix for a dense linear)
stored as one segment a level. A matrix has a step a bit-width of the ladder: step k adds the bits
that lead from the width below to that one. Step k lies in segment k, or one before it where the
matrix is one level ahead of the record. Segment i holds, for every matrix and step in it,
    scale block   in step 0 exponents, uint8 a row, and steps and zeros, [row block of 8][group] x
                  16 bytes; below 8 bits the shifts of the step, 4 bits a row and group
and then, for every matrix and step in it,
    plane         [row block of 8][unit of 32 columns] x 32 bytes per bit the step adds
Every part starts on a 64-byte boundary of the segment. See docs/FORMAT.md for the bit order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from .types import I64, QuantSpec

ROW_BLOCK = 8
UNIT = 32
CODE_BITS = 8
PART_ALIGN = 64
DIRECT_ALIGN = 4096
DIRECT_FROM = 256 * 1024
"""Segments at least this large are aligned to DIRECT_ALIGN, so that O_DIRECT can read them."""


def align_up(n: int, to: int) -> int:
    """Smallest multiple of `to` that is >= n."""
    return -(-n // to) * to


@dataclass(frozen=True)
class MatrixLayout:
    """A [rows, cols] matrix: w[r, c] multiplies input column c and adds to output row r.

    first_col: where a matrix of a record that is stored as several, side by side, goes on with
    this one. ahead: 1 if it is read one level above the record's, 0 if at the same.
    """

    rows: int
    cols: int
    group_size: int
    first_col: int = 0
    ahead: int = 0

    @property
    def row_blocks(self) -> int:
        return -(-self.rows // ROW_BLOCK)

    @property
    def units(self) -> int:
        """Units of 32 columns in a row, the last one zero-padded."""
        return -(-self.cols // UNIT)

    @property
    def groups(self) -> int:
        return -(-self.units * UNIT // self.group_size)

    @property
    def exponent_bytes(self) -> int:
        """Bytes of the exponents, padded."""
        return align_up(self.row_blocks * ROW_BLOCK, PART_ALIGN)

    @property
    def step_bytes(self) -> int:
        """Bytes of the steps and zeros, padded."""
        return align_up(self.row_blocks * self.groups * 2 * ROW_BLOCK, PART_ALIGN)

    @property
    def shift_bytes(self) -> int:
        """Bytes of one level's shifts, padded."""
        return align_up(self.row_blocks * self.groups * ROW_BLOCK // 2, PART_ALIGN)

    def plane_bytes(self, bits: int) -> int:
        """Bytes of a plane that adds `bits` (1 or 2) bits to every code."""
        return self.row_blocks * self.units * 32 * bits


@dataclass(frozen=True)
class RecordLayout:
    """Segments of one record: where each lies in it, and every part inside its segment.

    matrices: as they are stored. depth: segments, so levels that it can be read at.
    """

    matrices: tuple[MatrixLayout, ...]
    quant: QuantSpec
    depth: int
    alignment: int

    @cached_property
    def levels(self) -> tuple[int, ...]:
        """Bit-widths that the record can be read at, one a segment."""
        return self.quant.levels[: self.depth]

    @cached_property
    def wholes(self) -> tuple[range, ...]:
        """Which of `matrices` side by side make each whole one: gate, up, down of an expert."""
        first = [m for m, matrix in enumerate(self.matrices) if matrix.first_col == 0]
        return tuple(map(range, first, [*first[1:], len(self.matrices)]))

    def matrix_level(self, m: int, level_index: int) -> int:
        """Index of the level that matrix m is read at where the record is at `level_index`."""
        return min(level_index + self.matrices[m].ahead, len(self.quant.levels) - 1)

    def steps(self, m: int, segment: int) -> range:
        """Steps of matrix m that lie in a segment."""
        first = self.matrix_level(m, segment - 1) + 1 if segment else 0
        return range(first, self.matrix_level(m, segment) + 1)

    def segment_of(self, m: int, step: int) -> int:
        """Segment that a step of matrix m lies in."""
        return max(step - self.matrices[m].ahead, 0)

    def added_bits(self, step: int) -> int:
        """Bits that step `step` adds to every code."""
        levels = self.quant.levels
        return levels[step] - (levels[step - 1] if step else 0)

    def scale_parts(self, m: int, step: int) -> dict[str, int]:
        """Offsets in the scale block of a step of matrix m of what it holds, and its "end"."""
        matrix = self.matrices[m]
        sizes: dict[str, int] = {}
        if step == 0:
            sizes |= {"exponent": matrix.exponent_bytes, "step": matrix.step_bytes}
        if step >= matrix.ahead and self.quant.levels[step] < CODE_BITS:
            sizes["shift"] = matrix.shift_bytes
        out, at = {}, 0
        for name, size in sizes.items():
            out[name] = at
            at += size
        return out | {"end": at}

    @cached_property
    def part_offsets(self) -> I64:
        """int64 [steps, matrices, 2]: offset in its segment of (scale block, plane) of a step.

        Zero where the record has no such step.
        """
        return self._placed[0]

    @cached_property
    def segment_sizes(self) -> tuple[int, ...]:
        """Bytes of each segment, without the padding that aligns the next."""
        return self._placed[1]

    @cached_property
    def _placed(self) -> tuple[I64, tuple[int, ...]]:
        offsets = np.zeros((len(self.quant.levels), len(self.matrices), 2), np.int64)
        sizes = []
        for i in range(self.depth):
            at = 0
            steps = [(m, k) for m in range(len(self.matrices)) for k in self.steps(m, i)]
            for m, k in steps:
                offsets[k, m, 0] = at
                at += self.scale_parts(m, k)["end"]
            for m, k in steps:
                offsets[k, m, 1] = at
                at += align_up(self.matrices[m].plane_bytes(self.added_bits(k)), PART_ALIGN)
            sizes.append(at)
        return offsets, tuple(sizes)

    @cached_property
    def segment_offsets(self) -> tuple[int, ...]:
        """Offset of each segment from the record's start; every one is aligned."""
        out, at = [], 0
        for size in self.segment_sizes:
            out.append(at)
            at += align_up(size, self.alignment)
        return tuple(out)

    @property
    def stride(self) -> int:
        """Bytes from one record to the next."""
        return self.segment_offsets[-1] + align_up(self.segment_sizes[-1], self.alignment)

    def prefix_bytes(self, level_index: int) -> int:
        """Bytes of the contiguous read that brings a record to level `level_index`."""
        return self.segment_offsets[level_index] + self.segment_sizes[level_index]

    def weights(self) -> int:
        """Number of weights in the record (unpadded)."""
        return sum(m.rows * m.cols for m in self.matrices)


def record_layout(matrices: Sequence[MatrixLayout], quant: QuantSpec, depth: int) -> RecordLayout:
    """Layout of a record of these matrices with `depth` segments.

    Alignment is 4096 where the smallest segment has 256 KiB or more, else 64.
    """
    small = RecordLayout(tuple(matrices), quant, depth, PART_ALIGN)
    if min(small.segment_sizes) >= DIRECT_FROM:
        return replace(small, alignment=DIRECT_ALIGN)
    return small


def expert_layout(
    hidden_size: int, moe_intermediate_size: int, quant: QuantSpec, ahead: int = 0
) -> RecordLayout:
    """Layout of one expert: gate [I, H], up [I, H], down [H, I], at the levels experts hold.

    ahead: so many of the first columns of down, a multiple of 32 or all, are one level ahead.
    """
    h, i, group = hidden_size, moe_intermediate_size, quant.group_size
    matrices = [MatrixLayout(i, h, group), MatrixLayout(i, h, group)]
    if ahead:
        matrices.append(MatrixLayout(h, ahead, group, 0, 1))
    if ahead < i:
        matrices.append(MatrixLayout(h, i - ahead, group, ahead))
    return record_layout(matrices, quant, len(quant.expert_levels))


def dense_layout(rows: int, cols: int, quant: QuantSpec) -> RecordLayout:
    """Layout of one dense linear [rows, cols]."""
    matrix = MatrixLayout(rows, cols, quant.group_size)
    return record_layout([matrix], quant, len(quant.levels))
