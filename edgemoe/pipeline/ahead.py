"""What the next layer will want, guessed from what this one is given, and how far to trust it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from .. import kernels
from ..types import F32

TRUST = 0.85
"""Share of guesses at what is missing that have to be right for reading on them to pay where the
disk is always busy. A wrong one keeps it from reads that are wanted, so where it is busy for half
of the time, half of that will do (docs/benchmarks.md)."""
_KEPT, _ENOUGH = 0.98, 16.0
"""What is left of a guess after one more; guesses, so weighed, before any is trusted."""
_SAMPLE = 16
"""While guesses are not trusted, one layer step in so many makes one."""
_SCATTER = 0x9E3779B1
"""2 ** 32 / the golden ratio: multiples of it, modulo 2 ** 32, come back to no layer in step."""
_LOST = 1e-6
"""A norm's weight below this part of the largest has erased its channel: nothing to divide by."""

Guess = Callable[[int, F32], tuple[int, list[int]] | None]
"""(layer, x) -> (the next layer with experts, those it will probably want, the most wanted first),
or None after the last. x: float32 [n, hidden], what the layer's experts are given."""


class Routing(NamedTuple):
    """How a layer with experts chooses: its number, the weights of the norm before the router,
    float32 [hidden], and the router's, float32 [experts, hidden]."""

    layer: int
    norm: F32
    router: F32


class NextRouter:
    """A `Guess`: the next layer's router, asked with this layer's state.

    The residual stream changes little from layer to layer, so most experts that the next router
    names for what enters this layer's experts are those it will choose. An RMS norm scales a row by
    one number, and the ratio of two norms' weights turns what one of them gives into what the other
    would.

    Args:
        pool: what computes. routings: of all layers with experts, in order. top_k: of each token.
    """

    def __init__(self, pool: kernels.Pool, routings: Sequence[Routing], top_k: int) -> None:
        self._pool, self._top_k = pool, top_k
        self._next: dict[int, tuple[int, F32, F32]] = {}
        for here, then in pairwise(routings):
            lost = np.abs(here.norm) <= _LOST * np.abs(here.norm).max()
            ratio = np.where(lost, 0, then.norm / np.where(lost, 1, here.norm))
            self._next[here.layer] = then.layer, ratio.astype(np.float32), then.router

    def __call__(self, layer: int, x: F32) -> tuple[int, list[int]] | None:
        """See `Guess`."""
        known = self._next.get(layer)
        if known is None:
            return None
        following, ratio, router = known
        scores = kernels.linear_f32(self._pool, x * ratio, router)
        top = np.argpartition(scores, -self._top_k, axis=1)[:, -self._top_k :]
        return following, [e for e, _ in Counter(top.ravel().tolist()).most_common()]


class LookAhead:
    """Guesses at what the next layer lacks, given out only while most of them prove right.

    Models differ in how many of the experts the next router names, and where the cache holds most
    of what is common, what it lacks is harder to guess than the rest. So guesses are compared with
    what comes, and those at missing experts counted.

    Args:
        guess: what makes them. always: give all of them out, right or not (for measurements).

    Attributes:
        busy: share of the time in which the disk reads; whoever knows sets it.
    """

    def __init__(self, guess: Guess, *, always: bool = False) -> None:
        self._guess, self._always = guess, always
        self.busy = 1.0
        self._right = self._all = 0.0
        self._steps = 0
        self._pending: dict[int, list[int]] = {}

    @property
    def trusted(self) -> bool:
        """Whether reading on guesses pays."""
        needed = TRUST * self.busy * self._all
        return self._always or (self._all >= _ENOUGH and self._right >= needed)

    def learn(self, layer: int, wanted: Container[int]) -> None:
        """A layer step wants this."""
        for expert in self._pending.pop(layer, ()):
            self._right = self._right * _KEPT + (expert in wanted)
            self._all = self._all * _KEPT + 1

    def missing(
        self, layer: int, x: F32, held: Callable[[int], Sequence[int]], depth: int
    ) -> tuple[int, list[int]] | None:
        """What to read now: as `Guess`, but only experts that lack one of their first `depth`
        segments; None while guesses are not trusted.

        held: by layer, the segments of each expert that are there or on their way.
        """
        self._steps += 1
        trusted = self.trusted
        if not trusted and self._steps * _SCATTER % 2**32 >= 2**32 // _SAMPLE:
            return None
        guess = self._guess(layer, x)
        if guess is None:
            return None
        following, likely = guess
        has = held(following)
        lacking = [e for e in likely if has[e] < depth]
        self._pending[following] = lacking
        return (following, lacking) if trusted and lacking else None

    def forget(self) -> None:
        """A step was broken off: what was guessed does not come."""
        self._pending.clear()
