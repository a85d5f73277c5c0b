"""Sizes and offsets of nested records: arithmetic shared by packer, store, loader and kernels.

A record is one or more matrices ([gate, up, down] for an expert, one matrix for a dense linear)
stored as one segment a level. Segment i holds, in this order, for every matrix m:
    scale block   gains of level i, float16 a row; below 8 bits its shifts, 4 bits a row and group;
                  in segment 0 also, for all levels, exponents, uint8 a row, and steps and zeros,
                  [row block of 8][group] x 16 bytes
and then, for every matrix m:
    plane         [row block of 8][unit of 32 columns] x 32 bytes per bit the level adds
Every part starts on a 64-byte boundary of the segment. See docs/FORMAT.md for the bit order.
"""

from __future__ import annotations

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
    def gain_bytes(self) -> int:
        """Bytes of one level's gains, padded."""
        return align_up(self.row_blocks * ROW_BLOCK * 2, PART_ALIGN)

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
    """Segments of one record: where each lies in it, and every part inside its segment."""

    matrices: tuple[MatrixLayout, ...]
    quant: QuantSpec
    alignment: int

    def scale_parts(self, level_index: int, m: int) -> dict[str, int]:
        """Offsets in the scale block of matrix m of what it holds, and its "end", in order."""
        matrix = self.matrices[m]
        sizes = {"gain": matrix.gain_bytes}
        if level_index == 0:
            sizes |= {"exponent": matrix.exponent_bytes, "step": matrix.step_bytes}
        if self.quant.levels[level_index] < CODE_BITS:
            sizes["shift"] = matrix.shift_bytes
        out, at = {}, 0
        for name, size in sizes.items():
            out[name] = at
            at += size
        return out | {"end": at}

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
            for m in range(len(self.matrices)):
                out[i, m, 0] = at
                at += self.scale_parts(i, m)["end"]
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
    """Layout of one expert: gate [I, H], up [I, H], down [H, I], at the levels experts hold."""
    h, i = hidden_size, moe_intermediate_size
    held = replace(quant, levels=quant.expert_levels)
    return record_layout(((i, h), (i, h), (h, i)), held)


def dense_layout(rows: int, cols: int, quant: QuantSpec) -> RecordLayout:
    """Layout of one dense linear [rows, cols]."""
    return record_layout(((rows, cols),), quant)
