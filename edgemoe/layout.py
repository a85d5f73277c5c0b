"""Sizes and offsets of nested records: arithmetic shared by packer, store, loader and kernels.

A record is one or more matrices ([gate, up, down] for an expert, one matrix for a dense linear)
stored as one segment a level. Segment i holds, in this order, for every matrix m:
    scale block of level i   one 64-byte head (float32 multiplier, zero padding), then
                             [row block of 8][group] x 32 bytes: 8 float16 scales, 8 float16 offsets
and then, for every matrix m:
    plane                    [row block of 8][unit of 32 columns] x 32 bytes per bit the level adds
Every part starts on a 64-byte boundary of the segment. See docs/FORMAT.md for the bit order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .types import I64, QuantSpec

ROW_BLOCK = 8
UNIT = 32
PART_ALIGN = 64
SCALE_HEAD = 64
DIRECT_ALIGN = 4096
DIRECT_FROM = 256 * 1024
"""Segments at least this large are aligned to DIRECT_ALIGN, so that O_DIRECT can read them."""


def align_up(n: int, to: int) -> int:
    """Smallest multiple of `to` that is >= n."""
    return -(-n // to) * to


@dataclass(frozen=True)
class MatrixLayout:
    """A [rows, cols] matrix: w[r, c] multiplies input column c and adds to output row r."""

    rows: int
    cols: int
    group_size: int

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
    def scale_bytes(self) -> int:
        return SCALE_HEAD + self.row_blocks * self.groups * 4 * ROW_BLOCK

    def plane_bytes(self, bits: int) -> int:
        """Bytes of a plane that adds `bits` (1 or 2) bits to every code."""
        return self.row_blocks * self.units * 32 * bits


@dataclass(frozen=True)
class RecordLayout:
    """Segments of one record: where each lies in it, and every part inside its segment."""

    matrices: tuple[MatrixLayout, ...]
    quant: QuantSpec
    alignment: int

    def added_bits(self, level_index: int) -> int:
        """Bits that segment `level_index` adds to every code."""
        levels = self.quant.levels
        return levels[level_index] - (levels[level_index - 1] if level_index else 0)

    @cached_property
    def part_offsets(self) -> I64:
        """int64 [levels, matrices, 2]: offset in the segment of (scale block, plane)."""
        n = len(self.quant.levels)
        out = np.zeros((n, len(self.matrices), 2), np.int64)
        for i in range(n):
            at = 0
            for m, mat in enumerate(self.matrices):
                out[i, m, 0] = at
                at += align_up(mat.scale_bytes, PART_ALIGN)
            for m, mat in enumerate(self.matrices):
                out[i, m, 1] = at
                at += align_up(mat.plane_bytes(self.added_bits(i)), PART_ALIGN)
        return out

    @cached_property
    def segment_sizes(self) -> tuple[int, ...]:
        """Bytes of each segment, without the padding that aligns the next."""
        last = self.matrices[-1]
        return tuple(
            int(self.part_offsets[i, -1, 1])
            + align_up(last.plane_bytes(self.added_bits(i)), PART_ALIGN)
            for i in range(len(self.quant.levels))
        )

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


def record_layout(shapes: tuple[tuple[int, int], ...], quant: QuantSpec) -> RecordLayout:
    """Layout of a record of matrices with these (rows, cols).

    Alignment is 4096 where the smallest segment has 256 KiB or more, else 64.
    """
    mats = tuple(MatrixLayout(r, c, quant.group_size) for r, c in shapes)
    small = RecordLayout(mats, quant, PART_ALIGN)
    if min(small.segment_sizes) >= DIRECT_FROM:
        return RecordLayout(mats, quant, DIRECT_ALIGN)
    return small


def expert_layout(hidden_size: int, moe_intermediate_size: int, quant: QuantSpec) -> RecordLayout:
    """Layout of one expert: gate [I, H], up [I, H], down [H, I]."""
    h, i = hidden_size, moe_intermediate_size
    return record_layout(((i, h), (i, h), (h, i)), quant)


def dense_layout(rows: int, cols: int, quant: QuantSpec) -> RecordLayout:
    """Layout of one dense linear [rows, cols]."""
    return record_layout(((rows, cols),), quant)
