"""What reading a segment and computing a job take on this machine, learnt as a run goes on."""

from __future__ import annotations

from collections.abc import Sequence

from ..hebf.loads import Costs

_KEPT = 0.95
"""What is left of a measured call after one more; calls of a prefill and of decoding alternate."""
_FIRST_READ, _FIRST_BIT, _FIRST_PAIR = 1e-9, 1e-4, 4e-5
"""Seconds a byte read, an expert's bit and a token of it, before anything was measured."""


class Profile:
    """Costs that follow what was measured.

    Computing experts of b bits for p tokens altogether takes b * bit + p * pair seconds: weights
    are read once an expert, and multiplied with once a token. The two are fitted by least squares.
    """

    def __init__(self) -> None:
        self._read, self._bit, self._pair = _FIRST_READ, _FIRST_BIT, _FIRST_PAIR
        self._sums = [0.0] * 5

    def reads(self, size: int, seconds: float) -> None:
        """So many bytes were read in so many seconds with reads in flight, since the start."""
        if size and seconds > 0:
            self._read = seconds / size

    def computed(self, bits: int, pairs: int, seconds: float) -> None:
        """A call computed experts of so many bits in all, each counted once, for so many pairs of
        an expert and a token."""
        news = bits * bits, bits * pairs, pairs * pairs, bits * seconds, pairs * seconds
        bb, bp, pp, bt, pt = self._sums = [
            old * _KEPT + new for old, new in zip(self._sums, news, strict=True)
        ]
        scale = bb * pp - bp * bp
        bit, pair = bt / bb, 0.0
        if scale > 1e-3 * bb * pp:  # calls differ in tokens an expert, so the two can be told apart
            bit, pair = (bt * pp - pt * bp) / scale, (pt * bb - bt * bp) / scale
            if bit < 0:
                bit, pair = 0.0, pt / pp
            elif pair < 0:
                bit, pair = bt / bb, 0.0
        self._bit, self._pair = bit, pair

    def costs(self, sizes: Sequence[int], bits: Sequence[int]) -> Costs:
        """Of segments of these bytes; of jobs at each level, which has so many bits."""
        return Costs(
            [size * self._read for size in sizes],
            [each * self._bit for each in bits],
            [self._pair for _ in bits],
        )
