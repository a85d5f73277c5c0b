"""Reads of a file, queued and several in flight, each verified (native/reader.h).

EDGEMOE_IO=uring|threads forces an engine; the default is io_uring where the kernel allows it, and a
pool of threads elsewhere. Both deliver the same bytes.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np

from ..closing import Closing
from ..errors import KernelError, UsageError
from ..types import U8, U64
from . import dispatch

ENGINES = ("uring", "threads")
BLOCK = 4096
"""Offsets, sizes and addresses at multiples of this are read straight to their place (O_DIRECT)."""
MAX_DEPTH = 256
MAX_CHUNK = 1 << 30

OK, DAMAGED, FAILED, TRUNCATED = range(4)
"""How a read ended: verified, not the bytes of its CRC, refused, beyond the end of the file."""

_TIMEOUT, _UNKNOWN, _DUPLICATE, _FULL, _INVALID, _CLOSED = range(1, 7)
_OUTSIDE = -1
_COLUMNS = 6


class Landed(NamedTuple):
    """A read that has ended.

    tag: the caller's. status: OK, DAMAGED, FAILED or TRUNCATED. errno: if it failed. at: byte of
    the file where it failed, where the damaged read begins, or where the file ends. begun_ns,
    ended_ns: when the first read of the file that served it began and when the last ended, before
    it was verified; nanoseconds of time.monotonic_ns.
    """

    tag: int
    status: int
    errno: int
    at: int
    begun_ns: int
    ended_ns: int


class Reader(Closing):
    """A queue of reads of one file.

    Reads start in order of priority (lower first), then of submission; they may end in any order.
    Neighbours in the file and the order are read at once, large ones in pieces. Memory that a read
    may write to is kept alive until the read is collected, taken back, or the reader closed. Any
    thread may call; calls that block release the GIL and answer to signals within 0.1 s.

    Args:
        fd: of the file; the reader opens it again and does not need it afterwards.
        depth: reads in flight at most, 1 to MAX_DEPTH.
        chunk: longest single read in bytes, a multiple of BLOCK.
        capacity: reads queued, in flight or not yet collected, at most.
        direct: pass the page cache by where the file system allows it; where it does not, or where
            this is False, pages that were read are dropped from it.
        bytes_per_second: limit on what is read; 0 is none.
        engine: "uring" or "threads"; None takes EDGEMOE_IO, or the best there is.

    Raises:
        UsageError: an option out of range, or an engine this machine does not have.
    """

    def __init__(
        self,
        fd: int,
        *,
        depth: int = 8,
        chunk: int = 1 << 20,
        capacity: int = 4096,
        direct: bool = True,
        bytes_per_second: float = 0.0,
        engine: str | None = None,
    ) -> None:
        if not 1 <= depth <= MAX_DEPTH:
            raise UsageError(f"reads in flight must be 1 to {MAX_DEPTH}, got {depth}")
        if not 0 < chunk <= MAX_CHUNK or chunk % BLOCK:
            raise UsageError(
                f"the longest read must be a multiple of {BLOCK} up to {MAX_CHUNK} bytes, "
                f"got {chunk}"
            )
        if not 1 <= capacity <= 1 << 24:
            raise UsageError(f"a queue holds 1 to {1 << 24} reads, got {capacity}")
        if not 0 <= bytes_per_second < float("inf"):
            raise UsageError(f"a limit on reading must be 0 or more, got {bytes_per_second}")
        setting = f"engine {engine}"
        if engine is None:
            engine = os.environ.get("EDGEMOE_IO", "")
            setting = f"EDGEMOE_IO={engine}"
        if engine not in ("", *ENGINES):
            raise UsageError(f"{setting}: must be {' or '.join(ENGINES)}")
        try:
            self._native = dispatch.native.Reader(
                fd, engine, depth, capacity, direct, chunk, bytes_per_second
            )
        except OSError as exc:
            if engine != "uring":
                raise
            raise UsageError(
                f"{setting}: io_uring cannot be used here ({exc.strerror}); use threads"
            ) from exc

    def submit(self, memory: U8, reads: U64, priority: int = 0) -> None:
        """Queue reads, all or none.

        Args:
            memory: uint8 [bytes], writable; where all of them go.
            reads: uint64 [n, 6]; of each: offset and size in the file, CRC32C, the byte of `memory`
                it begins at, room there, tag. Up to `room` bytes are written, `size` of which mean
                anything. A read is direct, without a copy, if the address and the offset are
                multiples of BLOCK and the room is, too. Tags differ for all not yet collected.
            priority: of all; lower is sooner.

        Raises:
            KernelError: a wrong array, a size of 0 or beyond its room, a room outside `memory`.
            UsageError: a tag is in use, more than `capacity`, or the reader is closed.
        """
        dispatch.check("memory", memory, np.uint8, None)
        dispatch.check("reads", reads, np.uint64, None, _COLUMNS)
        if not memory.flags.writeable:
            raise KernelError("memory: expected a writable array")
        code = self._native.submit(memory, reads, priority)
        if code == _OUTSIDE:
            raise KernelError(f"reads: a room lies outside the {memory.size} bytes of memory")
        if code == _INVALID:
            raise KernelError("reads: expected sizes of 1 to the room, and offsets within a file")
        if code == _DUPLICATE:
            raise UsageError("a tag is in use by a read that is not collected yet")
        if code == _FULL:
            raise UsageError(f"no place for {len(reads)} more reads: collect some first")
        self._require(code, 0)

    def cancel(self, tag: int) -> bool:
        """Whether the read was still waiting, and is forgotten; else it goes on and will land.

        Raises:
            UsageError: there is no such read, or the reader is closed.
        """
        code, waited = self._native.cancel(tag)
        self._require(code, tag)
        return waited

    def reprioritise(self, tag: int, priority: int) -> bool:
        """Whether the read was still waiting, and has the new priority; errors as `cancel`."""
        code, waited = self._native.reprioritise(tag, priority)
        self._require(code, tag)
        return waited

    def cancel_all(self) -> None:
        """Forget all reads that wait; of those begun, what is not in flight is not read any more.

        The latter are collected as ever, FAILED with errno.ECANCELED if anything of them is
        missing. Raises UsageError if the reader is closed.
        """
        self._require(self._native.cancel_all(), 0)

    def wait(self, tag: int | None = None, seconds: float = 0.0) -> Landed | None:
        """Collect the read with this tag, or the one that ended first of all; None if none has.

        Args:
            tag: None: any.
            seconds: how long to wait for it; 0 takes only what has ended.

        Raises:
            UsageError: there is no such read (a tag was given), or the reader is closed.
        """
        code, *landed = self._native.wait(tag, seconds)
        if code == _TIMEOUT or (code == _UNKNOWN and tag is None):
            return None
        self._require(code, tag or 0)
        return Landed(*landed)

    def stats(self) -> dict[str, Any]:
        """Counters since the start.

        bytes_read (from the file: rounding and gaps included), bytes_verified (of reads that
        arrived), bytes_copied (through a buffer, not being aligned), reads (calls of the system),
        retries; seconds busy_s (at least one read in flight), waited_s (in `wait`), verify_s
        (processor time of checksums). Of now: in_flight (calls), waiting (reads not begun),
        oldest_s (age of the oldest call in flight), memory_bytes (of the reader itself), direct
        (the page cache is passed by), engine.
        """
        return self._native.stats()

    def close(self) -> None:
        """Forget what waits, wait for what is in flight, let memory go; twice is fine."""
        self._native.close()

    def _require(self, code: int, tag: int) -> None:
        if code == _CLOSED:
            raise UsageError("the reader is closed")
        if code == _UNKNOWN:
            raise UsageError(f"no read has the tag {tag}, or it was collected")
