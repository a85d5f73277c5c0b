"""One exception tree.

    EdgeMoEError              exit code 1
    ├── UsageError            a setting the caller gave is wrong; exit code 2
    ├── CheckpointError       a source checkpoint is missing, damaged or inconsistent
    │   └── UnsupportedError  it is sound, but asks for something edgemoe does not do
    ├── StoreError            a store is missing, damaged or of another version
    │   └── ChecksumError     bytes read differ from bytes written
    ├── MemoryBudgetError     the ceiling is below what the work needs; carries the figures
    ├── OutputError           a result could not be written (disk full, no permission)
    └── KernelError           an array of the wrong dtype, shape or stride reached a kernel

Messages are one line: what is wrong, where, and what to do about it.
"""

from __future__ import annotations

from pathlib import PurePath


def shown(value: object, limit: int = 160) -> str:
    """`value` as one printable line, for use inside a message.

    Text and paths stand as they are where they are printable; everything else goes through repr.
    Names and values come from files nobody vouches for: they may hold newlines or be huge, so all
    but paths is cut to `limit` characters.
    """
    text = str(value) if isinstance(value, (str, PurePath)) else repr(value)
    if not text.isprintable():
        text = repr(text)
    if len(text) <= limit or isinstance(value, PurePath):
        return text
    return f"{text[: limit - 3]}..."


class EdgeMoEError(Exception):
    """Base of every error edgemoe raises on purpose."""

    exit_code = 1


class UsageError(EdgeMoEError, ValueError):
    """A setting or argument is out of range or contradicts another."""

    exit_code = 2


class CheckpointError(EdgeMoEError):
    """A source checkpoint cannot be read as what it claims to be."""


class UnsupportedError(CheckpointError):
    """A sound checkpoint asks for a family, option or dtype that edgemoe does not implement."""


class StoreError(EdgeMoEError):
    """A store cannot be opened or breaks the format (docs/FORMAT.md)."""


class ChecksumError(StoreError):
    """Stored bytes do not match their CRC32C."""


class MemoryBudgetError(EdgeMoEError, MemoryError):
    """The memory ceiling is too low.

    Attributes:
        needed_bytes: the smallest ceiling that would do.
        budget_bytes: the ceiling that was given.
    """

    def __init__(self, message: str, *, needed_bytes: int, budget_bytes: int) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes
        self.budget_bytes = budget_bytes


class OutputError(EdgeMoEError):
    """A file could not be written; nothing of it is left behind."""


class KernelError(EdgeMoEError, ValueError):
    """An array handed to a kernel has the wrong dtype, shape or memory layout."""
