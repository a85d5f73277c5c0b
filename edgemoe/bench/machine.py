"""What the machine has to give at this moment: memory to read, integers to multiply."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil

from .. import kernels
from .timing import seconds

STREAM_BYTES = 256 << 20
"""Bytes that are read to measure the memory; far above any processor's caches."""

_BUSY = ("user", "nice", "system", "irq", "softirq", "steal")

_READS = 4
_PEAK_MS = 20.0


class Limits:
    """Measures the limits of decoding and of prefill on the threads of a pool."""

    def __init__(self, threads: int) -> None:
        self._pool = kernels.new_pool(threads)
        room = np.ones(STREAM_BYTES + 64, np.uint8)  # written, so that it is memory
        start = -room.ctypes.data % 64
        self._data = room[start : start + STREAM_BYTES]

    def stream(self) -> list[float]:
        """Bytes a second of a few runs over plain memory."""
        return [STREAM_BYTES / seconds(self._read) for _ in range(_READS)]

    def _read(self) -> None:
        kernels.stream_read(self._pool, self._data)

    def int8_peak(self) -> float:
        """Integer multiply-adds a second."""
        return kernels.int8_peak(self._pool, _PEAK_MS)


class OtherPrograms:
    """How much of the processors all but some processes use, since it was made.

    pids: this process and those it measures.
    """

    def __init__(self, pids: Sequence[int]) -> None:
        self._processes = [psutil.Process(pid) for pid in pids]
        self._start, self._before = time.monotonic(), self._cpu_s()

    def _cpu_s(self) -> float:
        own = sum(sum(p.cpu_times()[:2]) for p in self._processes)
        every = psutil.cpu_times()
        return float(sum(getattr(every, kind, 0.0) for kind in _BUSY)) - own

    def cpus(self) -> float:
        """CPUs' worth of time."""
        return max(0.0, (self._cpu_s() - self._before) / (time.monotonic() - self._start))


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor as the system calls it."""
    try:
        for line in cpuinfo.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
