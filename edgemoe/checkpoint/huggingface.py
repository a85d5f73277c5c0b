"""A Hugging Face directory: config.json, tokenizer files and safetensors weights."""

from __future__ import annotations

import re
from pathlib import Path

from ..arch import EXPERT_PARTS, ExpertPart, find_family
from ..errors import CheckpointError, UnsupportedError, shown
from ..types import F32
from .base import Checkpoint, join_generation
from .files import MIB, parse_object, read_small
from .safetensors_dir import READABLE_DTYPES, SafetensorsDir, unsupported_dtype
from .safetensors_header import TensorInfo

TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
)
"""Files beside the weights that a store takes along unchanged."""

_CONFIG_LIMIT = 16 * MIB
_TEXT_LIMIT = 256 * MIB
# Rotary tables that old versions of transformers saved; they follow from the config.
_INERT_TENSOR = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)\Z")


class HuggingFaceCheckpoint(Checkpoint):
    """An open Hugging Face directory, checked in full but for the weights' values.

    Raises:
        CheckpointError: something is missing, damaged or inconsistent; the message says what.
        UnsupportedError: the family, a config value, a tensor or a dtype is not implemented.
    """

    def __init__(self, path: Path) -> None:
        where = shown(path / "config.json")
        raw = parse_object(read_small(path / "config.json", _CONFIG_LIMIT), where)
        family = find_family(raw, where)
        config = family.parse_config(raw, where)
        files = {
            name: read_small(path / name, _TEXT_LIMIT)
            for name in TEXT_FILES
            if (path / name).exists()
        }
        super().__init__(path, join_generation(config, files, shown(path)), files, max_level=8)
        self._names = family.names
        self._source = SafetensorsDir(path)
        self._dense: dict[str, TensorInfo] = {}
        self._packed: dict[int, tuple[TensorInfo, TensorInfo]] = {}
        self._match_tensors()

    @property
    def _without_tokenizer(self) -> str:
        return (
            "tokenizer.json; download it, or write it with"
            " transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )

    def fingerprint_files(self) -> list[Path]:
        """config.json, the text files there are and the weights."""
        return [
            self.path / "config.json",
            *(self.path / name for name in self.files),
            *self._source.files,
        ]

    def _read_dense(self, name: str, first: int, count: int) -> F32:
        return self._source.read_rows(self._dense[name], first, count)

    def _read_expert(
        self, layer: int, expert: int, part: ExpertPart, first: int, count: int
    ) -> F32:
        if layer not in self._packed:
            info = self._source.tensors[self._names.expert_part(layer, expert, part)]
            return self._source.read_rows(info, first, count)
        gate_up, down = self._packed[layer]
        if part == "down":
            first += expert * self.config.hidden_size
            return self._source.read_rows(down, first, count)
        # Gate rows come first, up rows after them (transformers chunks the product in this order).
        first += (2 * expert + (part == "up")) * self.config.moe_intermediate_size
        return self._source.read_rows(gate_up, first, count)

    def _match_tensors(self) -> None:
        """Find every needed tensor, with the right shape and dtype, and no unknown one."""
        tensors, config = self._source.tensors, self.config
        used: set[str] = set()

        def need(name: str, shape: tuple[int, ...]) -> TensorInfo:
            info = tensors.get(name)
            if info is None:
                raise CheckpointError(
                    f"{shown(self.path)} has no tensor {name}; the checkpoint is incomplete, or"
                    " its config.json is another model's"
                )
            if info.shape != shape:
                raise CheckpointError(
                    f"{info.where} has shape {shown(list(info.shape))}, where"
                    f" config.json implies {list(shape)}"
                )
            if info.dtype not in READABLE_DTYPES:
                raise unsupported_dtype(info)
            used.add(name)
            return info

        for canonical, shape in self._shapes.items():
            name = self._names.dense(canonical)
            if canonical == "embed" and config.tie_word_embeddings and name not in tensors:
                name = self._names.lm_head
            self._dense[canonical] = need(name, shape)
        inter, hidden = config.moe_intermediate_size, config.hidden_size
        for layer in config.moe_layers:
            gate_up, down = self._names.packed_pair(layer)
            if gate_up in tensors or down in tensors:
                self._packed[layer] = (
                    need(gate_up, (config.num_experts, 2 * inter, hidden)),
                    need(down, (config.num_experts, hidden, inter)),
                )
                continue
            for expert in range(config.num_experts):
                for part in EXPERT_PARTS:
                    shape = (hidden, inter) if part == "down" else (inter, hidden)
                    need(self._names.expert_part(layer, expert, part), shape)
        self._check_tied(used)
        unknown = [name for name in tensors if name not in used and not _INERT_TENSOR.search(name)]
        if unknown:
            more = f" (and {len(unknown) - 1} more like it)" if len(unknown) > 1 else ""
            raise UnsupportedError(
                f"{tensors[unknown[0]].where}{more} is not part of a"
                f" {self.model_type} model with this config.json"
            )

    def _check_tied(self, used: set[str]) -> None:
        """A tied model may still hold an lm_head, as long as it equals the embedding."""
        head = self._source.tensors.get(self._names.lm_head)
        if head is None or head.name in used or not self.config.tie_word_embeddings:
            return
        if not self._source.same_bytes(head, self._dense["embed"]):
            raise CheckpointError(
                f"{head.where} differs from the embedding, yet config.json says"
                " tie_word_embeddings; set that to false to use both"
            )
        used.add(head.name)
