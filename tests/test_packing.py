"""The bit layout, against a plain loop that follows docs/FORMAT.md word by word."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest

from edgemoe import kernels, reference
from edgemoe.errors import StoreError, UsageError
from edgemoe.layout import RecordLayout, dense_layout, expert_layout, record_layout
from edgemoe.mwq import packing
from edgemoe.mwq.packing import LevelScales, decode, pack_record, unpack_codes
from edgemoe.types import LEVELS, U8, QuantSpec

SHAPES = [(1, 1), (8, 32), (9, 33), (13, 70), (16, 128), (7, 129), (40, 704), (3, 1408)]
LADDERS = [LEVELS, (2, 4, 6, 8), (1, 2, 3, 4, 5, 6, 7, 8)]


def random_parts(layout: RecordLayout, seed: int = 0) -> tuple[list[U8], list[list[LevelScales]]]:
    rng = np.random.default_rng(seed)
    codes = [rng.integers(0, 256, (m.rows, m.cols), np.uint8) for m in layout.matrices]
    scales = [
        [
            (
                rng.standard_normal((m.rows, m.groups), np.float32),
                rng.standard_normal((m.rows, m.groups), np.float32),
            )
            for _ in layout.quant.levels
        ]
        for m in layout.matrices
    ]
    return codes, scales


def plane_by_loop(codes: U8, shift: int, bits: int) -> bytes:
    """A plane built one code at a time."""
    rows, cols = codes.shape
    blocks, units = -(-rows // 8), -(-cols // 32)
    out = bytearray(blocks * units * 32 * bits)
    for row in range(rows):
        for col in range(cols):
            value = int(codes[row, col]) >> shift & (2**bits - 1)
            cell = ((row // 8) * units + col // 32) * 32 * bits
            t, j = col % 32 // 4, col % 4
            if bits == 1:
                out[cell + 4 * (row % 8) + j] |= value << t
            else:
                out[cell + 32 * (t // 4) + 4 * (row % 8) + j] |= value << 2 * (t % 4)
    return bytes(out)


@pytest.mark.parametrize("levels", LADDERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_planes_equal_the_plain_loop(shape: tuple[int, int], levels: tuple[int, ...]) -> None:
    layout = dense_layout(*shape, QuantSpec(levels))
    codes, scales = random_parts(layout)
    segments = pack_record(layout, codes, scales)
    assert [s.size for s in segments] == list(layout.segment_sizes)
    for i, level in enumerate(levels):
        want = plane_by_loop(codes[0], 8 - level, layout.added_bits(i))
        at = int(layout.part_offsets[i, 0, 1])
        assert segments[i][at : at + len(want)].tobytes() == want
        assert not segments[i][at + len(want) :].any()


@pytest.mark.parametrize("shape", SHAPES)
def test_codes_come_back_at_every_level(shape: tuple[int, int]) -> None:
    layout = record_layout((shape, (shape[1], shape[0]), (5, 40)), QuantSpec())
    codes, scales = random_parts(layout)
    segments = pack_record(layout, codes, scales)
    for i, level in enumerate(LEVELS):
        for got, want in zip(unpack_codes(layout, segments[: i + 1], i), codes, strict=True):
            np.testing.assert_array_equal(got, want >> (8 - level))


def test_scale_block_byte_by_byte() -> None:
    layout = dense_layout(11, 300, QuantSpec())
    codes, scales = random_parts(layout)
    segments = pack_record(layout, codes, scales)
    for i, (s, o) in enumerate(scales[0]):
        block = segments[i].tobytes()
        (multiplier,) = struct.unpack_from("<f", block)
        assert np.frexp(multiplier)[0] == 0.5, "a power of two"
        assert not any(block[4:64])
        for row in range(16):
            for group in range(3):
                at = 64 + ((row // 8) * 3 + group) * 32 + 2 * (row % 8)
                (got_s,), (got_o,) = (struct.unpack_from("<e", block, at + k) for k in (0, 16))
                if row >= 11:
                    assert (got_s, got_o) == (0, 0)
                    continue
                assert got_s * multiplier == pytest.approx(s[row, group], rel=2**-11)
                assert got_o * multiplier == pytest.approx(o[row, group], rel=2**-11)


@pytest.mark.parametrize("peak", [0.0, 1e-45, 1e-39, 1e-20, 1.0, 65504.0, 1e5, 3e38])
def test_scales_of_any_size_survive(peak: float) -> None:
    layout = dense_layout(8, 256, QuantSpec())
    s = np.full((8, 2), peak, np.float32)
    o = np.full((8, 2), -peak / 100, np.float32)
    block = packing.pack_scales(layout.matrices[0], s, o)
    got_s, got_o = packing.unpack_scales(layout.matrices[0], block)
    np.testing.assert_allclose(got_s, s, rtol=2**-11, atol=2e-45)
    np.testing.assert_allclose(got_o, o, rtol=2**-11, atol=2e-45)


def test_infinite_scales_are_refused() -> None:
    matrix = dense_layout(8, 32, QuantSpec()).matrices[0]
    s = np.zeros((8, 1), np.float32)
    with pytest.raises(UsageError, match="finite"):
        packing.pack_scales(matrix, s, s + np.float32(np.inf))


def test_decode_uses_the_scales_of_the_last_segment_only() -> None:
    layout = expert_layout(70, 40, QuantSpec())
    codes, scales = random_parts(layout)
    segments = pack_record(layout, codes, scales)
    for i, level in enumerate(LEVELS):
        blocks = layout.part_offsets[i, :, 0]
        for m, (matrix, got) in enumerate(
            zip(layout.matrices, decode(layout, segments, i), strict=True)
        ):
            s, o = packing.unpack_scales(matrix, segments[i][int(blocks[m]) :])
            group = np.arange(matrix.cols) // 128
            want = s[:, group] * (codes[m] >> (8 - level)) + o[:, group]
            np.testing.assert_array_equal(got, want)
    want_last = decode(layout, segments, 4)
    for lower in segments[:4]:
        lower[: int(layout.part_offsets[0, 0, 1])] = 255
    for got, want in zip(decode(layout, segments, 4), want_last, strict=True):
        np.testing.assert_array_equal(got, want)


def test_pieces_do_not_change_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = expert_layout(100, 90, QuantSpec())
    codes, scales = random_parts(layout)
    whole = pack_record(layout, codes, scales)
    weights = decode(layout, whole, 3)
    monkeypatch.setattr(packing, "_CHUNK_CODES", 1)
    for a, b in zip(weights, decode(layout, whole, 3), strict=True):
        np.testing.assert_array_equal(a, b)
    pool = kernels.new_pool(2)
    pieces = [
        piece
        for first in range(0, 90, 16)
        for piece in packing.plane_pieces(layout, 0, first, codes[0][first : first + 16], pool)
    ]
    for i, at, data in pieces:
        np.testing.assert_array_equal(whole[i][at : at + data.size], data)
    assert sum(p[2].size for p in pieces) == sum(
        layout.matrices[0].plane_bytes(layout.added_bits(i)) for i in range(5)
    )


@pytest.mark.parametrize(
    "levels", [LEVELS, (1, 2, 3, 4, 5, 6, 7, 8), (2, 4, 6, 8), (1, 3, 5, 7, 8)]
)
@pytest.mark.parametrize("shape", [(1, 1), (8, 32), (13, 37), (70, 704)])
def test_native_packing_equals_its_twin(levels: tuple[int, ...], shape: tuple[int, int]) -> None:
    codes = np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)
    for threads in (1, 3):
        got = kernels.pack_rows(kernels.new_pool(threads), codes, levels)
        for a, b in zip(got, reference.pack_rows(codes, levels), strict=True):
            np.testing.assert_array_equal(a, b)


def test_bytes_are_pinned() -> None:
    """Format version 1: these bytes may never change."""
    layout = dense_layout(13, 200, QuantSpec())
    codes = [(np.arange(13 * 200, dtype=np.uint32) * 151 % 256).astype(np.uint8).reshape(13, 200)]
    grid = np.arange(26, dtype=np.float32).reshape(13, 2)
    scales = [[(grid * 2.0**-level, grid - 7) for level in LEVELS]]
    digest = hashlib.sha256(b"".join(s.tobytes() for s in pack_record(layout, codes, scales)))
    assert digest.hexdigest() == "fff21fca7cee2d27769f5f612a4ae541ba801c9d174b7a773424a0c1c56d6c69"


def test_what_does_not_fit_the_layout_is_refused() -> None:
    layout = dense_layout(8, 64, QuantSpec())
    codes, scales = random_parts(layout)
    with pytest.raises(UsageError, match="codes must be uint8"):
        pack_record(layout, [codes[0][:, :32]], scales)
    with pytest.raises(UsageError, match="codes must be uint8"):
        pack_record(layout, [codes[0].astype(np.int8)], scales)
    with pytest.raises(UsageError, match="5 levels"):
        pack_record(layout, codes, [scales[0][:4]])
    with pytest.raises(UsageError, match="scales are"):
        pack_record(layout, codes, [[(s[:4], o) for s, o in scales[0]]])
    segments = pack_record(layout, codes, scales)
    segments[1] = segments[1][:-1]
    with pytest.raises(StoreError, match="do not fit"):
        unpack_codes(layout, segments, 2)
    assert unpack_codes(layout, segments, 0)
