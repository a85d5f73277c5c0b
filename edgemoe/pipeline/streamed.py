"""The mixture part of a model whose experts do not all fit: some are computed, others still read.

A layer step has two halves. `begin` asks for what is missing, in the order in which the layer is
done soonest; `finish` computes each expert as soon as it is there and sums up. Between the two the
caller may do something else: the other half of a batch (see `alternate`). With `overlap` off
everything is read first and then computed: the plain loop that the other is compared with. Both
give the same bits, as each expert's output is kept until all are there and summed in one order.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from .. import kernels
from ..closing import Closing
from ..errors import MemoryBudgetError
from ..hebf.loads import Order, hottest_bit_first, on_demand, shortest_makespan
from ..hebf.order import hottest_first
from ..loader.budget import format_size
from ..loader.guard import Guard
from ..loader.policies import ByWorth, LeastFrequentlyUsed, LeastRecentlyUsed
from ..loader.residency import Lease, Policy, Want
from ..loader.streaming import Span, StreamedExperts
from ..store import Store
from ..types import F32, I32, Streaming, Traffic
from .ahead import Guess, LookAhead
from .costs import Profile
from .counts import DemandCounts

_LOOK_NS = 50_000_000
"""Between two looks at what the process uses, which take a third of a millisecond."""

_AT_ONCE = 8
"""Experts computed in one go while others still wait for their room."""


ORDERS: dict[str, Order] = {
    "shortest": shortest_makespan,
    "hebf": hottest_bit_first,
    "fifo": on_demand,
}


def policy_named(name: str, store: Store) -> Policy:
    """What to evict, one of types.POLICIES, for the experts of a store."""
    config = store.config
    layers, experts = len(config.moe_layers), config.num_experts
    if name == "worth":
        levels = len(store.quant.expert_levels)
        return ByWorth(layers, experts, levels, config.num_experts_per_tok)
    if name == "lru":
        return LeastRecentlyUsed(layers, experts)
    return LeastFrequentlyUsed(layers, experts)


def streamed_mixture(
    store: Store,
    pool: kernels.Pool,
    budget_bytes: int,
    level: int,
    streaming: Streaming,
    guess: Guess | None = None,
    guard: Guard | None = None,
    limit: float = 0.0,
    span: Span | None = None,
) -> StreamedMixture:
    """All layers' experts of a store at a level (its index), streamed through so many bytes.

    guess: at what the next layer wants; None: nothing is read ahead. guard: asked between tokens;
    None: nothing is given back. limit: bytes a second to read at most; 0: no limit.

    Raises:
        MemoryBudgetError: the budget cannot hold the largest segment.
    """
    policy = policy_named(streaming.policy, store)
    source = StreamedExperts(store, budget_bytes, policy, level, limit=limit, span=span)
    return StreamedMixture(
        pool,
        source,
        level,
        store.quant.expert_levels,
        ORDERS[streaming.order],
        overlap=streaming.overlap,
        ahead=None if guess is None else LookAhead(guess),
        guard=guard,
        span=span,
    )


@dataclass
class Step:
    """A layer step under way. todo: experts not yet computed. missing: those not yet claimed, in
    the order of their reads. spare_due: nothing was evicted for the next step yet. leases: with the
    experts of each that are not yet computed."""

    layer: int
    counts: dict[int, int]
    todo: list[int]
    missing: list[int]
    spare_due: bool
    leases: list[tuple[Lease, set[int]]] = field(default_factory=list)
    pair_out: F32 = field(init=False)
    parts: kernels.MixtureParts = field(init=False)


class StreamedMixture(Closing):
    """All layers' experts at one level, streamed.

    Args:
        pool: what computes. source: where experts come from. level: index of their level.
        bits: of each level. order: of a layer's reads. overlap: compute while reading.
        ahead: what the next layer will want, or None: nothing is read before it is asked for.
        guard: of the ceiling; asked between tokens. span: told what was done when.
    """

    def __init__(
        self,
        pool: kernels.Pool,
        source: StreamedExperts,
        level: int,
        bits: Sequence[int],
        order: Order,
        *,
        overlap: bool = True,
        ahead: LookAhead | None = None,
        guard: Guard | None = None,
        span: Span | None = None,
    ) -> None:
        self._pool, self._source, self.overlap = pool, source, overlap
        self._guard = guard
        self._level, self._depth, self._bits = level, level + 1, bits
        self._order, self._span = order, span
        self._mixtures = {
            layer: kernels.Mixture(source.layout(layer), source.segments(layer), level)
            for layer in source.layers
        }
        self._counts = DemandCounts(
            bits[level], {layer: source.expert_bytes(layer, self._depth) for layer in source.layers}
        )
        self._profile = Profile()
        self._open: list[Step] = []
        self._ahead = ahead
        self._early: list[tuple[int, Lease]] = []  # what was read early, and for which layer
        self._spare: list[F32] = []
        self._first = min(source.layers, default=0)
        self._wait_ns = 0
        self._look_ns, self._read_s = time.monotonic_ns(), 0.0

    @property
    def traffic(self) -> Traffic:
        """What was asked of the experts, and read for them, since the model was loaded."""
        return replace(
            self._counts.traffic,
            missed_bytes=self._source.missed_bytes,
            bytes_read=self._source.reading()[0],
            evictions=self._source.evictions,
            wait_s=self._wait_ns / 1e9,
        )

    def close(self) -> None:
        """Stop reading and give the memory back; twice is fine."""
        self._spare.clear()
        self._source.close()

    def __call__(self, layer: int, x: F32, ids: I32, weights: F32) -> F32:
        """Sum over slots of weight * expert(x).

        x: float32 [n, hidden]; ids, weights: [n, k]. Returns float32 [n, hidden].

        Raises:
            ChecksumError, StoreError: an expert cannot be read.
            MemoryBudgetError: a single expert does not fit.
        """
        try:
            self._watch(layer)
            wanted = self._wanted(ids)
            missing = self._missing(layer, wanted)
            small = ids.size <= kernels.AT_ONCE_PAIRS and not self._open
            if small and not missing and self._source.landed(layer, wanted, self._depth):
                return self._at_once(layer, x, ids, weights, wanted)
            step = self._begin(layer, x, ids, weights, wanted, missing)
            self._read_ahead(layer, x, wanted)
            return self._finish(step)
        except BaseException:
            self._recover()
            raise

    def begin(self, layer: int, x: F32, ids: I32, weights: F32) -> Step:
        """Ask for all that the layer wants; arguments as for a call, to stay as they are until
        `finish`, and errors as of a call."""
        try:
            self._watch(layer)
            wanted = self._wanted(ids)
            step = self._begin(layer, x, ids, weights, wanted, self._missing(layer, wanted))
            self._tidy_early()
            return step
        except BaseException:
            self._recover()
            raise

    def finish(self, step: Step) -> F32:
        """What the layer's experts give: float32 [n, hidden]; errors as of a call."""
        try:
            return self._finish(step)
        except BaseException:
            self._recover()
            raise

    def _recover(self) -> None:
        """Whatever ended a step, the next may begin as if it had never been."""
        self._open.clear()
        self._early.clear()
        if self._ahead is not None:
            self._ahead.forget()
        self._source.recover()

    def _wanted(self, ids: I32) -> dict[int, int]:
        """How many tokens want each expert, lowest first."""
        return dict(sorted(Counter(ids.ravel().tolist()).items()))

    def _missing(self, layer: int, wanted: Iterable[int]) -> list[int]:
        """Those that are neither there nor on their way."""
        held = self._source.claimed(layer)
        return [e for e in wanted if held[e] < self._depth]

    def _watch(self, layer: int) -> None:
        """Now and then, between tokens: see how busy the disk is, and give memory back before the
        ceiling is reached."""
        if layer != self._first:
            return
        now = time.monotonic_ns()
        if now < self._look_ns:
            return
        if self._ahead is not None:
            read_s = self._source.reading()[1]
            seconds = max(now - self._look_ns + _LOOK_NS, 1) / 1e9
            self._ahead.busy = min((read_s - self._read_s) / seconds, 1.0)
            self._read_s = read_s
        self._look_ns = now + _LOOK_NS
        if self._guard is not None:
            excess = self._guard.excess(self._source.unfilled_bytes)
            if excess:
                self._source.shrink(excess)

    def _at_once(self, layer: int, x: F32, ids: I32, weights: F32, wanted: dict[int, int]) -> F32:
        """All is there, and nothing can go away meanwhile: no step is open."""
        wants = [Want(e, self._depth) for e in wanted]
        self._source.observe(layer, wants)
        self._counts.add(layer, ids, weights)
        kept = self._read_ahead(layer, x, wanted, wants)
        begun = time.monotonic_ns()
        out = self._mixtures[layer](self._pool, x, ids, weights)
        ended = self._note("experts", begun, layer, experts=len(wanted))
        self._profile.computed(len(wanted), ids.size, (ended - begun) / 1e9)
        if kept is not None:
            self._source.release(kept)
        return out

    def _read_ahead(
        self, layer: int, x: F32, wanted: dict[int, int], keep: Sequence[Want] = ()
    ) -> Lease | None:
        """Begin to read what the next layer will probably want; a lease on `keep` if that could
        make the layer at hand lose it."""
        ahead, source, depth = self._ahead, self._source, self._depth
        if ahead is None:
            return None
        self._tidy_early()
        ahead.learn(layer, wanted)
        guess = ahead.missing(layer, x, source.claimed, depth)
        # Half of the cache is left to what is known to be wanted.
        if guess is None or not source.fits(layer, depth, 2 * (len(wanted) + len(guess[1]))):
            return None
        following, experts = guess
        kept = source.claim(layer, keep) if keep else None
        if keep and kept is None:
            return None
        lease = source.claim(following, [Want(e, depth) for e in experts], early=True)
        if lease is not None:
            self._early.append((following, lease))
        return kept

    def _tidy_early(self) -> None:
        """Release what was read early for a step that has come by now, and has landed."""
        early, self._early = self._early, []
        for layer, lease in early:
            if self._source.landed(layer, [want.expert for want in lease.wants], self._depth):
                self._source.release(lease)
            else:
                self._early.append((layer, lease))

    def _complete_early(self) -> None:
        """Let all go that was read early, as soon as it has landed."""
        while self._source.collect() is not None:
            pass
        for _, lease in self._early:
            self._source.release(lease)
        self._early.clear()

    def _begin(
        self, layer: int, x: F32, ids: I32, weights: F32, wanted: dict[int, int], missing: list[int]
    ) -> Step:
        # All that comes before the first read is time in which the disk does nothing.
        source, depth = self._source, self._depth
        source.observe(layer, [Want(e, depth) for e in wanted])
        here = [e for e in wanted if e not in missing]
        order = self._ordered(layer, ids, wanted, missing)
        step = Step(layer, wanted, list(wanted), order, bool(missing))
        if source.fits(layer, depth, len(wanted)) and self._claim(step, here + step.missing):
            step.missing = []
        else:
            if here:
                self._claim(step, here)
            self._claim_missing(step)
        # The disk is at work: now for what it need not wait for.
        mixture = self._mixtures[layer]
        step.pair_out = self._buffer(ids.size, mixture.hidden)
        step.parts = kernels.MixtureParts(mixture, x, ids, weights, step.pair_out)
        self._counts.add(layer, ids, weights)
        self._open.append(step)
        return step

    def _finish(self, step: Step) -> F32:
        self._complete(step)
        begun = time.monotonic_ns()
        out = step.parts.sum(self._pool)
        self._note("experts", begun, step.layer)
        self._open.remove(step)
        self._spare.append(step.pair_out)
        return out

    def _complete(self, step: Step) -> None:
        while step.todo:
            while self._source.collect(wait=False):
                pass
            ready = [e for e in step.todo if self._source.ready(step.layer, e) >= self._depth]
            loading = set(step.todo).difference(ready, step.missing)
            if ready and (self.overlap or not loading):
                self._compute(step, ready[:_AT_ONCE] if step.missing else ready)
                self._claim_missing(step)
            elif loading:
                self._wait(step)
            elif not self._claim_missing(step):
                self._make_way(step)
        self._evict_ahead(step)

    def _evict_ahead(self, step: Step) -> None:
        """Once a step, when there is nothing better to do: evict for the next."""
        if step.spare_due:
            step.spare_due = False
            self._source.spare(step.layer, self._depth)

    def _compute(self, step: Step, experts: list[int]) -> None:
        begun = time.monotonic_ns()
        step.parts.run(self._pool, experts)
        ended = self._note("experts", begun, step.layer, experts=len(experts))
        pairs = sum(step.counts[e] for e in experts)
        self._profile.computed(len(experts), pairs, (ended - begun) / 1e9)
        done = set(experts)
        step.todo = [e for e in step.todo if e not in done]
        # What another step has brought in is computed without being claimed.
        step.missing = [e for e in step.missing if e not in done]
        left = []
        for lease, open_ in step.leases:
            open_ -= done
            if open_:
                left.append((lease, open_))
            else:
                self._source.release(lease)
        step.leases = left

    def _wait(self, step: Step) -> None:
        self._evict_ahead(step)
        begun = time.monotonic_ns()
        self._source.collect()
        ended = self._note("wait", begun, step.layer)
        self._wait_ns += ended - begun

    def _claim(self, step: Step, experts: Sequence[int]) -> bool:
        lease = self._source.claim(step.layer, [Want(e, self._depth) for e in experts])
        if lease is not None:
            step.leases.append((lease, set(experts)))
        return lease is not None

    def _claim_missing(self, step: Step) -> bool:
        """Claim what there is room for; whether anything was claimed."""
        before = len(step.missing)
        while step.missing and self._claim(step, step.missing[:1]):
            del step.missing[0]
        return len(step.missing) < before

    def _make_way(self, step: Step) -> None:
        """What was read early, or other steps, hold what room there is: let it go, or compute them
        first."""
        if self._early:
            self._complete_early()
            return
        others = [other for other in self._open if other is not step and other.todo]
        if not others:
            raise MemoryBudgetError(
                f"layer {step.layer}: not even one expert at a time fits in the "
                f"{format_size(self._source.budget_bytes)} for experts; give a larger --mem or "
                "--cache",
                needed_bytes=0,
                budget_bytes=self._source.budget_bytes,
            )
        for other in others:
            self._complete(other)

    def _ordered(
        self, layer: int, ids: I32, counts: dict[int, int], missing: list[int]
    ) -> list[int]:
        """Experts that are missing in the order of their reads."""
        if len(missing) <= 1:
            return missing
        held = self._source.claimed(layer)
        if len({(held[e], counts[e]) for e in missing}) <= 1:
            return missing  # every order takes the same time
        demands = hottest_first(ids, np.full(ids.shape, self._level, np.int32))
        sizes = self._source.layout(layer).segment_sizes
        self._profile.reads(*self._source.reading())
        costs = self._profile.costs(sizes, self._bits, self._level)
        loads = self._order(demands, np.array(held, np.int32), costs)
        return list(dict.fromkeys(load.expert for load in loads))

    def _buffer(self, rows: int, hidden: int) -> F32:
        while self._spare:
            buffer = self._spare.pop()
            if len(buffer) >= rows:
                return buffer
        return np.empty((rows, hidden), np.float32)

    def _note(self, name: str, begun: int, layer: int, **more: int) -> int:
        ended = time.monotonic_ns()
        if self._span is not None:
            self._span(name, begun, ended, layer=layer, **more)
        return ended
