"""Memory for expert segments that come and go, under a budget that is never exceeded.

Every size of segment has rooms of its own in one run of reserved addresses; memory is there only
where a segment is or was. The room of an evicted segment is kept as it is for the next one: giving
its pages back and faulting in others would make a read 1.3 to 1.5 times as long and take three
times the processor time (scripts/bench_slots.py). Pages are given back only where rooms of another
size are wanted. Kernels take an address for each segment, so it does not matter where it lies.
"""

from __future__ import annotations

import mmap
import sys
from collections import Counter
from typing import NamedTuple

import numpy as np

from ..errors import EdgeMoEError, MemoryBudgetError, UsageError
from ..layout import RecordLayout
from ..store import Store
from ..types import U8, U64
from .budget import format_size
from .rooms import PAGE, UNALIGNED_TABLES, Account, Rooms, room_sizes, table_bytes, whole_pages

SPARE = 64
"""One part in so many of the budget is left to free rooms by whoever keeps to `capacity`."""

_ABSENT, _LOADING, _LANDED = range(3)
_STATES = ("absent", "loading", "landed")

_LINUX = sys.platform == "linux"
# Python has had this name since 3.13 only.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000) if _LINUX else 0
_GIVE_BACK = getattr(mmap, "MADV_DONTNEED" if _LINUX else "MADV_FREE", None)


