"""What a round takes, and how rounds are summed up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


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
