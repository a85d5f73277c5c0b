"""What layer steps ask of experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import numpy as np

from ..types import F32, I32, I64, Traffic
from .bit_router import Grant

_KEPT = 4096
"""Decoding steps that are noted before they are summed up: a few hundred bytes each at most."""


class DemandCounts:
    """Adds up what layer steps want, whatever of it is there.

    A small model decodes a layer in tens of microseconds, so a step of one token is only noted
    (its gates are copied: the next layer overwrites them) and summed up with many others.

    Args:
        bits: of each level. sizes: layer -> bytes of each segment of its experts.
    """

    def __init__(self, bits: Sequence[int], sizes: Mapping[int, Sequence[int]]) -> None:
        self._bits: I64 = np.asarray(bits, np.int64)
        self._layers = {layer: i for i, layer in enumerate(sizes)}
        self._bytes: I64 = np.array([list(accumulate(row)) for row in sizes.values()], np.int64)
        self._demands = self._given = self._wished = self._wanted = 0
        self._gates = self._gated = 0.0
        self._noted: list[tuple[int, bytes, I32, I32]] = []

    def add(self, layer: int, ids: I32, gates: F32, grant: Grant) -> None:
        """A layer step wants experts `ids` with weights `gates`, both [n, k]; so they were granted.
        The grant's arrays must stay as they are."""
        if len(ids) == 1:  # k experts, each once
            self._noted.append((layer, gates.tobytes(), *grant))
            if len(self._noted) >= _KEPT:
                self._sum_up()
            return
        self._count(gates.reshape(-1), grant.levels.reshape(-1), grant.wished.reshape(-1))
        of_layer = self._bytes[self._layers[layer]]
        highest = np.full(int(ids.max()) + 1, -1)
        np.maximum.at(highest, ids.reshape(-1), grant.levels.reshape(-1))
        self._wanted += int(of_layer[highest[highest >= 0]].sum())

    def _count(self, gates: F32, levels: I32, wished: I32) -> None:
        bits = self._bits[levels]
        self._demands += len(gates)
        self._given += int(bits.sum())
        self._wished += int(self._bits[wished].sum())
        self._gates += float(gates.sum(dtype=np.float64))
        self._gated += float(gates.astype(np.float64) @ bits)

    def _sum_up(self) -> None:
        noted, self._noted = self._noted, []
        if not noted:
            return
        levels = np.concatenate([grant.reshape(-1) for _, _, grant, _ in noted])
        wished = np.concatenate([grant.reshape(-1) for _, _, _, grant in noted])
        gates = np.frombuffer(b"".join(step for _, step, _, _ in noted), np.float32)
        self._count(gates, levels, wished)
        rows = np.repeat(
            [self._layers[layer] for layer, _, _, _ in noted],
            [grant.size for _, _, grant, _ in noted],
        )
        self._wanted += int(self._bytes[rows, levels].sum())

    @property
    def traffic(self) -> Traffic:
        """All of it so far."""
        self._sum_up()
        return Traffic(
            demands=self._demands,
            bits=self._given,
            wished_bits=self._wished,
            gates=self._gates,
            gated_bits=self._gated,
            wanted_bytes=self._wanted,
        )
