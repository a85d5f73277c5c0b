"""The serial loop: everything is resident, so a layer's demands are one call."""

from __future__ import annotations

import time
from collections.abc import Sequence

from .. import kernels
from ..loader.resident import ResidentExperts
from ..loader.streaming import Span
from ..types import F32, I32, Traffic
from .bit_router import BitRouter
from .counts import DemandCounts


class SerialExperts:
    """The mixture part of every layer, on experts that are all resident.

    Args:
        pool: what computes. resident: the experts. router: which level each demand gets, of those
            that are resident. span: told what was done when.

    Attributes:
        router: may be exchanged between passes.
    """

    def __init__(
        self,
        pool: kernels.Pool,
        resident: ResidentExperts,
        router: BitRouter,
        span: Span | None = None,
    ) -> None:
        self._pool, self.router, self._span = pool, router, span
        self._counts = DemandCounts(
            resident.bits,
            {layer: resident.layout(layer).segment_sizes for layer in resident.layers},
        )
        self._mixtures = {
            layer: kernels.Mixture(resident.layout(layer), resident.segments(layer))
            for layer in resident.layers
        }

    @property
    def traffic(self) -> Traffic:
        """What was asked of the experts since the model was loaded."""
        return self._counts.traffic

    def close(self) -> None:
        """Nothing is open."""

    def __call__(
        self,
        layer: int,
        x: F32,
        ids: I32,
        weights: F32,
        means: Sequence[float] | None = None,
    ) -> F32:
        """Sum over slots of weight * expert(x).

        x: float32 [n, hidden]; ids, weights: [n, k]; means: bits that each token is to get on
        average, None: all the usual. Returns float32 [n, hidden].
        """
        grant = self.router(layer, x, ids, weights, None, means)
        begun = time.monotonic_ns()
        y = self._mixtures[layer](self._pool, x, ids, grant.levels, weights)
        if self._span is not None:
            self._span("experts", begun, time.monotonic_ns(), layer=layer)
        self._counts.add(layer, ids, weights, grant)
        return y
