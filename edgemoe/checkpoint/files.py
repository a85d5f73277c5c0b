"""Reads of the files of a checkpoint: small ones whole, weights in place; and strict JSON."""

from __future__ import annotations

import gc
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError, shown
from ..types import F32

MIB = 1 << 20


@dataclass(frozen=True)
class FileStamp:
    """What tells that a file is still the one whose header was checked."""

    size: int
    mtime_ns: int
    inode: int

    @staticmethod
    def of(fd: int) -> FileStamp:
        """Stamp of an open file."""
        now = os.fstat(fd)
        return FileStamp(now.st_size, now.st_mtime_ns, now.st_ino)


def open_regular(path: Path) -> int:
    """A read-only file descriptor of a regular file (or a link to one).

    Raises CheckpointError, saying why, where it is missing, unreadable or something else, such as
    a directory or a pipe (which is never waited on).
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(f"cannot read {shown(path)}: {reason}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CheckpointError(f"cannot read {shown(path)}: it is not a regular file")
    return fd


def open_unchanged(path: Path, stamp: FileStamp) -> int:
    """As `open_regular`, for a file that must still be the one of that stamp."""
    fd = open_regular(path)
    if FileStamp.of(fd) != stamp:
        os.close(fd)
        raise CheckpointError(f"{shown(path)} changed while it was being read; start again")
    return fd


def read_into(fd: int, out: np.ndarray[Any, Any], offset: int, where: str) -> None:
    """Fill `out` with the file's bytes [offset, offset + out.nbytes), read for `where`."""
    view = out.view(np.uint8).data
    done = 0
    while done < len(view):
        try:
            got = os.preadv(fd, [view[done:]], offset + done)
        except OSError as error:
            raise CheckpointError(f"{where}: {error.strerror}") from error
        if got == 0:
            raise CheckpointError(f"{where} was truncated while it was read")
        done += got


def drop_cached(fd: int, offset: int, size: int) -> None:
    """Let go of bytes that were read once: keeping them cached would push other files out."""
    with suppress(OSError):
        os.posix_fadvise(fd, offset, size, os.POSIX_FADV_DONTNEED)


def require_finite(values: F32, first: int, columns: int, where: str) -> None:
    """Raise CheckpointError where one of `values` is NaN or infinite.

    values: float32, flat; the first is number `first` of a matrix with so many `columns`.
    """
    sound = np.isfinite(values)
    if not sound.all():
        bad = int(np.argmin(sound))
        row, column = divmod(first + bad, columns)
        raise CheckpointError(
            f"{where} holds {values[bad]:g} at row {row}, column {column};"
            " the checkpoint is damaged or its training diverged"
        )


@contextmanager
def no_collection() -> Iterator[None]:
    """Pause the cyclic collector: parsing makes many objects, no cycles, and walking them costs."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def read_small(path: Path, limit: int) -> bytes:
    """All bytes of a file that has no business being larger than `limit` bytes."""
    fd = open_regular(path)
    with open(fd, "rb") as file:
        if os.fstat(fd).st_size > limit:
            raise CheckpointError(
                f"{shown(path)} is larger than {limit // MIB} MiB: it cannot be what its name says"
            )
        try:
            return file.read()
        except OSError as error:
            raise CheckpointError(f"cannot read {shown(path)}: {error.strerror}") from error


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `data`, called `where` in messages.

    Stricter than the json module: UTF-8 only, no duplicate keys, no NaN or Infinity.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) == len(pairs):
            return out
        # Taking each pair's key out once leaves only the later ones of those given twice.
        twice = [key for key, _ in pairs if out.pop(key, out) is out]
        raise CheckpointError(f"{where}: the key {shown(twice[0])} appears twice")

    def constant(name: str) -> Any:
        raise CheckpointError(f"{where}: {name} is not a JSON number")

    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where} is not UTF-8: bad byte at {error.start}") from error
    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=constant)
    except RecursionError as error:
        raise CheckpointError(f"{where} is not valid JSON: nested too deeply") from error
    except ValueError as error:
        raise CheckpointError(f"{where} is not valid JSON: {shown(str(error))}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is not a JSON object")
    return value
