"""The header of one .safetensors file, read and checked in full before any weight is.

Format: 8 bytes little-endian length N, N bytes of JSON {name: {dtype, shape, data_offsets}}, data.
Source: https://github.com/huggingface/safetensors, README, "Format".
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError, UnsupportedError, shown
from .files import FileStamp, no_collection, open_regular, parse_object

MAX_HEADER = 100_000_000
"""Bytes; the safetensors library refuses longer headers too."""

MAX_DIMS = 16

_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
_TOO_LARGE = 1 << 63

DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}


class TensorInfo(NamedTuple):
    """One tensor: `offset` is in bytes from the start of `file`, `nbytes` its length there."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def where(self) -> str:
        """How messages call it."""
        return f"{shown(self.file)}: tensor {shown(self.name)}"


def read_header(path: Path) -> tuple[dict[str, TensorInfo], FileStamp]:
    """All tensors of a .safetensors file, by name.

    Guarantees that every tensor lies inside the file, that its byte range has the length its
    dtype and shape imply, and that the ranges neither overlap nor leave a hole.

    Raises:
        CheckpointError: the file breaks any of this, or the safetensors library refuses it.
        UnsupportedError: a dtype that this version does not know.
    """
    fd = open_regular(path)
    try:
        stamp = FileStamp.of(fd)
        data, start = _header_bytes(fd, path, stamp.size)
    except OSError as error:
        raise CheckpointError(f"cannot read {shown(path)}: {error.strerror}") from error
    finally:
        os.close(fd)
    with no_collection():
        raw = parse_object(data, f"{shown(path)}: the header")
        _check_metadata(raw.pop("__metadata__", None), path)
        tensors = {name: _tensor_info(name, entry, path, start) for name, entry in raw.items()}
        _check_ranges(tensors.values(), path, start, stamp.size)
    # The library is the format's reference: whatever it refuses is refused here too.
    try:
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{shown(path)} is damaged: {shown(str(error))}") from error
    return tensors, stamp


def _header_bytes(fd: int, path: Path, size: int) -> tuple[bytes, int]:
    """The JSON bytes of the header and the offset at which the data begins."""
    head = os.pread(fd, 48, 0)
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{shown(path)} is a Git LFS pointer, not the weights; fetch them with: git lfs pull"
        )
    length = int.from_bytes(head[:8], "little")
    if len(head) < 8 or length > size - 8:
        raise CheckpointError(
            f"{shown(path)} is not a whole .safetensors file: {size} bytes do not hold the header"
            f" of {length if len(head) >= 8 else 8} bytes; download it again"
        )
    if length > MAX_HEADER:
        raise CheckpointError(
            f"{shown(path)}: a header of {length} bytes is over the limit of {MAX_HEADER}"
        )
    data = bytearray()
    while len(data) < length:
        piece = os.pread(fd, length - len(data), 8 + len(data))
        if not piece:
            raise CheckpointError(f"{shown(path)} was truncated while it was read")
        data += piece
    return bytes(data), 8 + length


def _check_metadata(metadata: Any, path: Path) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{shown(path)}: __metadata__ is not an object of strings")


def _tensor_info(name: str, entry: Any, file: Path, start: int) -> TensorInfo:
    """One checked entry of the header; `start` is where the data begins."""
    if not isinstance(entry, dict) or entry.keys() != _ENTRY_KEYS:
        raise _fault(file, name, "is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        what = f"tensor {shown(name)} has the unknown dtype {shown(dtype)}"
        raise UnsupportedError(f"{shown(file)}: {what}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS:
        raise _fault(file, name, f"has the bad shape {shown(shape)}")
    # Python's integers do not wrap: a product past 2^64 cannot pass for a small one.
    bits = DTYPE_BITS[dtype]
    for axis in shape:
        if type(axis) is not int or not 0 <= axis < _TOO_LARGE:
            raise _fault(file, name, f"has the bad shape {shown(shape)}")
        bits *= axis
    if not isinstance(offsets, list) or len(offsets) != 2:
        raise _fault(file, name, f"has the bad data_offsets {shown(offsets)}")
    begin, end = offsets
    if type(begin) is not int or type(end) is not int or not 0 <= begin <= end < _TOO_LARGE:
        raise _fault(file, name, f"has the bad data_offsets {shown(offsets)}")
    nbytes = end - begin
    if bits != nbytes * 8:
        takes = shown(-(-bits // 8), 40)
        raise _fault(file, name, f"has {nbytes} bytes, but {dtype} {shown(shape)} takes {takes}")
    return TensorInfo(name, file, dtype, tuple(shape), start + begin, nbytes)


def _fault(file: Path, name: str, what: str) -> CheckpointError:
    return CheckpointError(f"{shown(file)}: tensor {shown(name)} {what}")


def _check_ranges(infos: Iterable[TensorInfo], path: Path, start: int, size: int) -> None:
    """Ranges must tile the data exactly: from its start to the end of the file."""
    at = start
    for info in sorted(infos, key=lambda info: (info.offset, info.nbytes)):
        if info.offset != at:
            what = "overlaps the tensor before it" if info.offset < at else "follows a hole"
            raise CheckpointError(
                f"{shown(path)}: tensor {shown(info.name)} {what}"
                f" (it begins at byte {info.offset}, the one before ends at {at})"
            )
        at += info.nbytes
    if at > size:
        raise CheckpointError(
            f"{shown(path)} is truncated: its header promises {at} bytes, it has {size};"
            " download it again"
        )
    if at < size:
        raise CheckpointError(f"{shown(path)} has {size - at} bytes after its last tensor")
