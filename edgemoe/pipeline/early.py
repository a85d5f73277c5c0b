"""What is read before it is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..loader.residency import Lease, Want
from ..loader.resident import Progress
from ..loader.streaming import StreamedExperts
from ..types import F32
from .ahead import LookAhead

_TOGETHER = 16
"""Experts that are read at a time before anything is computed."""


def in_turn(layers: Sequence[int], experts: int, depth: int) -> list[tuple[int, Want]]:
    """All experts so many segments deep, one of each layer in turn."""
    return [(layer, Want(expert, depth)) for expert in range(experts) for layer in layers]


class EarlyReads:
    """Reads that nobody waits for yet. What they bring stays, held by leases, until it has landed.

    Args:
        source: where experts come from. depth: segments of an expert that a guess reads.
        ahead: what the next layer will want, or None: no guesses. at_start: layers and what of them
        `preload` reads, best first.
    """

    def __init__(
        self,
        source: StreamedExperts,
        depth: int,
        ahead: LookAhead | None = None,
        at_start: Sequence[tuple[int, Want]] = (),
    ) -> None:
        self._source, self._depth = source, depth
        self._ahead, self._at_start = ahead, at_start
        self._leases: list[tuple[int, Lease]] = []  # for which layer

    def __bool__(self) -> bool:
        """Whether leases are held."""
        return bool(self._leases)

    def busy(self, share: float) -> None:
        """Of the time the disk lately read in this share."""
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

    def preload(self, progress: Progress | None = None) -> None:
        """Read what is to be read at start, as far as memory goes.

        progress: called with (bytes read, bytes in all).
        """
        source = self._source
        wants = self._at_start[: source.room_for(self._at_start)]
        total = sum(source.want_bytes(*each) for each in wants)
        done = 0
        for layer, want in wants:
            self._claim(layer, [want])
            while len(self._leases) >= _TOGETHER and source.collect() is not None:
                self.tidy()
            done += source.want_bytes(layer, want)
            if progress is not None:
                progress(done, total)
        self.complete()

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
