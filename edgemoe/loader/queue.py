"""Segments of a store on their way into memory: the read queue in the store's terms."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..closing import Closing
from ..errors import StoreError, shown
from ..kernels import reader
from ..kernels.reader import Landed, Reader
from ..store import Store
from ..types import U8, PlaneRef

STALL_S = 8.0
"""A single read in flight for longer is an error."""


class Read(NamedTuple):
    """A segment to read: its place in the store, the byte of the memory it goes to, the bytes that
    may be overwritten there (of which ref.size will mean something), and the caller's tag."""

    ref: PlaneRef
    at: int
    room: int
    tag: int


class ReadQueue(Closing):
    """Reads of one store. `Reader` says in which order they go and what may be called when.

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
        with self._lock:
            self._reader.submit(memory, np.array(rows, np.uint64).reshape(-1, 6), priority)
            self._refs.update((r.tag, r.ref) for r in reads)

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

    def poll(self) -> int | None:
        """Tag of a read that has landed, the first of all; None if none has. Errors as `wait`."""
        landed = self._reader.wait()
        return None if landed is None else self._collect(landed)

    def wait_any(self) -> int | None:
        """Tag of the next read to land; None if none is left to wait for. Errors as `wait`."""
        while self._refs:
            landed = self._reader.wait(None, self._stall / 4)
            if landed is not None:
                return self._collect(landed)
            self._refuse_stall()
        return None

    def wait(self, tag: int) -> None:
        """Wait until the read with this tag has landed.

        Raises:
            ChecksumError: the bytes differ from those written; names the segment.
            StoreError: the file ends early, cannot be read, or a read stalls.
            UsageError: there is no such read.
        """
        while (landed := self._reader.wait(tag, self._stall / 4)) is None:
            self._refuse_stall()
        self._collect(landed)

    def _refuse_stall(self) -> None:
        oldest = self._reader.stats()["oldest_s"]
        if oldest > self._stall:
            raise StoreError(
                f"{shown(self._store.path)}: a read has taken {oldest:.1f} s and has not ended; "
                "see whether the disk still answers"
            )

    def _collect(self, landed: Landed) -> int:
        with self._lock:
            ref = self._refs.pop(landed.tag)
        if landed.status == reader.DAMAGED:
            raise self._store.damaged(ref)
        if landed.status == reader.TRUNCATED:
            raise self._store.truncated(landed.at, ref.offset + ref.size - landed.at)
        if landed.status == reader.FAILED:
            raise self._store.unreadable(landed.at, os.strerror(landed.errno))
        return landed.tag

    def stats(self) -> dict[str, Any]:
        """Counters since the start: see `Reader.stats`."""
        return self._reader.stats()

    def close(self) -> None:
        """Forget what waits and wait for what is in flight; twice is fine."""
        self._reader.close()
        with self._lock:
            self._refs.clear()
