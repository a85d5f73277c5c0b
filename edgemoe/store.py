"""The store: one file that holds a model as nested segments (docs/FORMAT.md).

`Store` reads it, `StoreWriter` makes it, `replace_section` exchanges one section of a finished one.
`layer` is everywhere the layer's number in the model, as in ModelConfig.moe_layers; a level index
counts QuantSpec.levels. All sizes and offsets are bytes.
"""

from __future__ import annotations

import bisect
import contextlib
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ChecksumError, OutputError, StoreError, UsageError
from .kernels import crc32c
from .layout import PART_ALIGN, RecordLayout, align_up
from .store_file import IO_CHUNK, as_bytes, crc_of_file, read_exactly, reporting, write_exactly
from .store_header import (
    DATA_START,
    MAX_HEADER,
    SUPERBLOCK,
    Header,
    SectionEntry,
    Superblock,
    TensorEntry,
    decode_superblock,
    newest_superblock,
    tensor_shapes,
)
from .store_parse import check_section_name, parse_header
from .store_writer import NestedWriter, StoreWriter
from .types import F32, PlaneRef

__all__ = [
    "NestedWriter",
    "SectionEntry",
    "Store",
    "StoreWriter",
    "TensorEntry",
    "replace_section",
    "tensor_shapes",
]


def _read(fd: int, offset: int, size: int, path: str) -> bytes:
    data = bytearray(size)
    read_exactly(fd, memoryview(data), offset, path)
    return bytes(data)


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """Put the file's name before the message of a StoreError that lacks it."""
    try:
        yield
    except StoreError as exc:
        if str(exc).startswith(path):
            raise
        raise type(exc)(f"{path}: {exc}") from None


def _load(fd: int, path: str) -> tuple[Superblock, Header]:
    """Newest superblock and header of an open file, checked against each other and its length."""
    with _naming(path):
        size = os.fstat(fd).st_size
        blocks = _read(fd, 0, min(size, DATA_START), path).ljust(DATA_START, b"\0")
        block = newest_superblock(blocks)
        if block.file_length > size:
            raise StoreError(
                f"truncated: {size} of {block.file_length} bytes are there; copy or convert it again"
            )
        end = block.header_offset + block.header_length
        if not block.header_length <= MAX_HEADER or end != block.file_length:
            raise StoreError(
                f"the superblock puts a header of {block.header_length} bytes at byte "
                f"{block.header_offset} of {block.file_length}"
            )
        raw = _read(fd, block.header_offset, block.header_length, path)
        if crc32c(as_bytes(raw)) != block.header_crc32c:
            raise ChecksumError("the header is damaged; copy or convert it again")
        return block, parse_header(raw, block)


