"""Segments of a store on their way into memory: the read queue in the store's terms."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..closing import Closing
from ..errors import EdgeMoEError, StoreError, UsageError, shown
from ..kernels import reader
from ..kernels.reader import Landed, Reader
from ..store import Store
from ..types import U8, PlaneRef

STALL_S = 8.0
"""A single read in flight for longer is an error."""
_LOOK = 1 / 16
"""Part of that time after which a wait looks for such a read."""


class Read(NamedTuple):
    """A segment to read: its place in the store, the byte of the memory it goes to, the bytes that
    may be overwritten there (of which ref.size will mean something), and the caller's tag."""

    ref: PlaneRef
    at: int
    room: int
    tag: int


class Arrival(NamedTuple):
    """A segment that has landed: its tag; when the first read of the file that served it began and
    the last ended, in nanoseconds of time.monotonic_ns."""

    tag: int
    begun_ns: int
    ended_ns: int


class ReadQueue(Closing):
    """Reads of one store. `Reader` says in which order they go and what may be called when.

    After a call that Ctrl-C interrupted only `drain` and `close` may follow: it may have collected
    a read that nobody was told of.

    Args:
        store: open; its file may be unlinked.
        depth: reads in flight at most.
        chunk: longest single read in bytes.
        capacity: segments queued, in flight or not yet collected, at most.
        limit: bytes a second to read at most; 0 is no limit.
        engine: "uring" or "threads"; None takes EDGEMOE_IO, or the best there is.
        stall: seconds one read of the file may take.

    Raises:
        UsageError: an option out of range.
    """

    def __init__(
        self,
        store: Store,
        *,
        depth: int = 8,
        chunk: int = 1 << 20,
        capacity: int = 4096,
        limit: float = 0.0,
        engine: str | None = None,
        stall: float = STALL_S,
    ) -> None:
        self._store = store
        self._stall = stall
        self._refs: dict[int, PlaneRef] = {}
        self._lock = threading.Lock()  # what is submitted is known before it can be collected
        self._reader = Reader(
            store.fileno(),
            depth=depth,
            chunk=chunk,
            capacity=capacity,
            bytes_per_second=limit,
            engine=engine,
        )

    def submit(self, memory: U8, reads: Sequence[Read], priority: int = 0) -> None:
        """Queue reads into `memory`, uint8 [bytes], all or none; lower priorities go first.

        Raises:
            KernelError: a room too small or outside the memory. UsageError: a tag in use, or more
            reads than the queue holds.
        """
        rows = [(r.ref.offset, r.ref.size, r.ref.crc32c, r.at, r.room, r.tag) for r in reads]
        table = np.array(rows, np.uint64).reshape(-1, 6)
        with self._lock:
            # Known before they are queued: `drain` has to find them even if Ctrl-C comes between.
            new = {r.tag: r.ref for r in reads if r.tag not in self._refs}
            self._refs.update(new)
            try:
                self._reader.submit(memory, table, priority)
            except EdgeMoEError:
                for tag in new:
                    del self._refs[tag]
                raise

    def cancel(self, tag: int) -> bool:
        """Whether the read was still waiting, and is forgotten; else it will land all the same.

        Raises:
            UsageError: there is no such read.
        """
        with self._lock:
            waited = self._reader.cancel(tag)
            if waited:
                del self._refs[tag]
        return waited

    def reprioritise(self, tag: int, priority: int) -> bool:
        """Whether the read was still waiting, and has the new priority; errors as `cancel`."""
        return self._reader.reprioritise(tag, priority)

    def poll(self) -> Arrival | None:
        """A read that has landed, the first of all; None if none has. Errors as `wait`."""
        landed = self._reader.wait()
        return None if landed is None else self._collect(landed)

    def wait_any(self) -> Arrival | None:
        """The next read to land; None if none is left to wait for. Errors as `wait`."""
        while self._refs:
            landed = self._reader.wait(None, self._stall * _LOOK)
            if landed is not None:
                return self._collect(landed)
            self._refuse_stall()
        return None

    def wait(self, tag: int) -> Arrival:
        """Wait until the read with this tag has landed.

        Raises:
            ChecksumError: the bytes differ from those written; names the segment.
            StoreError: the file ends early, cannot be read, or a read stalls.
            UsageError: there is no such read.
        """
        return self._collect(self._await(tag))

    def drain(self) -> tuple[list[int], list[int]]:
        """Empty the queue after an error or Ctrl-C: take back what waits, await what is in flight.

        Nothing is written to the memory of any read afterwards. No other thread may call meanwhile.

        Returns:
            (tags of reads that landed well, tags of those that did not: taken back, failed, or
            collected by a call that was interrupted before it could tell).

        Raises:
            StoreError: a read in flight stalls: the queue can only be closed then.
            UsageError: the queue is closed.
        """
        landed: list[int] = []
        lost: list[int] = []
        self._reader.cancel_all()
        for tag in [*self._refs]:
            try:
                well = self._await(tag).status == reader.OK
            except UsageError:  # it was taken back, or collected by a call that was interrupted
                well = False
            (landed if well else lost).append(tag)
            with self._lock:
                del self._refs[tag]
        return landed, lost

    def _await(self, tag: int) -> Landed:
        while (landed := self._reader.wait(tag, self._stall * _LOOK)) is None:
            self._refuse_stall()
        return landed

    def _refuse_stall(self) -> None:
        oldest = self._reader.stats()["oldest_s"]
        if oldest > self._stall:
            raise StoreError(
                f"{shown(self._store.path)}: a read has taken {oldest:.1f} s and has not ended; "
                "see whether the disk still answers"
            )

    def _collect(self, landed: Landed) -> Arrival:
        with self._lock:
            ref = self._refs.pop(landed.tag)
        if landed.status == reader.DAMAGED:
            raise self._store.damaged(ref)
        if landed.status == reader.TRUNCATED:
            raise self._store.truncated(landed.at, ref.offset + ref.size - landed.at)
        if landed.status == reader.FAILED:
            raise self._store.unreadable(landed.at, os.strerror(landed.errno))
        return Arrival(landed.tag, landed.begun_ns, landed.ended_ns)

    def stats(self) -> dict[str, Any]:
        """Counters since the start: see `Reader.stats`."""
        return self._reader.stats()

    def close(self) -> None:
        """Forget what waits and wait for what is in flight; twice is fine."""
        self._reader.close()
        with self._lock:
            self._refs.clear()
