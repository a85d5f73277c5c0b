"""What reading a segment and computing a job take on this machine, learnt as a run goes on."""

from __future__ import annotations

from collections.abc import Sequence

from ..hebf.loads import Costs

_KEPT = 0.95
"""What is left of a measured call after one more; calls of a prefill and of decoding alternate."""
_FIRST_READ, _FIRST_JOB, _FIRST_PAIR = 1e-9, 4e-4, 4e-5
"""Seconds a byte read, an expert and a token of it, before anything was measured."""


class Profile:
    """Costs that follow what was measured.

    Computing e experts for p tokens altogether takes e * job + p * pair seconds: weights are read
    once an expert, and multiplied with once a token. The two are fitted by least squares.
    """

    def __init__(self) -> None:
        self._read, self._job, self._pair = _FIRST_READ, _FIRST_JOB, _FIRST_PAIR
        self._sums = [0.0] * 5

    def reads(self, size: int, seconds: float) -> None:
        """So many bytes were read in so many seconds with reads in flight, since the start."""
        if size and seconds > 0:
            self._read = seconds / size

    def computed(self, experts: int, pairs: int, seconds: float) -> None:
        """A call computed so many experts for so many pairs of an expert and a token."""
        news = experts * experts, experts * pairs, pairs * pairs, experts * seconds, pairs * seconds
        ee, ep, pp, et, pt = self._sums = [
            old * _KEPT + new for old, new in zip(self._sums, news, strict=True)
        ]
        scale = ee * pp - ep * ep
        job, pair = et / ee, 0.0
        if scale > 1e-3 * ee * pp:  # calls differ in tokens an expert, so the two can be told apart
            job, pair = (et * pp - pt * ep) / scale, (pt * ee - et * ep) / scale
            if job < 0:
                job, pair = 0.0, pt / pp
            elif pair < 0:
                job, pair = et / ee, 0.0
        self._job, self._pair = job, pair

    def costs(self, sizes: Sequence[int], bits: Sequence[int], level: int) -> Costs:
        """Of segments of these bytes; of jobs at each level, which cost as what they read.

        bits: of each level. level: index of the one that was measured.
        """
        scale = [b / bits[level] for b in bits]
        return Costs(
            [size * self._read for size in sizes],
            [s * self._job for s in scale],
            [self._pair for _ in scale],
        )
