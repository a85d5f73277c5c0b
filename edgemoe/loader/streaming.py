"""Experts that come into memory as layers want them, and leave it again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ..closing import Closing
from ..layout import RecordLayout
from ..store import Store
from ..types import U64
from .queue import Read, ReadQueue
from .residency import Lease, Policy, Residency, Segment, Want
from .slots import SegmentSlots, budget_for

Span = Callable[..., None]
"""Called with a name, begin and end in nanoseconds of time.monotonic_ns, and what else is to be
known, by keyword."""

_QUEUE_BYTES = 12 << 20
"""Of the read queue: 0.6 MB of tables, and a buffer for each read in flight where segments are not
aligned for O_DIRECT."""
_EXPERT_BYTES, _SEGMENT_BYTES = 300, 200
"""Of Python's objects for each expert and each of its segments."""


def books_bytes(store: Store) -> int:
    """What streaming needs beside the segments, at most: the queue, and lists of all experts."""
    config, depth = store.config, len(store.quant.expert_levels)
    experts = len(config.moe_layers) * config.num_experts
    return _QUEUE_BYTES + experts * (_EXPERT_BYTES + depth * _SEGMENT_BYTES)


class StreamedExperts(Closing):
    """Expert segments of a store under a budget: books, memory and reads kept in step.

        streamed.observe(layer, wants)          # once a layer step, all that it wants
        lease = streamed.claim(layer, wants)    # what is missing is being read from now on
        streamed.collect()                      # waits for one segment, as often as needed
        ... compute what is `ready` ...
        streamed.release(lease)

    Residency decides what stays; it counts whole rooms and keeps to what the slots can always give,
    so that memory never refuses what it has granted. One thread at a time may call.

    Args:
        store: open as long as this is.
        budget_bytes: of memory for segments, page tables included.
        policy: what to evict.
        level_index: highest level that will be wanted.
        limit: bytes a second to read at most; 0 is no limit.
        depth: reads in flight at most.
        span: told when each segment was read.

    Raises:
        MemoryBudgetError: the budget cannot hold the largest segment. UsageError: a limit below 0.
    """

    def __init__(
        self,
        store: Store,
        budget_bytes: int,
        policy: Policy,
        level_index: int,
        *,
        limit: float = 0.0,
        depth: int = 8,
        span: Span | None = None,
    ) -> None:
        self._store, self._span = store, span
        self._least = min(budget_for(store, level_index, 1), budget_bytes)
        self._slots = SegmentSlots(store, budget_bytes)
        self._layers = self._slots.layers
        self._ordinal = {layer: i for i, layer in enumerate(self._layers)}
        self._experts, self._levels = store.config.num_experts, len(store.quant.expert_levels)
        sizes = [
            [self._slots.room_bytes(layer, i) for i in range(self._levels)]
            for layer in self._layers
        ]
        capacity = self._slots.capacity(budget_bytes)
        self._residency = Residency(sizes, self._experts, max(capacity, 1), policy)
        self._queue = ReadQueue(store, depth=depth, limit=limit)
        self._step = 0
        self.missed_bytes = self.evictions = 0

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that have experts."""
        return self._layers

    @property
    def budget_bytes(self) -> int:
        """Memory for segments, of now."""
        return self._slots.budget_bytes

    @property
    def unfilled_bytes(self) -> int:
        """Bytes of the budget that nothing has been written to yet."""
        return self._slots.budget_bytes - self._slots.resident_bytes

    def reading(self) -> tuple[int, float]:
        """Bytes read since the start, and seconds in which a read was in flight."""
        stats = self._queue.stats()
        return int(stats["bytes_read"]), float(stats["busy_s"])

    def layout(self, layer: int) -> RecordLayout:
        """Of the layer's expert records."""
        return self._slots.layout(layer)

    def segments(self, layer: int) -> U64:
        """uint64 [experts, levels]: where each segment lies, 0 if it has not landed."""
        return self._slots.segments(layer)

    def observe(self, layer: int, wants: Sequence[Want]) -> None:
        """A layer step begins that wants this, each expert once."""
        self._step += 1
        self._residency.observe(self._ordinal[layer], wants)

    def segment_bytes(self, layer: int) -> list[int]:
        """Bytes that each segment of the layer's experts takes."""
        return [self._slots.room_bytes(layer, i) for i in range(self._levels)]

    def fits(self, layer: int, wants: Iterable[tuple[int, int]], times: int = 1) -> bool:
        """Whether so many times what these experts take fits in memory that holds nothing else."""
        prefix = self._residency.prefix(self._ordinal[layer])
        return times * sum(prefix[depth] for _, depth in wants) <= self._residency.budget

    def want_bytes(self, layer: int, want: Want) -> int:
        """Bytes that it takes."""
        return self._residency.prefix(self._ordinal[layer])[want.depth]

    def room_for(self, wants: Sequence[tuple[int, Want]]) -> int:
        """How many first ones of these (layer, want) fit into what memory is free, with room left
        for as much as `spare` would keep."""
        left = self._residency.budget - self._residency.used_bytes
        for count, (layer, want) in enumerate(wants):
            size = self.want_bytes(layer, want)
            left -= size
            if left < 2 * size:
                return count
        return len(wants)

    def claimed(self, layer: int) -> list[int]:
        """Segments of each expert that are there or on their way."""
        return self._residency.claimed(self._ordinal[layer])

    def ready(self, layer: int, expert: int) -> int:
        """How many first segments of an expert have landed."""
        return self._residency.ready(self._ordinal[layer], expert)

    def landed(self, layer: int, wants: Iterable[tuple[int, int]]) -> bool:
        """Whether all that is wanted of these experts has landed."""
        ordinal, ready = self._ordinal[layer], self._residency.ready
        return all(ready(ordinal, expert) >= depth for expert, depth in wants)

    def claim(
        self,
        layer: int,
        wants: Sequence[Want],
        early: bool = False,
        order: Sequence[tuple[int, int]] = (),
    ) -> Lease | None:
        """Keep these experts in memory until `release`, and read what is missing of them, in the
        order of `wants`. None, with nothing changed, if other leases leave too little room.

        early: they are not yet asked for; reads of the next layer step that are go first. order: of
        reads, (expert, segment) of all that is missing, where it is not that of `wants`.

        Raises:
            MemoryBudgetError: they would not fit in memory that holds nothing else.
        """
        ordinal = self._ordinal[layer]
        lease = self._residency.acquire(ordinal, wants)
        if lease is None:
            return None
        self.missed_bytes += lease.load_bytes
        self._evict(lease.evict)
        if lease.load:
            slots, segment = self._slots, self._store.expert_segment
            first = ordinal * self._experts
            reads = []
            load = lease.load
            if order:
                rank = {each: i for i, each in enumerate(order)}
                load = tuple(sorted(load, key=lambda each: rank[each.expert, each.level]))
            for _, expert, level in load:
                at, room = slots.commit(layer, expert, level)
                tag = (first + expert) * self._levels + level
                reads.append(Read(segment(layer, expert, level), at, room, tag))
            self._queue.submit(slots.memory, reads, 2 * self._step + 3 * early)
        return lease

    def spare(self, layer: int, depth: int) -> None:
        """Evict ahead of need (Residency.spare): once a layer step, with its reads under way."""
        self._evict(self._residency.spare(self._ordinal[layer], depth))

    def _evict(self, segments: Sequence[Segment]) -> None:
        self.evictions += len(segments)
        for owner, expert, level in segments:
            self._slots.evict(self._layers[owner], expert, level)

    def collect(self, wait: bool = True) -> Segment | None:
        """The next segment that has landed; None if none has, or, with `wait`, none is on its way.

        Raises:
            ChecksumError, StoreError: a read failed.
        """
        arrival = self._queue.wait_any() if wait else self._queue.poll()
        if arrival is None:
            return None
        segment = self._segment(arrival.tag)
        layer = self._layers[segment.layer]
        self._slots.landed(layer, segment.expert, segment.level)
        self._residency.land(segment)
        if self._span is not None:
            _, begun, ended = arrival
            size = self._store.expert_layout(layer).segment_sizes[segment.level]
            self._span(
                "read",
                begun,
                ended,
                layer=layer,
                expert=segment.expert,
                segment=segment.level,
                bytes=size,
            )
        return segment

    def _segment(self, tag: int) -> Segment:
        index, level = divmod(tag, self._levels)
        return Segment(*divmod(index, self._experts), level)

    def release(self, lease: Lease) -> None:
        """What a lease holds may be evicted again. Once, when all of it has landed."""
        self._residency.release(lease)

    def recover(self) -> None:
        """After an error or Ctrl-C in a step: take back what is not read, and let go of all leases.
        What has landed stays.

        Raises:
            StoreError: a read in flight stalls.
        """
        landed, _ = self._queue.drain()
        for tag in landed:
            layer, expert, level = self._segment(tag)
            self._slots.landed(self._layers[layer], expert, level)
        depths = self._slots.settle()
        self._residency.settle([depths[layer] for layer in self._layers])

    def shrink(self, excess: int) -> None:
        """Give so many bytes of the budget back, or as many as can be spared: what leases hold, and
        room for one expert, stays."""
        budget = max(self._slots.budget_bytes - excess, self._least)
        evict = self._residency.resize(self._slots.capacity(budget))
        if evict is None:
            return
        self._evict(evict)
        self._slots.resize(budget)

    def close(self) -> None:
        """Stop reading and give all memory back; twice is fine."""
        self._queue.close()
        self._slots.settle()
        self._slots.close()
