"""The serial loop: everything is resident, so a layer's demands are one call."""

from __future__ import annotations

from .. import kernels
from ..loader.resident import ResidentExperts
from ..types import F32, I32


class SerialExperts:
    """The mixture part of every layer, on experts that are all resident at one level."""

    def __init__(self, pool: kernels.Pool, resident: ResidentExperts) -> None:
        self._pool = pool
        self._resident = resident
        level = resident.level_index
        self._mixtures = {
            layer: kernels.Mixture(resident.layout(layer), resident.segments(layer), level)
            for layer in resident.layers
        }

    @property
    def mean_bits(self) -> float:
        """Bits used / demands; every demand gets the resident level here."""
        return float(self._resident.bits)

    def close(self) -> None:
        """Nothing is open."""

    def __call__(self, layer: int, x: F32, ids: I32, weights: F32) -> F32:
        """Sum over slots of weight * expert(x).

        x: float32 [n, hidden]; ids, weights: [n, k]. Returns float32 [n, hidden].
        """
        return self._mixtures[layer](self._pool, x, ids, weights)
