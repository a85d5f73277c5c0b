"""The bit layout, against a plain loop that follows docs/FORMAT.md word by word."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from coded import random_scales

from edgemoe import kernels, reference
from edgemoe.errors import StoreError, UsageError
from edgemoe.layout import MatrixLayout, RecordLayout, dense_layout, expert_layout, record_layout
from edgemoe.mwq import packing
from edgemoe.mwq.packing import decode, pack_record, unpack_codes
from edgemoe.types import LEVELS, U8, NestedScales, QuantSpec

SHAPES = [(1, 1), (8, 32), (9, 33), (13, 70), (16, 128), (7, 129), (40, 704), (3, 1408)]
LADDERS = [LEVELS, (2, 4, 6, 8), (1, 2, 3, 4, 5, 6, 7, 8)]


def random_parts(layout: RecordLayout, seed: int = 0) -> tuple[list[U8], list[NestedScales]]:
    rng = np.random.default_rng(seed)
    codes = [rng.integers(0, 256, (m.rows, m.cols), np.uint8) for m in layout.matrices]
    levels = len(layout.quant.levels)
    return codes, [random_scales(m.rows, m.groups, levels, rng) for m in layout.matrices]


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
    shapes = (shape, (shape[1], shape[0]), (5, 40))
    layout = record_layout([MatrixLayout(*s, 128) for s in shapes], QuantSpec(), 5)
    codes, scales = random_parts(layout)
    segments = pack_record(layout, codes, scales)
    for i, level in enumerate(LEVELS):
        for got, want in zip(unpack_codes(layout, segments[: i + 1], i), codes, strict=True):
            np.testing.assert_array_equal(got, want >> (8 - level))


def test_scale_block_byte_by_byte() -> None:
    layout = dense_layout(11, 300, QuantSpec())
    codes, (scales,) = random_parts(layout)
    segments = pack_record(layout, codes, [scales])
    for i in range(5):
        block = segments[i].tobytes()
        shifts_at = 192 if i == 0 else 0
        end = int(layout.part_offsets[i, 0, 1])
        assert end == shifts_at + (64 if i < 4 else 0)
        for row in range(16 if i < 4 else 0):
            for group in range(3):
                byte = block[shifts_at + ((row // 8) * 3 + group) * 4 + row % 8 // 2]
                nibble = byte >> 4 if row % 2 else byte & 15
                assert nibble == (scales.shift[i, row, group] if row < 11 else 0)
        assert not any(block[shifts_at + 2 * 3 * 4 : end])
    block = segments[0].tobytes()
    assert list(block[:11]) == list(scales.exponent)
    assert list(block[11:64]) == [1] * 5 + [0] * 48
    for row in range(16):
        for group in range(3):
            at = 64 + ((row // 8) * 3 + group) * 16 + row % 8
            want = (scales.step[row, group], scales.zero[row, group]) if row < 11 else (0, 0)
            assert (block[at], block[at + 8]) == want
    assert not any(block[64 + 2 * 3 * 16 : 192])


@pytest.mark.parametrize("exponent", [1, 100, 239])
def test_steps_are_what_the_format_says(exponent: int) -> None:
    every = np.arange(256, dtype=np.uint8)[None]
    no_shift = np.full((5, 1, 256), 8, np.uint8)
    scales = NestedScales(np.array([exponent], np.uint8), every, np.zeros_like(every), no_shift)
    s, o = packing.affine(scales, 8, 4)
    for u in range(256):
        want = 2.0 ** (exponent - 127) * (1 + u % 16 / 16) * 2.0 ** (u // 16)
        assert (s[0, u], o[0, u]) == (want, 0)


def test_what_no_store_can_hold_is_refused() -> None:
    layout = dense_layout(8, 32, QuantSpec())
    sound = random_scales(8, 1, 5, np.random.default_rng(0))
    packing.pack_scales(layout, 0, 0, sound)
    for exponent in (0, 240):
        wrong = replace(sound, exponent=np.full(8, exponent, np.uint8))
        with pytest.raises(UsageError, match="exponents must be"):
            packing.pack_scales(layout, 0, 0, wrong)
    for level, shift in ((0, 16), (4, 7)):
        changed = sound.shift.copy()
        changed[level] = shift
        with pytest.raises(UsageError, match="shifts must be"):
            packing.pack_scales(layout, 0, 0, replace(sound, shift=changed))


def decoded_by_formula(codes: U8, scales: NestedScales, step_index: int) -> np.ndarray:
    """A stored matrix at a level of the ladder, in float64."""
    bits = LEVELS[step_index]
    group = np.arange(codes.shape[1]) // 128
    step = 2.0 ** (scales.exponent[:, None].astype(float) - 127 + scales.step // 16)
    step = (step * (1 + scales.step % 16 / 16))[:, group]
    cells = (codes >> (8 - bits)) - (2**bits - 1) / 2
    cells = cells + (scales.shift[step_index][:, group].astype(float) - 8) / 16
    zero = scales.zero[:, group].astype(float)
    return np.asarray(step * (2.0 ** (8 - bits) * cells + 127.5 - zero))


@pytest.mark.parametrize("max_level", [2, 4, 8])
@pytest.mark.parametrize("ahead", [0, 32, 160, 170])
def test_decode_is_the_formula(ahead: int, max_level: int) -> None:
    """With the steps of the first segment, shifts of the last, ahead columns one level up."""
    layout = expert_layout(70, 170, QuantSpec(max_level=max_level), ahead)
    codes, scales = random_parts(layout)
    segments = pack_record(layout, codes, scales)
    assert len(segments) == layout.depth == LEVELS.index(max_level) + 1
    assert [m.cols for m in layout.matrices] == [70, 70, *(n for n in (ahead, 170 - ahead) if n)]
    for i in range(layout.depth):
        parts = [
            decoded_by_formula(codes[m], scales[m], min(i + (ahead > 0 and m == 2), 4))
            for m in range(len(codes))
        ]
        gate, up, down = decode(layout, segments[: i + 1], i)
        for got, want in zip((gate, up, down), (*parts[:2], np.hstack(parts[2:])), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("ahead", [0, 64, 170])
def test_rows_are_those_of_the_whole(ahead: int) -> None:
    layout = expert_layout(70, 170, QuantSpec(), ahead)
    segments = pack_record(layout, *random_parts(layout))
    for i in range(5):
        for whole, want in enumerate(decode(layout, segments[: i + 1], i)):
            for first, stop in ((0, 8), (16, 40), (64, len(want))):
                got = packing.decode_rows(
                    layout, i, whole, first, stop, lambda n, at, size: segments[n][at : at + size]
                )
                np.testing.assert_array_equal(got, want[first:stop])


@pytest.mark.parametrize("shape", [(2048, 1024), (2048, 768), (4096, 14336)])
def test_a_read_at_b_bits_costs_little_more_than_b_bits_a_weight(shape: tuple[int, int]) -> None:
    """OLMoE, Qwen3-30B-A3B, Mixtral: the whole prefix, scale blocks and padding counted."""
    for max_level in (4, 6, 8):
        layout = expert_layout(*shape, QuantSpec(max_level=max_level))
        assert layout.levels == tuple(b for b in LEVELS if b <= max_level)
        for i, level in enumerate(layout.levels):
            assert 8 * layout.prefix_bytes(i) / layout.weights() <= level + 0.40


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
    """Format version 3: these bytes may never change."""
    layout = dense_layout(13, 200, QuantSpec())
    codes = [(np.arange(13 * 200, dtype=np.uint32) * 151 % 256).astype(np.uint8).reshape(13, 200)]
    grid = np.arange(26, dtype=np.uint8).reshape(13, 2)
    shift = np.tile(grid % 16, (5, 1, 1))
    shift[4] = 8
    scales = [NestedScales(grid[:, 0] + 90, grid * 9, 255 - grid, shift)]
    digest = hashlib.sha256(b"".join(s.tobytes() for s in pack_record(layout, codes, scales)))
    assert digest.hexdigest() == "53a1ac96132fa83303851a800a5ed7eb358acf3097dd336c4fae00dd061ff8e3"


def test_what_does_not_fit_the_layout_is_refused() -> None:
    layout = dense_layout(8, 64, QuantSpec())
    codes, scales = random_parts(layout)
    with pytest.raises(UsageError, match="codes must be uint8"):
        pack_record(layout, [codes[0][:, :32]], scales)
    with pytest.raises(UsageError, match="codes must be uint8"):
        pack_record(layout, [codes[0].astype(np.int8)], scales)
    with pytest.raises(UsageError, match="exponent, step, zero, shift are"):
        pack_record(layout, codes, [replace(scales[0], shift=scales[0].shift[:4])])
    with pytest.raises(UsageError, match="exponent, step, zero, shift are"):
        pack_record(layout, codes, [replace(scales[0], step=scales[0].step[:4])])
    segments = pack_record(layout, codes, scales)
    segments[1] = segments[1][:-1]
    with pytest.raises(StoreError, match="do not fit"):
        unpack_codes(layout, segments, 2)
    assert unpack_codes(layout, segments, 0)
