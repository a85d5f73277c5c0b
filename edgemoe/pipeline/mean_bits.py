"""Levels whose mean is the one that was asked for: raises go to those demands that gain most.

One that would have to be read has to gain more than one that is there: a heavy gate waits for its
segments, a light one computes on what is resident, the lowest level at least.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from ..types import F32, I32, I64
from .aim import Aim
from .bit_router import Gains, Grant


def check_mean(mean_bits: float, bits: Sequence[int], name: str = "mean_bits") -> None:
    """Raise UsageError for a mean that experts with these levels cannot have."""
    if not bits[0] <= mean_bits <= bits[-1]:
        raise UsageError(
            f"{name} must be from {bits[0]} to {bits[-1]}, the bits that this model's experts "
            f"have, not {mean_bits:g}"
        )


class _Target:
    """One mean that some tokens are to have, and what a bit has to gain for it.

    Attributes:
        price: of now.
    """

    def __init__(self, mean_bits: float, bits: Sequence[int]) -> None:
        self.aim = Aim(mean_bits, bits)
        self.price = 0.0
        self._first: int | None = None
        self._settled = False  # a whole pass has been seen

    def see(self, layer: int, gains: F32, demands_per_token: int) -> None:
        """A layer step has demands with these gains: the price changes from pass to pass."""
        self.aim.see(gains)
        if self._first is None:
            self._first = layer
        elif layer == self._first:
            self._settled = True
        if not self._settled:
            self.price = self.aim.first_price(gains)
        elif layer == self._first:
            self.price = self.aim.price(demands_per_token)


class MeanBits:
    """Levels whose mean over a run is the one that was asked for, for all tokens or for each.

    Deterministic: what it chooses depends on nothing but its calls, in order, and on what is held.

    Args:
        gains: of raises. bits: of each level. mean_bits: to aim at where a call asks for no other.
        read_price: how many times as much a raise has to gain whose segment is not in memory, all
            its tokens together; 1: memory does not matter.
        demands_per_token: layers with experts * experts a token takes in each.

    Raises:
        UsageError: a mean that the levels do not reach, or a price below 1.
    """

    early_depth = 1

    def __init__(
        self,
        gains: Gains,
        bits: Sequence[int],
        mean_bits: float,
        read_price: float,
        demands_per_token: int,
    ) -> None:
        check_mean(mean_bits, bits)
        if not read_price >= 1:
            raise UsageError(f"read_price must be 1 or more, not {read_price:g}")
        self._gains, self._read_price, self._usual = gains, read_price, mean_bits
        self._levels, self._bits = bits, np.asarray(bits, np.int32)
        self._segments = np.arange(1, len(bits))
        self._demands_per_token = demands_per_token
        self._targets: dict[float, _Target] = {}

    def __call__(
        self,
        layer: int,
        x: F32,
        ids: I32,
        gates: F32,
        held: Sequence[int] | None,
        means: Sequence[float] | None = None,
    ) -> Grant:
        gains = self._gains(layer, x, ids, gates)
        rows: dict[float, slice | I64] = {self._usual: slice(None)}
        if means is not None and len(set(means)) == 1:
            rows = {means[0]: slice(None)}
        elif means is not None:
            rows = {m: np.flatnonzero(np.asarray(means) == m) for m in sorted(set(means))}
        price = np.empty((len(ids), 1, 1), np.float32)
        for mean, part in rows.items():
            target = self._targets.get(mean)
            if target is None:
                target = self._targets[mean] = _Target(mean, self._levels)
            target.see(layer, gains[part], self._demands_per_token)
            price[part] = target.price
        worth = gains >= price
        wished = worth.sum(axis=-1, dtype=np.int32)
        levels = wished
        if held is not None and self._read_price > 1:
            levels = self._granted(gains, price, worth, ids, np.asarray(held, np.int32))
        given, asked = self._bits[levels], self._bits[wished]
        for mean, part in rows.items():
            one = given[part]
            self._targets[mean].aim.give(int(one.sum()), int(asked[part].sum()), one.size)
        return Grant(levels, wished)

    def _granted(
        self, gains: F32, price: F32, worth: NDArray[np.bool_], ids: I32, held: I32
    ) -> I32:
        """Levels without raises whose segments are not there and not worth reading."""
        here = held[:, None] > self._segments  # [experts, levels - 1]
        if len(ids) == 1:
            granted = here[ids] | (gains >= price * self._read_price)
        else:
            with np.errstate(divide="ignore", invalid="ignore"):  # of a price of 0 all are worth it
                times = np.where(worth, gains / price, 0).reshape(-1, len(self._segments))
            total = np.zeros(here.shape)
            np.add.at(total, ids.ravel(), np.nan_to_num(times, nan=np.inf, posinf=np.inf))
            granted = (here | (total >= self._read_price))[ids]
        raised = np.logical_and.accumulate(worth & granted, axis=-1)
        levels: I32 = raised.sum(axis=-1, dtype=np.int32)
        return levels
