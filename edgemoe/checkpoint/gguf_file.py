"""A GGUF file or all parts of a split one: metadata, tensors, and reads of any of their rows.

Nothing is mapped into memory: data is read with pread into fresh arrays, so that resident memory
stays at what the caller holds.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .. import kernels
from ..errors import CheckpointError, shown
from ..types import F32
from .files import drop_cached, open_unchanged, read_into, require_finite
from .gguf_header import MAX_TENSORS, GgufHeader, GgufTensor, read_gguf_header

_CHUNK = 1 << 20
"""Weights decoded at a time, a multiple of every block: bounds what a read takes beside its
result."""

_PART_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
_MAX_PARTS = 99_999


class GgufFile:
    """An open GGUF. Holds no open files.

    Attributes:
        files: the file, or its parts in order.
        tensors: every tensor of every part, by name.
    """

    def __init__(self, headers: Sequence[GgufHeader], pool: kernels.Pool | None) -> None:
        self.files = [header.path for header in headers]
        self.tensors = {name: info for h in headers for name, info in h.tensors.items()}
        self._stamps = {header.path: header.stamp for header in headers}
        self._pool = pool

    def read_rows(self, info: GgufTensor, first: int, count: int) -> F32:
        """float32 [count, columns]: rows [first, first + count) of a tensor seen as a matrix.

        A tensor of n axes is a matrix of its last axis by the product of the others; one of a
        single axis is one row. Reads only these rows' bytes.

        Raises CheckpointError: the file changed since it was opened, cannot be read, or a value is
        NaN or infinite.
        """
        columns = info.shape[-1]
        weights, size = kernels.GGML_BLOCKS[info.type]
        out = np.empty((count, columns), np.float32)
        flat = out.reshape(-1)
        begin = info.offset + first * columns // weights * size
        raw = np.empty(min(_CHUNK, flat.size) // weights * size, np.uint8)
        fd = open_unchanged(info.file, self._stamps[info.file])
        try:
            for at in range(0, flat.size, _CHUNK):
                part = flat[at : at + _CHUNK]
                data = raw[: part.size // weights * size]
                read_into(fd, data, begin + at // weights * size, info.where)
                if self._pool is None:
                    self._pool = kernels.new_pool(kernels.default_threads())
                kernels.dequantize(self._pool, data, info.type, part)
                require_finite(part, first * columns + at, columns, info.where)
            drop_cached(fd, begin, flat.size // weights * size)
        finally:
            os.close(fd)
        return out


def read_parts(path: Path) -> list[GgufHeader]:
    """The header of a GGUF, or those of all its parts in order, `path` being any of them.

    Parts are named NAME-00001-of-00003.gguf and lie beside one another; the first has the metadata.

    Raises:
        CheckpointError: a part is missing, misnamed or of another model; and as
            `read_gguf_header`.
        UnsupportedError: as `read_gguf_header`.
    """
    given = read_gguf_header(path)
    number, count = _split(given)
    if count <= 1:
        return [given]
    paths = _part_paths(path, number, count)
    missing = [part for part in paths if not part.exists()]
    if missing:
        raise CheckpointError(
            f"{shown(path)}: {len(missing)} of {count} parts are missing, the first is"
            f" {shown(missing[0])}; put all parts in one directory"
        )
    headers = [given if i == number else read_gguf_header(p) for i, p in enumerate(paths)]
    _check_parts(headers)
    return headers


def _split(header: GgufHeader) -> tuple[int, int]:
    """Number of this part, from 0, and how many there are."""
    return _count(header, "split.no"), _count(header, "split.count")


def _count(header: GgufHeader, key: str, most: int = _MAX_PARTS) -> int:
    value = header.metadata.get(key, 0)
    if type(value) is not int or not 0 <= value <= most:
        raise CheckpointError(
            f"{shown(header.path)}: {key} is {shown(value)}; it must be from 0 to {most}"
        )
    return value


def _part_paths(path: Path, number: int, count: int) -> list[Path]:
    """Where the parts must be, going by the name of part `number`."""
    match = _PART_NAME.fullmatch(path.name)
    if match is None or (int(match[2]), int(match[3])) != (number + 1, count):
        raise CheckpointError(
            f"{shown(path)} is part {number + 1} of {count} of a split file; parts are found by"
            f" their names: rename it to NAME-{number + 1:05}-of-{count:05}.gguf, and the others"
            " likewise"
        )
    return [path.with_name(f"{match[1]}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]


def _check_parts(headers: Sequence[GgufHeader]) -> None:
    """Parts must be numbered as they are named and hold together what each of them promises."""
    first = headers[0]
    seen: dict[str, Path] = {}
    promised = _promised(first)
    for i, header in enumerate(headers):
        number, count = _split(header)
        if (number, count, _promised(header)) != (i, len(headers), promised):
            raise CheckpointError(
                f"{shown(header.path)} does not belong to {shown(first.path)}: it is part"
                f" {number + 1} of {count}, of {_promised(header)} tensors in all, and should be"
                f" part {i + 1} of {len(headers)}, of {promised}; download it again"
            )
        for name in header.tensors:
            if name in seen:
                raise CheckpointError(
                    f"{shown(header.path)} does not belong to {shown(seen[name])}: both hold"
                    f" tensor {shown(name)}; download them again"
                )
            seen[name] = header.path
    if len(seen) != promised:
        raise CheckpointError(
            f"{shown(first.path)} and its other parts hold {len(seen)} tensors, not {promised};"
            " download them again"
        )


def _promised(header: GgufHeader) -> int:
    """How many tensors the parts hold together, as this one says."""
    return _count(header, "split.tensors.count", MAX_TENSORS)
