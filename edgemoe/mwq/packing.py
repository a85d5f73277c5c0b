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

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from .. import kernels
from ..errors import StoreError, UsageError
from ..layout import ROW_BLOCK, SCALE_HEAD, UNIT, MatrixLayout, RecordLayout
from ..types import F32, U8

LevelScales = tuple[F32, F32]
"""Scales s and offsets o of one level of one matrix: float32 [rows, groups] each."""

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


def _multiplier(s: F32, o: F32) -> np.float32:
    """Power of two that brings the largest |s| and |o| under 2**15; 2**-126 at least."""
    peak = max(float(np.abs(s).max()), float(np.abs(o).max()))
    if not math.isfinite(peak):
        raise UsageError("scales and offsets must be finite")
    exponent = math.frexp(peak)[1] if peak else 15
    multiplier: np.float32 = np.float32(2.0 ** max(exponent - 15, -126))
    return multiplier


def pack_scales(matrix: MatrixLayout, s: F32, o: F32) -> U8:
    """Scale block of one matrix at one level: uint8 [matrix.scale_bytes].

    Args:
        s, o: float32 [rows, groups]. Stored as float16 times one float32 power of two, so a value
            keeps 11 significant bits unless it is 2**-28 of the matrix's largest or less.
    """
    if s.shape != (matrix.rows, matrix.groups) or o.shape != s.shape:
        raise UsageError(
            f"scales are {s.shape} and offsets {o.shape}, not {(matrix.rows, matrix.groups)}"
        )
    multiplier = _multiplier(s, o)
    block = np.zeros(matrix.scale_bytes, np.uint8)
    block[:4].view("<f4")[0] = multiplier
    body = block[SCALE_HEAD:].view("<f2")
    body = body.reshape(matrix.row_blocks, matrix.groups, 2, ROW_BLOCK)
    padded = np.zeros((matrix.row_blocks * ROW_BLOCK, matrix.groups), np.float32)
    for k, values in enumerate((s, o)):
        # division by a power of two: exact, and no reciprocal that could overflow
        np.divide(values, multiplier, out=padded[: matrix.rows])
        body[:, :, k, :] = padded.reshape(matrix.row_blocks, ROW_BLOCK, -1).transpose(0, 2, 1)
    return block


def unpack_scales(matrix: MatrixLayout, block: U8) -> LevelScales:
    """Inverse of `pack_scales`: (s, o) float32 [rows, groups], as a kernel sees them."""
    multiplier = np.float32(block[:4].view("<f4")[0])
    body = block[SCALE_HEAD : matrix.scale_bytes].view("<f2")
    body = body.reshape(matrix.row_blocks, matrix.groups, 2, ROW_BLOCK)

    def values(k: int) -> F32:
        rows = body[:, :, k, :].transpose(0, 2, 1).reshape(-1, matrix.groups)[: matrix.rows]
        out: F32 = rows.astype(np.float32) * multiplier
        return out

    return values(0), values(1)


def _check_codes(layout: RecordLayout, codes: Sequence[U8]) -> None:
    shapes = [c.shape for c in codes]
    want = [(m.rows, m.cols) for m in layout.matrices]
    if shapes != want or any(c.dtype != np.uint8 for c in codes):
        raise UsageError(f"codes must be uint8 of shapes {want}, not {shapes}")


def pack_record(
    layout: RecordLayout,
    codes: Sequence[U8],
    scales: Sequence[Sequence[LevelScales]],
    pool: kernels.Pool | None = None,
) -> list[U8]:
    """All segments of a record.

    Args:
        layout: of the record; says how many matrices and levels there are.
        codes: uint8 [rows, cols] a matrix, 8-bit codes.
        scales: for each matrix, for each level, (s, o) float32 [rows, groups].
        pool: threads to use; None: one.

    Returns:
        One uint8 array a segment, of layout.segment_sizes.

    Raises:
        UsageError: shapes or dtypes do not fit the layout.
    """
    _check_codes(layout, codes)
    levels = layout.quant.levels
    if [len(m) for m in scales] != [len(levels)] * len(codes):
        raise UsageError(f"scales must come as {len(levels)} levels for each matrix")
    pool = pool or kernels.new_pool(1)
    segments = [np.zeros(size, np.uint8) for size in layout.segment_sizes]
    for m, matrix in enumerate(layout.matrices):
        for i, segment in enumerate(segments):
            at = int(layout.part_offsets[i, m, 0])
            segment[at : at + matrix.scale_bytes] = pack_scales(matrix, *scales[m][i])
        for i, at, data in plane_pieces(layout, m, 0, np.ascontiguousarray(codes[m]), pool):
            segments[i][at : at + data.size] = data
    return segments


def plane_pieces(
    layout: RecordLayout, m: int, first_row: int, codes: U8, pool: kernels.Pool
) -> Iterator[tuple[int, int, U8]]:
    """The plane bytes of a run of rows of matrix m, for writing a record piece by piece.

    Args:
        first_row: a multiple of 8. codes: uint8 [rows, cols], whole row blocks but for the last of
            the matrix.

    Yields:
        (level index, offset in that segment, uint8 bytes).
    """
    for i, data in enumerate(kernels.pack_rows(pool, codes, layout.quant.levels)):
        yield i, plane_offset(layout, i, m, first_row), data


def plane_offset(layout: RecordLayout, level_index: int, m: int, row: int) -> int:
    """Offset in its segment of the plane bytes of matrix m from row `row`, a multiple of 8, on."""
    cell = 32 * layout.added_bits(level_index)
    at = row // ROW_BLOCK * layout.matrices[m].units * cell
    return int(layout.part_offsets[level_index, m, 1]) + at


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
    """Codes at one level, from segments 0..level_index: uint8 [rows, cols] a matrix, < 2**bits.

    Raises:
        StoreError: a segment has another size than the layout says.
    """
    _check_segments(layout, segments, level_index)
    added = [layout.added_bits(i) for i in range(level_index + 1)]
    out = []
    for m, matrix in enumerate(layout.matrices):
        codes = np.empty((matrix.rows, matrix.cols), np.uint8)
        step = max(_CHUNK_CODES // (matrix.units * UNIT * ROW_BLOCK), 1) * ROW_BLOCK
        for first in range(0, matrix.rows, step):
            stop = min(first + step, matrix.rows)
            planes = []
            for i, bits in enumerate(added):
                at = plane_offset(layout, i, m, first)
                blocks = -(-(stop - first) // ROW_BLOCK)
                planes.append(segments[i][at : at + blocks * matrix.units * 32 * bits])
            codes[first:stop] = _unpack_rows(planes, added, stop - first, matrix.cols)
        out.append(codes)
    return out


def decode(
    layout: RecordLayout, segments: Sequence[NDArray[np.uint8]], level_index: int
) -> list[F32]:
    """Weights at one level: s * code + o, float32 [rows, cols] a matrix.

    Uses the scales of segment `level_index` only, as the kernels do (DESIGN, decision 6).
    """
    out = []
    for m, codes in enumerate(unpack_codes(layout, segments, level_index)):
        matrix = layout.matrices[m]
        at = int(layout.part_offsets[level_index, m, 0])
        s, o = unpack_scales(matrix, segments[level_index][at : at + matrix.scale_bytes])
        w = np.empty((matrix.rows, matrix.cols), np.float32)
        width = matrix.group_size
        for g in range(matrix.groups):
            part = slice(g * width, min((g + 1) * width, matrix.cols))
            np.multiply(codes[:, part], s[:, g, None], out=w[:, part])
            w[:, part] += o[:, g, None]
        out.append(w)
    return out
