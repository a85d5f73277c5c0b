"""The watch over a memory ceiling: when the arena has to give memory back, and how much."""

from __future__ import annotations

import os
from collections.abc import Callable

import psutil

from ..errors import UsageError
from .budget import rss_bytes, status_bytes


def memory_bytes() -> int:
    """Resident memory of this process and all its descendants now, page tables included (which
    only Linux tells)."""
    return rss_bytes() + sum(_resident(pid) for pid in _descendants(os.getpid()))


class Guard:
    """Whether a process is about to use up the margin under its ceiling.

    Args:
        ceiling: bytes that may never be in use. margin: bytes that shall stay free below it.
        read: bytes in use now.

    Raises:
        UsageError: a margin below 1 or not below the ceiling.
    """

    def __init__(self, ceiling: int, margin: int, read: Callable[[], int] = memory_bytes) -> None:
        if not 0 < margin < ceiling:
            raise UsageError(f"a margin must be 1 to {ceiling - 1} bytes, got {margin}")
        self.ceiling, self.margin = ceiling, margin
        self._read = read

    def excess(self, unfilled: int) -> int:
        """Bytes by which the arena's budget has to shrink now; 0 while half the margin is left.

        Args:
            unfilled: bytes of the arena's budget that nothing has been written to yet: they will
                be in use without anyone asking.

        When more than half the margin is gone, all of it is asked back, so that a slow growth is
        answered seldom.
        """
        expected = self._read() + unfilled
        if expected + self.margin // 2 <= self.ceiling:
            return 0
        return expected + self.margin - self.ceiling


def _resident(pid: int) -> int:
    """Of another process, page tables included; 0 if it has ended."""
    try:
        return status_bytes(pid, "VmRSS", "VmPTE")
    except OSError:
        pass
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def _descendants(pid: int) -> list[int]:
    if not os.path.exists(f"/proc/{pid}/task/{pid}/children"):
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    # psutil reads every process of the machine, milliseconds each time
    found: list[int] = []
    parents = [pid]
    while parents:
        here = f"/proc/{parents.pop()}/task"
        try:
            threads = os.listdir(here)
        except OSError:  # it has ended
            continue
        for thread in threads:
            try:
                with open(f"{here}/{thread}/children", encoding="ascii") as file:
                    children = [int(child) for child in file.read().split()]
            except OSError:
                continue
            found += children
            parents += children
    return found
