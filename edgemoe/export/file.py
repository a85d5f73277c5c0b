"""A GGUF file written in any order, at its final size from the start.

The gguf package's writer wants a tensor whole and opens the file itself; experts are stacked in
tensors of gigabytes, and a file of ours appears only when it is complete.

Source: ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType, TracebackType
from typing import TypeAlias

import numpy as np

from ..errors import UsageError
from ..layout import align_up
from ..store.file import AtomicFile, reporting, write_exactly
from ..types import U8

Value: TypeAlias = "str | bool | int | float | Sequence[str] | Sequence[int] | Sequence[float]"
"""str, bool, uint32, float32, or an array of str, int32 or float32."""

MAGIC = b"GGUF"
_VERSION = 3
_ALIGNMENT = 32

TYPES: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {"f32": (0, 1, 4), "f16": (1, 1, 2), "q8_0": (8, 32, 34)}
)
"""Type of a tensor -> (its number in the file, weights a block, bytes a block)."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of the file. shape: outermost axis first; the last is a whole number of blocks."""

    name: str
    shape: tuple[int, ...]
    type: str

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        _, weights, size = TYPES[self.type]
        return math.prod(self.shape) // weights * size


class GgufFile:
    """Writes a new GGUF file; a context manager. Nothing is at `path` until `commit` returns.

    Args:
        path: the file to make; an existing GGUF file is replaced at commit.
        metadata: key-values, in the order of the file.
        tensors: in the order of the file; their data is written later, at any offset.

    Raises:
        OutputError: the place is not writable or has no room; nothing is left behind. Every method
            that writes raises it too.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        metadata: Mapping[str, Value],
        tensors: Sequence[TensorSpec],
    ) -> None:
        self._starts: dict[str, int] = {}
        self._left = {t.name: t.nbytes for t in tensors}
        at = 0
        infos = []
        for t in tensors:
            number, weights, _ = TYPES[t.type]
            if t.name in self._starts or t.shape[-1] % weights:
                raise UsageError(f"tensor {t.name} of shape {t.shape} cannot be {t.type}")
            dims = struct.pack(f"<I{len(t.shape)}Q", len(t.shape), *reversed(t.shape))
            infos.append(_string(t.name) + dims + struct.pack("<IQ", number, at))
            self._starts[t.name] = at
            at += align_up(t.nbytes, _ALIGNMENT)
        keys = [_string(key) + _typed(value) for key, value in metadata.items()]
        head = MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))
        head = b"".join([head, *keys, *infos])
        self._data = align_up(len(head), _ALIGNMENT)
        self.size = self._data + at
        self._file = AtomicFile(path, MAGIC)
        try:
            with reporting(self._file.where, self._file.fd, self.size):
                os.posix_fallocate(self._file.fd, 0, self.size)
                write_exactly(self._file.fd, memoryview(head), 0)
        except BaseException:
            self._file.discard()
            raise

    def write(self, name: str, offset: int, data: U8) -> None:
        """Write bytes of a tensor at this offset in it; every byte once, in any order."""
        self._left[name] -= data.size
        with reporting(self._file.where, self._file.fd, self.size):
            write_exactly(self._file.fd, data.data, self._data + self._starts[name] + offset)

    def commit(self) -> None:
        """Bring all to the disk and give the file its name. UsageError if bytes are missing."""
        missing = [name for name, left in self._left.items() if left]
        if missing:
            raise UsageError(f"tensor {missing[0]} was not written to its end")
        with reporting(self._file.where, self._file.fd, self.size):
            self._file.commit()

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.discard()


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _typed(value: Value) -> bytes:
    """A value behind the number of its type."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    first = value[0] if value else ""
    of, data = 8, b""
    if isinstance(first, str):
        data = b"".join(_string(str(v)) for v in value)
    elif isinstance(first, float):
        of, data = 6, np.array(value, "<f4").tobytes()
    else:
        of, data = 5, np.array(value, "<i4").tobytes()
    return struct.pack("<IIQ", 9, of, len(value)) + data
