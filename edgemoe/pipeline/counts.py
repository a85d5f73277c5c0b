"""What layer steps ask of experts at one level."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..types import F32, I32, Traffic

_KEPT = 4096
"""Decoding steps that are noted before they are summed up: a few hundred bytes each at most."""


class DemandCounts:
    """Adds up what layer steps want, whatever of it is there.

    A small model decodes a layer in tens of microseconds, so a step of one token is only noted
    (its gates are copied: the next layer overwrites them) and summed up with many others.

    Args:
        bits: of every expert. sizes: layer -> bytes of one of its experts at these bits.
    """

    def __init__(self, bits: int, sizes: Mapping[int, int]) -> None:
        self._bits, self._sizes = bits, dict(sizes)
        self._demands = self._wanted = 0
        self._gates = 0.0
        self._noted: list[tuple[int, bytes]] = []

    def add(self, layer: int, ids: I32, gates: F32) -> None:
        """A layer step wants experts `ids` with weights `gates`, both [n, k]."""
        if len(ids) == 1:  # k experts, each once
            self._noted.append((layer, gates.tobytes()))
            if len(self._noted) >= _KEPT:
                self._sum_up()
            return
        self._demands += ids.size
        self._gates += float(gates.sum(dtype=np.float64))
        self._wanted += int(np.count_nonzero(np.bincount(ids.reshape(-1)))) * self._sizes[layer]

    def _sum_up(self) -> None:
        gates = np.frombuffer(b"".join(step for _, step in self._noted), np.float32)
        self._demands += gates.size
        self._gates += float(gates.sum(dtype=np.float64))
        self._wanted += sum(len(step) // 4 * self._sizes[layer] for layer, step in self._noted)
        self._noted.clear()

    @property
    def traffic(self) -> Traffic:
        """All of it so far."""
        self._sum_up()
        return Traffic(
            demands=self._demands,
            bits=self._demands * self._bits,
            gates=self._gates,
            gated_bits=self._gates * self._bits,
            wanted_bytes=self._wanted,
        )
