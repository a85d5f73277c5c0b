"""Rooms of one size in reserved addresses: which are taken, and what memory they hold on to.

Pure bookkeeping: nothing here touches the memory itself.
"""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from ..layout import align_up

PAGE = mmap.PAGESIZE
_ENTRY = 8
_NEAR = 32
"""Sizes less than a 32nd apart share rooms: a freed one then fits more segments."""

UNALIGNED_TABLES = 3 * PAGE
"""By how much `table_bytes` may grow with where the addresses begin."""


def whole_pages(size: int) -> int:
    """Bytes of the whole pages that `size` bytes take."""
    return align_up(size, PAGE)


def table_bytes(first: int, last: int) -> int:
    """Most page tables that the addresses [first, last) can need, in bytes; none for no address."""
    if first >= last:
        return 0
    span, total = PAGE, 0
    for _ in range(3):  # above that there is one for all
        span *= PAGE // _ENTRY
        total += ((last - 1) // span - first // span + 1) * PAGE
    return total


def room_sizes(sizes: Iterable[int]) -> dict[int, int]:
    """The room that each of these sizes (whole pages) goes to: the largest of those near it."""
    out: dict[int, int] = {}
    room = 0
    for size in sorted(set(sizes), reverse=True):
        if room - size > room // _NEAR or not room:
            room = size
        out[size] = room
    return out


@dataclass
class Account:
    """What all rooms of an arena hold, in bytes.

    taken: pages of rooms that are taken. warm: pages of free rooms, kept. tables: most page tables
    of all addresses touched so far; giving pages back leaves them there.
    """

    taken: int = 0
    warm: int = 0
    tables: int = 0

    @property
    def resident(self) -> int:
        """All of it."""
        return self.taken + self.warm + self.tables


class Rooms:
    """`count` rooms of `size` bytes (whole pages) from address `first` on; `account` is kept up.

    A free room is warm while its pages are kept: to take it costs no page faults. Given back it is
    cold. All others have never been touched.

    Attributes:
        warm: bytes of the pages of warm rooms.
        new_tables: by how much the account's tables grow with the next room taken.
    """

    def __init__(self, first: int, size: int, count: int, account: Account) -> None:
        self.first, self.size, self.count = first, size, count
        self.warm = 0
        self._account = account
        self._held: dict[int, int] = {}  # bytes of the pages of a room that is taken or warm
        self._warm: deque[int] = deque()
        self._cold: list[int] = []
        self._touched = 0
        self.new_tables = table_bytes(first, first + size)

    @property
    def end(self) -> int:
        """Address behind the last room."""
        return self.first + self.size * self.count

    def cost(self, size: int) -> int:
        """By how much the account grows with the next room taken for `size` bytes (whole pages)."""
        held = self._held[self._warm[-1]] if self._warm else 0
        return max(size - held, 0) + self.new_tables

    def take(self, size: int) -> int:
        """Address of a free room, of which `size` bytes (whole pages) will be used."""
        if self._warm:
            room = self._warm.pop()
            self._keep(-self._held[room])
        elif self._cold:
            room = self._cold.pop()
        else:
            room = self.first + self._touched * self.size
            self._touched += 1
            self._account.tables += self.new_tables
        self._held[room] = max(size, self._held.get(room, 0))
        self._account.taken += self._held[room]
        self._foresee()
        return room

    def free(self, room: int) -> None:
        """A taken room becomes warm."""
        self._account.taken -= self._held[room]
        self._keep(self._held[room])
        self._warm.append(room)
        self._foresee()

    def cool(self) -> tuple[int, int]:
        """(address, bytes) of the pages of a warm room that are given back from now on: of the one
        that has been free for longest."""
        room = self._warm.popleft()
        held = self._held.pop(room)
        self._keep(-held)
        self._cold.append(room)
        return room, held

    def _keep(self, more: int) -> None:
        self.warm += more
        self._account.warm += more

    def _foresee(self) -> None:
        self.new_tables = 0
        if not self._warm and not self._cold:
            used = self.first + self._touched * self.size
            self.new_tables = table_bytes(self.first, used + self.size)
            self.new_tables -= table_bytes(self.first, used)
