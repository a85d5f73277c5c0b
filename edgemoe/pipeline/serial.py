"""The serial loop: everything is resident, so a layer's demands are one call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from .. import kernels
from ..hebf.order import hottest_first
from ..layout import RecordLayout
from ..loader.resident import ResidentExperts
from ..types import F32, I32, U64


def mixture(
    layout: RecordLayout,
    segments: U64,
    level: int,
    pool: kernels.Pool,
    x: F32,
    ids: I32,
    gates: F32,
) -> F32:
    """kernels.Mixture(layout, segments, level)(pool, x, ids, gates) out of separate kernels."""
    demands = hottest_first(ids, np.full(ids.shape, level, np.int32))
    token = demands.pair // np.int32(ids.shape[1])
    jobs = segments[demands.expert], demands.level_index, demands.first_pair, token
    pair_out = kernels.experts(pool, layout, x, *jobs)
    position = np.empty(ids.size, np.int32)
    position[demands.pair] = np.arange(ids.size, dtype=np.int32)
    return kernels.combine(pool, pair_out, position.reshape(ids.shape), gates)


class SerialExperts:
    """The mixture part of every layer, on experts that are all resident at one level."""

    def __init__(self, pool: kernels.Pool, resident: ResidentExperts) -> None:
        self._pool = pool
        self._resident = resident
        self._mixtures: dict[int, Callable[[kernels.Pool, F32, I32, F32], F32]] = {}
        for layer in resident.layers:
            record = resident.layout(layer), resident.segments(layer), resident.level_index
            one_call = kernels.fused()
            self._mixtures[layer] = (
                kernels.Mixture(*record) if one_call else partial(mixture, *record)
            )

    @property
    def mean_bits(self) -> float:
        """Bits used / demands; every demand gets the resident level here."""
        return float(self._resident.bits)

    def __call__(self, layer: int, x: F32, ids: I32, weights: F32) -> F32:
        """Sum over slots of weight * expert(x).

        x: float32 [n, hidden]; ids, weights: [n, k]. Returns float32 [n, hidden].
        """
        return self._mixtures[layer](self._pool, x, ids, weights)
