"""In which order a layer's missing segments are read. Every order is a function of the same kind.

A layer's demands are jobs, each an expert at a level for some pairs. A job can be computed when all
segments up to its level are there: one disk reads segments one after another, one processor
computes jobs as they become ready. An order lists all missing segments, each expert's ascending.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..types import I32, Demands


class Load(NamedTuple):
    """One segment of one expert of the layer at hand."""

    expert: int
    segment: int


class Costs(NamedTuple):
    """Profiled seconds, one value a level: T_io of a segment, T_comp of a job and of each pair."""

    read: Sequence[float]
    job: Sequence[float]
    pair: Sequence[float]


Order = Callable[[Demands, I32, Costs], list[Load]]
"""Called with a layer's demands; held, int32 [experts], the segments of each expert that are there
or on their way; and costs."""


class Link(NamedTuple):
    """A job with what has to be read for it once the expert's lower jobs have what they need."""

    expert: int
    segments: range
    pairs: int
    read: float
    compute: float


def links(demands: Demands, held: I32, costs: Costs) -> dict[int, list[Link]]:
    """Jobs of each expert, lowest level first; experts as they come in the demands."""
    experts, levels = demands.expert.tolist(), demands.level_index.tolist()
    first = demands.first_pair.tolist()
    has = held[demands.expert].tolist()
    out: dict[int, list[Link]] = {}
    for j in sorted(range(len(experts)), key=levels.__getitem__):
        chain = out.setdefault(experts[j], [])
        begin = max(has[j], chain[-1].segments.stop if chain else 0)
        segments = range(begin, max(begin, levels[j] + 1))
        pairs = first[j + 1] - first[j]
        compute = costs.job[levels[j]] + costs.pair[levels[j]] * pairs
        read = sum(costs.read[s] for s in segments)
        chain.append(Link(experts[j], segments, pairs, read, compute))
    return out


def johnson_key(read: float, compute: float) -> tuple[int, float]:
    """Johnson's rule for two machines: short reads first, then long computations.

    Those that take longer to compute than to read come first, ascending in what they read, so that
    the processor starts early; the rest come descending in what they compute, so that little is
    left to do when the last has been read (S. M. Johnson, 1954).
    """
    return (0, read) if read <= compute else (1, -compute)


def hottest_bit_first(demands: Demands, held: I32, costs: Costs) -> list[Load]:
    """HEBF (D2MoE, arXiv 2504.15299): the segment that serves most pairs first, base before rest.

    One queue an expert, ascending; the head with the highest cumulative count is taken: the base
    serves all pairs on the expert, segment k those that want level k or more. The paper leaves ties
    open. Here one expert is finished before the next begins, since nothing of it can be computed
    before and its segments lie side by side on the disk; among experts, Johnson's rule on all that
    each has to read and compute; then the lower id.

    With the same levels wanted and missing of all experts this is Johnson's order, and no order is
    faster. It is not where they differ: a hot expert that has much to read goes before a cooler one
    whose little would let the processor start, or a long computation comes last because few pairs
    want it. `shortest_makespan` costs the same to find.
    """
    ranked = []
    for expert, chain in links(demands, held, costs).items():
        key = johnson_key(sum(k.read for k in chain), sum(k.compute for k in chain))
        count = sum(k.pairs for k in chain)
        for link in chain:
            ranked += [(-count, key, expert, s) for s in link.segments]
            count -= link.pairs
    return [Load(expert, segment) for _, _, expert, segment in sorted(ranked)]


def shortest_makespan(demands: Demands, held: I32, costs: Costs) -> list[Load]:
    """The order with which the layer is done soonest: Johnson's rule on chains.

    An expert's jobs form a chain, each to be read after the one below it. A job that Johnson's rule
    would put before the one below it is read right after that one, and the two count as one: of
    (a, b) and (c, d), read and compute, min(b, c) runs side by side, so it is (a + c - min(b, c),
    b + d - min(b, c)). What remains ascends within each chain, and sorting it is optimal for two
    machines and chains (T. Kurisu, 1976; C. L. Monma and J. B. Sidney, 1979). Ties: the hotter
    expert, then the lower id.
    """
    ranked = []
    for expert, chain in links(demands, held, costs).items():
        blocks: list[tuple[float, float, list[int]]] = []
        for link in chain:
            block = link.read, link.compute, list(link.segments)
            while blocks and johnson_key(*block[:2]) < johnson_key(*blocks[-1][:2]):
                read, compute, segments = blocks.pop()
                both = min(compute, block[0])
                block = read + block[0] - both, compute + block[1] - both, segments + block[2]
            blocks.append(block)
        count = sum(k.pairs for k in chain)
        for at, (read, compute, segments) in enumerate(blocks):
            ranked.append((johnson_key(read, compute), -count, expert, at, segments))
    return [Load(expert, s) for _, _, expert, _, segments in sorted(ranked) for s in segments]


def on_demand(demands: Demands, held: I32, costs: Costs) -> list[Load]:
    """First come, first served: token by token and slot by slot, all that is missing for the pair.

    What a runtime does that reads an expert when it meets it.
    """
    del costs  # it knows nothing of the future
    has = held.tolist()
    jobs = zip(
        demands.pair[demands.first_pair[:-1]].tolist(),
        demands.expert.tolist(),
        demands.level_index.tolist(),
        strict=True,
    )
    out = []
    for _, expert, level in sorted(jobs):
        out += [Load(expert, s) for s in range(has[expert], level + 1)]
        has[expert] = max(has[expert], level + 1)
    return out


class Timeline(NamedTuple):
    """Seconds that a layer takes, and those of them in which nothing was computed."""

    makespan: float
    wait: float


def timeline(loads: Sequence[Load], demands: Demands, held: I32, costs: Costs) -> Timeline:
    """What an order of reads costs: read back to back, every job computed as it becomes ready.

    loads: with all that is missing, each expert's ascending. Jobs that are ready at the same time
    are computed in the order of the demands, which does not matter to the makespan.
    """
    landed, clock = {}, 0.0
    for load in loads:
        clock += costs.read[load.segment]
        landed[load] = clock
    ready = []
    for expert, chain in links(demands, held, costs).items():
        at = 0.0
        for link in chain:
            if link.segments:
                at = landed[Load(expert, link.segments[-1])]
            ready.append((at, link.compute))
    done = busy = 0.0
    for at, compute in sorted(ready, key=lambda job: job[0]):
        done = max(done, at) + compute
        busy += compute
    done = max(done, clock)
    return Timeline(done, done - busy)
