"""Reference distributions on disk: one file a (checkpoint, windows) pair, whole or not there.

    magic, then for every scored row of every window:
        ids [k] uint16 or uint32, logp [k] float16, rest float64, true_logp float32
    then the CRC32C of all before it, uint32; everything little-endian and packed

A row's k and the width of its ids follow from the vocabulary, the number of rows from the windows;
both are part of the file's name, a hash that also covers the checkpoint's files.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from types import TracebackType

import numpy as np

from .checkpoint import Checkpoint
from .closing import Closing
from .errors import OutputError, StoreError, shown
from .evaluate import ReferenceRows, Window
from .kernels import crc32c
from .store.file import AtomicFile, crc_of_file, read_exactly, reporting, write_exactly
from .types import U8

MAGIC = b"EDGEMOE-REF\0\x03\0\0\0"
_CRC = 4


def directory() -> Path:
    """Where reference distributions are kept: $XDG_CACHE_HOME/edgemoe/reference."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "edgemoe" / "reference"


def path_for(checkpoint: Checkpoint, todo: Sequence[Window], kept: int) -> Path:
    """The file of these windows and this checkpoint, of which `kept` tokens a row are kept."""
    digest = hashlib.sha256(MAGIC)
    for file in checkpoint.fingerprint_files():
        stat = file.stat()
        digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    digest.update(f"{checkpoint.config!r} {kept}\n".encode())
    for window in todo:
        digest.update(f"{window.first} {len(window.tokens)}\n".encode())
        digest.update(window.tokens.tobytes())
    return directory() / f"{digest.hexdigest()[:32]}.ref"


def row_type(vocab: int, kept: int) -> np.dtype[np.void]:
    """A row of the file; `kept` is at most the vocabulary."""
    ids = "<u2" if vocab <= 1 << 16 else "<u4"
    k = min(kept, vocab)
    return np.dtype([("ids", ids, (k,)), ("logp", "<f2", (k,)), ("rest", "<f8"), ("true", "<f4")])


class ReferenceFile(Closing):
    """The rows of a file, read from disk as they are asked for. Close it, or use it in a `with`."""

    def __init__(self, path: Path, fd: int, row: np.dtype[np.void], counts: Sequence[int]) -> None:
        self._where, self._fd, self._row = shown(path), fd, row
        self._first = [0, *accumulate(counts)]

    @classmethod
    def open(
        cls, path: Path, row: np.dtype[np.void], counts: Sequence[int]
    ) -> ReferenceFile | None:
        """The file if it is there and whole, else None. counts: scored rows of each window."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            return None
        body = len(MAGIC) + sum(counts) * row.itemsize
        try:
            if os.fstat(fd).st_size == body + _CRC:
                tail = np.empty(_CRC, np.uint8)
                read_exactly(fd, tail.data, body, "")
                if crc_of_file(fd, 0, body, "") == int(tail.view("<u4")[0]):
                    return cls(path, fd, row, counts)
        except StoreError:
            pass  # not readable: it is made again
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        return None

    def rows(self, window: int, first: int, stop: int) -> ReferenceRows:
        """Scored rows [first, stop) of a window.

        Raises:
            StoreError: the file cannot be read any more.
        """
        out = np.empty(stop - first, self._row)
        at = len(MAGIC) + (self._first[window] + first) * self._row.itemsize
        read_exactly(self._fd, out.view(np.uint8).data, at, self._where)
        return ReferenceRows(out["ids"], out["logp"], out["rest"], out["true"])

    def close(self) -> None:
        """Close the file; twice is fine."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class ReferenceWriter:
    """Writes rows in order under a temporary name; leaving the `with` gives the file its own.

    Nothing is left behind if the `with` ends by an exception; what a killed process leaves, the
    next writer of the same file removes.

    Raises:
        OutputError: the directory cannot be made or written to, or the disk is full.
    """

    def __init__(self, path: Path, row: np.dtype[np.void]) -> None:
        self._where, self._row = shown(path), row
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                path.unlink()  # it is there, but not whole
        except OSError as exc:
            raise OutputError(
                f"cannot keep the reference in {shown(path.parent)}: {exc.strerror}; set "
                "XDG_CACHE_HOME to a directory with room"
            ) from None
        self._file = AtomicFile(path, MAGIC)
        self._crc = self._size = 0

    def __enter__(self) -> ReferenceWriter:
        self._write(np.frombuffer(MAGIC, np.uint8))
        return self

    def add(self, rows: ReferenceRows) -> None:
        """Append rows."""
        out = np.empty(len(rows.rest), self._row)
        out["ids"], out["logp"], out["rest"], out["true"] = (
            rows.ids,
            rows.logp,
            rows.rest,
            rows.true_logp,
        )
        self._write(out.view(np.uint8))

    def _write(self, data: U8) -> None:
        with reporting(self._where):
            write_exactly(self._file.fd, data.data, self._size)
        self._size += data.size
        self._crc = crc32c(data, self._crc)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                with reporting(self._where):
                    self._write(np.array([self._crc], "<u4").view(np.uint8))
                    self._file.commit()
        finally:
            self._file.discard()
