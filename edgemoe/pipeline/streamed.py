"""The mixture part of a model whose experts do not all fit: some are computed, others still read.

A layer step has two halves. `begin` asks for what is missing, in the order in which the layer is
done soonest; `finish` computes each expert as soon as it is there and sums up. Between the two the
caller may do something else: the other half of a batch (see `alternate`). With `overlap` off
everything is read first and then computed: the plain loop that the other is compared with. Both
give the same bits, as each expert's output is kept until all are there and summed in one order.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from .. import kernels
from ..closing import Closing
from ..errors import MemoryBudgetError
from ..hebf.loads import Order
from ..hebf.order import hottest_first
from ..loader.budget import format_size
from ..loader.guard import Guard
from ..loader.residency import Want
from ..loader.resident import Progress
from ..loader.streaming import Span, StreamedExperts
from ..types import F32, I32, Traffic
from .bit_router import BitRouter, Grant
from .costs import Profile
from .counts import DemandCounts
from .early import EarlyReads
from .step import Step, jobs_of, wants_of

_LOOK_NS = 50_000_000
"""Between two looks at what the process uses, which take a third of a millisecond."""

_AT_ONCE = 8
"""Jobs computed in one go while others still wait for their room."""


class StreamedMixture(Closing):
    """All layers' experts, streamed.

    Args:
        pool: what computes. source: where experts come from. router: which level each demand gets.
        bits: of each level. order: of a layer's reads. overlap: compute while reading.
        early: what is read before it is asked for.
        guard: of the ceiling; asked between tokens. span: told what was done when.

    Attributes:
        router: may be exchanged between passes.
    """

    def __init__(
        self,
        pool: kernels.Pool,
        source: StreamedExperts,
        router: BitRouter,
        bits: Sequence[int],
        order: Order,
        *,
        overlap: bool = True,
        early: EarlyReads | None = None,
        guard: Guard | None = None,
        span: Span | None = None,
    ) -> None:
        self._pool, self._source, self.overlap = pool, source, overlap
        self._guard = guard
        self.router, self._bits = router, bits
        self._order, self._span = order, span
        self._mixtures = {
            layer: kernels.Mixture(source.layout(layer), source.segments(layer))
            for layer in source.layers
        }
        self._counts = DemandCounts(
            bits, {layer: source.segment_bytes(layer) for layer in source.layers}
        )
        self._profile = Profile()
        self._open: list[Step] = []
        self._early = EarlyReads(source, 1) if early is None else early
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

    def __call__(
        self,
        layer: int,
        x: F32,
        ids: I32,
        weights: F32,
        means: Sequence[float] | None = None,
    ) -> F32:
        """Sum over slots of weight * expert(x).

        x: float32 [n, hidden]; ids, weights: [n, k]; means: bits that each token is to get on
        average, None: all the usual. Returns float32 [n, hidden].

        Raises:
            ChecksumError, StoreError: an expert cannot be read.
            MemoryBudgetError: a single expert does not fit.
        """
        try:
            self._watch(layer)
            step, grant = self._asked(layer, x, ids, weights, means)
            small = ids.size <= kernels.AT_ONCE_PAIRS and not self._open
            if small and not step.missing and self._source.landed(layer, step.wants.items()):
                return self._at_once(step, x, ids, weights, grant)
            self._begin(step, x, ids, weights, grant)
            self._early.look_ahead(layer, step.wants, x)
            return self._finish(step)
        except BaseException:
            self._recover()
            raise

    def preload(self, progress: Progress | None = None) -> None:
        """Read what is to be read before anything is asked for; errors as of a call.

        progress: called with (bytes read, bytes in all).
        """
        try:
            self._early.preload(progress)
        except BaseException:
            self._recover()
            raise

    def begin(
        self,
        layer: int,
        x: F32,
        ids: I32,
        weights: F32,
        means: Sequence[float] | None = None,
    ) -> Step:
        """Ask for all that the layer wants; arguments as for a call, to stay as they are until
        `finish`, and errors as of a call."""
        try:
            self._watch(layer)
            step, grant = self._asked(layer, x, ids, weights, means)
            self._begin(step, x, ids, weights, grant)
            self._early.tidy()
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
        self._early.forget()
        self._source.recover()

    def _asked(
        self, layer: int, x: F32, ids: I32, weights: F32, means: Sequence[float] | None
    ) -> tuple[Step, Grant]:
        """What the layer wants, at which levels."""
        # All that comes before the first read is time in which the disk does nothing.
        held, width = self._source.claimed(layer), len(self._bits)
        grant = self.router(layer, x, ids, weights, held, means)
        counts = jobs_of(ids, grant.levels, width)
        wants = wants_of(counts, width)
        missing = [e for e, depth in wants.items() if held[e] < depth]
        step = Step(layer, width, counts, wants, list(counts), missing, bool(missing))
        wished = wants
        if grant.wished is not grant.levels:
            wished = wants_of(jobs_of(ids, grant.wished, width), width)
        self._source.observe(layer, [Want(*each) for each in wished.items()])
        return step, grant

    def _watch(self, layer: int) -> None:
        """Now and then, between tokens: see how busy the disk is, and give memory back before the
        ceiling is reached."""
        if layer != self._first:
            return
        now = time.monotonic_ns()
        if now < self._look_ns:
            return
        read_s = self._source.reading()[1]
        seconds = max(now - self._look_ns + _LOOK_NS, 1) / 1e9
        self._early.busy(min((read_s - self._read_s) / seconds, 1.0))
        self._read_s = read_s
        self._look_ns = now + _LOOK_NS
        if self._guard is not None:
            excess = self._guard.excess(self._source.unfilled_bytes)
            if excess:
                self._source.shrink(excess)

    def _at_once(self, step: Step, x: F32, ids: I32, weights: F32, grant: Grant) -> F32:
        """All is there, and nothing can go away meanwhile: no step is open."""
        self._counts.add(step.layer, ids, weights, grant)
        kept = self._early.look_ahead(step.layer, step.wants, x, step.wanted(list(step.wants)))
        begun = time.monotonic_ns()
        out = self._mixtures[step.layer](self._pool, x, ids, grant.levels, weights)
        ended = self._note("experts", begun, step.layer, jobs=len(step.counts))
        self._profile.computed(self._bits_of(step.counts), ids.size, (ended - begun) / 1e9)
        if kept is not None:
            self._source.release(kept)
        return out

    def _begin(self, step: Step, x: F32, ids: I32, weights: F32, grant: Grant) -> None:
        layer, missing = step.layer, set(step.missing)
        here = [e for e in step.wants if e not in missing]
        order = self._ordered(step, ids, grant.levels)
        if self._source.fits(layer, step.wants.items()) and self._claim(
            step, here + step.missing, order
        ):
            step.missing = []
        else:
            if here:
                self._claim(step, here)
            self._claim_missing(step)
        # The disk is at work: now for what it need not wait for.
        mixture = self._mixtures[layer]
        step.pair_out = self._buffer(ids.size, mixture.hidden)
        step.parts = kernels.MixtureParts(mixture, x, ids, grant.levels, weights, step.pair_out)
        self._counts.add(layer, ids, weights, grant)
        self._open.append(step)

    def _finish(self, step: Step) -> F32:
        self._complete(step)
        begun = time.monotonic_ns()
        out = step.parts.sum(self._pool)
        self._note("experts", begun, step.layer)
        self._open.remove(step)
        self._spare.append(step.pair_out)
        return out

    def _complete(self, step: Step) -> None:
        source, width = self._source, step.width
        while step.todo:
            while source.collect(wait=False):
                pass
            ready = [j for j in step.todo if source.ready(step.layer, j // width) > j % width]
            loading = {j // width for j in set(step.todo).difference(ready)}.difference(
                step.missing
            )
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
            self._source.spare(step.layer, max(step.wants.values()))

    def _compute(self, step: Step, jobs: list[int]) -> None:
        begun = time.monotonic_ns()
        step.parts.run(self._pool, jobs)
        ended = self._note("experts", begun, step.layer, jobs=len(jobs))
        pairs = sum(step.counts[job] for job in jobs)
        self._profile.computed(self._bits_of(jobs), pairs, (ended - begun) / 1e9)
        for lease in step.computed(jobs):
            self._source.release(lease)

    def _bits_of(self, jobs: Iterable[int]) -> int:
        return sum(self._bits[job % len(self._bits)] for job in jobs)

    def _wait(self, step: Step) -> None:
        self._evict_ahead(step)
        begun = time.monotonic_ns()
        self._source.collect()
        ended = self._note("wait", begun, step.layer)
        self._wait_ns += ended - begun

    def _claim(self, step: Step, experts: list[int], order: Sequence[tuple[int, int]] = ()) -> bool:
        lease = self._source.claim(step.layer, step.wanted(experts), order=order)
        if lease is not None:
            step.leases.append((lease, step.jobs(experts)))
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
            self._early.complete()
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

    def _ordered(self, step: Step, ids: I32, levels: I32) -> Sequence[tuple[int, int]]:
        """Puts the missing experts in the order of their reads; (expert, segment) of all reads, if
        those of an expert do not come together."""
        missing = step.missing
        if len(missing) <= 1:
            return ()
        held, width = self._source.claimed(step.layer), step.width
        shape: dict[int, list[int]] = {e: [held[e]] for e in missing}
        for job, count in step.counts.items():
            if job // width in shape:
                shape[job // width] += job % width, count
        if len(set(map(tuple, shape.values()))) <= 1:
            return ()  # every order takes the same time
        demands = hottest_first(ids, levels)
        sizes = self._source.layout(step.layer).segment_sizes
        self._profile.reads(*self._source.reading())
        costs = self._profile.costs(sizes, self._bits)
        loads = self._order(demands, np.array(held, np.int32), costs)
        step.missing = list(dict.fromkeys(load.expert for load in loads))
        return loads if len(step.counts) > len(step.wants) else ()

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
