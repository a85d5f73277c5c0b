"""Codes and scales to the bytes of segments, and back. This file owns the bit layout.

A plane adds one or two bits to every code. It is a run of cells, one for each
[block of 8 rows][unit of 32 columns]. With lane r = row in block, column in unit = 4 * T + j:

    1-bit cell  32 bytes: bit T of byte 4 * r + j
    2-bit cell  64 bytes, two vectors v = T // 4 of 32: bits 2 * (T % 4) and up of byte 4 * r + j

so a kernel that shifts and masks one 32-byte vector gets, for a fixed T, four consecutive columns
of each of eight rows: what an int8 dot product of 32-bit lanes eats. The four bytes j of a (r, T)
are one little-endian uint32 here; all shifts below work on four codes at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import kernels
from ..errors import StoreError, UsageError
from ..layout import CODE_BITS, ROW_BLOCK, UNIT, MatrixLayout, RecordLayout
from ..types import F32, U8, NestedScales

MAX_EXPONENT = 239
"""Of a row: the largest step, 15 octaves above 2^(239 - 127), is still finite."""

NO_SHIFT = 8
"""The shift that leaves a cell's centre where it is."""

_CHUNK_CODES = 1 << 19
"""Codes unpacked at a time; the working set of a chunk stays in a core's cache."""

_ONES = {1: np.uint32(0x01010101), 2: np.uint32(0x03030303)}


