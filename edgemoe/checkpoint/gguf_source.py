"""A GGUF file from its start on: numbers, strings and arrays, each checked before it is read.

A count in a file is never trusted: nothing is allocated that the file's own bytes do not fill, and
bytes and values are limited.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError, UnsupportedError, shown
from .files import MIB

MAX_HEADER = 64 * MIB
MAX_VALUES = 1 << 21
"""Elements of all arrays together; a vocabulary of 262,144 with its merges has 1.3 million."""

_CHUNK = 1 * MIB
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "<u1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
"""Type number of a value -> NumPy's name; 7 is bool, of one byte."""
_BOOL = 7
_U64 = struct.Struct("<Q")


class GgufSource:
    """The file from its start on, read in chunks; every length is checked against what is there."""

    def __init__(self, fd: int, path: Path, size: int) -> None:
        self._fd = fd
        self.path = path
        self.size = size
        self._buffer = b""
        self._at = 0
        self._base = 0  # offset in the file of the buffer's first byte
        self._values = 0

    @property
    def offset(self) -> int:
        """Where the next byte stands in the file."""
        return self._base + self._at

    def fault(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{shown(self.path)}: {what}; the file is damaged: download it again"
        )

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        self._need(count)
        self._at += count
        return self._buffer[self._at - count : self._at]

    def _need(self, count: int) -> None:
        """Have at least `count` bytes in the buffer."""
        if self._at + count <= len(self._buffer):
            return
        end = self.offset + count
        if end > self.size:
            raise self.fault(
                f"its header goes on to byte {shown(end, 40)} at least, the file ends at"
                f" {self.size}"
            )
        if end > MAX_HEADER:
            raise UnsupportedError(
                f"{shown(self.path)}: a header of {shown(end, 40)} bytes or more is over the limit"
                f" of {MAX_HEADER}"
            )
        kept = self._buffer[self._at :]
        self._base += self._at
        self._at = 0
        want = min(max(count, _CHUNK), self.size - self._base) - len(kept)
        pieces = [kept]
        while want > 0:
            piece = os.pread(self._fd, want, self._base + sum(map(len, pieces)))
            if not piece:
                raise CheckpointError(f"{shown(self.path)} was truncated while it was read")
            pieces.append(piece)
            want -= len(piece)
        self._buffer = b"".join(pieces)

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def u64(self) -> int:
        return int.from_bytes(self.take(8), "little")

    def string(self, what: str) -> str:
        """A length and as many bytes of UTF-8; `what` says of what, in messages."""
        data = self.take(self.u64())
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fault(f"{what} is not UTF-8: bad byte at {error.start}") from error

    def strings(self, count: int, what: str) -> list[str]:
        """`count` strings, in a tight loop: vocabularies are long."""
        out: list[str] = []
        unpack = _U64.unpack_from
        buffer, at = self._buffer, self._at
        try:
            while len(out) < count:
                if at + 8 <= len(buffer) and (end := at + 8 + unpack(buffer, at)[0]) <= len(buffer):
                    out.append(buffer[at + 8 : end].decode("utf-8"))
                    at = end
                else:
                    self._at = at
                    out.append(self.string(f"element {len(out)} of {what}"))
                    buffer, at = self._buffer, self._at
        except UnicodeDecodeError as error:
            raise self.fault(
                f"element {len(out)} of {what} is not UTF-8: bad byte at {error.start}"
            ) from error
        self._at = at
        return out

    def scalars(self, kind: int, count: int, what: str) -> list[Any]:
        """`count` numbers or booleans of a type of _SCALARS."""
        dtype = np.dtype(_SCALARS[kind])
        values = np.frombuffer(self.take(count * dtype.itemsize), dtype)
        if kind == _BOOL:
            if values.size and int(values.max()) > 1:
                raise self.fault(f"{what} is a boolean of value {int(values.max())}, not 0 or 1")
            values = values.astype(np.bool_)
        out: list[Any] = values.tolist()
        return out

    def value(self, kind: int, what: str) -> Any:
        """The value of a key."""
        if kind == _STRING:
            return self.string(what)
        if kind in _SCALARS:
            return self.scalars(kind, 1, what)[0]
        if kind != _ARRAY:
            raise self.fault(f"{what} has the unknown type {kind}")
        kind, count = self.u32(), self.u64()
        if kind == _ARRAY:
            raise UnsupportedError(
                f"{shown(self.path)}: {what} is an array of arrays, which no known key is"
            )
        if kind != _STRING and kind not in _SCALARS:
            raise self.fault(f"{what} is an array of the unknown type {kind}")
        least = 8 if kind == _STRING else np.dtype(_SCALARS[kind]).itemsize
        if count * least > self.size - self.offset:
            raise self.fault(
                f"{what} is said to have {shown(count, 40)} elements, more than fit in the rest of"
                " the file"
            )
        self._values += count
        if self._values > MAX_VALUES:
            raise UnsupportedError(
                f"{shown(self.path)}: with {what} the arrays of the metadata have {self._values}"
                f" elements, over the limit of {MAX_VALUES}"
            )
        return self.strings(count, what) if kind == _STRING else self.scalars(kind, count, what)
