"""The read queue of native/reader.h without a compiler: threads that read through the page cache.

Same order, same answers; reads are neither direct nor put together, so it is slower.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from dataclasses import dataclass
from typing import Any

from ..types import U8, U64
from . import floats

_READ_OK, _DAMAGED, _FAILED, _TRUNCATED = range(4)
_OK, _TIMEOUT, _UNKNOWN, _DUPLICATE, _FULL, _INVALID, _CLOSED = range(7)
_OUTSIDE = -1
_PAGE = 4096
_SLICE_S = 0.1
"""How long a wait may be deaf to signals."""
_CREDIT_S = 0.02
"""Time that a limited reader may catch up on."""


@dataclass
class _Request:
    priority: int
    serial: int
    offset: int
    crc32c: int
    tag: int
    out: U8
    state: str = "waiting"  # then started, done
    status: int = _READ_OK
    error: int = 0
    at: int = 0
    begun_ns: int = 0
    ended_ns: int = 0
    cut_short: bool = False


class Reader:
    """See kernels/reader.py, which checks the arguments. It lives until it is closed."""

    def __init__(
        self,
        fd: int,
        engine: str,
        depth: int,
        capacity: int,
        direct: bool,
        chunk: int,
        bytes_per_second: float,
    ) -> None:
        if engine == "uring":
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        self._fd = os.dup(fd)
        self._capacity, self._chunk, self._rate = capacity, chunk, bytes_per_second
        self._allowed = 0.0
        self._serial = 0
        self._requests: dict[int, _Request] = {}
        self._finished: dict[int, _Request] = {}
        self._flying: dict[int, float] = {}
        self._count = dict.fromkeys(("bytes_read", "reads", "retries", "bytes_verified"), 0)
        self._seconds = dict.fromkeys(("busy_s", "waited_s", "verify_s"), 0.0)
        self._busy_since = 0.0
        self._lock = threading.Lock()
        self._work, self._ended = threading.Condition(self._lock), threading.Condition(self._lock)
        self._quit = False
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(depth)]
        for thread in self._threads:
            thread.start()

    def submit(self, memory: U8, reads: U64, priority: int) -> int:
        """Queue rows of (offset, size, CRC32C, at, room, tag), all or none."""
        rows = [tuple(map(int, row)) for row in reads]
        if any(at + room > memory.size for _, _, _, at, room, _ in rows):
            return _OUTSIDE
        if any(
            not 0 < size <= room or offset + size >= 1 << 63 for offset, size, _, _, room, _ in rows
        ):
            return _INVALID
        tags = [row[5] for row in rows]
        with self._lock:
            if self._quit:
                return _CLOSED
            if len(rows) + len(self._requests) > self._capacity:
                return _FULL
            if len(set(tags)) < len(tags) or self._requests.keys() & set(tags):
                return _DUPLICATE
            for offset, size, crc, at, _, tag in rows:
                out = memory[at : at + size]
                self._requests[tag] = _Request(priority, self._serial, offset, crc, tag, out)
                self._serial += 1
            self._work.notify(len(rows))
        return _OK

    def _withdraw(self, tag: int) -> tuple[int, _Request | None]:
        if self._quit:
            return _CLOSED, None
        request = self._requests.get(tag)
        if request is None:
            return _UNKNOWN, None
        return _OK, request if request.state == "waiting" else None

    def cancel(self, tag: int) -> tuple[int, bool]:
        """Forget a read that is waiting; whether it was."""
        with self._lock:
            code, request = self._withdraw(tag)
            if request is not None:
                del self._requests[tag]
                self._ended.notify_all()
        return code, request is not None

    def cancel_all(self) -> int:
        """Forget the reads that wait, and what is not in flight of those begun."""
        with self._lock:
            if self._quit:
                return _CLOSED
            for tag, request in [*self._requests.items()]:
                if request.state == "waiting":
                    del self._requests[tag]
                request.cut_short = True
            self._ended.notify_all()
        return _OK

    def reprioritise(self, tag: int, priority: int) -> tuple[int, bool]:
        """Move a read that is waiting; whether it was."""
        with self._lock:
            code, request = self._withdraw(tag)
            if request is not None:
                request.priority = priority
        return code, request is not None

    def wait(self, tag: int | None, seconds: float) -> tuple[int, int, int, int, int, int, int]:
        """(code, tag, status, errno, at, begun_ns, ended_ns) of the read with this tag, or any."""
        begun = time.monotonic()
        nothing = (0, 0, 0, 0, 0, 0)
        with self._lock:
            while True:
                if self._quit:
                    return (_CLOSED, *nothing)
                if not self._requests or (tag is not None and tag not in self._requests):
                    return (_UNKNOWN, *nothing)
                found = next(iter(self._finished), None) if tag is None else tag
                if found is not None and found in self._finished:
                    r = self._finished.pop(found)
                    del self._requests[found]
                    return _OK, r.tag, r.status, r.error, r.at, r.begun_ns, r.ended_ns
                left = begun + seconds - time.monotonic()
                if left <= 0:
                    return (_TIMEOUT, *nothing)
                slept = time.monotonic()
                self._ended.wait(min(left, _SLICE_S))
                self._seconds["waited_s"] += time.monotonic() - slept

    def stats(self) -> dict[str, Any]:
        """As kernels/reader.py says."""
        with self._lock:
            now = time.monotonic()
            return {
                **self._count,
                **self._seconds,
                "busy_s": self._seconds["busy_s"] + (now - self._busy_since) * bool(self._flying),
                "bytes_copied": 0,
                "in_flight": len(self._flying),
                "waiting": sum(r.state == "waiting" for r in self._requests.values()),
                "oldest_s": now - min(self._flying.values(), default=now),
                "memory_bytes": 0,
                "direct": False,
                "engine": "threads",
            }

    def close(self) -> None:
        """Forget what waits, wait for what is in flight."""
        with self._lock:
            first, self._quit = not self._quit, True
            self._work.notify_all()
            self._ended.notify_all()
        for thread in self._threads:
            thread.join()
        with self._lock:
            self._requests.clear()
            self._finished.clear()
            if first:
                os.close(self._fd)

    def _next(self) -> _Request | None:
        """The read to begin now; None: close. The lock is held."""
        while not self._quit:
            waiting = [r for r in self._requests.values() if r.state == "waiting"]
            now = time.monotonic()
            if waiting and now >= self._allowed:
                return min(waiting, key=lambda r: (r.priority, r.serial))
            self._work.wait(self._allowed - now if waiting else None)
        return None

    def _run(self) -> None:
        while True:
            with self._lock:
                request = self._next()
                if request is None:
                    return
                request.state = "started"
                request.begun_ns = time.monotonic_ns()
                now = time.monotonic()
                if not self._flying:
                    self._busy_since = now
                self._flying[request.tag] = now
                if self._rate:
                    self._allowed = max(self._allowed, now - _CREDIT_S)
                    self._allowed += request.out.size / self._rate
            self._read(request)
            with self._lock:
                request.state = "done"
                self._finished[request.tag] = request
                self._ended.notify_all()
            del request  # its memory is the caller's again

    def _read(self, r: _Request) -> None:
        view, done, reads = r.out.data, 0, 0
        try:
            while done < len(view):
                if r.cut_short:
                    raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
                part = view[done : done + self._chunk]
                got = os.preadv(self._fd, [part], r.offset + done)
                reads += 1
                if not got:
                    r.status, r.at = _TRUNCATED, r.offset + done
                    break
                done += got
        except OSError as exc:
            r.status, r.error, r.at = _FAILED, exc.errno or 0, r.offset + done
        r.ended_ns = time.monotonic_ns()
        if hasattr(os, "posix_fadvise"):
            first = r.offset // _PAGE * _PAGE
            size = r.offset + len(view) - first
            os.posix_fadvise(self._fd, first, -(-size // _PAGE) * _PAGE, os.POSIX_FADV_DONTNEED)
        with self._lock:
            del self._flying[r.tag]
            now = time.monotonic()
            if not self._flying:
                self._seconds["busy_s"] += now - self._busy_since
            self._count["bytes_read"] += done
            self._count["reads"] += reads
        if r.status != _READ_OK:
            return
        begun = time.thread_time()
        if int(floats.crc32c(r.out, 0)) != r.crc32c:
            r.status, r.at = _DAMAGED, r.offset
        with self._lock:
            self._seconds["verify_s"] += time.thread_time() - begun
            self._count["bytes_verified"] += r.out.size
