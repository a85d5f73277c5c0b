"""The header of one GGUF file: metadata and tensor table, checked before any weight is read.

Format, all little-endian: "GGUF", u32 version, u64 tensors, u64 key-values; the key-values (string
key, u32 type, value); the tensors (string name, u32 axes, u64 lengths with the innermost first, u32
type, u64 offset from the data); padding to the alignment; the data. A string is a u64 length and
UTF-8. Source: https://github.com/ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import CheckpointError, UnsupportedError, shown
from ..kernels import GGML_BLOCKS
from .files import FileStamp, no_collection, open_regular
from .gguf_source import GgufSource

MAGIC = b"GGUF"
VERSIONS = (2, 3)

MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 16
MAX_NAME = 64
"""Bytes of a tensor's name; ggml has no longer ones."""
MAX_ALIGNMENT = 1 << 24

TYPE_NAMES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    4: "Q4_2",
    5: "Q4_3",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    30: "BF16",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
}
"""ggml's tensor types by number (ggml.h, enum ggml_type); GGML_BLOCKS has those that are read."""


class GgufTensor(NamedTuple):
    """One tensor: `offset` is in bytes from the start of `file`, `nbytes` its length there.

    type: one of GGML_BLOCKS. shape: outermost axis first.
    """

    name: str
    file: Path
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def where(self) -> str:
        """How messages call it."""
        return f"{shown(self.file)}: tensor {shown(self.name)}"


class GgufHeader(NamedTuple):
    """What stands before a file's data. metadata: str, int, float, bool, or a list of one kind."""

    path: Path
    stamp: FileStamp
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf_header(path: Path) -> GgufHeader:
    """Metadata and tensors of a GGUF file.

    Guarantees that every tensor lies inside the file, aligned, in whole blocks of its type, and
    that no two overlap. Takes time and memory in proportion to the header, which is limited.

    Raises:
        CheckpointError: the file breaks any of this, or is damaged or truncated.
        UnsupportedError: another version or byte order, a tensor type that is not read, an array
            of arrays, or a header over the limits.
    """
    fd = open_regular(path)
    try:
        stamp = FileStamp.of(fd)
        with no_collection():
            source = GgufSource(fd, path, stamp.size)
            tensors, keys = _begin(source)
            metadata = _metadata(source, keys)
            infos = _tensors(source, tensors, _alignment(metadata, path))
            _check_ranges(infos.values(), path)
    except OSError as error:
        raise CheckpointError(f"cannot read {shown(path)}: {error.strerror}") from error
    finally:
        os.close(fd)
    return GgufHeader(path, stamp, metadata, infos)


def _begin(source: GgufSource) -> tuple[int, int]:
    """The number of tensors and of key-values."""
    name = shown(source.path)
    head = source.take(min(24, source.size))
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{name} is a Git LFS pointer, not the model; fetch it with: git lfs pull"
        )
    if not head.startswith(MAGIC):
        raise CheckpointError(f"{name} is not a GGUF file: it does not begin with GGUF")
    if len(head) < 24:
        raise CheckpointError(f"{name} is not a whole GGUF file: it has {len(head)} bytes")
    version = int.from_bytes(head[4:8], "little")
    if version not in VERSIONS:
        if 0 < int.from_bytes(head[4:8], "big") <= max(VERSIONS):
            raise UnsupportedError(f"{name} is a big-endian GGUF; only little-endian ones are read")
        raise UnsupportedError(
            f"{name} is GGUF version {version}; only versions"
            f" {' and '.join(map(str, VERSIONS))} are read"
        )
    tensors, keys = struct.unpack("<QQ", head[8:])
    for count, most, what in ((tensors, MAX_TENSORS, "tensors"), (keys, MAX_KEYS, "keys")):
        if count > most:
            raise UnsupportedError(f"{name} is said to have {count} {what}; the limit is {most}")
    return tensors, keys


def _metadata(source: GgufSource, count: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for i in range(count):
        key = source.string(f"key {i}")
        if not key or key in out:
            raise source.fault(f"key {i}, {shown(key)}, {'appears twice' if key else 'is empty'}")
        out[key] = source.value(source.u32(), shown(key))
    return out


def _alignment(metadata: dict[str, Any], path: Path) -> int:
    """Offsets of tensors are multiples of this."""
    value = metadata.get("general.alignment", 32)
    if type(value) is not int or not 0 < value <= MAX_ALIGNMENT or value & (value - 1):
        raise CheckpointError(
            f"{shown(path)}: general.alignment is {shown(value)}; it must be a power of two up to"
            f" {MAX_ALIGNMENT}"
        )
    return value


def _tensors(source: GgufSource, count: int, alignment: int) -> dict[str, GgufTensor]:
    entries: list[tuple[str, str, tuple[int, ...], int]] = []
    names: set[str] = set()
    for i in range(count):
        name = source.string(f"the name of tensor {i}")
        if not name or name in names or len(name.encode()) > MAX_NAME:
            why = "appears twice" if name in names else f"is not of 1 to {MAX_NAME} bytes"
            raise source.fault(f"the name of tensor {i}, {shown(name)}, {why}")
        names.add(name)
        axes = source.u32()
        if not 1 <= axes <= 4:
            raise source.fault(f"tensor {shown(name)} has {axes} axes; it must have 1 to 4")
        shape = struct.unpack(f"<{axes}Q", source.take(8 * axes))[::-1]
        number, offset = source.u32(), source.u64()
        kind = TYPE_NAMES.get(number, f"number {number}")
        if kind not in GGML_BLOCKS:
            raise UnsupportedError(
                f"{shown(source.path)}: tensor {shown(name)}: type {kind} is not supported;"
                f" supported: {', '.join(GGML_BLOCKS)}"
            )
        entries.append((name, kind, shape, offset))
    start = -(-source.offset // alignment) * alignment
    out = {}
    for name, kind, shape, offset in entries:
        if offset % alignment:
            raise source.fault(
                f"tensor {shown(name)} is at offset {offset}, not a multiple of the alignment of"
                f" {alignment}"
            )
        nbytes = _size(source, name, kind, shape)
        end = start + offset + nbytes
        if end > source.size:
            raise source.fault(
                f"tensor {shown(name)} ends at byte {shown(end, 40)}, the file at {source.size}"
            )
        out[name] = GgufTensor(name, source.path, kind, shape, start + offset, nbytes)
    return out


def _size(source: GgufSource, name: str, kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor that is not empty and whose rows are whole blocks."""
    weights, size = GGML_BLOCKS[kind]
    # Python's integers do not wrap: a product past 2^64 cannot pass for a small one.
    total = math.prod(shape)
    if total == 0:
        raise source.fault(f"tensor {shown(name)} has the empty shape {list(shape)}")
    if shape[-1] % weights:
        raise source.fault(
            f"tensor {shown(name)} has rows of {shape[-1]} weights, not whole {kind} blocks of"
            f" {weights}"
        )
    return total // weights * size


def _check_ranges(tensors: Iterable[GgufTensor], path: Path) -> None:
    """No two tensors may share a byte."""
    end, before = 0, ""
    for info in sorted(tensors, key=lambda info: info.offset):
        if info.offset < end:
            raise CheckpointError(
                f"{shown(path)}: tensor {shown(info.name)} overlaps {shown(before)}; the file is"
                " damaged: download it again"
            )
        end, before = info.offset + info.nbytes, info.name
