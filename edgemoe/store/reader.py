"""Reading a store: where everything lies, verified reads, what takes how much."""

from __future__ import annotations

import bisect
import os
import stat
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..closing import Closing
from ..errors import ChecksumError, StoreError, UsageError, shown
from ..kernels import crc32c
from ..layout import RecordLayout
from ..types import F32, PlaneRef
from .file import IO_CHUNK, as_bytes, crc_of_file, read_exactly, truncated, unreadable
from .header import (
    EXPERTS,
    SUPERBLOCK,
    Header,
    SectionEntry,
    Superblock,
    TensorEntry,
    decode_superblock,
)
from .parse import load_header, read_bytes


class Store(Closing):
    """An open store. Reads are positional, so threads may share one.

    Attributes:
        path: as given to `open`.
        config, quant, metadata: what the header says. ahead: columns of down that are read one
            level above the rest, in each layer with experts.
        tensors: by canonical name, in file order. sections: by name.
    """

    def __init__(
        self, path: str, fd: int, block: Superblock, header: Header, crcs: NDArray[np.uint32]
    ) -> None:
        self.path = path
        self._where = shown(path)
        self.config, self.quant, self.metadata = header.config, header.quant, header.metadata
        self.ahead = tuple(entry.ahead for entry in header.experts)
        self.tensors: dict[str, TensorEntry] = header.tensors
        self.sections: dict[str, SectionEntry] = header.sections
        self._fd, self._block, self._header, self._crcs = fd, block, header, crcs
        self._experts = {
            layer: (i, entry)
            for i, (layer, entry) in enumerate(
                zip(self.config.moe_layers, header.experts, strict=True)
            )
        }
        self._first_crc: dict[str, int] = {}
        at = header.expert_count * len(self.quant.expert_levels)
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
        where = shown(path)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError) as exc:
            reason = getattr(exc, "strerror", None) or exc
            raise StoreError(f"{where}: cannot open the store: {reason}") from exc
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise StoreError(f"{where}: this is not a file, so it is not a store")
            block, header = load_header(fd, where)
            table = header.crc_table
            raw = read_bytes(fd, table.offset, table.size, where)
            if crc32c(as_bytes(raw)) != table.crc32c:
                raise ChecksumError(f"{where}: the CRC table is damaged; copy or convert it again")
            return cls(os.fspath(path), fd, block, header, np.frombuffer(raw, "<u4"))
        except BaseException:
            os.close(fd)
            raise

    def close(self) -> None:
        """Close the file; twice is fine."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def fileno(self) -> int:
        """The file descriptor, for readers that submit their own I/O."""
        if self._fd < 0:
            raise UsageError(f"{self._where}: the store is closed")
        return self._fd

    def expert_segment(self, layer: int, expert: int, level_index: int) -> PlaneRef:
        """Where one segment of one expert lies. UsageError if there is none."""
        experts, levels = self.config.num_experts, len(self.quant.expert_levels)
        if layer not in self._experts or not (0 <= expert < experts and 0 <= level_index < levels):
            raise UsageError(
                f"{self._where}: no segment {level_index} of expert {expert} in layer {layer}"
            )
        ordinal, entry = self._experts[layer]
        index = ordinal * experts + expert
        return PlaneRef(
            entry.offset + expert * entry.layout.stride + entry.layout.segment_offsets[level_index],
            entry.layout.segment_sizes[level_index],
            int(self._crcs[index * levels + level_index]),
        )

    def expert_layout(self, layer: int) -> RecordLayout:
        """Where every part of an expert's record lies; layers with equal ones share the object."""
        if layer not in self._experts:
            raise UsageError(f"{self._where}: layer {layer} has no experts")
        return self._experts[layer][1].layout

    def tensor_segments(self, name: str) -> list[PlaneRef]:
        """Where the segments of a nested tensor lie, in level order; one part for a float32 one."""
        if name not in self.tensors:
            raise StoreError(f"{self._where}: the store has no tensor {shown(name)}")
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
        if out.dtype != np.uint8 or out.shape != (ref.size,) or not out.flags.carray:
            raise UsageError(f"read_into needs a writable uint8 array of {ref.size} bytes in a row")
        read_exactly(self.fileno(), out.data, ref.offset, self._where)
        if crc32c(out) != ref.crc32c:
            raise self.damaged(ref)

    def damaged(self, ref: PlaneRef) -> ChecksumError:
        """The error of a segment whose bytes are not those of its checksum."""
        return ChecksumError(
            f"{self._where}: {self._describe(ref.offset)} is damaged (byte {ref.offset}, "
            f"{ref.size} bytes); copy or convert it again"
        )

    def unreadable(self, at: int, reason: str) -> StoreError:
        """The error of a read that the system refused at this byte."""
        return unreadable(self._where, at, reason)

    def truncated(self, end: int, missing: int) -> StoreError:
        """The error of a file that ends at this byte, so many bytes too early."""
        return truncated(self._where, end, missing)

    def read_f32(self, name: str) -> F32:
        """A float32 tensor as a new array of its shape; errors as `read_into`."""
        refs = self.tensor_segments(name)
        entry = self.tensors[name]
        if entry.kind != "f32":
            raise StoreError(f"{self._where}: tensor {shown(name)} is nested, not float32")
        out = np.empty(entry.shape, "<f4")
        self.read_into(refs[0], out.reshape(-1).view(np.uint8))
        return out

    def section(self, name: str) -> bytes:
        """Bytes of a section; StoreError if there is none, ChecksumError if it is damaged."""
        if name not in self.sections:
            raise StoreError(f"{self._where}: the store has no section {shown(name)}")
        entry = self.sections[name]
        out = np.empty(entry.size, np.uint8)
        self.read_into(PlaneRef(entry.offset, entry.size, entry.crc32c), out)
        return out.tobytes()

    def _regions(self) -> list[tuple[int, int, str]]:
        """(offset, size, what) of every region of the file that is not empty, ascending."""
        block = self._block
        regions = [(o, size, what) for o, size, _, what in self._header.regions() if size]
        return sorted([*regions, (block.header_offset, block.header_length, "header")])

    def _describe(self, offset: int) -> str:
        """What lies at this offset, for messages."""
        regions = [(start, what) for start, _, what in self._regions()]
        start, what = regions[bisect.bisect_right(regions, (offset, "\U0010ffff")) - 1]
        levels = self.quant.levels
        if what.startswith(EXPERTS):
            layer = int(what.removeprefix(EXPERTS))
            layout = self.expert_layout(layer)
            expert, inside = divmod(offset - start, layout.stride)
            level = levels[bisect.bisect_right(layout.segment_offsets, inside) - 1]
            return f"layer {layer} expert {expert} segment {level}-bit"
        name = what.removeprefix("tensor ")
        tensor = self.tensors.get(name)
        if tensor is None or tensor.layout is None:
            return what
        index = bisect.bisect_right(tensor.layout.segment_offsets, offset - start) - 1
        return f"{what} segment {levels[index]}-bit"

    def verify(self, progress: Callable[[int, int, str], None] | None = None) -> list[str]:
        """Read the whole file and compare it with its checksums.

        Args:
            progress: called with (bytes done, bytes in all, part) now and then.

        Returns:
            One line a damaged part, empty when all is sound. Padding that is not zero is damage.
        """
        fd, total = self.fileno(), self._block.file_length
        damaged = self._damaged_superblocks()
        end = reported = 0
        for offset, size, crc in self._parts():
            try:
                if any(read_bytes(fd, end, offset - end, self._where)):
                    damaged.append(f"padding at byte {end} is not zero")
                if crc is not None and crc_of_file(fd, offset, size, self._where) != crc:
                    damaged.append(f"{self._describe(offset)} (byte {offset}, {size} bytes)")
            except StoreError as exc:
                damaged.append(f"{self._describe(offset)}: {exc}")
            end = offset + size
            if progress is not None and (end - reported >= IO_CHUNK or end == total):
                progress(end, total, self._describe(offset))
                reported = end
        return damaged

    def _damaged_superblocks(self) -> list[str]:
        out = []
        for i, letter in enumerate("AB"):
            try:
                sound = decode_superblock(
                    read_bytes(self._fd, i * SUPERBLOCK, SUPERBLOCK, self._where)
                )
            except StoreError:
                sound = None
            if sound is None:
                out.append(f"superblock {letter} (byte {i * SUPERBLOCK}); the other one is used")
        return out

    def _parts(self) -> Iterator[tuple[int, int, int | None]]:
        """(offset, size, CRC32C or None) of all that is not padding, ascending."""
        header = self._header
        for start, size, what in self._regions():
            if what.startswith(EXPERTS):
                layer = int(what.removeprefix(EXPERTS))
                for expert in range(self.config.num_experts):
                    for i in range(len(self.quant.expert_levels)):
                        ref = self.expert_segment(layer, expert, i)
                        yield ref.offset, ref.size, ref.crc32c
            elif what.startswith("tensor "):
                for ref in self.tensor_segments(what.removeprefix("tensor ")):
                    yield ref.offset, ref.size, ref.crc32c
            elif what.startswith("section "):
                yield start, size, header.sections[what.removeprefix("section ")].crc32c
            elif what == "crc_table":
                yield start, size, header.crc_table.crc32c
            elif what == "header":
                yield start, size, self._block.header_crc32c
            else:
                yield start, size, None

    def size_report(self) -> dict[str, Any]:
        """What takes how much of the file, for `inspect`. JSON-ready.

        "experts" and "dense" (nested tensors) give weights, bytes, bytes of each level's segments,
        and bits a weight of a read up to each level, scales and padding counted; "float32" the
        plain tensors; "sections" each section; "dead_bytes" replaced sections; "overhead_bytes" all
        else (superblocks, header, CRC table, padding). All bytes add up to "file_bytes".
        """
        header = self._header
        nested = [t for t in self.tensors.values() if t.layout is not None]
        plain = [t for t in self.tensors.values() if t.layout is None]
        out: dict[str, Any] = {
            "file_bytes": self._block.file_length,
            "experts": self._nested_report(
                [(entry.layout, self.config.num_experts) for entry in header.experts]
            ),
            "dense": self._nested_report([(t.layout, 1) for t in nested if t.layout is not None]),
            "float32": {
                "tensors": len(plain),
                "weights": sum(t.size for t in plain) // 4,
                "bytes": sum(t.size for t in plain),
            },
            "sections": {s.name: s.size for s in self.sections.values()},
            "dead_bytes": sum(size for _, size in header.dead),
        }
        named = sum(out[k]["bytes"] for k in ("experts", "dense", "float32"))
        named += sum(out["sections"].values()) + out["dead_bytes"]
        return out | {"overhead_bytes": self._block.file_length - named}

    def _nested_report(self, records: list[tuple[RecordLayout, int]]) -> dict[str, Any]:
        """Totals over (layout, how many) of nested records."""
        weights = sum(layout.weights() * n for layout, n in records)
        levels = records[0][0].levels if records else ()
        segments = {
            level: sum(layout.segment_sizes[i] * n for layout, n in records)
            for i, level in enumerate(levels)
        }
        bits = {
            str(level): 8 * sum(layout.prefix_bytes(i) * n for layout, n in records) / weights
            for i, level in enumerate(levels)
        }
        return {
            "records": sum(n for _, n in records),
            "weights": weights,
            "bytes": sum(segments.values()),
            "segments": {str(level): size for level, size in segments.items()},
            "bits_per_weight": bits,
        }
