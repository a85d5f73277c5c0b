"""The header of a store: superblocks, JSON, and the checks that make every later offset safe.

A header says little that does not follow from the model's shape: where the parts lie. All else in
it is recomputed with layout.py and must agree. docs/FORMAT.md describes every field.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np

from ..arch.tensors import dense_shapes, is_nested
from ..errors import ChecksumError, StoreError, shown
from ..kernels import crc32c
from ..layout import PART_ALIGN, RecordLayout, dense_layout, expert_layout
from ..types import ModelConfig, QuantSpec
from .checks import LISTS

MAGIC = b"EDGEMOE\0"
VERSION = 3
SUPERBLOCK = 4096
DATA_START = 2 * SUPERBLOCK
MAX_HEADER = 16 << 20
MAX_ITEMS = 250_000
"""Brackets, braces and commas a header may hold; bounds the time and memory of parsing it."""

EXPERTS = "experts of layer "
"""What the regions of experts are called, before the layer's number."""

Kind: TypeAlias = Literal["nested", "f32"]
TensorShapes: TypeAlias = dict[str, tuple[Kind, tuple[int, ...]]]

_FIELDS = struct.Struct("<8sIIQQQQ")


@dataclass(frozen=True)
class Superblock:
    """Where the newest header lies; two copies at bytes 0 and 4096 of the file."""

    generation: int
    header_offset: int
    header_length: int
    header_crc32c: int
    file_length: int

    def encode(self) -> bytes:
        """The 4096 bytes of a superblock."""
        body = _FIELDS.pack(
            MAGIC,
            VERSION,
            self.header_crc32c,
            self.generation,
            self.header_offset,
            self.header_length,
            self.file_length,
        ).ljust(SUPERBLOCK - 4, b"\0")
        return body + struct.pack("<I", checksum(body))


def checksum(data: bytes) -> int:
    """CRC32C of some bytes."""
    return crc32c(np.frombuffer(data, np.uint8))


def decode_superblock(block: bytes) -> Superblock | None:
    """The superblock in these 4096 bytes; None where magic or checksum are wrong.

    Raises:
        StoreError: it is sound but of another format version.
    """
    magic, version, header_crc, generation, offset, length, total = _FIELDS.unpack_from(block)
    (crc,) = struct.unpack_from("<I", block, SUPERBLOCK - 4)
    if magic != MAGIC or crc != checksum(block[:-4]):
        return None
    if version != VERSION:
        raise StoreError(
            f"store format version {version}, this edgemoe reads version {VERSION}: "
            "install the edgemoe that wrote it or convert the model again"
        )
    if any(block[_FIELDS.size : -4]):
        raise StoreError("a superblock holds data in its reserved bytes")
    return Superblock(generation, offset, length, header_crc, total)


def newest_superblock(blocks: bytes) -> Superblock:
    """The valid superblock of highest generation in the first 8192 bytes of a file.

    Raises:
        ChecksumError: both are damaged. StoreError: this is no store, or of another version.
    """
    pair = (blocks[:SUPERBLOCK], blocks[SUPERBLOCK:])
    found = [s for s in map(decode_superblock, pair) if s is not None]
    if found:
        return max(found, key=lambda s: s.generation)
    if any(b.startswith(MAGIC) for b in pair):
        raise ChecksumError("both superblocks are damaged; copy or convert it again")
    raise StoreError("this is not an edgemoe store; make one with `edgemoe convert`")


@dataclass(frozen=True)
class TensorEntry:
    """A tensor outside the experts. Sizes and offsets in bytes of the file.

    kind: "nested" (a record of one matrix, see `layout`) or "f32" (little-endian, row-major).
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    offset: int
    layout: RecordLayout | None = None

    @property
    def size(self) -> int:
        """Bytes it takes in the file, padding after the last segment not counted."""
        if self.layout is not None:
            return self.layout.prefix_bytes(self.layout.depth - 1)
        return 4 * math.prod(self.shape)

    @property
    def alignment(self) -> int:
        return self.layout.alignment if self.layout is not None else PART_ALIGN

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """(offset in the file, size) of each checksummed part: the segments, or the one array."""
        if self.layout is None:
            return ((self.offset, self.size),)
        pairs = zip(self.layout.segment_offsets, self.layout.segment_sizes, strict=True)
        return tuple((self.offset + o, s) for o, s in pairs)


@dataclass(frozen=True)
class SectionEntry:
    """A named run of bytes after the weights, with its checksum."""

    name: str
    offset: int
    size: int
    crc32c: int


def tensor_shapes(config: ModelConfig) -> TensorShapes:
    """Kind and shape of every tensor that a store of this model has outside the experts."""
    return {
        name: ("nested" if is_nested(name) else "f32", shape)
        for name, shape in dense_shapes(config).items()
    }


def make_entry(shapes: TensorShapes, quant: QuantSpec, name: str, offset: int) -> TensorEntry:
    """Entry of one of a model's tensors (`tensor_shapes`); StoreError for an unknown name."""
    if name not in shapes:
        raise StoreError(f"a store of this model has no tensor {shown(name)}")
    kind, shape = shapes[name]
    layout = dense_layout(shape[0], shape[1], quant) if kind == "nested" else None
    return TensorEntry(name, kind, shape, offset, layout)


