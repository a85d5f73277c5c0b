"""Ways to quantize experts, as functions from weights to decoded weights, and models made by them.

A quantizer is called once for every matrix. Asked for several levels it nests them; asked for one
it is free to serve that one alone: the difference is what nesting costs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias, cast

import numpy as np

from edgemoe.arch import EXPERT_PARTS, ExpertPart
from edgemoe.checkpoint import Checkpoint
from edgemoe.errors import UsageError, shown
from edgemoe.export.source import StoreSource
from edgemoe.layout import record_layout
from edgemoe.mwq.packing import decode, pack_record
from edgemoe.mwq.quantize import quantize_matrix
from edgemoe.store import Store
from edgemoe.types import F32, LEVELS, QuantSpec

GROUP = 128


@dataclass(frozen=True)
class Place:
    """Which matrix of the model this is: what a calibrated quantizer finds its statistics by."""

    layer: int
    expert: int
    part: ExpertPart


class Quantizer(Protocol):
    """Weights of one matrix to what is decoded of them at each level."""

    def __call__(self, place: Place, w: F32, levels: tuple[int, ...], /) -> Mapping[int, F32]:
        """w: float32 [rows, cols]. levels: ascending. Returns float32 [rows, cols] a level."""
        ...


Experts: TypeAlias = Mapping[Place, F32]
"""Every expert's matrices, decoded at one level."""


def nearest(place: Place, w: F32, levels: tuple[int, ...]) -> dict[int, F32]:
    """Today's quantizer of stores: nearest 8-bit codes, cut to their top bits; packed and decoded.

    Its codes do not depend on the levels asked for: a level alone is the nested one, bit for bit.

    Raises:
        UsageError: stores have no such level.
    """
    quant = QuantSpec(LEVELS, GROUP)
    if not set(levels) <= set(LEVELS):
        raise UsageError(f"stores have levels {LEVELS}, not {levels}")
    codes, scales = quantize_matrix(w, quant)
    layout = record_layout((w.shape,), quant)
    segments = pack_record(layout, [codes], [scales])
    return {
        level: decode(layout, segments[: i + 1], i)[0]
        for i, level in enumerate(quant.levels)
        if level in levels
    }


def minmax(place: Place, w: F32, levels: tuple[int, ...]) -> dict[int, F32]:
    """Each level by itself: nearest of 2^b points from the least to the greatest of a group.

    Not nested, whatever the levels; steps and offsets are not rounded.
    """
    out = {}
    for level in levels:
        decoded = np.empty_like(w)
        for at in range(0, w.shape[1], GROUP):
            part = w[:, at : at + GROUP].astype(np.float64)
            low, high = part.min(axis=1, keepdims=True), part.max(axis=1, keepdims=True)
            step = np.maximum((high - low) / (2**level - 1), 1e-30)
            decoded[:, at : at + GROUP] = np.rint((part - low) / step) * step + low
        out[level] = decoded
    return out


BUILT_IN: Mapping[str, Quantizer] = {"nearest": nearest, "minmax": minmax}


def find(spec: str) -> Quantizer:
    """A quantizer by its name here, or as package.module:function.

    Raises:
        UsageError: there is no such one.
    """
    if spec in BUILT_IN:
        return BUILT_IN[spec]
    module, colon, name = spec.partition(":")
    try:
        found = getattr(importlib.import_module(module), name) if colon else None
    except (ImportError, AttributeError, ValueError) as exc:
        raise UsageError(f"no quantizer {shown(spec)}: {exc}") from None
    if not callable(found):
        raise UsageError(
            f"no quantizer {shown(spec)}: give {', '.join(BUILT_IN)}, package.module:function, or "
            "a store (*.emoe)"
        )
    return cast(Quantizer, found)


def places(checkpoint: Checkpoint) -> list[Place]:
    """All matrices of all experts, in order."""
    config = checkpoint.config
    return [
        Place(layer, expert, part)
        for layer in config.moe_layers
        for expert in range(config.num_experts)
        for part in EXPERT_PARTS
    ]


def quantize(
    checkpoint: Checkpoint,
    quantizer: Quantizer,
    levels: Sequence[int],
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, Experts]:
    """Every expert at every level, float32 in memory: 4 bytes a weight and level.

    progress: called with (matrices done, in all).
    """
    out: dict[int, dict[Place, F32]] = {level: {} for level in levels}
    todo = places(checkpoint)
    for i, place in enumerate(todo):
        w = checkpoint.expert_matrix(place.layer, place.expert, place.part)
        for level, decoded in quantizer(place, w, tuple(levels)).items():
            out[level][place] = decoded
        if progress is not None:
            progress(i + 1, len(todo))
    return dict(out)


def of_store(checkpoint: Checkpoint, path: Path, level: int) -> Experts:
    """Every expert of a store, decoded at one level.

    Raises:
        UsageError: the store has no such level, or is another model's.
    """
    config = checkpoint.config
    with Store.open(path) as store:
        if store.config != config:
            raise UsageError(f"{shown(path)} was not made of {shown(checkpoint.path)}")
        source = StoreSource(store, level)
        rows = {"gate": config.moe_intermediate_size, "up": config.moe_intermediate_size}
        rows["down"] = config.hidden_size
        return {
            place: source.rows((place.layer, place.expert, place.part), 0, rows[place.part])
            for place in places(checkpoint)
        }


class Requantized(Checkpoint):
    """A checkpoint whose experts are replaced; all else is its own, in float32."""

    def __init__(self, checkpoint: Checkpoint, experts: Experts) -> None:
        super().__init__(checkpoint.path, checkpoint.config, checkpoint.files, checkpoint.max_level)
        self._checkpoint, self._experts = checkpoint, experts

    @property
    def _without_tokenizer(self) -> str:
        return "tokenizer.json"

    def fingerprint_files(self) -> list[Path]:
        """None: nothing of it may be cached under the checkpoint's name."""
        raise UsageError("a requantized model is no file")

    def _read_dense(self, name: str, first: int, count: int) -> F32:
        if len(self.shape(name)) == 1:
            return self._checkpoint.tensor(name)
        return self._checkpoint.tensor(name, rows=(first, first + count))

    def _read_expert(
        self, layer: int, expert: int, part: ExpertPart, first: int, count: int
    ) -> F32:
        return self._experts[Place(layer, expert, part)][first : first + count]
