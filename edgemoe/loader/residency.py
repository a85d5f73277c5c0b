"""Which segments of which experts are in memory, under a budget that holds to the byte.

Pure bookkeeping: no disk, no memory, no thread of its own; not safe for threads. Of each expert
some first segments are *claimed*: there, or on their way. Claimed bytes never exceed the budget, so
what is evicted has to be let go of before what is loaded is asked for. Raising an expert loads only
the missing segments, lowering one drops its top segments first.

For each layer step the engine calls `observe` once with all that the layer wants, then `acquire`
with all of it, or with one part after another where it does not fit at once, `land` as reads end,
and `release` when a part has been computed, or `settle` when reads failed or were taken back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from ..errors import MemoryBudgetError, UsageError, shown
from ..types import F32, F64

_AHEAD, _AHEAD_PART = 2, 64
"""Experts that `spare` makes room for; the part of a budget that they may take."""


class Want(NamedTuple):
    """An expert of the layer at hand and how many of its segments are needed: level index + 1."""

    expert: int
    depth: int


class Segment(NamedTuple):
    """One of an expert's segments, 0 the lowest; layers count those with experts."""

    layer: int
    expert: int
    level: int


class Lease(NamedTuple):
    """What `acquire` granted: wants stay in memory until this very object is given to `release`.

    evict: gone from the books, top segments before lower ones. load: to be read now, each expert's
    ascending. wanted_bytes, load_bytes: of all wants, and of those to be read.
    """

    layer: int
    wants: tuple[Want, ...]
    evict: tuple[Segment, ...]
    load: tuple[Segment, ...]
    wanted_bytes: int
    load_bytes: int


class Policy(Protocol):
    """What goes first. Experts are counted through all layers: layer * experts + expert."""

    whole: bool
    """Whether an expert goes as a whole and not one segment after another."""

    def observe(self, layer: int, wants: Sequence[Want]) -> None:
        """A layer step begins that wants this."""

    def claim(self, at: int, depth: int) -> None:
        """Expert `at` now has `depth` segments."""

    def drop(self, layer: int) -> F32 | F64:
        """During a step of `layer`: what the top segment of each expert is rated.

        [layers * experts], the highest goes first, -inf where there is none; the caller's to
        change.
        """

    def drop_each(self, layer: int, at: int, depth: int) -> list[float]:
        """The same of expert `at` if it had 0, 1 .. `depth` segments."""


