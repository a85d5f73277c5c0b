"""Damaged and malicious GGUF files: the tensor table."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from gguf_hostile import ARCH, F32, Q4_0, Q4_K, Q8_0, parse, refused
from gguf_samples import (
    BOOL,
    FLOAT32,
    I32,
    STRING,
    U32,
    array_entry,
    entry,
    info,
    raw_gguf,
    string,
)

from edgemoe.errors import UnsupportedError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "m.gguf"


@pytest.mark.parametrize("value", [0, 3, 33, 48, 1 << 25, 1 << 31, (1 << 32) - 1])
def test_alignments(path: Path, value: int) -> None:
    key = entry("general.alignment", U32, value)
    refused(path, raw_gguf([ARCH, key], [info("a", [8])], bytes(64)), f"alignment is {value}")


@pytest.mark.parametrize(
    "key",
    [
        entry("general.alignment", I32, -32),
        entry("general.alignment", FLOAT32, 32.0),
        entry("general.alignment", BOOL, 1),
        entry("general.alignment", STRING, "32"),
        array_entry("general.alignment", U32, [32]),
    ],
)
def test_alignments_of_the_wrong_kind(path: Path, key: bytes) -> None:
    refused(path, raw_gguf([ARCH, key], [info("a", [8])], bytes(64)), "general.alignment is")


@pytest.mark.parametrize("alignment", [1, 8, 4096, 1 << 20])
def test_alignments_that_are_sound(path: Path, alignment: int) -> None:
    key = entry("general.alignment", U32, alignment)
    data = raw_gguf([ARCH, key], [info("a", [8])], bytes(32), alignment=alignment)
    assert parse(path, data).tensors["a"].offset == len(data) - 32


@pytest.mark.parametrize("axes", [0, 5, 6, 1000, (1 << 32) - 1])
def test_numbers_of_axes(path: Path, axes: int) -> None:
    entry = string("a") + struct.pack("<I", axes) + struct.pack("<Q", 1) * min(axes, 8) + bytes(12)
    refused(path, raw_gguf([ARCH], [entry], bytes(32)), f"a has {axes} axes")


@pytest.mark.parametrize(
    "shape",
    [
        [32, 1 << 32, 1 << 32],  # the product wraps to 0
        [1 << 63, 2],
        [1 << 62, 4],
        [(1 << 64) - 32],
        [32, (1 << 64) - 1],
        [1 << 32, 1 << 32],
        [32, (1 << 59) + 1],  # 34 bytes a block: wraps to 34
        [1 << 63, 1 << 63, 1 << 63, 1 << 63],
        [32, 5],
        [160],
    ],
)
@pytest.mark.parametrize("kind", [F32, Q8_0])
def test_tensors_past_the_end(path: Path, shape: list[int], kind: int) -> None:
    refused(path, raw_gguf([ARCH], [info("a", shape, kind)], bytes(128)), "a ends at byte")


@pytest.mark.parametrize("shape", [[0], [0, 5], [32, 0], [32, 1 << 63, 0], [32, 2, 2, 0]])
def test_empty_tensors(path: Path, shape: list[int]) -> None:
    refused(path, raw_gguf([ARCH], [info("a", shape)], bytes(128)), "has the empty shape")


@pytest.mark.parametrize(
    ("kind", "row"), [(Q8_0, 31), (Q8_0, 33), (Q4_0, 16), (Q4_K, 32), (Q4_K, 257)]
)
def test_rows_that_are_not_whole_blocks(path: Path, kind: int, row: int) -> None:
    data = raw_gguf([ARCH], [info("a", [row, 256], kind)], bytes(1 << 20))
    refused(path, data, f"rows of {row} weights, not whole")


@pytest.mark.parametrize("offset", [1, 16, 31, 33, (1 << 64) - 1])
def test_unaligned_offsets(path: Path, offset: int) -> None:
    data = raw_gguf([ARCH], [info("a", [8], offset=offset)], bytes(256))
    refused(path, data, f"offset {offset}, not a multiple")


@pytest.mark.parametrize("offset", [96, 1 << 31, 1 << 63, (1 << 64) - 32])
def test_offsets_past_the_end(path: Path, offset: int) -> None:
    data = raw_gguf([ARCH], [info("a", [9], offset=offset)], bytes(96))
    refused(path, data, "a ends at byte")


def test_overlaps(path: Path) -> None:
    infos = [info("a", [16], offset=32), info("b", [8], offset=64), info("c", [8], offset=0)]
    refused(path, raw_gguf([ARCH], infos, bytes(128)), "tensor b overlaps a")
    infos = [info("a", [8]), info("b", [8])]
    refused(path, raw_gguf([ARCH], infos, bytes(128)), "overlaps")
    # a hole is harmless
    parse(path, raw_gguf([ARCH], [info("a", [8]), info("b", [8], offset=64)], bytes(128)))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (16, "IQ2_XXS"),
        (17, "IQ2_XS"),
        (19, "IQ1_S"),
        (23, "IQ4_XS"),
        (24, "I8"),
        (28, "F64"),
        (34, "TQ1_0"),
        (4, "Q4_2"),
        (9, "Q8_1"),
        (31, "Q4_0_4_4"),
        (40, "NVFP4"),
        (36, "number 36"),
        (1000, "number 1000"),
        ((1 << 32) - 1, "number 4294967295"),
    ],
)
def test_types_that_are_not_read(path: Path, kind: int, name: str) -> None:
    data = raw_gguf([ARCH], [info("a", [256], kind)], bytes(4096))
    refused(path, data, f"type {name} is not supported; supported: F32, ", kind=UnsupportedError)


def test_a_huge_sparse_tensor_costs_nothing_to_open(path: Path) -> None:
    data = raw_gguf([ARCH], [info("a", [1 << 12, 1 << 28], F32)])
    header = parse(path, data, size=len(data) + (1 << 42))
    assert header.tensors["a"].nbytes == 1 << 42
