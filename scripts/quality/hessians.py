"""Second moments of what goes into experts, from a float32 pass over calibration text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgemoe import kernels
from edgemoe.checkpoint import Checkpoint
from edgemoe.cpu_attn.kv_cache import OnePass
from edgemoe.errors import UsageError, shown
from edgemoe.model import Span, hidden
from edgemoe.reference import silu
from edgemoe.types import F32, I32, I64
from edgemoe.weights import InMemory, from_checkpoint

from .quantizers import Place

BATCH = 4
"""Windows that go through the model together."""


@dataclass(frozen=True)
class Hessians:
    """Means of x x^T over the tokens an expert served, in float32, layers with experts in order.

    inputs: [layers, experts, hidden, hidden], of gate and up. middles: [layers, experts, I, I], of
    down. counts: int64 [layers, experts], tokens served.
    """

    inputs: F32
    middles: F32
    counts: I64
    layers: tuple[int, ...]

    def of(self, place: Place) -> F32:
        """Of one matrix: [columns, columns]; all zero for an expert that served no token."""
        both = self.middles if place.part == "down" else self.inputs
        found: F32 = both[self.layers.index(place.layer), place.expert]
        return found

    def save(self, path: Path) -> None:
        """Write them to a file."""
        with path.open("wb") as file:
            np.savez(
                file,
                inputs=self.inputs,
                middles=self.middles,
                counts=self.counts,
                layers=np.array(self.layers),
            )

    @classmethod
    def load(cls, path: Path) -> Hessians:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            layers = tuple(int(i) for i in file["layers"])
            return cls(file["inputs"], file["middles"], file["counts"], layers)


class _Recorder:
    """Experts in float32 that add up the second moments of all they are given."""

    def __init__(self, source: InMemory) -> None:
        config = source.config
        self._source, self._layers = source, config.moe_layers
        shape = len(config.moe_layers), config.num_experts
        width, middle = config.hidden_size, config.moe_intermediate_size
        self._inputs = np.zeros((*shape, width, width), np.float32)
        self._middles = np.zeros((*shape, middle, middle), np.float32)
        self._counts = np.zeros(shape, np.int64)

    def __call__(self, layer: int, x: F32, ids: I32, weights: F32) -> F32:
        y, at = np.zeros_like(x), self._layers.index(layer)
        for e in np.unique(ids):
            gate, up, down = self._source.expert(layer, int(e))
            token, slot = np.nonzero(ids == e)
            h = x[token]
            mid = (silu((h @ gate.T).astype(np.float64)) * (h @ up.T)).astype(np.float32)
            y[token] += (mid @ down.T) * weights[token, slot][:, None]
            self._inputs[at, e] += h.T @ h
            self._middles[at, e] += mid.T @ mid
            self._counts[at, e] += len(token)
        return y

    def result(self) -> Hessians:
        per = np.maximum(self._counts, 1)[..., None, None].astype(np.float32)
        return Hessians(self._inputs / per, self._middles / per, self._counts, self._layers)


def collect(
    checkpoint: Checkpoint,
    ids: Sequence[int],
    ctx: int,
    progress: Callable[[int, int], None] | None = None,
) -> Hessians:
    """Over whole windows of `ctx` tokens; the model's weights are held in memory as float32.

    progress: called with (windows done, in all).

    Raises:
        UsageError: the text is shorter than a window.
    """
    count = len(ids) // ctx
    if not count:
        raise UsageError(
            f"the calibration text has {len(ids)} tokens, less than a window of {ctx}: give more"
        )
    todo = np.array(ids[: count * ctx], np.int64).reshape(count, ctx)
    source = InMemory(checkpoint)
    weights, recorder = from_checkpoint(source), _Recorder(source)
    pool = kernels.new_pool(kernels.default_threads())
    for first in range(0, count, BATCH):
        part = todo[first : first + BATCH]
        spans = [Span(OnePass(checkpoint.config), ctx) for _ in part]
        hidden(weights, recorder, pool, part.reshape(-1), spans)
        if progress is not None:
            progress(min(first + BATCH, count), count)
    return recorder.result()


def read_calibration(path: Path, size: int) -> str:
    """The first `size` bytes of a text, whole characters; markers stay in.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(size).decode("utf-8", errors="ignore")
    except OSError as exc:
        raise UsageError(f"{shown(path)}: cannot be read: {exc.strerror}") from None
