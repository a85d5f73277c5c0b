"""A model as it was published: configuration, tokenizer files and weights, checked, as float32.

    checkpoint = open_checkpoint("OLMoE-1B-7B-0924")
    gate, up, down = checkpoint.expert(layer=0, expert=5)

Names and shapes are canonical (edgemoe/arch/tensors.py), whatever the family's files call them.
Knows nothing of quantization or stores.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from ..arch import EXPERT_PARTS, ConfigReader, ExpertPart, dense_shapes, find_family
from ..errors import CheckpointError, UnsupportedError, shown
from ..types import F32, ModelConfig
from .files import MIB, open_regular, parse_object, read_small
from .safetensors_dir import READABLE_DTYPES, SafetensorsDir, unsupported_dtype
from .safetensors_header import TensorInfo

__all__ = ["Checkpoint", "open_checkpoint"]

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


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a Hugging Face directory and check all of it but the weights' values.

    Args:
        path: directory with config.json and model.safetensors, or shards with their index.

    Raises:
        CheckpointError: something is missing, damaged or inconsistent; the message says what.
        UnsupportedError: the family, a config value, a tensor or a dtype is not implemented.
    """
    place = Path(path)
    try:
        return Checkpoint(_model_directory(place))
    except OSError as error:
        raise CheckpointError(f"cannot read {shown(place)}: {error.strerror}") from error


class Checkpoint:
    """An open checkpoint. Holds no open files; every read opens its file and closes it again.

    Attributes:
        path: the directory.
        model_type: the family, as config.json names it.
        config: what the forward pass needs; end-of-text ids joined with generation_config.json's.
        files: contents of those of TEXT_FILES that exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        where = shown(path / "config.json")
        raw = parse_object(read_small(path / "config.json", _CONFIG_LIMIT), where)
        family = find_family(raw, where)
        config = family.parse_config(raw, where)
        self.files = {
            name: read_small(path / name, _TEXT_LIMIT)
            for name in TEXT_FILES
            if (path / name).exists()
        }
        self.model_type = family.model_type
        self.config = self._join_generation(config)
        self._moe_layers = frozenset(config.moe_layers)
        self._names = family.names
        self._shapes = dense_shapes(self.config)
        self._source = SafetensorsDir(path)
        self._dense: dict[str, TensorInfo] = {}
        self._packed: dict[int, tuple[TensorInfo, TensorInfo]] = {}
        self._match_tensors()

    def require_tokenizer(self) -> None:
        """Raise CheckpointError unless the directory has a tokenizer.json."""
        if "tokenizer.json" not in self.files:
            raise CheckpointError(
                f"{shown(self.path)} has no tokenizer.json; download it, or write it with"
                " transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
            )

    def dense_names(self) -> list[str]:
        """Canonical names of all tensors but the experts', in forward order."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor with this canonical name."""
        return self._shapes[name]

    def tensor(self, name: str, *, rows: tuple[int, int] | None = None) -> F32:
        """A tensor by canonical name, float32; with `rows` only rows [start, stop) of a matrix.

        Raises CheckpointError, naming tensor and file, where a value is NaN or infinite.
        """
        info, shape = self._dense[name], self._shapes[name]
        if len(shape) == 1:
            return self._source.read_rows(info, 0, 1).reshape(shape)
        start, stop = _row_range(rows, shape[0], name)
        return self._source.read_rows(info, start, stop - start)

    def expert(self, layer: int, expert: int) -> tuple[F32, F32, F32]:
        """gate [I, H], up [I, H] and down [H, I] of one expert, float32.

        `layer` counts all layers of the model. Reads only this expert's bytes.
        """
        gate, up, down = (self.expert_matrix(layer, expert, part) for part in EXPERT_PARTS)
        return gate, up, down

    def expert_matrix(
        self, layer: int, expert: int, part: ExpertPart, *, rows: tuple[int, int] | None = None
    ) -> F32:
        """One matrix of one expert, float32; with `rows` only its rows [start, stop).

        gate and up are [moe_intermediate_size, hidden_size], down is the transpose of that.
        """
        config = self.config
        if layer not in self._moe_layers or not 0 <= expert < config.num_experts:
            raise IndexError(f"there is no expert {expert} in layer {layer}")
        inter, hidden = config.moe_intermediate_size, config.hidden_size
        height = hidden if part == "down" else inter
        start, stop = _row_range(rows, height, part)
        if layer not in self._packed:
            info = self._source.tensors[self._names.expert_part(layer, expert, part)]
            return self._source.read_rows(info, start, stop - start)
        gate_up, down = self._packed[layer]
        if part == "down":
            return self._source.read_rows(down, expert * hidden + start, stop - start)
        # Gate rows come first, up rows after them (transformers chunks the product in this order).
        first = (2 * expert + (part == "up")) * inter
        return self._source.read_rows(gate_up, first + start, stop - start)

    def _join_generation(self, config: ModelConfig) -> ModelConfig:
        """Add the end-of-text ids (and a missing start id) of generation_config.json."""
        data = self.files.get("generation_config.json")
        if data is None:
            return config
        where = shown(self.path / "generation_config.json")
        keys = ConfigReader(parse_object(data, where), where)
        eos = tuple(dict.fromkeys(config.eos_token_ids + keys.token_ids("eos_token_id")))
        bos = config.bos_token_id
        if bos is None:
            bos = keys.optional_integer("bos_token_id", most=1 << 31)
        return replace(config, eos_token_ids=eos, bos_token_id=bos)

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


def _row_range(rows: tuple[int, int] | None, height: int, name: str) -> tuple[int, int]:
    start, stop = (0, height) if rows is None else rows
    if not 0 <= start <= stop <= height:
        raise IndexError(f"rows {start}:{stop} of {name} are not within its {height} rows")
    return start, stop


def _model_directory(path: Path) -> Path:
    """`path`, if it is a directory with a config.json; else an error that says what to give."""
    if path.is_dir():
        if (path / "config.json").exists():
            return path
        raise CheckpointError(
            f"{shown(path)} has no config.json; give the directory of a Hugging Face model"
        )
    if not path.exists():
        raise CheckpointError(f"{shown(path)} does not exist; give a checkpoint directory")
    with open(open_regular(path), "rb") as file:
        head = file.read(8)
    if path.suffix == ".gguf" or head.startswith(b"GGUF"):
        raise UnsupportedError(
            f"{shown(path)} is a GGUF file, which cannot be converted; give the directory of the"
            " Hugging Face model it was made from"
        )
    if head.startswith(b"EDGEMOE\0"):
        raise CheckpointError(f"{shown(path)} is an edgemoe store already; run it as it is")
    if path.suffix == ".safetensors":
        parent = path.absolute().parent
        todo = (
            f"give its directory: {shown(parent)}"
            if (parent / "config.json").exists()
            else "give a directory that also has its config.json and tokenizer.json"
        )
        raise CheckpointError(f"{shown(path)} is only weights; {todo}")
    raise CheckpointError(
        f"{shown(path)} is not a directory; give the directory of a Hugging Face model"
    )
