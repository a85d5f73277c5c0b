"""What an expert's output loses at each level: for whoever decides how many bits it gets.

A store keeps float32 [layers with experts, experts, levels] in the section `sensitivity.f32`. With
a calibration text it is measured: the geometric mean over tokens of the squared error of the
expert's output over the squares of the residual stream that it is added to. (The mean is that of
some outliers, whose experts would take bits from all others: docs/quality.md.) Without one it is
estimated from the weights alone: for inputs that are independent and have the variance that the
layer's norm gives them, the mean squared error of an output, which tells experts of a layer apart,
layers roughly.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import StoreError
from ..layout import RecordLayout
from ..reference import silu
from ..store import Store
from ..types import F32, F64, U8, NestedScales
from .calibrate import Chunk
from .packing import decode
from .quantize import by_level

SECTION = "sensitivity.f32"
COSTS = "layer_cost.f32"

_NOTHING = 1e-30
"""Errors below this count as this: a token that an expert gives nothing has no logarithm."""


def measured(layout: RecordLayout, segments: Sequence[U8], sample: Chunk, down: F32) -> F32:
    """Of one expert on some of its tokens: float32 [levels].

    down: float32 [hidden, intermediate], unquantized, for what the output should be; columns in the
    order of sample.middles.
    """
    want = sample.middles @ down.T
    out = np.empty(layout.depth, np.float32)
    for i in range(layout.depth):
        gate, up, lossy = decode(layout, segments, i)
        x = sample.inputs
        with np.errstate(over="ignore"):
            a = silu((x @ gate.T).astype(np.float64)) * (x @ up.T)
        error = np.square(a.astype(np.float32) @ lossy.T - want).mean(axis=1)
        relative = np.maximum(error * sample.quiet[:, 0], _NOTHING, dtype=np.float64)
        out[i] = np.exp(np.log(relative).mean())
    return out


class Estimate:
    """Adds up what quantization did to the weights of one expert."""

    def __init__(self, layout: RecordLayout) -> None:
        self._layout = layout
        self._power = np.zeros(3)
        self._lost = np.zeros((3, layout.depth))

    def add(self, whole: int, w: F32, scales: Sequence[NestedScales]) -> None:
        """Rows of gate, up or down (0, 1, 2), and the scales of each stored part of it.

        An error is taken to lie anywhere in its cell.
        """
        self._power[whole] += np.square(w, dtype=np.float64).sum()
        for m, part in zip(self._layout.wholes[whole], scales, strict=True):
            matrix = self._layout.matrices[m]
            s, _ = by_level(self._layout, m, part)
            width = np.full(matrix.groups, matrix.group_size)
            width[-1] = matrix.cols - (matrix.groups - 1) * matrix.group_size
            self._lost[whole] += (np.square(s, dtype=np.float64) * width).sum(axis=(1, 2)) / 12

    def result(self, norm: F32) -> F32:
        """float32 [levels]. norm: weights of the norm before the experts, [hidden]."""
        relative = (self._lost / np.maximum(self._power, 1e-300)[:, None]).sum(axis=0)
        rows, hidden = self._layout.matrices[0].rows, self._layout.matrices[0].cols
        variance = float(np.square(norm, dtype=np.float64).mean()) * self._power[:2] / rows
        middle = rows * _silu_power(variance[0]) * variance[1]
        output = self._power[2] / (rows * hidden) * middle
        lost: F64 = np.minimum(relative * output, np.finfo(np.float32).max)
        return lost.astype(np.float32)


def _silu_power(variance: float) -> float:
    """Mean of silu(g)^2 of a normal g."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(32)
    g: F64 = np.clip(nodes * np.sqrt(variance), -1e30, 1e30)
    with np.errstate(over="ignore"):
        return float((weights * np.square(silu(g))).sum() / weights.sum())


def costs_of_store(store: Store) -> F32:
    """What an error costs, by the layer it is made in, 1 on average: float32 [layers with experts];
    all 1 where it was not measured (layer_costs.py).

    Raises:
        StoreError: the section does not hold that.
    """
    count = len(store.config.moe_layers)
    if COSTS not in store.sections:
        return np.ones(count, np.float32)
    data = np.frombuffer(store.section(COSTS), np.uint8)
    if data.size != 4 * count:
        raise StoreError(f"{store.path}: section {COSTS} does not hold {count} float32")
    costs: F32 = data.view("<f4").astype(np.float32)
    if not (np.isfinite(costs).all() and costs.min() > 0):
        raise StoreError(f"{store.path}: section {COSTS} holds costs that are not above 0")
    return costs


def of_store(store: Store) -> F32 | None:
    """Of every expert and level: float32 [layers with experts, experts, levels]; None: not told.

    Raises:
        StoreError: the section has another size.
    """
    if SECTION not in store.sections:
        return None
    config, levels = store.config, len(store.quant.expert_levels)
    shape = len(config.moe_layers), config.num_experts, levels
    data = store.section(SECTION)
    if len(data) != 4 * int(np.prod(shape)):
        raise StoreError(f"{store.path}: section {SECTION} does not hold {shape} float32")
    return np.frombuffer(data, "<f4").reshape(shape)