class Residency:
    """The books of the arena.

    Args:
        sizes: int [layers, levels], bytes that each segment of the layer's experts takes.
        experts: in each layer.
        budget: bytes that claimed segments may take.
        policy: what to evict.

    Raises:
        UsageError: a budget that is not positive.
    """

    def __init__(
        self, sizes: Sequence[Sequence[int]], experts: int, budget: int, policy: Policy
    ) -> None:
        _check_budget(budget)
        self._sizes = [list(map(int, row)) for row in sizes]
        self._prefix = [[0, *np.cumsum(row, dtype=np.int64).tolist()] for row in self._sizes]
        self._experts = experts
        self._policy = policy
        self.budget = budget
        self._claimed = [0] * (len(self._sizes) * experts)
        self._floor = [0] * len(self._claimed)  # segments that leases hold
        self._shared: dict[int, list[int]] = {}  # their depths, of experts that several hold
        self._leases: dict[int, Lease] = {}  # by id
        self._flying: dict[int, set[int]] = {}  # segments being read, by expert
        self._used = self._held = 0
        self._layer = len(self._sizes) - 1  # of the last step

    @property
    def used_bytes(self) -> int:
        """Bytes of all claimed segments; at most the budget."""
        return self._used

    def prefix(self, layer: int) -> list[int]:
        """Bytes of the first 0, 1 .. segments of one of the layer's experts."""
        return self._prefix[layer]

    def claimed(self, layer: int) -> list[int]:
        """Segments of each expert of a layer that are there or on their way."""
        begin = layer * self._experts
        return self._claimed[begin : begin + self._experts]

    def ready(self, layer: int, expert: int) -> int:
        """How many first segments of an expert have landed."""
        at = layer * self._experts + expert
        flying = self._flying.get(at)
        return min(flying) if flying else self._claimed[at]

    def observe(self, layer: int, wants: Sequence[Want]) -> None:
        """Tell the policy what a layer step wants, each expert once."""
        self._layer = layer
        self._policy.observe(layer, wants)

    def acquire(self, layer: int, wants: Sequence[Want]) -> Lease | None:
        """Claim what is missing of these experts and evict what has to go for it.

        wants: each expert once, each with a segment at least. Returns None, with nothing changed,
        if it does not fit beside what other leases hold: release one and try again.

        A segment that is on its way for another lease counts as claimed: it is not in `load`, and
        its bytes not in `load_bytes`. `ready` tells when it has landed, for whichever lease it was
        read; until then this lease cannot be released. It stays when the other is released, for as
        long as this one holds it.

        Raises:
            MemoryBudgetError: it would not fit in an arena that holds nothing else.
            UsageError: an expert is there twice, or with no segment.
        """
        prefix, begin = self._prefix[layer], layer * self._experts
        claimed, floors = self._claimed, self._floor
        wanted = more = load_bytes = 0
        for expert, depth in wants:
            has, floor, size = claimed[begin + expert], floors[begin + expert], prefix[depth]
            wanted += size
            if depth > floor:
                more += size - prefix[floor]
            if depth > has:
                load_bytes += size - prefix[has]
        depths = dict(wants)
        if len(depths) < len(wants):
            raise UsageError(f"layer {layer}: an expert is wanted twice in {shown(wants)}")
        if min(depths.values(), default=1) < 1:
            raise UsageError(f"layer {layer}: nothing of an expert is wanted in {shown(wants)}")
        if wanted > self.budget:
            raise MemoryBudgetError(
                f"layer {layer} needs {wanted} bytes of experts at once, and there is room for "
                f"{self.budget}: give a larger --mem or --cache, or fewer --bits",
                needed_bytes=wanted,
                budget_bytes=self.budget,
            )
        if self._held + more > self.budget:
            return None
        self._layer = layer
        self._held += more
        for expert, depth in wants:
            floor = floors[begin + expert]
            if floor:
                self._shared.setdefault(begin + expert, [floor]).append(depth)
            if depth > floor:
                floors[begin + expert] = depth
        evict: list[Segment] = []
        load: list[Segment] = []
        if load_bytes:
            evict = self._make_room(layer, self.budget - load_bytes)
            for expert, depth in wants:
                at = begin + expert
                has = claimed[at]
                if depth > has:
                    claimed[at] = depth
                    self._policy.claim(at, depth)
                    self._flying.setdefault(at, set()).update(range(has, depth))
                    load += [Segment(layer, expert, i) for i in range(has, depth)]
            self._used += load_bytes
        lease = Lease(layer, tuple(wants), tuple(evict), tuple(load), wanted, load_bytes)
        self._leases[id(lease)] = lease
        return lease

    def spare(self, layer: int, depth: int) -> tuple[Segment, ...]:
        """Evict ahead of need, top segments before lower ones, so that what is missing next can be
        read at once: until two of the layer's experts with so many segments would fit. Nothing in
        budgets of which that is more than a 64th."""
        ahead = _AHEAD * self._prefix[layer][depth]
        if ahead > self.budget // _AHEAD_PART:
            return ()
        return tuple(self._make_room(layer, max(self.budget - ahead, self._held)))

    def _make_room(self, layer: int, target: int) -> list[Segment]:
        """Evict until `target` bytes are used; what leases hold, which is less, is passed over."""
        out: list[Segment] = []
        if self._used <= target:
            return out
        policy = self._policy
        rating = policy.drop(layer)
        while self._used > target:
            at = int(rating.argmax())
            owner, expert = divmod(at, self._experts)
            has, floor = self._claimed[at], self._floor[at]
            rated = policy.drop_each(layer, at, has)
            top = rated[has]
            while has > floor and (policy.whole or (rated[has] >= top and self._used > target)):
                has -= 1
                out.append(Segment(owner, expert, has))
                self._used -= self._sizes[owner][has]
            self._claimed[at] = has
            policy.claim(at, has)
            rating[at] = rated[has] if has > floor else -np.inf
        return out

    def land(self, segment: Segment) -> None:
        """A segment that `acquire` asked for is there.

        Raises:
            UsageError: it is not on its way.
        """
        at = segment.layer * self._experts + segment.expert
        flying = self._flying.get(at, set())
        if segment.level not in flying:
            raise UsageError(f"{segment} is not being read")
        flying.remove(segment.level)
        if not flying:
            del self._flying[at]

    def release(self, lease: Lease) -> None:
        """What a lease holds may be evicted again. Each lease once, when all of it has landed.

        Raises:
            UsageError: a segment of it is still on its way, or the lease is not held.
        """
        self._require_held(lease)
        if self._flying:
            begin = lease.layer * self._experts
            for want in lease.wants:
                if any(i < want.depth for i in self._flying.get(begin + want.expert, ())):
                    raise UsageError(f"{want} of layer {lease.layer} is still being read")
        self._let_go(lease)

    def settle(self, depths: Sequence[Sequence[int]]) -> None:
        """After a step was broken off: forget all leases and reads; so many first segments of each
        expert are there, [layers, experts]."""
        self._leases.clear()
        self._shared.clear()
        self._flying.clear()
        self._floor = [0] * len(self._claimed)
        self._used = self._held = 0
        for layer, row in enumerate(depths):
            for expert, depth in enumerate(row):
                at = layer * self._experts + expert
                self._claimed[at] = depth
                self._used += self._prefix[layer][depth]
                self._policy.claim(at, depth)

    def resize(self, budget: int) -> tuple[Segment, ...] | None:
        """Change the budget; what is to be evicted for it, top segments before lower ones.

        Returns None, with nothing changed, if leases hold more than that: release one and try
        again.

        Raises:
            UsageError: a budget that is not positive.
        """
        _check_budget(budget)
        if self._held > budget:
            return None
        self.budget = budget
        return tuple(self._make_room(self._layer, budget))

    def _require_held(self, lease: Lease) -> None:
        if id(lease) not in self._leases:
            raise UsageError(
                f"the lease on {shown(lease.wants)} of layer {lease.layer} is not held"
            )

    def _let_go(self, lease: Lease) -> None:
        del self._leases[id(lease)]
        prefix, begin = self._prefix[lease.layer], lease.layer * self._experts
        floors, shared = self._floor, self._shared
        for expert, depth in lease.wants:
            at = begin + expert
            depths = shared.get(at)
            if depths is None:
                self._held -= prefix[depth]
                floors[at] = 0
                continue
            depths.remove(depth)
            floor = max(depths)
            self._held -= prefix[floors[at]] - prefix[floor]
            floors[at] = floor
            if len(depths) == 1:
                del shared[at]


def _check_budget(budget: int) -> None:
    if budget < 1:
        raise UsageError(f"a cache of {budget} bytes holds nothing; give it more")
