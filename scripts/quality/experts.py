"""A model with other experts in the place of its own: those that a store decodes to, for one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from edgemoe.arch import EXPERT_PARTS, ExpertPart
from edgemoe.checkpoint import Checkpoint
from edgemoe.errors import UsageError, shown
from edgemoe.export.source import StoreSource
from edgemoe.store import Store
from edgemoe.types import F32


@dataclass(frozen=True)
class Place:
    """Which matrix of the model this is: what a calibrated quantizer finds its statistics by."""

    layer: int
    expert: int
    part: ExpertPart


Experts: TypeAlias = Mapping[Place, F32]
"""Every expert's matrices, decoded at one level."""


def places(checkpoint: Checkpoint) -> list[Place]:
    """All matrices of all experts, in order."""
    config = checkpoint.config
    return [
        Place(layer, expert, part)
        for layer in config.moe_layers
        for expert in range(config.num_experts)
        for part in EXPERT_PARTS
    ]


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
