"""What every checkpoint gives, whatever its files look like."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..arch import EXPERT_PARTS, ConfigReader, ExpertPart, dense_shapes
from ..errors import CheckpointError, shown
from ..types import F32, ModelConfig
from .files import parse_object

Rows = tuple[int, int]
"""Rows [start, stop) of a matrix."""


class Checkpoint(ABC):
    """An open checkpoint. Holds no open files; every read opens its file and closes it again.

    Attributes:
        path: the directory or file that was opened.
        model_type: the family, as Hugging Face names it.
        config: what the forward pass needs; end-of-text ids joined with generation_config.json's.
        files: tokenizer.json, tokenizer_config.json, generation_config.json and
            chat_template.jinja, those there are, for a store to take along unchanged.
        max_level: bits of the highest level worth keeping of the experts: 4, 6 or 8, by how finely
            the source holds them.
    """

    def __init__(
        self,
        path: Path,
        config: ModelConfig,
        files: Mapping[str, bytes],
        max_level: int,
    ) -> None:
        self.path = path
        self.model_type = config.model_type
        self.config = config
        self.files = files
        self.max_level = max_level
        self._shapes = dense_shapes(config)
        self._moe_layers = frozenset(config.moe_layers)

    def require_tokenizer(self) -> None:
        """Raise CheckpointError unless there is a tokenizer.json."""
        if "tokenizer.json" not in self.files:
            raise CheckpointError(f"{shown(self.path)} has no {self._without_tokenizer}")

    @property
    @abstractmethod
    def _without_tokenizer(self) -> str:
        """What is missing where there is no tokenizer, and what to do about it."""

    @abstractmethod
    def fingerprint_files(self) -> list[Path]:
        """Files whose names, sizes and times together tell this checkpoint from any other."""

    def dense_names(self) -> list[str]:
        """Canonical names of all tensors but the experts', in forward order."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor with this canonical name."""
        return self._shapes[name]

    def tensor(self, name: str, *, rows: Rows | None = None) -> F32:
        """A tensor by canonical name, float32; with `rows` only rows [start, stop) of a matrix.

        Raises CheckpointError, naming tensor and file, where a value is NaN or infinite.
        """
        shape = self._shapes[name]
        if len(shape) == 1:
            return self._read_dense(name, 0, 1).reshape(shape)
        start, stop = _row_range(rows, shape[0], name)
        return self._read_dense(name, start, stop - start)

    def expert(self, layer: int, expert: int) -> tuple[F32, F32, F32]:
        """gate [I, H], up [I, H] and down [H, I] of one expert, float32.

        `layer` counts all layers of the model. Reads only this expert's bytes.
        """
        gate, up, down = (self.expert_matrix(layer, expert, part) for part in EXPERT_PARTS)
        return gate, up, down

    def expert_matrix(
        self, layer: int, expert: int, part: ExpertPart, *, rows: Rows | None = None
    ) -> F32:
        """One matrix of one expert, float32; with `rows` only its rows [start, stop).

        gate and up are [moe_intermediate_size, hidden_size], down is the transpose of that.
        """
        config = self.config
        if layer not in self._moe_layers or not 0 <= expert < config.num_experts:
            raise IndexError(f"there is no expert {expert} in layer {layer}")
        height = config.hidden_size if part == "down" else config.moe_intermediate_size
        start, stop = _row_range(rows, height, part)
        return self._read_expert(layer, expert, part, start, stop - start)

    @abstractmethod
    def _read_dense(self, name: str, first: int, count: int) -> F32:
        """Rows [first, first + count) of a tensor by canonical name; a vector is one row."""

    @abstractmethod
    def _read_expert(
        self, layer: int, expert: int, part: ExpertPart, first: int, count: int
    ) -> F32:
        """Rows [first, first + count) of one matrix of one expert that there is."""


def join_generation(config: ModelConfig, files: Mapping[str, bytes], where: str) -> ModelConfig:
    """`config` with the end-of-text ids (and a missing start id) of generation_config.json.

    `where` is what messages call the place of that file.
    """
    data = files.get("generation_config.json")
    if data is None:
        return config
    where = f"{where}/generation_config.json"
    keys = ConfigReader(parse_object(data, where), where)
    eos = tuple(dict.fromkeys(config.eos_token_ids + keys.token_ids("eos_token_id")))
    bos = config.bos_token_id
    if bos is None:
        bos = keys.optional_integer("bos_token_id", most=1 << 31)
    return replace(config, eos_token_ids=eos, bos_token_id=bos)


def _row_range(rows: Rows | None, height: int, name: str) -> Rows:
    start, stop = (0, height) if rows is None else rows
    if not 0 <= start <= stop <= height:
        raise IndexError(f"rows {start}:{stop} of {name} are not within its {height} rows")
    return start, stop
