"""A second reader of stores, written from docs/FORMAT.md alone: pure Python, nothing of edgemoe.

If this file has to change, format version 3 has changed.
"""

from __future__ import annotations

import json
import math
import struct
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from convert_samples import make_checkpoint

from edgemoe.calibration import calibration
from edgemoe.checkpoint import open_checkpoint
from edgemoe.errors import UsageError
from edgemoe.mwq.convert import convert
from edgemoe.mwq.packing import decode
from edgemoe.store import Store, replace_section
from edgemoe.types import LEVELS, U8

Shape = tuple[int, int, int]
"""rows, cols, and 1 if the matrix is a level ahead."""


def make_crc_table() -> list[int]:
    table = []
    for n in range(256):
        for _ in range(8):
            n = n >> 1 ^ (0x82F63B78 if n & 1 else 0)
        table.append(n)
    return table


CRC_TABLE = make_crc_table()


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ CRC_TABLE[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF


def up(n: int, a: int) -> int:
    return -(-n // a) * a


class SecondReader:
    """Reads a whole store, checking every rule of the format on the way."""

    def __init__(self, data: bytes) -> None:
        assert crc32c(b"123456789") == 0xE3069283
        valid = [s for s in map(self.superblock, (data[:4096], data[4096:8192])) if s]
        _, length_at, header_at, header_length, header_crc = max(valid)
        assert header_at + header_length == length_at <= len(data)
        self.data = data[:length_at]
        raw = data[header_at : header_at + header_length]
        assert crc32c(raw) == header_crc
        self.header: dict[str, Any] = json.loads(raw)
        self.model, self.quant = self.header["model"], self.header["quant"]
        self.levels, self.group = self.quant["levels"], self.quant["group_size"]
        self.added = [b - a for a, b in zip([0, *self.levels], self.levels, strict=False)]
        self.held = self.levels.index(self.quant["max_level"]) + 1
        table = self.header["crc_table"]
        raw = self.part(table["offset"], table["size"], table["crc32c"])
        self.crcs = list(struct.unpack(f"<{len(raw) // 4}I", raw))
        self.check_coverage(header_at, header_length)

    @staticmethod
    def superblock(block: bytes) -> tuple[int, int, int, int, int] | None:
        fields = struct.unpack_from("<8sIIQQQQ", block)
        magic, version, header_crc, generation, header_at, header_length, length = fields
        if magic != b"EDGEMOE\0" or crc32c(block[:4092]) != struct.unpack("<I", block[4092:])[0]:
            return None
        assert version == 3
        return generation, length, header_at, header_length, header_crc

    def part(self, offset: int, size: int, crc: int) -> bytes:
        data = self.data[offset : offset + size]
        assert crc32c(data) == crc
        return data

    def shapes_of(self, rows: int, cols: int) -> tuple[int, int, int]:
        return math.ceil(rows / 8), math.ceil(cols / 32), math.ceil(cols / self.group)

    def steps_of(self, ahead: int, i: int) -> list[int]:
        """Steps of a matrix that lie in segment i."""
        last = len(self.levels) - 1
        if ahead == 0:
            return [i]
        return [0, 1] if i == 0 else [i + 1] if i < last else []

    def parts_of(
        self, shapes: list[Shape], levels: int
    ) -> list[tuple[int, dict[tuple[int, int], int], dict[tuple[int, int], int]]]:
        """(size, offsets of scale blocks, of planes by (matrix, step)) of the first segments."""
        out = []
        for i in range(levels):
            at, scales, planes = 0, {}, {}
            steps = [
                (m, k) for m, (*_, ahead) in enumerate(shapes) for k in self.steps_of(ahead, i)
            ]
            for m, k in steps:
                rows, cols, ahead = shapes[m]
                blocks, _, groups = self.shapes_of(rows, cols)
                scales[m, k] = at
                if k == 0:
                    at += up(8 * blocks, 64) + up(16 * blocks * groups, 64)
                if k >= ahead and self.levels[k] < 8:
                    at += up(4 * blocks * groups, 64)
            for m, k in steps:
                blocks, units, _ = self.shapes_of(*shapes[m][:2])
                planes[m, k] = at
                at += up(blocks * units * 32 * self.added[k], 64)
            out.append((at, scales, planes))
        return out

    def check_segments(self, shapes: list[Shape], entry: dict[str, Any], levels: int) -> int:
        """Compare the header's segments with the rules; returns the stride."""
        sizes = [size for size, _, _ in self.parts_of(shapes, levels)]
        alignment = 4096 if min(sizes) >= 262_144 else 64
        assert entry["alignment"] == alignment
        at = 0
        for level, size, segment in zip(
            self.levels[:levels], sizes, entry["segments"], strict=True
        ):
            assert segment == {"level": level, "offset": at, "size": size}
            at += up(size, alignment)
        return at

    def expert_shapes(self, ahead: int) -> list[Shape]:
        h, i = self.model["hidden_size"], self.model["moe_intermediate_size"]
        down = [(h, ahead, 1), (h, i - ahead, 0)]
        return [(i, h, 0), (i, h, 0), *(shape for shape in down if shape[1])]

    def moe_layers(self) -> list[int]:
        dense = self.model["dense_layers"]
        return [i for i in range(self.model["num_hidden_layers"]) if i not in dense]

    def check_coverage(self, header_at: int, header_length: int) -> None:
        parts = [(0, 8192, 4096), (header_at, header_length, 64)]
        assert len(self.header["experts"]) == len(self.moe_layers())
        for e in self.header["experts"]:
            shapes = self.expert_shapes(e["ahead"])
            assert self.check_segments(shapes, e, self.held) == e["stride"]
            size = self.model["num_experts"] * e["stride"]
            parts.append((e["offset"], size, e["alignment"]))
        for t in self.header["tensors"]:
            if t["kind"] == "f32":
                assert t["size"] == 4 * math.prod(t["shape"])
                parts.append((t["offset"], t["size"], 64))
            else:
                self.check_segments([(*t["shape"], 0)], t, len(self.levels))
                last = t["segments"][-1]
                parts.append((t["offset"], last["offset"] + last["size"], t["alignment"]))
        for s in [self.header["crc_table"], *self.header["sections"]]:
            parts.append((s["offset"], s["size"], 64))
        parts += [(offset, size, 64) for offset, size in self.header["dead"]]
        end = 0
        for offset, size, alignment in sorted(p for p in parts if p[1]):
            assert offset == up(end, alignment)
            assert not any(self.data[end:offset])
            end = offset + size
        assert end == len(self.data)

    def matrix(self, shapes: list[Shape], m: int, segments: list[bytes]) -> list[list[float]]:
        """Weights of matrix m of a record whose segments up to that of the level are these."""
        rows, cols, ahead = shapes[m]
        blocks, units, groups = self.shapes_of(rows, cols)
        parts = self.parts_of(shapes, len(segments))
        where = {k: i for i in range(len(segments)) for k in self.steps_of(ahead, i)}
        last = max(where)
        bits = self.levels[last]
        exponents = segments[0][parts[0][1][m, 0] :]
        steps = exponents[up(8 * blocks, 64) :]
        if last == 0:
            shifts = steps[up(16 * blocks * groups, 64) :]
        else:
            shifts = segments[where[last]][parts[where[last]][1][m, last] :]
        out = []
        for r in range(rows):
            row = []
            for c in range(cols):
                cell, lane = r // 8 * units + c // 32, r % 8
                t, j = c % 32 // 4, c % 4
                code = 0
                for k in range(last + 1):
                    segment, plane = segments[where[k]], parts[where[k]][2][m, k]
                    if self.added[k] == 1:
                        byte = segment[plane + cell * 32 + 4 * lane + j]
                        code = code << 1 | byte >> t & 1
                    else:
                        byte = segment[plane + cell * 64 + 32 * (t // 4) + 4 * lane + j]
                        code = code << 2 | byte >> 2 * (t % 4) & 3
                at = (r // 8 * groups + c // self.group) * 16 + lane
                u, zero = steps[at], steps[at + 8]
                step = 2.0 ** (exponents[r] - 127 + u // 16) * (1 + u % 16 / 16)
                shift = 8
                if bits < 8:
                    pair = shifts[(r // 8 * groups + c // self.group) * 4 + lane // 2]
                    shift = pair >> 4 * (lane % 2) & 15
                cells = code - (2**bits - 1) / 2 + (shift - 8) / 16
                row.append(step * (2 ** (8 - bits) * cells + 127.5 - zero))
            out.append(row)
        return out

    def expert(self, layer: int, expert: int, levels: int) -> list[list[list[float]]]:
        ordinal = self.moe_layers().index(layer)
        e = self.header["experts"][ordinal]
        index = ordinal * self.model["num_experts"] + expert
        base = e["offset"] + expert * e["stride"]
        segments = [
            self.part(base + s["offset"], s["size"], self.crcs[index * self.held + i])
            for i, s in enumerate(e["segments"][:levels])
        ]
        shapes = self.expert_shapes(e["ahead"])
        gate, up, *down = (self.matrix(shapes, m, segments) for m in range(len(shapes)))
        return [gate, up, [list(chain(*row)) for row in zip(*down, strict=True)]]

    def tensor(self, name: str, levels: int) -> list[list[float]]:
        at = len(self.moe_layers()) * self.model["num_experts"] * self.held
        for t in self.header["tensors"]:
            if t["name"] != name:
                at += len(self.levels) if t["kind"] == "nested" else 1
            elif t["kind"] == "f32":
                raw = self.part(t["offset"], t["size"], self.crcs[at])
                flat = struct.unpack(f"<{len(raw) // 4}f", raw)
                cols = t["shape"][-1]
                return [list(flat[i : i + cols]) for i in range(0, len(flat), cols)]
            else:
                segments = [
                    self.part(t["offset"] + s["offset"], s["size"], self.crcs[at + i])
                    for i, s in enumerate(t["segments"][:levels])
                ]
                return self.matrix([(*t["shape"], 0)], 0, segments)
        raise KeyError(name)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("format")
    return make_checkpoint(directory / "src", hidden_size=140, moe_intermediate_size=36).path


@pytest.fixture(scope="module")
def plain(source: Path) -> Path:
    convert(source, source.parent / "m.emoe")
    return source.parent / "m.emoe"


@pytest.fixture(scope="module", params=["plain", "calibrated"])
def stored(request: pytest.FixtureRequest, source: Path, plain: Path) -> Path:
    """Only a calibrated store has columns ahead."""
    if request.param == "plain":
        return plain
    out = source.parent / "calibrated.emoe"
    checkpoint = open_checkpoint(source)
    text = [np.random.default_rng(0).integers(0, 70, 128) for _ in range(4)]
    convert(checkpoint, out, calibrate=calibration(checkpoint, text, 1))
    return out


def read(store: Store, refs: list[Any]) -> list[U8]:
    out = [np.empty(r.size, np.uint8) for r in refs]
    for ref, array in zip(refs, out, strict=True):
        store.read_into(ref, array)
    return out


def test_the_page_names_every_field(stored: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "FORMAT.md").read_text()
    header = SecondReader(stored.read_bytes()).header
    keys = [*header, *header["model"], *header["quant"]]
    keys += [*header["experts"][0], *header["tensors"][0]]
    assert [key for key in keys if f"`{key}`" not in page and f'"{key}"' not in page] == []


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5])
def test_both_readers_see_the_same_weights(stored: Path, levels: int) -> None:
    second = SecondReader(stored.read_bytes())
    with Store.open(stored) as store:
        assert any(store.ahead) == (stored.name == "calibrated.emoe")
        for layer in store.config.moe_layers:
            refs = [store.expert_segment(layer, 1, i) for i in range(levels)]
            first = decode(store.expert_layout(layer), read(store, refs), levels - 1)
            for a, b in zip(first, second.expert(layer, 1, levels), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
        for name in ("lm_head", "layers.0.k", "layers.1.down"):
            layout = store.tensors[name].layout
            assert layout is not None
            segments = read(store, store.tensor_segments(name)[:levels])
            (w,) = decode(layout, segments, levels - 1)
            np.testing.assert_allclose(w, second.tensor(name, levels), rtol=1e-6, atol=1e-7)
        for name in ("norm", "layers.2.router", "layers.1.k_norm"):
            got = np.array(second.tensor(name, levels), np.float32)
            np.testing.assert_array_equal(store.read_f32(name).reshape(got.shape), got)


@pytest.mark.parametrize("max_level", [4, 6])
def test_a_store_without_its_upper_segments(plain: Path, source: Path, max_level: int) -> None:
    small = source.parent / f"{max_level}.emoe"
    convert(source, small, max_level=max_level)
    whole, cut = SecondReader(plain.read_bytes()), SecondReader(small.read_bytes())
    assert cut.held == LEVELS.index(max_level) + 1 and len(cut.data) < len(whole.data)
    for levels in range(1, cut.held + 1):
        assert cut.expert(2, 1, levels) == whole.expert(2, 1, levels)
    assert cut.tensor("lm_head", 5) == whole.tensor("lm_head", 5)
    with Store.open(small) as store:
        refs = [store.expert_segment(2, 1, i) for i in range(cut.held)]
        first = decode(store.expert_layout(2), read(store, refs), cut.held - 1)
        for a, b in zip(first, cut.expert(2, 1, cut.held), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
        with pytest.raises(UsageError, match="no segment"):
            store.expert_segment(2, 1, cut.held)
        assert store.verify() == []


def test_a_store_with_replaced_sections_still_follows_the_rules(stored: Path) -> None:
    for data in (b"one", b"", b"three" * 50):
        replace_section(stored, "sensitivities", data)
        second = SecondReader(stored.read_bytes())
        sections = {s["name"]: s for s in second.header["sections"]}
        s = sections["sensitivities"]
        assert second.part(s["offset"], s["size"], s["crc32c"]) == data
        assert second.data[sections["tokenizer.json"]["offset"] :].startswith(b'{"version"')