@dataclass(frozen=True)
class ExpertsEntry:
    """The experts of one layer: records of one layout, one after the other.

    ahead: of the first columns of down, that are read one level above the rest.
    """

    offset: int
    ahead: int
    layout: RecordLayout


def layer_layouts(
    config: ModelConfig, quant: QuantSpec, ahead: Sequence[int]
) -> list[RecordLayout]:
    """Layout of an expert in each layer that has some; equal ones are one object."""
    sizes = config.hidden_size, config.moe_intermediate_size
    known = {n: expert_layout(*sizes, quant, n) for n in set(ahead)}
    return [known[n] for n in ahead]


@dataclass(frozen=True)
class Header:
    """All that a store's header says. Offsets and sizes in bytes of the file.

    experts: one entry a layer with experts.
    """

    config: ModelConfig
    quant: QuantSpec
    experts: tuple[ExpertsEntry, ...]
    tensors: dict[str, TensorEntry]
    crc_table: SectionEntry
    sections: dict[str, SectionEntry]
    dead: tuple[tuple[int, int], ...]
    metadata: dict[str, str]

    @cached_property
    def expert_count(self) -> int:
        """Expert records in the store, over all layers."""
        return len(self.config.moe_layers) * self.config.num_experts

    @property
    def checksum_count(self) -> int:
        """Entries of the CRC table: one a segment of every expert, then one a tensor part."""
        parts = sum(len(t.parts) for t in self.tensors.values())
        return self.expert_count * len(self.quant.expert_levels) + parts

    def to_json(self) -> dict[str, Any]:
        """The JSON object of this header."""
        model = dataclasses.asdict(self.config)
        for key in LISTS:
            model[key] = list(model[key])
        table = self.crc_table
        return {
            "format": "edgemoe-store",
            "version": VERSION,
            "model": model,
            "quant": {
                "levels": list(self.quant.levels),
                "max_level": self.quant.max_level,
                "group_size": self.quant.group_size,
                "scale_encoding": "e4m4-z8-shift4",
                "plane_layout": "r8u32",
            },
            "experts": [_experts_json(entry) for entry in self.experts],
            "tensors": [_tensor_json(t) for t in self.tensors.values()],
            "crc_table": {"offset": table.offset, "size": table.size, "crc32c": table.crc32c},
            "sections": [dataclasses.asdict(s) for s in self.sections.values()],
            "dead": [list(extent) for extent in self.dead],
            "metadata": self.metadata,
        }

    def encode(self) -> bytes:
        """The header's bytes: UTF-8 JSON.

        Raises:
            StoreError: larger than a reader takes.
        """
        raw = json.dumps(self.to_json(), separators=(",", ":"), allow_nan=False).encode()
        check_bulk(raw)
        return raw

    def regions(self) -> list[tuple[int, int, int, str]]:
        """(offset, size, alignment, what) of all parts of the file but the header itself."""
        out = [
            (0, DATA_START, 1, "superblocks"),
            (self.crc_table.offset, self.crc_table.size, PART_ALIGN, "crc_table"),
        ]
        for layer, entry in zip(self.config.moe_layers, self.experts, strict=True):
            size = entry.layout.stride * self.config.num_experts
            out.append((entry.offset, size, entry.layout.alignment, f"{EXPERTS}{layer}"))
        out += [(t.offset, t.size, t.alignment, f"tensor {t.name}") for t in self.tensors.values()]
        out += [(s.offset, s.size, PART_ALIGN, f"section {s.name}") for s in self.sections.values()]
        out += [(offset, size, PART_ALIGN, "dead region") for offset, size in self.dead]
        return out


def _segments_json(layout: RecordLayout) -> list[dict[str, int]]:
    return [
        {"level": b, "offset": o, "size": s}
        for b, o, s in zip(layout.levels, layout.segment_offsets, layout.segment_sizes, strict=True)
    ]


def _experts_json(entry: ExpertsEntry) -> dict[str, Any]:
    layout = entry.layout
    return {
        "offset": entry.offset,
        "ahead": entry.ahead,
        "stride": layout.stride,
        "alignment": layout.alignment,
        "segments": _segments_json(layout),
    }


def _tensor_json(t: TensorEntry) -> dict[str, Any]:
    out = {"name": t.name, "kind": t.kind, "shape": list(t.shape), "offset": t.offset}
    if t.layout is None:
        return out | {"size": t.size}
    return out | {"alignment": t.alignment, "segments": _segments_json(t.layout)}


def check_bulk(raw: bytes) -> None:
    """Refuse a header whose parsing would take much time or memory, before it is parsed."""
    items = sum(raw.count(c) for c in (b"[", b"{", b","))
    if len(raw) > MAX_HEADER or items > MAX_ITEMS:
        raise StoreError(
            f"the header has {len(raw)} bytes and {items} items; at most {MAX_HEADER} bytes and "
            f"{MAX_ITEMS} items are allowed"
        )