def _unpack_rows(planes: Sequence[U8], added: Sequence[int], rows: int, cols: int) -> U8:
    """Inverse of `pack_rows` for the first len(planes) levels: codes of that level [rows, cols]."""
    blocks, units = -(-rows // ROW_BLOCK), -(-cols // UNIT)
    quads = np.zeros((8, blocks, units, ROW_BLOCK), "<u4")
    for plane, bits in zip(planes, added, strict=True):
        cells = plane.view("<u4").reshape(blocks, units, bits, ROW_BLOCK)
        per_vector = 8 // bits
        quads <<= np.uint32(bits)
        for t in range(8):
            vector = cells[:, :, t // per_vector]
            quads[t] |= (vector >> np.uint32(bits * (t % per_vector))) & _ONES[bits]
    lanes = np.ascontiguousarray(quads.transpose(1, 3, 2, 0))
    return lanes.view(np.uint8).reshape(blocks * ROW_BLOCK, units * UNIT)[:rows, :cols]


def _row_blocks(matrix: MatrixLayout, values: NDArray[Any]) -> NDArray[Any]:
    """values [rows, ...] padded with zeros to [row_blocks, 8, ...]."""
    padded = np.zeros((matrix.row_blocks * ROW_BLOCK, *values.shape[1:]), values.dtype)
    padded[: matrix.rows] = values
    return padded.reshape(matrix.row_blocks, ROW_BLOCK, *values.shape[1:])


def _check_scales(matrix: MatrixLayout, levels: Sequence[int], scales: NestedScales) -> None:
    rows, groups, count = matrix.rows, matrix.groups, len(levels)
    names = ("exponent", "step", "zero", "shift")
    got = [getattr(scales, name).shape for name in names]
    want = [(rows,), (rows, groups), (rows, groups), (count, rows, groups)]
    if got != want:
        raise UsageError(f"{', '.join(names)} are {got}, not {want}")
    if not ((scales.exponent >= 1) & (scales.exponent <= MAX_EXPONENT)).all():
        raise UsageError(f"exponents must be from 1 to {MAX_EXPONENT}")
    for bits, shift in zip(levels, scales.shift, strict=True):
        if not ((shift < 16).all() if bits < CODE_BITS else (shift == NO_SHIFT).all()):
            raise UsageError(f"shifts must be below 16, and {NO_SHIFT} at {CODE_BITS} bits")


def pack_scales(layout: RecordLayout, m: int, step: int, scales: NestedScales) -> U8:
    """Scale block of a step of matrix m of a record: uint8.

    Raises:
        UsageError: shapes do not fit the matrix, or values the format.
    """
    matrix, at = layout.matrices[m], layout.scale_parts(m, step)
    _check_scales(matrix, layout.quant.levels, scales)
    block = np.zeros(at["end"], np.uint8)

    def put(name: str, values: NDArray[Any]) -> None:
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        block[at[name] : at[name] + data.size] = data

    if "step" in at:
        exponents = _row_blocks(matrix, scales.exponent)
        exponents[exponents == 0] = 1  # rows past the last
        put("exponent", exponents)
        pairs = np.stack([_row_blocks(matrix, v) for v in (scales.step, scales.zero)])
        put("step", pairs.transpose(1, 3, 0, 2))  # [block, group, 2, 8]
    if "shift" in at:
        nibbles = _row_blocks(matrix, scales.shift[step]).transpose(0, 2, 1)
        put("shift", nibbles[..., 0::2] | nibbles[..., 1::2] << 4)  # [block, group, 4]
    return block


def unpack_scales(layout: RecordLayout, m: int, blocks: Sequence[U8]) -> NestedScales:
    """Inverse of `pack_scales` from the blocks of steps 0, 1, ...; no shifts elsewhere."""
    matrix = layout.matrices[m]
    rows, count, groups = matrix.rows, matrix.row_blocks, matrix.groups
    shift = np.full((len(layout.quant.levels), rows, groups), NO_SHIFT, np.uint8)
    for k, block in enumerate(blocks):
        at = layout.scale_parts(m, k)
        if "shift" in at:
            packed = block[at["shift"] : at["shift"] + count * groups * ROW_BLOCK // 2]
            packed = packed.reshape(count, groups, ROW_BLOCK // 2)
            nibbles = np.stack([packed & 15, packed >> 4], axis=-1)  # [block, group, 4, 2]
            by_row = nibbles.reshape(count, groups, ROW_BLOCK).transpose(0, 2, 1)
            shift[k] = by_row.reshape(-1, groups)[:rows]
    at = layout.scale_parts(m, 0)
    exponent = blocks[0][at["exponent"] : at["exponent"] + rows]
    body = blocks[0][at["step"] : at["step"] + count * groups * 2 * ROW_BLOCK]
    body = body.reshape(count, groups, 2, ROW_BLOCK).transpose(2, 0, 3, 1)
    step, zero = body.reshape(2, count * ROW_BLOCK, groups)[:, :rows]
    return NestedScales(exponent, step, zero, shift)


def affine(scales: NestedScales, bits: int, step: int) -> tuple[F32, F32]:
    """(s, o) float32 [rows, groups] of step `step`, at `bits` bits: w = s * code + o."""
    raised = scales.exponent.astype(np.uint32)[:, None] << np.uint32(23)
    unit = (raised + (scales.step.astype(np.uint32) << np.uint32(19))).view(np.float32)
    cell = np.float32(2.0 ** (8 - bits))
    middle = np.float32(127.5) - cell * np.float32(((1 << bits) - 1) / 2)
    moved = (scales.shift[step].astype(np.float32) - NO_SHIFT) * (cell / np.float32(16))
    return unit * cell, unit * ((middle - scales.zero.astype(np.float32)) + moved)


def _check_codes(layout: RecordLayout, codes: Sequence[U8]) -> None:
    shapes = [c.shape for c in codes]
    want = [(m.rows, m.cols) for m in layout.matrices]
    if shapes != want or any(c.dtype != np.uint8 for c in codes):
        raise UsageError(f"codes must be uint8 of shapes {want}, not {shapes}")


def pack_record(
    layout: RecordLayout,
    codes: Sequence[U8],
    scales: Sequence[NestedScales],
    pool: kernels.Pool | None = None,
) -> list[U8]:
    """All segments of a record.

    Args:
        layout: of the record; says how many matrices and levels there are.
        codes: uint8 [rows, cols] a stored matrix, 8-bit codes.
        scales: of each stored matrix, with the shifts of all levels of the ladder.
        pool: threads to use; None: one.

    Returns:
        One uint8 array a segment, of layout.segment_sizes.

    Raises:
        UsageError: shapes or dtypes do not fit the layout.
    """
    _check_codes(layout, codes)
    pool = pool or kernels.new_pool(1)
    segments = [np.zeros(size, np.uint8) for size in layout.segment_sizes]
    for m, of_matrix in enumerate(codes):
        pieces = [
            *scale_pieces(layout, m, scales[m]),
            *plane_pieces(layout, m, 0, np.ascontiguousarray(of_matrix), pool),
        ]
        for i, at, data in pieces:
            segments[i][at : at + data.size] = data
    return segments


def scale_pieces(
    layout: RecordLayout, m: int, scales: NestedScales
) -> Iterator[tuple[int, int, U8]]:
    """The scale blocks of matrix m of a record, for writing a record piece by piece.

    Yields:
        (segment, offset in it, uint8 bytes).
    """
    for step in range(layout.matrix_level(m, layout.depth - 1) + 1):
        at = int(layout.part_offsets[step, m, 0])
        yield layout.segment_of(m, step), at, pack_scales(layout, m, step, scales)


def plane_pieces(
    layout: RecordLayout, m: int, first_row: int, codes: U8, pool: kernels.Pool
) -> Iterator[tuple[int, int, U8]]:
    """The plane bytes of a run of rows of matrix m, likewise.

    Args:
        first_row: a multiple of 8. codes: uint8 [rows, cols], whole row blocks but for the last of
            the matrix.
    """
    levels = layout.quant.levels[: layout.matrix_level(m, layout.depth - 1) + 1]
    for step, data in enumerate(kernels.pack_rows(pool, codes, levels)):
        yield layout.segment_of(m, step), plane_offset(layout, m, step, first_row), data


def plane_offset(layout: RecordLayout, m: int, step: int, row: int) -> int:
    """Offset in its segment of the plane bytes of a step of matrix m from row `row` on.

    row: a multiple of 8.
    """
    cell = 32 * layout.added_bits(step)
    at = row // ROW_BLOCK * layout.matrices[m].units * cell
    return int(layout.part_offsets[step, m, 1]) + at


def _check_segments(layout: RecordLayout, segments: Sequence[U8], level_index: int) -> None:
    sizes = [s.size for s in segments[: level_index + 1]]
    if sizes != list(layout.segment_sizes[: level_index + 1]):
        raise StoreError(
            f"segments of {sizes} bytes do not fit the layout's {layout.segment_sizes}: "
            "the record is not of this shape"
        )


def unpack_codes(
    layout: RecordLayout, segments: Sequence[NDArray[np.uint8]], level_index: int
) -> list[U8]:
    """Codes of each stored matrix, from segments 0..level_index: uint8 [rows, cols].

    They have the bits of the level that the matrix is read at where the record is at this one.

    Raises:
        StoreError: a segment has another size than the layout says.
    """
    _check_segments(layout, segments, level_index)
    out = []
    for m, matrix in enumerate(layout.matrices):
        codes = np.empty((matrix.rows, matrix.cols), np.uint8)
        steps = range(layout.matrix_level(m, level_index) + 1)
        added = [layout.added_bits(k) for k in steps]
        run = max(_CHUNK_CODES // (matrix.units * UNIT * ROW_BLOCK), 1) * ROW_BLOCK
        for first in range(0, matrix.rows, run):
            stop = min(first + run, matrix.rows)
            planes = []
            for k, bits in zip(steps, added, strict=True):
                at = plane_offset(layout, m, k, first)
                blocks = -(-(stop - first) // ROW_BLOCK)
                segment = segments[layout.segment_of(m, k)]
                planes.append(segment[at : at + blocks * matrix.units * 32 * bits])
            codes[first:stop] = _unpack_rows(planes, added, stop - first, matrix.cols)
        out.append(codes)
    return out


ReadPart = Callable[[int, int, int], U8]
"""(segment, offset in it, size) -> bytes of the segment, uint8 [size]."""


def decode_rows(
    layout: RecordLayout, level_index: int, whole: int, first: int, stop: int, read: ReadPart
) -> F32:
    """Rows [first, stop) of a whole matrix of a record at one level: what `decode` gives of them.

    Args:
        whole: number of the matrix: 0, 1, 2 of an expert are gate, up, down.
        first: a multiple of 8.
        read: brings parts of the segments; only those of these rows are asked for.

    Returns:
        float32 [stop - first, cols].
    """
    parts = layout.wholes[whole]
    runs = tuple(replace(layout.matrices[m], rows=stop - first) for m in parts)
    one = replace(layout, matrices=runs)
    segments = [np.zeros(size, np.uint8) for size in one.segment_sizes[: level_index + 1]]
    for n, m in enumerate(parts):
        matrix, rows = runs[n], runs[n].row_blocks * ROW_BLOCK
        row_bytes = {"exponent": 1.0, "step": 2.0 * matrix.groups, "shift": 0.5 * matrix.groups}
        for k in range(layout.matrix_level(m, level_index) + 1):
            i = layout.segment_of(m, k)
            size, at = matrix.plane_bytes(layout.added_bits(k)), int(one.part_offsets[k, n, 1])
            segments[i][at : at + size] = read(i, plane_offset(layout, m, k, first), size)
            block, here = layout.scale_parts(m, k), one.scale_parts(n, k)
            for name in block.keys() & row_bytes.keys():
                start = int(layout.part_offsets[k, m, 0]) + block[name]
                size = int(rows * row_bytes[name])
                at = int(one.part_offsets[k, n, 0]) + here[name]
                segments[i][at : at + size] = read(i, start + int(first * row_bytes[name]), size)
    return decode(one, segments, level_index)[0]


def decode(
    layout: RecordLayout, segments: Sequence[NDArray[np.uint8]], level_index: int
) -> list[F32]:
    """Whole matrices at one level: s * code + o, float32 [rows, cols] each."""
    parts = []
    for m, codes in enumerate(unpack_codes(layout, segments, level_index)):
        matrix, step = layout.matrices[m], layout.matrix_level(m, level_index)
        scales = read_scales(layout, segments, level_index, m)
        s, o = affine(scales, layout.quant.levels[step], step)
        w = np.empty((matrix.rows, matrix.cols), np.float32)
        width = matrix.group_size
        for g in range(matrix.groups):
            part = slice(g * width, min((g + 1) * width, matrix.cols))
            np.multiply(codes[:, part], s[:, g, None], out=w[:, part])
            w[:, part] += o[:, g, None]
        parts.append(w)
    return [
        parts[whole[0]] if len(whole) == 1 else np.concatenate([parts[m] for m in whole], axis=1)
        for whole in layout.wholes
    ]


def read_scales(
    layout: RecordLayout, segments: Sequence[NDArray[np.uint8]], level_index: int, m: int
) -> NestedScales:
    """Scales of stored matrix m of a record, with the shifts it needs up to `level_index`."""
    blocks = []
    for k in range(layout.matrix_level(m, level_index) + 1):
        at = int(layout.part_offsets[k, m, 0])
        segment = segments[layout.segment_of(m, k)]
        blocks.append(segment[at : at + layout.scale_parts(m, k)["end"]])
    return unpack_scales(layout, m, blocks)