class _Kinds(NamedTuple):
    """Rooms that a store's expert segments go to, the largest first.

    room_of: bytes of the room, by bytes of a segment in whole pages. segments: those that go to
    rooms of a size, and smallest: the smallest of them, by bytes of the room.
    """

    room_of: dict[int, int]
    segments: dict[int, int]
    smallest: dict[int, int]

    def rooms(self, budget_bytes: int) -> dict[int, int]:
        """How many rooms of each size there have to be: no more than segments, nor than the
        smallest of these fit the budget."""
        return {
            room: min(n, max(budget_bytes // self.smallest[room], 1))
            for room, n in self.segments.items()
        }


def _kinds(store: Store) -> _Kinds:
    counts = Counter(
        whole_pages(size)
        for layer in store.config.moe_layers
        for size in store.expert_layout(layer).segment_sizes
    )
    kinds = _Kinds(room_sizes(counts), Counter(), {})
    for size in sorted(counts, reverse=True):
        room = kinds.room_of[size]
        kinds.segments[room] += counts[size] * store.config.num_experts
        kinds.smallest[room] = size
    return kinds


def budget_for(store: Store, level_index: int, experts: int | None = None) -> int:
    """Smallest budget, or little more, with which segments up to a level of so many experts, the
    largest there are, are never refused (`SegmentSlots.capacity`); None: of all experts.

    More than `resident.expert_bytes`: free rooms are 1.6 %, page tables 0.2 % a level, and a
    segment takes whole pages, which is 5 % for the bundled model and nothing for large ones.
    """
    kinds = _kinds(store)
    records = [
        sum(kinds.room_of[whole_pages(size)] for size in layout.segment_sizes[: level_index + 1])
        for layout in map(store.expert_layout, store.config.moe_layers)
    ]
    if experts is None:
        taken = sum(records) * store.config.num_experts
    else:
        taken = max(records, default=0) * experts
    budget = taken
    while True:
        tables = sum(
            table_bytes(0, room * n) + UNALIGNED_TABLES for room, n in kinds.rooms(budget).items()
        )
        if budget - tables - budget // SPARE >= taken:
            return budget
        budget = taken + tables + budget // SPARE + PAGE


class SegmentSlots:
    """Memory of the expert segments of one store, each absent, loading or landed.

        at, room = slots.commit(layer, expert, level_index)  # memory is set aside
        queue.submit(slots.memory, [Read(ref, at, room, tag)])
        queue.wait(tag)
        slots.landed(layer, expert, level_index)             # kernels find it in `segments`
        slots.evict(layer, expert, level_index)              # its room is free

    One thread at a time may call. A landed segment stays where it is until it is evicted, and its
    user must not evict it while kernels read it.

    The budget counts whole pages, those kept in free rooms included, and the page tables of all
    addresses touched so far: resident memory and page tables of the process together grow by no
    more than the budget. (Except that systems other than Linux take pages that are given back only
    when they need some.)

    Attributes:
        memory: uint8, all rooms: what `ReadQueue.submit` reads into.
        budget_bytes: of now; see `resize`.

    Raises:
        MemoryBudgetError: the budget cannot hold the largest segment.
        EdgeMoEError: the system refuses the addresses.
    """

    def __init__(self, store: Store, budget_bytes: int) -> None:
        experts = store.config.num_experts
        self._layouts = {layer: store.expert_layout(layer) for layer in store.config.moe_layers}
        depth = len(store.quant.expert_levels)
        kinds = _kinds(store)
        room_of, number = kinds.room_of, kinds.rooms(budget_bytes)
        self.memory, self._map = _reserve(sum(room * n for room, n in number.items()))
        self._first: int = self.memory.ctypes.data
        self._account = Account()
        end, rooms = self._first, dict[int, Rooms]()
        for room, n in number.items():
            rooms[room] = Rooms(end, room, n, self._account)
            end = rooms[room].end
        self._rooms = list(rooms.values())
        self._kinds = {
            layer: [(rooms[room_of[whole_pages(s)]], whole_pages(s)) for s in v.segment_sizes]
            for layer, v in self._layouts.items()
        }
        # Lists, as their items are read several times a segment, and NumPy's are slow to reach.
        self._state = {layer: [[_ABSENT] * depth for _ in range(experts)] for layer in self.layers}
        self._room = {layer: [[0] * depth for _ in range(experts)] for layer in self.layers}
        self._address = {layer: np.zeros((experts, depth), np.uint64) for layer in self.layers}
        self._loading = 0
        self._most = self.budget_bytes = budget_bytes
        largest = max((each.cost(each.size) for each in self._rooms), default=0)
        if largest > budget_bytes:
            raise MemoryBudgetError(
                f"the largest expert segment takes {format_size(largest)} of memory and page "
                f"tables, the budget of expert segments is {format_size(budget_bytes)}: give a "
                "larger --mem or --cache",
                needed_bytes=largest,
                budget_bytes=budget_bytes,
            )

    @property
    def used_bytes(self) -> int:
        """Bytes of the pages of segments that are loading or landed."""
        return self._account.taken

    @property
    def kept_bytes(self) -> int:
        """Bytes of the pages of free rooms, kept for the next segments."""
        return self._account.warm

    @property
    def table_bytes(self) -> int:
        """Most bytes of page tables that the addresses touched so far have made."""
        return self._account.tables

    @property
    def resident_bytes(self) -> int:
        """used + kept + tables: never more than the budget."""
        return self._account.resident

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that have experts."""
        return tuple(self._layouts)

    def layout(self, layer: int) -> RecordLayout:
        """Of the layer's expert records."""
        return self._layouts[layer]

    def segments(self, layer: int) -> U64:
        """uint64 [experts, levels]: where each segment of the layer's experts lies, 0 if it has not
        landed. One array for good, which follows what lands and is evicted."""
        return self._address[layer]

    def room_bytes(self, layer: int, level_index: int) -> int:
        """Bytes of the room of such a segment.

        Raises:
            UsageError: there is no such segment.
        """
        self._check(layer, 0, level_index)
        return self._kinds[layer][level_index][0].size

    def capacity(self, budget_bytes: int) -> int:
        """Bytes of rooms that segments may take so that `commit` never refuses one.

        Page tables are taken off the budget, and a 64th of it for free rooms. Without that, where
        levels are mixed, two in five rooms that evictions leave are of the wrong size and have to
        be given back; with it, one in a hundred.
        """
        tables = sum(table_bytes(rooms.first, rooms.end) for rooms in self._rooms)
        return budget_bytes - tables - budget_bytes // SPARE

    def commit(self, layer: int, expert: int, level_index: int) -> tuple[int, int]:
        """Set memory aside for an absent segment, which is loading from now on.

        Returns:
            (byte of `memory` where it begins, at a page; bytes from there on that a read may
            write: whole pages).

        Raises:
            MemoryBudgetError: the segments that are loading or landed leave too little.
            UsageError: it is not absent, or there is no such segment.
        """
        self._require(layer, expert, level_index, _ABSENT)
        rooms, size = self._kinds[layer][level_index]
        needed = self._needed(layer, level_index)
        if needed > self.budget_bytes:
            raise MemoryBudgetError(
                f"an expert segment needs {format_size(needed - self.budget_bytes)} more than is "
                f"left of the {format_size(self.budget_bytes)} of expert segments: evict some "
                "first, or give a larger --mem",
                needed_bytes=needed,
                budget_bytes=self.budget_bytes,
            )
        self._make_room(rooms, size)
        room = rooms.take(size)
        self._room[layer][expert][level_index] = room
        self._state[layer][expert][level_index] = _LOADING
        self._loading += 1
        return room - self._first, size

    def view(self, layer: int, expert: int, level_index: int) -> U8:
        """uint8 [whole pages]: the memory of a segment that is loading or landed.

        Raises:
            UsageError: it is absent, or there is no such segment.
        """
        if not self._check(layer, expert, level_index):
            raise _wrong_state(layer, expert, level_index, _ABSENT, "loading or landed")
        at = self._room[layer][expert][level_index] - self._first
        return self.memory[at : at + self._kinds[layer][level_index][1]]

    def landed(self, layer: int, expert: int, level_index: int) -> None:
        """The read of a loading segment has ended well: `segments` has it from now on.

        Raises:
            UsageError: it is not loading, or there is no such segment.
        """
        self._require(layer, expert, level_index, _LOADING)
        self._loading -= 1
        self._state[layer][expert][level_index] = _LANDED
        self._address[layer][expert, level_index] = self._room[layer][expert][level_index]

    def abandon(self, layer: int, expert: int, level_index: int) -> None:
        """The read of a loading segment was taken back or has failed: it is absent again.

        Nothing may write to its memory any more. Raises UsageError as `landed`.
        """
        self._require(layer, expert, level_index, _LOADING)
        self._loading -= 1
        self._free(layer, expert, level_index)

    def evict(self, layer: int, expert: int, level_index: int) -> None:
        """A landed segment is absent again; its room is free.

        Raises:
            UsageError: it is absent, or a read may still write to it, or there is no such segment.
        """
        self._require(layer, expert, level_index, _LANDED)
        self._free(layer, expert, level_index)

    def settle(self) -> dict[int, list[int]]:
        """After reads were broken off: what is loading is absent again, and so is what has landed
        above something absent, which nobody can use.

        Nothing may write to the memory of what was loading any more. Returns, by layer, how many
        first segments of each expert are there.
        """
        out: dict[int, list[int]] = {}
        for layer, experts in self._state.items():
            out[layer] = []
            for expert, states in enumerate(experts):
                depth = 0
                for level_index, state in enumerate(states):
                    if state == _LOADING:
                        self.abandon(layer, expert, level_index)
                    elif state == _LANDED and depth == level_index:
                        depth += 1
                    elif state == _LANDED:
                        self.evict(layer, expert, level_index)
                out[layer].append(depth)
        return out

    def resize(self, budget_bytes: int) -> None:
        """Change the budget, to no more than it was at first; free rooms are given back as needed.

        Raises:
            MemoryBudgetError: the segments that are loading or landed need more.
            UsageError: more than at first.
        """
        if budget_bytes > self._most:
            raise UsageError(
                f"the budget of expert segments can be {format_size(self._most)} at most, as it "
                f"was at first, not {format_size(budget_bytes)}"
            )
        needed = self.used_bytes + self.table_bytes
        if needed > budget_bytes:
            raise MemoryBudgetError(
                f"the expert segments in use need {format_size(needed)}, more than a budget of "
                f"{format_size(budget_bytes)}: evict some first",
                needed_bytes=needed,
                budget_bytes=budget_bytes,
            )
        self.budget_bytes = budget_bytes
        while self.resident_bytes > budget_bytes:
            self._give_back(max(self._rooms, key=lambda rooms: rooms.warm))

    def close(self) -> None:
        """Give all memory back; `segments` is all zero then. Twice is fine.

        The addresses stay reserved while `memory` or a view of it is in use.

        Raises:
            UsageError: a read may still write to some of it: close the queue, and abandon.
        """
        if self._loading:
            raise UsageError(
                f"{self._loading} expert segments are still loading: close the queue of reads and "
                "abandon them first"
            )
        for layer, address in self._address.items():
            for expert, level_index in np.argwhere(address).tolist():
                self._free(layer, expert, level_index)
        for rooms in self._rooms:
            while rooms.warm:
                self._give_back(rooms)

    def _check(self, layer: int, expert: int, level_index: int) -> int:
        """The segment's state; UsageError if there is no such segment."""
        state = self._state.get(layer)
        if state is None or not (0 <= expert < len(state) and 0 <= level_index < len(state[0])):
            raise UsageError(f"no segment {level_index} of expert {expert} in layer {layer}")
        return state[expert][level_index]

    def _require(self, layer: int, expert: int, level_index: int, wanted: int) -> None:
        state = self._check(layer, expert, level_index)
        if state != wanted:
            raise _wrong_state(layer, expert, level_index, state, _STATES[wanted])

    def _free(self, layer: int, expert: int, level_index: int) -> None:
        # In this order: if Ctrl-C comes between, no address is left of a room that others may get.
        self._address[layer][expert, level_index] = 0
        self._state[layer][expert][level_index] = _ABSENT
        self._kinds[layer][level_index][0].free(self._room[layer][expert][level_index])

    def _needed(self, layer: int, level_index: int) -> int:
        """Bytes of all segments in use and one more, page tables included."""
        rooms, size = self._kinds[layer][level_index]
        return self._account.taken + self._account.tables + size + rooms.new_tables

    def _make_room(self, rooms: Rooms, size: int) -> None:
        """Give free rooms back until `size` more bytes in `rooms` fit; its own are the last."""
        while self._account.resident + rooms.cost(size) > self.budget_bytes:
            others = [other for other in self._rooms if other.warm and other is not rooms]
            self._give_back(max(others, key=lambda other: other.warm, default=rooms))

    def _give_back(self, rooms: Rooms) -> None:
        room, size = rooms.cool()
        if _GIVE_BACK is not None:
            self._map.madvise(_GIVE_BACK, room - self._first, size)


def _reserve(size: int) -> tuple[U8, mmap.mmap]:
    """So many bytes of addresses, with memory only where something is written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
    try:
        reserved = mmap.mmap(-1, size, flags=flags)
    except OSError as exc:
        raise EdgeMoEError(
            f"the system refuses {format_size(size)} of addresses for expert segments "
            f"({exc.strerror}): raise `ulimit -v`, set vm.overcommit_memory to 0, or give a "
            "lower --mem"
        ) from exc
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        reserved.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(reserved, np.uint8), reserved


def _wrong_state(layer: int, expert: int, level_index: int, state: int, wanted: str) -> UsageError:
    return UsageError(
        f"segment {level_index} of expert {expert} in layer {layer} is {_STATES[state]}, not "
        f"{wanted}"
    )