class Store:
    """An open store. Reads are positional, so threads may share one.

    Attributes:
        path: as given to `open`.
        config, quant, metadata: what the header says.
        alignment: of expert records and their segments: 4096 or 64.
        expert_layout: where every part of an expert's record lies.
        tensors: by canonical name, in file order. sections: by name.
    """

    def __init__(self, path: str, fd: int, header: Header, crcs: NDArray[np.uint32]) -> None:
        self.path = path
        self.config, self.quant, self.metadata = header.config, header.quant, header.metadata
        self.expert_layout: RecordLayout = header.expert_layout
        self.alignment = self.expert_layout.alignment
        self.tensors: dict[str, TensorEntry] = header.tensors
        self.sections: dict[str, SectionEntry] = header.sections
        self._fd, self._header, self._crcs = fd, header, crcs
        self._ordinals = {layer: i for i, layer in enumerate(self.config.moe_layers)}
        self._first_crc: dict[str, int] = {}
        at = header.expert_count * len(self.quant.levels)
        for name, entry in self.tensors.items():
            self._first_crc[name] = at
            at += len(entry.parts)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Store:
        """Open a store and check its superblocks, header and CRC table; weights are not read.

        Raises:
            StoreError: missing, unreadable, no store, truncated, or its header breaks the format.
            ChecksumError: superblocks, header or CRC table are damaged.
        """
        name = os.fspath(path)
        try:
            fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as exc:
            raise StoreError(f"{name}: cannot open the store: {exc.strerror}") from exc
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise StoreError(f"{name}: this is not a file, so it is not a store")
            _, header = _load(fd, name)
            table = header.crc_table
            raw = _read(fd, table.offset, table.size, name)
            if crc32c(as_bytes(raw)) != table.crc32c:
                raise ChecksumError(f"{name}: the CRC table is damaged; copy or convert it again")
            return cls(name, fd, header, np.frombuffer(raw, "<u4"))
        except BaseException:
            os.close(fd)
            raise

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; twice is fine."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def fileno(self) -> int:
        """The file descriptor, for readers that submit their own I/O."""
        if self._fd < 0:
            raise UsageError(f"{self.path}: the store is closed")
        return self._fd

    def expert_segment(self, layer: int, expert: int, level_index: int) -> PlaneRef:
        """Where one segment of one expert lies. UsageError if there is none."""
        experts, levels = self.config.num_experts, len(self.quant.levels)
        if layer not in self._ordinals or not (0 <= expert < experts and 0 <= level_index < levels):
            raise UsageError(
                f"{self.path}: no segment {level_index} of expert {expert} in layer {layer}"
            )
        index = self._ordinals[layer] * experts + expert
        layout = self.expert_layout
        start = self._header.experts_offset + index * layout.stride
        return PlaneRef(
            start + layout.segment_offsets[level_index],
            layout.segment_sizes[level_index],
            int(self._crcs[index * levels + level_index]),
        )

    def tensor_segments(self, name: str) -> list[PlaneRef]:
        """Where the segments of a nested tensor lie, in level order; one part for a float32 one."""
        if name not in self.tensors:
            raise StoreError(f"{self.path}: the store has no tensor {name!r}")
        first = self._first_crc[name]
        return [
            PlaneRef(offset, size, int(self._crcs[first + i]))
            for i, (offset, size) in enumerate(self.tensors[name].parts)
        ]

    def read_into(self, ref: PlaneRef, out: NDArray[np.uint8]) -> None:
        """Read one segment into `out`, uint8 [ref.size], and verify it.

        Raises:
            ChecksumError: the bytes differ from those written; names the part.
            StoreError: the file ends early or cannot be read. UsageError: `out` does not fit.
        """
        if out.dtype != np.uint8 or out.shape != (ref.size,) or not out.flags.c_contiguous:
            raise UsageError(f"read_into needs a contiguous uint8 array of {ref.size} bytes")
        read_exactly(self.fileno(), memoryview(out), ref.offset, self.path)
        if crc32c(out) != ref.crc32c:
            raise ChecksumError(
                f"{self.path}: {self._describe(ref.offset)} is damaged (byte {ref.offset}, "
                f"{ref.size} bytes); copy or convert it again"
            )

    def read_f32(self, name: str) -> F32:
        """A float32 tensor as a new array of its shape; errors as `read_into`."""
        refs = self.tensor_segments(name)
        entry = self.tensors[name]
        if entry.kind != "f32":
            raise StoreError(f"{self.path}: tensor {name!r} is nested, not float32")
        out = np.empty(entry.shape, "<f4")
        self.read_into(refs[0], out.reshape(-1).view(np.uint8))
        return out

    def section(self, name: str) -> bytes:
        """Bytes of a section; StoreError if there is none, ChecksumError if it is damaged."""
        if name not in self.sections:
            raise StoreError(f"{self.path}: the store has no section {name!r}")
        entry = self.sections[name]
        out = np.empty(entry.size, np.uint8)
        self.read_into(PlaneRef(entry.offset, entry.size, entry.crc32c), out)
        return out.tobytes()

    def _describe(self, offset: int) -> str:
        """What lies at this offset, for messages."""
        regions = sorted((o, what) for o, _, _, what in self._header.regions())
        start, what = regions[bisect.bisect_right(regions, (offset, "\U0010ffff")) - 1]
        layout, levels = self.expert_layout, self.quant.levels
        if what == "experts":
            index, inside = divmod(offset - start, layout.stride)
            ordinal, expert = divmod(index, self.config.num_experts)
            level = levels[bisect.bisect_right(layout.segment_offsets, inside) - 1]
            layer = self.config.moe_layers[ordinal]
            return f"layer {layer} expert {expert} segment {level}-bit"
        name = what.removeprefix("tensor ")
        tensor = self.tensors.get(name)
        if tensor is None or tensor.layout is None:
            return what
        index = bisect.bisect_right(tensor.layout.segment_offsets, offset - start) - 1
        return f"{what} segment {levels[index]}-bit"

    def _checked_parts(self) -> Iterator[tuple[int, int, int | None]]:
        """(offset, size, CRC32C or None) of all that is not padding, ascending."""
        header = self._header
        parts: list[tuple[int, int, int | None]] = [(0, DATA_START, None)]
        for ordinal, layer in enumerate(self.config.moe_layers):
            for expert in range(self.config.num_experts):
                for i in range(len(self.quant.levels)):
                    ref = self.expert_segment(layer, expert, i)
                    parts.append((ref.offset, ref.size, ref.crc32c))
        for name in self.tensors:
            parts += [(r.offset, r.size, r.crc32c) for r in self.tensor_segments(name)]
        for s in (header.crc_table, *header.sections.values()):
            parts.append((s.offset, s.size, s.crc32c))
        parts += [(offset, size, None) for offset, size in header.dead]
        yield from sorted(parts, key=lambda p: p[:2])
