"""A directory of .safetensors weights: one model.safetensors, or shards with their index.

Nothing is mapped into memory: data is read with pread into fresh arrays, so that resident memory
stays at what the caller holds.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError, UnsupportedError, shown
from ..types import F32
from .files import open_regular, parse_object, read_small
from .safetensors_header import MAX_HEADER, FileStamp, TensorInfo, read_header

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
                    self._fill(fd, part, begin + at * width, info)
                else:
                    raw = scratch[: part.size]
                    self._fill(fd, raw, begin + at * width, info)
                    _widen(raw, info.dtype, part)
                if not np.isfinite(part).all():
                    bad = at + int(np.flatnonzero(~np.isfinite(part))[0])
                    row, column = first + bad // columns, bad % columns
                    raise CheckpointError(
                        f"{info.where} holds {flat[bad]:g} at row {row}, column {column};"
                        " the checkpoint is damaged or its training diverged"
                    )
            # The bytes are converted once: keeping them cached would push other files out.
            with suppress(OSError):
                os.posix_fadvise(fd, begin, flat.size * width, os.POSIX_FADV_DONTNEED)
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
                self._fill(fds[0], left, a.offset + at, a)
                self._fill(fds[1], right, b.offset + at, b)
                if not np.array_equal(left, right):
                    return False
        finally:
            for fd in fds:
                os.close(fd)
        return True

    def _open(self, file: Path) -> int:
        fd = open_regular(file)
        if FileStamp.of(fd) != self._stamps[file]:
            os.close(fd)
            raise CheckpointError(f"{shown(file)} changed while it was being read; start again")
        return fd

    def _fill(self, fd: int, out: np.ndarray[Any, Any], offset: int, info: TensorInfo) -> None:
        """Read bytes [offset, offset + out.nbytes) into `out`."""
        view = out.view(np.uint8).data
        done = 0
        while done < len(view):
            try:
                got = os.preadv(fd, [view[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"{info.where}: {error.strerror}") from error
            if got == 0:
                raise CheckpointError(f"{info.where} was truncated while it was read")
            done += got


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
