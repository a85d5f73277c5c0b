"""What some work takes, and how rounds of it are summed up."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


def seconds(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds that `work` takes by a clock."""
    start = clock()
    work()
    return clock() - start


@dataclass(frozen=True)
class Timing:
    """Seconds of one sequence: of its prefill, and of each decoded token."""

    prefill_s: float
    steps_s: tuple[float, ...]

    @property
    def decode_s(self) -> float:
        """Seconds of all decoded tokens."""
        return sum(self.steps_s)


@dataclass(frozen=True)
class Spread:
    """Of a figure over the rounds."""

    p10: float
    median: float
    p90: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Percentiles, linear between neighbours."""
        return cls(*(float(v) for v in np.percentile(values, (10, 50, 90))))

    def shown(self, digits: int = 2) -> str:
        """As text: 10th percentile / median / 90th."""
        return " / ".join(f"{v:.{digits}f}" for v in (self.p10, self.median, self.p90))
