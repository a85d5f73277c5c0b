"""One block of anonymous memory that weights are read into."""

from __future__ import annotations

import mmap

import numpy as np

from ..errors import KernelError
from ..layout import align_up
from ..types import U8


class Arena:
    """`size` bytes of private anonymous memory, handed out front to back.

    Huge pages are off: resident memory then grows by exactly the pages that are written.
    """

    def __init__(self, size: int) -> None:
        self.size = align_up(max(size, 1), mmap.PAGESIZE)
        self._map = mmap.mmap(-1, self.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            self._map.madvise(mmap.MADV_NOHUGEPAGE)
        self._bytes: U8 = np.frombuffer(self._map, np.uint8)
        self.used = 0

    def take(self, size: int, alignment: int = 64) -> U8:
        """The next `size` bytes at a multiple of `alignment` (64 or 4096)."""
        first = align_up(self.used, alignment)
        if first + size > self.size:
            raise KernelError(f"arena: {size} bytes asked, {self.size - first} left")
        self.used = first + size
        return self._bytes[first : first + size]
