"""Damage of any kind to a store is told, where it is, before its bytes are used."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from store_samples import SUPERBLOCK, WIDE, Sample, header_of, make_store, read

from edgemoe.errors import ChecksumError, StoreError
from edgemoe.store import Store
from edgemoe.types import LEVELS


@pytest.fixture
def sample(tmp_path: Path) -> Sample:
    return make_store(tmp_path / "model.emoe")


def regions(path: Path) -> list[tuple[str, int, int]]:
    """(what, offset, size) of something in every region of the file."""
    out = [("superblock A", 0, SUPERBLOCK), ("superblock B", SUPERBLOCK, SUPERBLOCK)]
    with Store.open(path) as store:
        out += [(s.name, s.offset, s.size) for s in store.sections.values()]
        for layer in store.config.moe_layers:
            for i, level in enumerate(LEVELS):
                ref = store.expert_segment(layer, 1, i)
                out.append((f"layer {layer} expert 1 segment {level}-bit", ref.offset, ref.size))
        for name in ("embed", "layers.1.down", "layers.0.router", "norm"):
            for i, ref in enumerate(store.tensor_segments(name)):
                nested = store.tensors[name].kind == "nested"
                what = f"tensor {name}" + (f" segment {LEVELS[i]}-bit" if nested else "")
                out.append((what, ref.offset, ref.size))
    data = path.read_bytes()
    offset, raw = header_of(data)
    table = json.loads(raw)["crc_table"]
    return [*out, ("the header", offset, len(raw)), ("CRC table", table["offset"], table["size"])]


def flip(path: Path, at: int, bit: int = 0) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


def test_a_flipped_bit_is_found_in_every_region(sample: Sample) -> None:
    for what, offset, size in regions(sample.path):
        for at, bit in ((offset, 0), (offset + size // 2, 3), (offset + size - 1, 7)):
            flip(sample.path, at, bit)
            try:
                with Store.open(sample.path) as store:
                    found = store.verify()
                    assert len(found) == 1, (what, at, found)
                    assert what in found[0]
            except ChecksumError as exc:
                assert what in str(exc)
                assert what in ("the header", "CRC table")
            flip(sample.path, at, bit)
    with Store.open(sample.path) as store:
        assert store.verify() == []


def test_reading_a_damaged_part_raises_and_names_it(sample: Sample) -> None:
    with Store.open(sample.path) as store:
        ref = store.expert_segment(2, 1, 3)
        norm = store.tensor_segments("layers.1.input_norm")[0]
        for at in (ref.offset + 7, norm.offset, store.sections["tokenizer.json"].offset + 5):
            flip(sample.path, at)
        with pytest.raises(ChecksumError, match="layer 2 expert 1 segment 6-bit is damaged"):
            read(store, ref)
        with pytest.raises(ChecksumError, match=r"tensor layers\.1\.input_norm is damaged"):
            store.read_f32("layers.1.input_norm")
        with pytest.raises(ChecksumError, match=r"section tokenizer\.json is damaged"):
            store.section("tokenizer.json")
        read(store, store.expert_segment(2, 1, 2))
        assert len(store.verify()) == 3


def test_padding_that_is_not_zero_is_damage(tmp_path: Path) -> None:
    sample = make_store(tmp_path / "m.emoe", WIDE)
    with Store.open(sample.path) as store:
        ref = store.expert_segment(0, 0, 0)
        after = store.expert_segment(0, 0, 1).offset
        assert after > ref.offset + ref.size, "this segment is padded"
        flip(sample.path, after - 1)
        assert store.verify() == [f"padding at byte {ref.offset + ref.size} is not zero"]


def test_both_superblocks_damaged(sample: Sample) -> None:
    flip(sample.path, 20)
    with Store.open(sample.path) as store:
        assert store.verify() == ["superblock A (byte 0); the other one is used"]
    flip(sample.path, SUPERBLOCK + 4000)
    with pytest.raises(ChecksumError, match="both superblocks are damaged"):
        Store.open(sample.path)


def test_a_truncated_file_is_told_at_once(sample: Sample) -> None:
    data = sample.path.read_bytes()
    for keep in (len(data) - 1, len(data) // 2, 2 * SUPERBLOCK, 2 * SUPERBLOCK - 1, SUPERBLOCK):
        sample.path.write_bytes(data[:keep])
        with pytest.raises(StoreError, match=f"truncated: {keep} of {len(data)} bytes"):
            Store.open(sample.path)
    for keep in (SUPERBLOCK - 1, 100, 8, 3, 0):
        sample.path.write_bytes(data[:keep])
        with pytest.raises(StoreError):
            Store.open(sample.path)


def test_a_file_that_shrinks_while_open(sample: Sample) -> None:
    with Store.open(sample.path) as store:
        ref = store.expert_segment(2, 2, 4)
        os.truncate(sample.path, ref.offset + 10)
        with pytest.raises(StoreError, match="truncated: ends at byte"):
            read(store, ref)


@pytest.mark.parametrize("content", [b"", b"GGUF" + bytes(9000), b"\x7fELF", os.urandom(20000)])
def test_other_files_are_no_stores(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.emoe"
    path.write_bytes(content)
    with pytest.raises(StoreError, match="not an edgemoe store"):
        Store.open(path)


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="No such file"):
        Store.open(tmp_path / "missing.emoe")
    with pytest.raises(StoreError, match="not a file"):
        Store.open(tmp_path)
    with pytest.raises(StoreError, match="not a file"):
        Store.open("/dev/null")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(StoreError, match="not a file"):
        Store.open(fifo)
    with pytest.raises(StoreError, match="cannot open"):
        Store.open("nul\0byte")
    odd = tmp_path / "line\nbreak"
    with pytest.raises(StoreError) as info:
        Store.open(odd)
    assert "\n" not in str(info.value)


def test_failed_opens_leak_no_descriptor(sample: Sample) -> None:
    flip(sample.path, header_of(sample.path.read_bytes())[0])
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with pytest.raises(ChecksumError, match="header is damaged"):
            Store.open(sample.path)
    assert len(os.listdir("/proc/self/fd")) == before
