"""Writing a store: experts, tensors and sections in, one finished file out (docs/FORMAT.md)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from ..errors import OutputError, UsageError
from ..kernels import crc32c
from ..layout import PART_ALIGN, RecordLayout, align_up, dense_layout
from ..types import F32, U8, ModelConfig, QuantSpec
from .checks import (
    check_ahead,
    check_complete,
    check_config,
    check_metadata,
    check_quant,
    check_section_name,
    check_section_size,
)
from .file import AtomicFile, as_bytes, crc_of_file, reporting, write_exactly
from .header import (
    DATA_START,
    MAGIC,
    ExpertsEntry,
    Header,
    SectionEntry,
    Superblock,
    TensorEntry,
    layer_layouts,
    make_entry,
    tensor_shapes,
)
from .parse import parse_header


def expert_name(layer: int, expert: int) -> str:
    """What messages call an expert."""
    return f"layer {layer} expert {expert}"


class RecordWriter:
    """One record written piece by piece; from StoreWriter.open_expert or open_nested.

    Attributes:
        layout: of the record; gives the offset of every part in its segment.
    """

    def __init__(self, owner: StoreWriter, what: str, layout: RecordLayout, base: int) -> None:
        self.layout = layout
        self.what = what
        self._owner, self._base = owner, base
        self._left = [  # what no part covers is padding, zero already
            sum(
                layout.scale_parts(m, k)["end"] + matrix.plane_bytes(layout.added_bits(k))
                for m, matrix in enumerate(layout.matrices)
                for k in layout.steps(m, i)
            )
            for i in range(layout.depth)
        ]

    def write(self, level_index: int, offset: int, data: NDArray[np.uint8]) -> None:
        """Write bytes of one segment at this offset in it; every byte once, in any order."""
        flat = as_bytes(data)
        if not 0 <= offset <= self.layout.segment_sizes[level_index] - flat.size:
            raise UsageError(f"{self.what}: {flat.size} bytes at {offset} leave the segment")
        at = self._base + self.layout.segment_offsets[level_index] + offset
        self._owner._put(flat, at)
        self._left[level_index] -= flat.size

    def close(self) -> None:
        """Take the checksums; the record is done. UsageError if bytes are missing."""
        if any(self._left):
            raise UsageError(f"{self.what}: {self._left} bytes a segment were not written")
        self._owner._close_record(self.what, self.layout, self._base)


class StoreWriter:
    """Writes a new store; a context manager. Nothing is at `path` until `commit` returns.

    Args:
        path: the file to make; an existing store is replaced at commit.
        config, quant: what is stored; decides every size and the set of tensors.
        metadata: free strings for `inspect`.
        ahead: for each layer with experts, how many of the first columns of down are read one level
            above the rest: a multiple of 32, or all. None: none.

    Raises:
        OutputError: the place is not writable or has no room; nothing is left behind. Every method
            that writes raises it too.
        StoreError: the format cannot hold this config or quant.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        config: ModelConfig,
        quant: QuantSpec,
        metadata: dict[str, str],
        ahead: Sequence[int] | None = None,
    ) -> None:
        check_config(config)
        check_quant(quant)
        self._shapes = tensor_shapes(config)
        self._tensors: dict[str, TensorEntry] = {}
        self._crcs: dict[str, list[int]] = {}
        self._sections: dict[str, bytes] = {}
        table = SectionEntry("crc_table", 0, 0, 0)
        if ahead is None:
            ahead = (0,) * len(config.moe_layers)
        experts, self._end = [], DATA_START
        layouts = layer_layouts(config, quant, check_ahead(ahead, config))
        for count, layout in zip(ahead, layouts, strict=True):
            entry = ExpertsEntry(align_up(self._end, layout.alignment), count, layout)
            experts.append(entry)
            self._end = entry.offset + layout.stride * config.num_experts
        self._header = Header(
            config, quant, tuple(experts), {}, table, {}, (), check_metadata(metadata)
        )
        self._begun: set[str] = set()
        everything = [make_entry(self._shapes, quant, name, 0) for name in self._shapes]
        self._size = self._end + sum(align_up(t.size, t.alignment) for t in everything)
        self._file = AtomicFile(path, MAGIC)
        try:
            self._check_room()
        except BaseException:
            self._file.discard()
            raise

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.discard()

    def _check_room(self) -> None:
        with reporting(self._file.where):
            disk = os.fstatvfs(self._file.fd)
        free = disk.f_bavail * disk.f_frsize
        if self._size > free:
            raise OutputError(
                f"cannot write {self._file.where}: it needs {self._size} bytes and the disk has "
                f"{free} free: No space left on device; free {self._size - free} bytes or choose "
                "another place"
            )

    def _put(self, data: U8, offset: int) -> None:
        with reporting(self._file.where, self._file.fd, self._size):
            write_exactly(self._file.fd, data.data, offset)

    def _write_segments(
        self, record: RecordWriter, segments: Iterable[bytes | NDArray[np.uint8]]
    ) -> None:
        layout, crcs = record.layout, []
        for i, data in enumerate(segments):
            flat = as_bytes(data)
            if i >= len(layout.segment_sizes) or flat.size != layout.segment_sizes[i]:
                raise UsageError(
                    f"{record.what}: segment {i} of {flat.size} bytes does not fit its shape"
                )
            record.write(i, 0, flat)
            crcs.append(crc32c(flat))
        if len(crcs) != len(layout.segment_sizes):
            raise UsageError(
                f"{record.what}: {len(crcs)} segments instead of {len(layout.segment_sizes)}"
            )
        self._crcs[record.what] = crcs

    def _close_record(self, what: str, layout: RecordLayout, base: int) -> None:
        fd, where = self._file.fd, self._file.where
        pairs = zip(layout.segment_offsets, layout.segment_sizes, strict=True)
        self._crcs[what] = [crc_of_file(fd, base + offset, size, where) for offset, size in pairs]

    def open_expert(self, layer: int, expert: int) -> RecordWriter:
        """Begin an expert that is written in pieces; close it before commit.

        Experts may come in any order.
        """
        config = self._header.config
        if layer not in config.moe_layers or not 0 <= expert < config.num_experts:
            raise UsageError(f"the model has no expert {expert} in layer {layer}")
        what = expert_name(layer, expert)
        if what in self._begun:
            raise UsageError(f"{what} was written before")
        self._begun.add(what)
        entry = self._header.experts[config.moe_layers.index(layer)]
        return RecordWriter(self, what, entry.layout, entry.offset + expert * entry.layout.stride)

    @property
    def quant(self) -> QuantSpec:
        """Levels and groups of what is written."""
        return self._header.quant

    def expert_layout(self, layer: int) -> RecordLayout:
        """Of an expert of this layer."""
        return self._header.experts[self._header.config.moe_layers.index(layer)].layout

    def write_expert(
        self, layer: int, expert: int, segments: Iterable[bytes | NDArray[np.uint8]]
    ) -> None:
        """Write one expert at once, segments in level order."""
        self._write_segments(self.open_expert(layer, expert), segments)

    def _claim(self, name: str, kind: str, shape: tuple[int, ...]) -> TensorEntry:
        entry = make_entry(self._shapes, self._header.quant, name, 0)
        if (entry.kind, entry.shape) != (kind, shape):
            raise UsageError(
                f"tensor {name} is {kind} of shape {shape}, must be {entry.kind} of {entry.shape}"
            )
        if name in self._tensors:
            raise UsageError(f"tensor {name} was written before")
        entry = replace(entry, offset=align_up(self._end, entry.alignment))
        self._tensors[name] = entry
        self._end = entry.offset + entry.size
        return entry

    def open_nested(self, name: str, shape: tuple[int, int]) -> RecordWriter:
        """Begin a nested tensor [rows, cols] that is written in pieces; close it before commit."""
        entry = self._claim(name, "nested", shape)
        return RecordWriter(self, name, dense_layout(*shape, self._header.quant), entry.offset)

    def write_nested(
        self, name: str, shape: tuple[int, int], segments: Iterable[bytes | NDArray[np.uint8]]
    ) -> None:
        """Write one nested tensor [rows, cols] at once, segments in level order."""
        self._write_segments(self.open_nested(name, shape), segments)

    def write_f32(self, name: str, array: F32) -> None:
        """Write one float32 tensor as it is."""
        entry = self._claim(name, "f32", array.shape)
        data = np.ascontiguousarray(array, "<f4").reshape(-1).view(np.uint8)
        self._put(data, entry.offset)
        self._crcs[name] = [crc32c(data)]

    def add_section(self, name: str, data: bytes) -> None:
        """Add a named section; written at commit, in the order of the calls."""
        if check_section_name(name) in self._sections:
            raise UsageError(f"section {name} was added before")
        check_section_size(name, len(data))
        self._sections[name] = bytes(data)

    def commit(self) -> None:
        """Write tables and header, bring all to the disk, give the file its name.

        Raises:
            StoreError: experts or tensors are missing.
        """
        header, config = self._header, self._header.config
        experts = [
            expert_name(layer, e) for layer in config.moe_layers for e in range(config.num_experts)
        ]
        check_complete([*experts, *self._shapes], self._crcs)
        crcs = [crc for what in (*experts, *self._tensors) for crc in self._crcs[what]]
        table = np.array(crcs, "<u4")
        sections: dict[str, SectionEntry] = {}
        table_at = self._append(table.tobytes())
        for name, data in self._sections.items():
            sections[name] = replace(self._append(data), name=name)
        header = replace(
            header, tensors=self._tensors, crc_table=table_at, sections=sections, dead=()
        )
        raw = header.encode()
        at = self._append(raw)
        superblock = Superblock(1, at.offset, at.size, at.crc32c, self._end)
        parse_header(raw, superblock)  # what a reader would refuse is not given out
        self._put(as_bytes(superblock.encode() * 2), 0)
        with reporting(self._file.where, self._file.fd, self._size):
            self._file.commit()

    def _append(self, data: bytes) -> SectionEntry:
        offset = align_up(self._end, PART_ALIGN)
        self._put(as_bytes(data), offset)
        self._end = offset + len(data)
        return SectionEntry("", offset, len(data), crc32c(as_bytes(data)))
