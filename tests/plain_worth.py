"""`ByWorth` without its haste: every step counts and rates its whole layer when it is observed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from edgemoe.loader.policies import FAST, FAST_SHARE, PRIOR_STEPS, SLOW
from edgemoe.loader.residency import Want
from edgemoe.types import F32

ONE = np.float32(1)


class PlainWorth:
    """Same decisions as `ByWorth`, to the bit."""

    whole = False

    def __init__(
        self, layers: int, experts: int, levels: int, top_k: int, worth: ArrayLike | None
    ) -> None:
        self._layers, self._prior = layers, top_k / experts
        self._hits = np.zeros((2, layers, experts, levels), np.float32)
        self._weight = np.zeros((2, layers))
        price = np.ones((layers, experts, levels))
        if worth is not None:
            given = np.asarray(worth, np.float64)
            price = given.mean() / given
        self._price = price.astype(np.float32)
        self._rest = np.empty((layers, experts, levels), np.float32)
        self._depth = np.zeros((layers, experts), np.int64)
        for layer in range(layers):
            self._rate(layer, np.full((experts, levels), self._prior, np.float32))

    def _rate(self, layer: int, chance: F32) -> None:
        n = np.float32(self._layers)
        self._rest[layer] = (n / chance - n) * self._price[layer]

    def observe(self, layer: int, wants: Sequence[Want]) -> None:
        for i, decay in enumerate((FAST, SLOW)):
            self._weight[i, layer] = self._weight[i, layer] * decay + 1
            hits = self._hits[i, layer]
            hits[:] = hits * np.float32(decay) + np.float32(1e-9)
            for expert, depth in wants:
                hits[expert, :depth] += ONE
        a = FAST_SHARE / (self._weight[0, layer] + PRIOR_STEPS)
        b = (1 - FAST_SHARE) / (self._weight[1, layer] + PRIOR_STEPS)
        fast, slow = self._hits[:, layer]
        chance = fast * np.float32(a) + slow * np.float32(b)
        self._rate(layer, chance + np.float32(self._prior * PRIOR_STEPS * (a + b)))

    def claim(self, at: int, depth: int) -> None:
        self._depth.reshape(-1)[at] = depth

    def drop(self, layer: int) -> F32:
        out = np.full(self._depth.shape, -np.inf, np.float32)
        for owner, expert in np.argwhere(self._depth).tolist():
            top = self._depth[owner, expert] - 1
            steps = np.float32((owner - layer - 1) % self._layers + 1)
            out[owner, expert] = steps * self._price[owner, expert, top]
            out[owner, expert] += self._rest[owner, expert, top]
        return out.reshape(-1)

    def drop_each(self, layer: int, at: int, depth: int) -> list[float]:
        owner, expert = divmod(at, self._depth.shape[1])
        steps = (owner - layer - 1) % self._layers + 1
        rest, price = self._rest[owner, expert].tolist(), self._price[owner, expert].tolist()
        return [-np.inf, *(r + steps * p for r, p in zip(rest, price, strict=True))][: depth + 1]
