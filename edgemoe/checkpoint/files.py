"""Small bounded reads of the files of a checkpoint, and strict JSON."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, shown

MIB = 1 << 20


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
