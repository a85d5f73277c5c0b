"""Which level each token gets each of its experts at: the second of the two routers.

A level that is one higher costs bits and takes error away. What it takes away a bit is its gain;
see mean_bits.py for which raises are granted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike

from ..types import F32, F64, I32


class Grant(NamedTuple):
    """Level indices of a layer step's demands, int32 [n, k]: what each gets, and what it would get
    if all were in memory."""

    levels: I32
    wished: I32


class BitRouter(Protocol):
    """Chooses levels.

    Attributes:
        early_depth: segments of an expert that are worth reading before it is known what is wanted.
    """

    early_depth: int

    def __call__(
        self,
        layer: int,
        x: F32,
        ids: I32,
        gates: F32,
        held: Sequence[int] | None,
        means: Sequence[float] | None = None,
    ) -> Grant:
        """For a layer step: x float32 [n, hidden], ids and gates [n, k]; held: by expert, the first
        segments that are in memory or on their way, None: all; means: bits that each token is to
        get on average, [n], None: all the usual."""
        ...


class OneLevel:
    """The same level for all."""

    def __init__(self, level_index: int) -> None:
        self._level, self.early_depth = level_index, level_index + 1
        self._last = np.empty((0, 0), np.int32)

    def __call__(
        self,
        layer: int,
        x: F32,
        ids: I32,
        gates: F32,
        held: Sequence[int] | None,
        means: Sequence[float] | None = None,
    ) -> Grant:
        if self._last.shape != ids.shape:
            self._last = np.full(ids.shape, self._level, np.int32)
        return Grant(self._last, self._last)


class ExpertLevels:
    """A level for each expert, for good: EdgeMoE's (arXiv 2308.14352).

    levels: by layer, the level index of each expert.
    """

    def __init__(self, levels: Mapping[int, ArrayLike]) -> None:
        self._levels = {layer: np.asarray(row, np.int32) for layer, row in levels.items()}
        self.early_depth = 1 + min((int(row.min()) for row in self._levels.values()), default=0)

    def __call__(
        self,
        layer: int,
        x: F32,
        ids: I32,
        gates: F32,
        held: Sequence[int] | None,
        means: Sequence[float] | None = None,
    ) -> Grant:
        levels = self._levels[layer][ids]
        return Grant(levels, levels)


class Gains(Protocol):
    """What raises are worth."""

    def __call__(self, layer: int, x: F32, ids: I32, gates: F32) -> F32:
        """Gain a bit of each demand's raise to level 1, 2 ..: float32 [n, k, levels - 1], not
        negative, falling from level to level."""
        ...


class GateGains:
    """Gains without training: gate ** 2 times what the expert's squared error falls by.

    An expert's output enters the residual stream times its gate, so its error counts by the square.

    Args:
        loss: by layer, the squared error of each expert at each level, [experts, levels] (the
            store's sensitivities); None: 4 ** -bits for all.
        layers: that have experts. bits: of each level. costs: of an error in each layer; None: the
            same in all.
    """

    def __init__(
        self,
        layers: Sequence[int],
        bits: Sequence[int],
        loss: F32 | None = None,
        costs: F32 | None = None,
    ) -> None:
        width = np.asarray(bits, np.float64)
        self._slope: dict[int, F32] = {}
        for i, layer in enumerate(layers):
            error = 4.0 ** -width[None] if loss is None else loss[i].astype(np.float64)
            cost = 1.0 if costs is None else float(costs[i])
            self._slope[layer] = slopes(cost * error, width).astype(np.float32)
        self._one_for_all = loss is None

    def __call__(self, layer: int, x: F32, ids: I32, gates: F32) -> F32:
        slope = self._slope[layer]
        power = np.square(gates)[..., None]
        return power * (slope[0] if self._one_for_all else slope[ids])


def slopes(error: F64, bits: F64) -> F64:
    """Fall of the error a bit from level to level, [..., levels - 1], on the lower convex hull of
    its points (bits, error), which is flat after the least error: never rising, not negative."""
    best = np.minimum.accumulate(error, axis=-1)
    steps = np.diff(bits)
    out = np.empty((*best.shape[:-1], len(steps)))
    flat = best.reshape(-1, best.shape[-1])
    for row, to in zip(flat, out.reshape(-1, len(steps)), strict=True):
        runs: list[tuple[float, float, int]] = []  # fall, bits, levels of a run with one slope
        for fall, width in zip(-np.diff(row), steps, strict=True):
            run = float(fall), float(width), 1
            while runs and runs[-1][0] * run[1] <= run[0] * runs[-1][1]:
                last = runs.pop()
                run = last[0] + run[0], last[1] + run[1], last[2] + run[2]
            runs.append(run)
        to[:] = [fall / width for fall, width, count in runs for _ in range(count)]
    return out
