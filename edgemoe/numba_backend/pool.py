"""Threads and scratch memory of the numba backend."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from .jit import Kernel

SHARE = 1 << 18
"""Multiply-adds (some 100 microseconds) that are worth waking a thread for."""


class Pool:
    """`threads` threads, the calling one included, and scratch memory that operations share.

    numba's own parallel loops stay unused: their number of threads is a setting of the whole
    process. A result never depends on how its tasks were shared out.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._workers = ThreadPoolExecutor(threads - 1, "edgemoe") if threads > 1 else None
        self._scratch = np.empty(0, np.uint8)
        self.lock = threading.Lock()
        """Held for a whole operation: one at a time."""

    @property
    def threads(self) -> int:
        """Threads that compute, at most."""
        return self._threads

    @property
    def scratch_bytes(self) -> int:
        """Bytes of scratch held."""
        return self._scratch.nbytes

    def carve(self, *parts: tuple[type, Sequence[int]]) -> list[Any]:
        """Arrays of these dtypes and shapes, good until the next call."""
        sizes = [padded(np.dtype(dtype).itemsize, *shape) for dtype, shape in parts]
        if sum(sizes) > self._scratch.nbytes:
            self._scratch = np.empty(0, np.uint8)  # the old one goes before the new one comes
            self._scratch = np.empty(sum(sizes), np.uint8)
        out, at = [], 0
        for (dtype, shape), size in zip(parts, sizes, strict=True):
            out.append(np.ndarray(shape, dtype, self._scratch, at))
            at += size
        return out

    def run(self, kernel: Kernel, tasks: int, work: int, *args: Any) -> None:
        """kernel(first, last, *args) over all tasks; `work` is in multiply-adds."""
        compiled = kernel.compiled()
        shares = min(self._threads, tasks, max(1, work // SHARE))
        if self._workers is None or shares <= 1:
            compiled(0, tasks, *args)
            return
        bounds = [tasks * i // shares for i in range(shares + 1)]
        others: list[Future[None]] = []
        try:
            for i in range(1, shares):
                others.append(self._workers.submit(compiled, bounds[i], bounds[i + 1], *args))
            compiled(bounds[0], bounds[1], *args)
        finally:
            _finish(others)


def padded(*sizes: int) -> int:
    """The product of `sizes`, rounded up to 64 bytes."""
    return -(-math.prod(sizes) // 64) * 64


def _finish(futures: Sequence[Future[None]]) -> None:
    """Wait for all, even when interrupted: they read memory that the caller may give back next."""
    interrupted: KeyboardInterrupt | None = None
    for future in futures:
        while not future.done():
            try:
                future.exception()
            except KeyboardInterrupt as exc:
                interrupted = exc
    if interrupted is not None:
        raise interrupted
    for future in futures:
        future.result()
