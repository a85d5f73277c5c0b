"""Second moments of what goes into experts, from a float32 pass over calibration text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgemoe import kernels
from edgemoe.calibration import calibration
from edgemoe.checkpoint import Checkpoint
from edgemoe.errors import UsageError
from edgemoe.mwq.calibrate import Chunk, ExpertInputs, ExpertMatrices
from edgemoe.types import F32, I64

from .experts import Place


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


class _Recorder(ExpertInputs):
    """Adds up the second moments of what experts read, every token of theirs counting the same."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        config = checkpoint.config
        super().__init__(checkpoint.expert, config.num_experts, enough=0)
        self._layers = config.moe_layers
        shape = len(config.moe_layers), config.num_experts
        width, middle = config.hidden_size, config.moe_intermediate_size
        self._inputs = np.zeros((*shape, width, width), np.float32)
        self._middles = np.zeros((*shape, middle, middle), np.float32)
        self._counts = np.zeros(shape, np.int64)

    def see(
        self, layer: int, expert: int, matrices: ExpertMatrices, chunks: Iterator[Chunk]
    ) -> None:
        at = self._layers.index(layer), expert
        for chunk in chunks:
            self._inputs[at] += chunk.inputs.T @ chunk.inputs
            self._middles[at] += chunk.middles.T @ chunk.middles
            self._counts[at] += len(chunk.inputs)

    def result(self) -> Hessians:
        per = np.maximum(self._counts, 1)[..., None, None].astype(np.float32)
        return Hessians(self._inputs / per, self._middles / per, self._counts, self._layers)


def collect(checkpoint: Checkpoint, ids: Sequence[int], ctx: int) -> Hessians:
    """Over whole windows of `ctx` tokens, all of which go through the model together.

    Raises:
        UsageError: the text is shorter than a window.
    """
    count = len(ids) // ctx
    if not count:
        raise UsageError(
            f"the calibration text has {len(ids)} tokens, less than a window of {ctx}: give more"
        )
    recorder = _Recorder(checkpoint)
    text = list(np.array(ids[: count * ctx], np.int64).reshape(count, ctx))
    calibration(checkpoint, text, kernels.default_threads())(recorder)
    return recorder.result()
