"""A directory of .safetensors weights: one model.safetensors, or shards with their index.

Nothing is mapped into memory: data is read with pread into fresh arrays, so that resident memory
stays at what the caller holds.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError, UnsupportedError, shown
from ..types import F32
from .files import (
    FileStamp,
    drop_cached,
    open_unchanged,
    parse_object,
    read_into,
    read_small,
    require_finite,
)
from .safetensors_header import MAX_HEADER, TensorInfo, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
READABLE_DTYPES = ("F32", "F16", "BF16")

_CHUNK = 1 << 20
"""Elements decoded at a time: bounds the memory a read takes beside its result."""


class SafetensorsDir:
    """The tensors of a directory, by name, and reads of any of their rows.

    Attributes:
        directory: where the files are.
        tensors: every tensor of every file.
        files: the files read, the index first if there is one.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tensors: dict[str, TensorInfo] = {}
        self._stamps: dict[Path, FileStamp] = {}
        index = _read_index(directory)
        for file in sorted(set(index.values())) if index is not None else [SINGLE]:
            path = directory / file
            infos, self._stamps[path] = read_header(path)
            if index is not None:
                _check_shard(infos, path, index)
            self.tensors.update(infos)
        self.files = [directory / INDEX] * (index is not None) + list(self._stamps)

    def read_rows(self, info: TensorInfo, first: int, count: int) -> F32:
        """float32 [count, columns]: rows [first, first + count) of a tensor seen as a matrix.

        A tensor of n axes is a matrix of its last axis by the product of the others; one of a
        single axis is one row. Reads only these rows' bytes. bf16, f16 and f32 convert exactly.

        Raises:
            CheckpointError: the file changed since it was opened, cannot be read, or a value is
                NaN or infinite.
            UnsupportedError: the dtype is not BF16, F16 or F32.
        """
        columns = info.shape[-1]
        out = np.empty((count, columns), np.float32)
        flat = out.reshape(-1)
        if info.dtype not in READABLE_DTYPES:
            raise unsupported_dtype(info)
        width = 4 if info.dtype == "F32" else 2
        begin = info.offset + first * columns * width
        scratch = None if width == 4 else np.empty(min(_CHUNK, flat.size), np.uint16)
        fd = self._open(info.file)
        try:
            for at in range(0, flat.size, _CHUNK):
                part = flat[at : at + _CHUNK]
                if scratch is None:
                    read_into(fd, part, begin + at * width, info.where)
                else:
                    raw = scratch[: part.size]
                    read_into(fd, raw, begin + at * width, info.where)
                    _widen(raw, info.dtype, part)
                require_finite(part, first * columns + at, columns, info.where)
            drop_cached(fd, begin, flat.size * width)
        finally:
            os.close(fd)
        return out

    def same_bytes(self, a: TensorInfo, b: TensorInfo) -> bool:
        """Whether two tensors have the same dtype, shape and data; reads both in pieces."""
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        fds = self._open(a.file), self._open(b.file)
        try:
            for at in range(0, a.nbytes, _CHUNK):
                left, right = np.empty((2, min(_CHUNK, a.nbytes - at)), np.uint8)
                read_into(fds[0], left, a.offset + at, a.where)
                read_into(fds[1], right, b.offset + at, b.where)
                if not np.array_equal(left, right):
                    return False
        finally:
            for fd in fds:
                os.close(fd)
        return True

    def _open(self, file: Path) -> int:
        return open_unchanged(file, self._stamps[file])


def unsupported_dtype(info: TensorInfo) -> UnsupportedError:
    """The error for a weight that is neither bf16, f16 nor f32."""
    return UnsupportedError(
        f"{info.where} has dtype {info.dtype}; only BF16, F16 and F32 can be read:"
        " use the unquantized checkpoint"
    )


def _widen(raw: np.ndarray[Any, Any], dtype: str, out: F32) -> None:
    """Convert the 16-bit patterns `raw` to float32 in `out`, exactly."""
    if dtype == "F16":
        out[:] = raw.view(np.float16)
        return
    bits = out.view(np.uint32)
    bits[:] = raw
    bits <<= 16


def _read_index(directory: Path) -> dict[str, str] | None:
    """Tensor name -> shard file name; None where the weights are a single file."""
    single, index = directory / SINGLE, directory / INDEX
    if not index.exists():
        if single.exists():
            return None
        raise CheckpointError(
            f"{shown(directory)} has neither {SINGLE} nor {INDEX}{_hint(directory)}"
        )
    if single.exists():
        raise CheckpointError(
            f"{shown(directory)} has both {SINGLE} and {INDEX}; remove the one that is left over"
        )
    weight_map = parse_object(read_small(index, MAX_HEADER), shown(index)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{shown(index)} has no weight_map")
    for name, file in weight_map.items():
        # A shard lies beside its index: a path would lead reads anywhere on the machine.
        if not isinstance(file, str) or file in ("", ".", "..") or "/" in file or "\0" in file:
            raise CheckpointError(
                f"{shown(index)}: tensor {shown(name)} is said to be in {shown(file)}, which is"
                " not a plain file name"
            )
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if not (directory / file).exists()]
    if missing:
        raise CheckpointError(
            f"{shown(directory)}: {len(missing)} of {len(files)} shards are missing, the first is"
            f" {shown(missing[0])}; download the rest"
        )
    return weight_map


def _hint(directory: Path) -> str:
    """What to do where no weights were found, going by what else is there."""
    names = sorted(os.listdir(directory))
    if any(name.endswith(".safetensors") for name in names):
        return f" (there are .safetensors files, but not the index that names them: fetch {INDEX})"
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        return "; only safetensors weights are read: save the model again with safe_serialization"
    return "; download the weights"


def _check_shard(infos: dict[str, TensorInfo], path: Path, index: dict[str, str]) -> None:
    """A shard must hold the tensors the index places in it, and no other."""
    for name in infos:
        if index.get(name) != path.name:
            raise CheckpointError(
                f"{shown(path)} holds tensor {shown(name)}, which {INDEX} does not place there;"
                " the files do not belong together: download them again"
            )
    for name, file in index.items():
        if file == path.name and name not in infos:
            raise CheckpointError(
                f"{shown(path)} lacks tensor {shown(name)}, which {INDEX} places there;"
                " the files do not belong together: download them again"
            )
