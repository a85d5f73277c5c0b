"""How much a bit has to gain so that a run's mean of bits is the one that was asked for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..types import F32, F64

_LOW, _HIGH, _PER_OCTAVE = -120, 40, 4
"""Base 2 logarithms of gains that are told apart, and how finely."""
_KEPT_TOKENS = 512.0
"""Tokens after which what was seen counts for 1/e."""
_REPAY_TOKENS, _REPAY_PASSES = 32.0, 4.0
"""In so many tokens a deficit or surplus of bits is made good, and in so many passes at least: one
price holds for all tokens of a prefill chunk, and must not make good more than there is."""
_WITHHELD_TOKENS = 8.0
"""Tokens after which what was withheld, because it would have had to be read, counts for 1/e."""


class Aim:
    """The price of a bit with which the mean of all bits given is `mean_bits`.

    Every demand, a token at an expert, may be raised level by level, each raise with a gain a bit
    (see bit_router). Those that gain at least the price are granted. Gains seen so far are kept in
    a histogram, the old ones fading, from which the price follows; what is usually withheld from
    them is added to the mean, and what was given too much or too little so far is made good.

    Args:
        mean_bits: to aim at. bits: of each level, ascending.
    """

    def __init__(self, mean_bits: float, bits: Sequence[int]) -> None:
        self.mean_bits = mean_bits
        self._least, self._steps = bits[0], np.diff(np.asarray(bits, np.float64))
        self._mass: F64 = np.zeros((_HIGH - _LOW) * _PER_OCTAVE)
        self._seen = 0.0  # demands, faded as the histogram is
        self._owed = 0.0  # bits times demands, given less than aimed at
        self._noted: list[F32] = []
        self._pass = self._withheld = 0.0  # demands since the last price, and bits withheld of them
        self._usual = 0.0  # bits withheld of a demand

    def see(self, gains: F32) -> None:
        """There are demands with these gains, float32 [..., levels - 1]."""
        self._noted.append(gains.reshape(-1, len(self._steps)))

    def give(self, bits: int, wished: int, demands: int) -> None:
        """So many demands were given so many bits in all; at this price they would have been given
        `wished`, had nothing to be read."""
        self._owed += self.mean_bits * demands - bits
        self._pass += demands
        self._withheld += wished - bits

    def first_price(self, gains: F32) -> float:
        """What a bit has to gain where nothing is known but these demands: of them alone the mean
        is right."""
        flat = gains.reshape(-1, len(self._steps))
        order = np.argsort(-flat, axis=None, kind="stable")
        bits = np.cumsum(np.broadcast_to(self._steps, flat.shape).ravel()[order])
        wanted = (self.mean_bits - self._least) * len(flat)
        count = int(np.searchsorted(bits, wanted, side="right"))
        return float(flat.ravel()[order[count - 1]]) if count else float("inf")

    def price(self, demands_per_token: int) -> float:
        """What a bit has to gain from now on; something must have been seen.

        demands_per_token: in the whole model, which says how fast to forget.
        """
        self._count(demands_per_token)
        soon = max(_REPAY_TOKENS * demands_per_token, _REPAY_PASSES * self._pass)
        repaid = self._owed / soon
        if self._pass:
            kept = np.exp(-self._pass / (demands_per_token * _WITHHELD_TOKENS))
            self._usual = kept * self._usual + (1 - kept) * self._withheld / self._pass
        self._pass = self._withheld = 0.0
        wanted = (self.mean_bits + repaid + self._usual - self._least) * self._seen
        above = np.cumsum(self._mass[::-1])  # bits given at each price, falling
        if wanted <= 0:
            return float("inf")
        if wanted >= above[-1]:
            return 0.0
        at = int(np.searchsorted(above, wanted))
        before = float(above[at - 1]) if at else 0.0
        part = (wanted - before) / (float(above[at]) - before)
        return float(2.0 ** (_HIGH - (at + part) / _PER_OCTAVE))

    def _count(self, demands_per_token: int) -> None:
        noted, self._noted = self._noted, []
        if not noted:
            return
        gains = np.concatenate(noted) if len(noted) > 1 else noted[0]
        kept = np.exp(-len(gains) / (demands_per_token * _KEPT_TOKENS))
        with np.errstate(divide="ignore"):
            place = (np.log2(gains) - _LOW) * _PER_OCTAVE
        at = np.clip(place, 0, len(self._mass) - 1).astype(np.int64)
        weight = np.broadcast_to(self._steps, at.shape)
        self._mass *= kept
        self._mass += np.bincount(at.ravel(), weight.ravel(), len(self._mass))
        self._seen = self._seen * kept + len(gains)
