"""What to evict: by what a segment is worth, and what others do."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from ..errors import UsageError
from ..types import F32, F64, I32, I64
from .residency import Want

FAST, SLOW = 0.5, 0.995
"""What is left of a hit after one token more, in the two memories of `ByWorth`."""
FAST_SHARE = 0.5
"""Weight of the first memory. The three were chosen on real traces (scripts/simulate.py)."""
_TINY = np.float32(1e-9)  # keeps old hits out of the numbers that processors are slow with
PRIOR_STEPS = 4.0
"""Steps that the first guess, that all experts are as likely, counts for."""


class ByWorth:
    """Value of a segment = what it saves when it is wanted / (bytes * steps until it is wanted).

    The chance p that a step of its layer wants the segment is estimated by decayed hits. Its next
    possible use is d layer steps away, 1 for the layer that comes next, all `layers` for the one at
    hand, and each step of its layer that does not want it costs a round of all layers. So it is
    wanted in d + layers * (1 - p) / p steps on average. Where experts are wanted again and again
    this is nearly the clairvoyant's order, and since of two equals the one that was just used goes,
    some of a cycle that is too large for the cache stays in it; where they are not, it is the order
    of frequency.

    Args:
        layers, experts, levels: how many.
        top_k: experts a token takes in each layer.
        worth: [layers, experts, levels], what having the segment saves per byte of it. None: the
            same for all, right where what is missing is read anyhow (`--exact`): it saves its
            bytes. `worth_of` makes one from sensitivities.

    Raises:
        UsageError: worth that is negative, not finite or zero throughout.
    """

    # Most steps ask for no rating. What they want is noted, and counted when the run of successive
    # layers ends or a rating is asked for: all layers of the run at once.

    whole = False

    def __init__(
        self, layers: int, experts: int, levels: int, top_k: int, worth: ArrayLike | None = None
    ) -> None:
        self._layers, self._experts, self._levels = layers, experts, levels
        self._round = np.float32(layers)
        self._prior = top_k / experts
        self._noted: list[tuple[Want, ...]] = []  # of layers up to the one before `_next`
        self._next = 0
        self._counted = 0, 0  # layers that were counted since they were rated
        # Each layer is a row [level, expert], flat and in one run of memory. Rows of `_rest` and
        # `_price` begin with a level more, for experts that are not there, which is rated -inf.
        size = levels * experts
        self._hits: F32 = np.zeros((layers, 2 * size), np.float32)  # both memories
        self._fast, self._slow = self._hits[:, :size], self._hits[:, size:]
        self._marks = np.zeros_like(self._hits)
        self._decay = np.repeat(np.array([FAST, SLOW], np.float32), size)
        self._weight = [(0.0, 0.0)] * layers
        self._rest: F32 = np.full((layers, levels + 1, experts), -np.inf, np.float32)
        self._rest[:, 1:] = self._prior
        self._chance = self._rest.reshape(layers, -1)[:, experts:]  # while it is worked out
        self._price: F32 | None = None
        if worth is not None:
            given = np.broadcast_to(np.asarray(worth, np.float64), (layers, experts, levels))
            if not (np.isfinite(given).all() and given.min() >= 0 and given.max() > 0):
                raise UsageError("worth: give finite numbers, none negative, not all zero")
            self._price = np.zeros_like(self._rest)
            price = given.mean() / np.maximum(given, given.max() * 1e-9)
            self._price[:, 1:] = price.swapaxes(1, 2)
        self._index: I64 = np.array([self._place(at, 0) for at in range(layers * experts)])
        self._top: F32 = np.empty(layers * experts, np.float32)
        self._tops, self._indices = (v.reshape(layers, -1) for v in (self._top, self._index))
        self._rate(slice(None))
        self._top_price: F32 | None = None
        if self._price is not None:
            self._top_price = self._price.ravel()[self._index]
        steps = np.arange(2 * layers, dtype=np.float32) % layers + 1
        self._steps: F32 = np.repeat(steps, experts)

    def observe(self, layer: int, wants: Sequence[Want]) -> None:
        if layer != self._next:
            self._count()
        self._noted.append(tuple(wants))
        self._next = layer + 1

    def claim(self, at: int, depth: int) -> None:
        index = self._place(at, depth)
        self._index[at] = index
        self._top[at] = self._rest.item(index)
        if self._top_price is not None and self._price is not None:
            self._top_price[at] = self._price.item(index)

    def drop(self, layer: int) -> F32:
        self._catch_up()
        begin = self._begin(layer)
        steps = self._steps[begin : begin + len(self._top)]
        if self._top_price is None:
            return self._top + steps
        out: F32 = steps * self._top_price
        out += self._top
        return out

    def drop_each(self, layer: int, at: int, depth: int) -> list[float]:
        self._catch_up()
        owner, expert = divmod(at, self._experts)
        steps: float = self._steps.item(self._begin(layer) + at)
        rest: list[float] = self._rest[owner, : depth + 1, expert].tolist()
        if self._price is None:
            return [each + steps for each in rest]
        price: list[float] = self._price[owner, : depth + 1, expert].tolist()
        return [each + steps * p for each, p in zip(rest, price, strict=True)]

    def _place(self, at: int, depth: int) -> int:
        """Of the segment that is the top one of `depth`, in `_rest` and `_price`."""
        return at + (at // self._experts * self._levels + depth) * self._experts

    def _begin(self, layer: int) -> int:
        """Where in `_steps` those from `layer` to the next use of each expert begin."""
        return (self._layers - layer - 1) * self._experts

    def _count(self) -> None:
        """Count what is noted."""
        noted, self._noted = self._noted, []
        if not noted:
            return
        end, experts, width = self._next, self._experts, self._hits.shape[1]
        begin = end - len(noted)
        places: list[int] = []
        for i, wants in enumerate(noted):
            for expert, depth in wants:
                places += range(i * width + expert, i * width + depth * experts, experts)
            fast, slow = self._weight[begin + i]
            self._weight[begin + i] = fast * FAST + 1, slow * SLOW + 1
        rows = _rows(begin, end)
        hits, marks = self._hits[rows], self._marks[_rows(0, len(noted))]
        half = width // 2
        marks.fill(0)
        marks.put(places, 1)
        marks[..., half:] = marks[..., :half]
        hits *= self._decay
        hits += _TINY
        hits += marks
        rated_from, rated_to = self._counted
        if rated_from < rated_to:
            begin, end = min(begin, rated_from), max(end, rated_to)
        self._counted = begin, end

    def _catch_up(self) -> None:
        """Count and rate what was observed."""
        if not self._noted:
            return
        self._count()
        begin, end = self._counted
        self._counted = 0, 0
        factors = []
        for fast, slow in self._weight[begin:end]:
            a, b = FAST_SHARE / (fast + PRIOR_STEPS), (1 - FAST_SHARE) / (slow + PRIOR_STEPS)
            factors.append((a, b, self._prior * PRIOR_STEPS * (a + b)))
        rows = _rows(begin, end)
        of_fast, of_slow, prior = (
            map(np.float32, factors[0])
            if len(factors) == 1
            else np.array(factors, np.float32).T[:, :, None]
        )
        chance = self._chance[rows]
        np.multiply(self._fast[rows], of_fast, out=chance)
        chance += self._slow[rows] * of_slow
        chance += prior
        self._rate(rows)

    def _rate(self, rows: int | slice) -> None:
        """Of these layers: from the chance of each segment to the expected steps beyond its next
        possible use."""
        rest = self._chance[rows]
        np.divide(self._round, rest, out=rest)
        rest -= self._round
        if self._price is not None:
            rest *= self._price[rows, 1:].reshape(rest.shape)
        self._tops[rows] = self._rest.reshape(-1)[self._indices[rows]]


def _rows(begin: int, end: int) -> int | slice:
    """Rows begin .. end of an array; one row alone is an array of a dimension less, which NumPy is
    twice as fast with."""
    return begin if begin + 1 == end else slice(begin, end)


class ByExpert:
    """Policies that rate whole experts: what has the lowest `value` goes first.

    value: float64 [layers, experts], kept up to date by `observe` of each policy.
    """

    whole = True

    def __init__(self, layers: int, experts: int) -> None:
        self.value: F64 = np.zeros((layers, experts))
        self._absent: F64 = np.full(layers * experts, np.inf)  # 0 for those that are there

    def observe(self, layer: int, wants: Sequence[Want]) -> None:
        """Learns nothing in the run."""

    def claim(self, at: int, depth: int) -> None:
        self._absent[at] = 0 if depth else np.inf

    def drop(self, layer: int) -> F64:
        return -(self.value.reshape(-1) + self._absent)

    def drop_each(self, layer: int, at: int, depth: int) -> list[float]:
        return [-np.inf] + [-float(self.value.item(at))] * depth


class LeastRecentlyUsed(ByExpert):
    """Global LRU over whole experts at fixed bits: what streaming rivals do."""

    def __init__(self, layers: int, experts: int) -> None:
        super().__init__(layers, experts)
        self._uses = 1

    def observe(self, layer: int, wants: Sequence[Want]) -> None:
        uses = range(self._uses, self._uses + len(wants))
        self.value[layer, [w.expert for w in wants]] = uses
        self._uses = uses.stop


class LeastFrequentlyUsed(ByExpert):
    """Global LFU over whole experts: uses since the start; of equals, the one used longer ago."""

    def __init__(self, layers: int, experts: int) -> None:
        super().__init__(layers, experts)
        self._steps = 0

    def observe(self, layer: int, wants: Sequence[Want]) -> None:
        self._steps += 1
        experts = [w.expert for w in wants]
        uses = np.floor(self.value[layer, experts]) + 1
        self.value[layer, experts] = uses + 1 - 1 / (1 + self._steps)


class ByProfile(ByExpert):
    """EdgeMoE's: how often an expert was used in a profile, and how soon its layer comes.

    profile: [layers, experts], uses counted before the run. `hottest` says what to load at start,
    `static_levels` at which bits each expert is kept for ever.
    """

    def __init__(self, profile: ArrayLike) -> None:
        uses = np.asarray(profile, np.float64)
        super().__init__(*uses.shape)
        self.value = uses

    def drop(self, layer: int) -> F64:
        layers = len(self.value)
        steps = np.roll(np.arange(1, layers + 1), layer + 1)
        return -((self.value / steps[:, None]).reshape(-1) + self._absent)

    def drop_each(self, layer: int, at: int, depth: int) -> list[float]:
        return [-np.inf] + [float(self.drop(layer)[at])] * depth


def worth_of(bits: Sequence[int], sizes: ArrayLike, loss: ArrayLike | None = None) -> F64:
    """Error that a segment takes away, per byte of it: what `ByWorth` weighs, [layers, 1 or
    experts, levels].

    bits: of each level. sizes: [layers, levels], bytes. loss: [layers, experts, levels], error of
    an expert at each level (the store's sensitivities); None: 4 ** -bits for all. An expert that is
    not there is taken to lose 4 ** bits[0] times what its lowest level does.
    """
    size = np.asarray(sizes, np.float64)[:, None, :]
    if loss is None:
        loss = np.broadcast_to(4.0 ** -np.asarray(bits, np.float64), size.shape)
    error = np.asarray(loss, np.float64)
    missing = error[..., :1] * 4.0 ** bits[0]
    gain = -np.diff(np.concatenate([missing, error], axis=-1))
    out: F64 = np.maximum(gain, 0) / size
    return out


def hottest(profile: ArrayLike) -> list[tuple[int, int]]:
    """(layer, expert) in falling order of `profile` [layers, experts]; ties: lower ones first."""
    uses = np.asarray(profile)
    order = np.argsort(-uses.ravel(), kind="stable")
    return [divmod(int(at), uses.shape[1]) for at in order]


def static_levels(loss: ArrayLike, sizes: ArrayLike, target: int) -> I32:
    """Level index of each expert so that all together take at most `target` bytes.

    All begin at the lowest; the raise by one level that takes away most error per byte goes first,
    as long as it fits. loss: [layers, experts, levels]. sizes: [layers, levels], bytes.
    Returns int32 [layers, experts].

    Raises:
        UsageError: the lowest level of all takes more than `target`.
    """
    error, size = np.asarray(loss, np.float64), np.asarray(sizes, np.int64)
    layers, experts, levels = error.shape
    left = target - int(size[:, 0].sum()) * experts
    if left < 0:
        raise UsageError(f"{target} bytes do not hold all experts at the lowest level")
    out = np.zeros((layers, experts), np.int32)
    gain = -np.diff(error, axis=2) / size[:, None, 1:]
    if levels == 1:
        return out
    heap = [(-gain[i, e, 0], i, e) for i in range(layers) for e in range(experts)]
    heapq.heapify(heap)
    while heap:
        _, i, e = heapq.heappop(heap)
        cost = int(size[i, out[i, e] + 1])
        if cost > left:
            continue
        left -= cost
        out[i, e] += 1
        if out[i, e] + 1 < levels:
            heapq.heappush(heap, (-gain[i, e, out[i, e]], i, e))
    return out
