"""What is read before it is asked for: guesses at the next layer, and what there is room for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ..loader.residency import Lease, Want
from ..loader.streaming import StreamedExperts
from ..types import F32
from .ahead import LookAhead

BUSY = 0.8
"""Share of the time in which the disk may read, at most, for more to be read into free memory."""

Fill = Iterator[tuple[int, Want]]
"""Layers and what of them to read into memory that nothing has taken yet, best first."""


def in_turn(layers: Sequence[int], experts: int, depths: Sequence[int]) -> Fill:
    """All experts so many segments deep, one of each layer in turn, then all deeper."""
    for depth in depths:
        for expert in range(experts):
            for layer in layers:
                yield layer, Want(expert, depth)


class EarlyReads:
    """Reads that nobody waits for yet. What they bring stays, held by leases, until it has landed.

    Args:
        source: where experts come from. depth: segments of an expert that a guess reads.
        ahead: what the next layer will want, or None. fill: what to read into free memory while the
        disk is idle, or None.
    """

    def __init__(
        self,
        source: StreamedExperts,
        depth: int,
        ahead: LookAhead | None = None,
        fill: Fill | None = None,
    ) -> None:
        self._source, self._depth = source, depth
        self._ahead, self._fill = ahead, fill
        self._leases: list[tuple[int, Lease]] = []  # for which layer
        self._busy = 0.0

    def __bool__(self) -> bool:
        """Whether leases are held."""
        return bool(self._leases)

    def busy(self, share: float) -> None:
        """Of the time the disk lately read in this share."""
        self._busy = share
        if self._ahead is not None:
            self._ahead.busy = share

    def look_ahead(
        self, layer: int, wants: Mapping[int, int], x: F32, keep: Sequence[Want] = ()
    ) -> Lease | None:
        """Begin to read what the next layer will probably want; a lease on `keep` if that could
        make the layer at hand lose it.

        wants: segments of each expert that this layer wants. x: what its experts are given.
        """
        ahead, source, depth = self._ahead, self._source, self._depth
        if ahead is None:
            return None
        self.tidy()
        ahead.learn(layer, wants)
        guess = ahead.missing(layer, x, source.claimed, depth)
        if guess is None:
            return None
        following, experts = guess
        likely = [Want(e, depth) for e in experts]
        # Half of the cache is left to what is known to be wanted.
        if not source.fits(layer, [*wants.items(), *likely], 2):
            return None
        kept = source.claim(layer, keep) if keep else None
        if keep and kept is None:
            return None
        self._claim(following, likely)
        return kept

    def fill(self) -> None:
        """Begin to read something into free memory, if the disk has nothing else to do."""
        if self._fill is None:
            return
        source = self._source
        while source.collect(wait=False):
            pass
        self.tidy()
        if source.reads_under_way or self._busy > BUSY:
            return
        for layer, want in self._fill:
            if source.claimed(layer)[want.expert] >= want.depth:
                continue
            if source.has_room(layer, want):
                self._claim(layer, [want])
                return
            break
        self._fill = None  # full; from here on what comes in takes the place of something else

    def _claim(self, layer: int, wants: Sequence[Want]) -> None:
        lease = self._source.claim(layer, wants, early=True)
        if lease is not None:
            self._leases.append((layer, lease))

    def tidy(self) -> None:
        """Release what has landed."""
        leases, self._leases = self._leases, []
        for layer, lease in leases:
            if self._source.landed(layer, lease.wants):
                self._source.release(lease)
            else:
                self._leases.append((layer, lease))

    def complete(self) -> None:
        """Let all go, as soon as it has landed."""
        while self._source.collect() is not None:
            pass
        for _, lease in self._leases:
            self._source.release(lease)
        self._leases.clear()

    def forget(self) -> None:
        """A step was broken off: no lease is held any more, and what was guessed does not come."""
        self._leases.clear()
        if self._ahead is not None:
            self._ahead.forget()
