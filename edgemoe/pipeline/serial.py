"""The serial loop: order the demands of a layer, compute them, sum them up."""

from __future__ import annotations

import numpy as np

from .. import kernels
from ..hebf.order import hottest_first
from ..loader.resident import ResidentExperts
from ..types import F32, I32


class SerialExperts:
    """The mixture part of every layer, on experts that are all resident at one level."""

    def __init__(self, pool: kernels.Pool, resident: ResidentExperts) -> None:
        self._pool = pool
        self._resident = resident

    @property
    def mean_bits(self) -> float:
        """Bits used / demands; every demand gets the resident level here."""
        return float(self._resident.bits)

    def __call__(self, layer: int, x: F32, ids: I32, weights: F32) -> F32:
        """Sum over slots of weight * expert(x).

        x: float32 [n, hidden]; ids, weights: [n, k]. Returns float32 [n, hidden].
        """
        n, k = ids.shape
        want = hottest_first(ids, np.full((n, k), self._resident.level_index, np.int32))
        pair_out = kernels.experts(
            self._pool,
            self._resident.layout(layer),
            x,
            self._resident.addresses(layer, want.expert),
            want.level_index,
            want.first_pair,
            want.pair // np.int32(k),
        )
        position = np.empty(n * k, np.int32)
        position[want.pair] = np.arange(n * k, dtype=np.int32)
        return kernels.combine(self._pool, pair_out, position.reshape(n, k), weights)
