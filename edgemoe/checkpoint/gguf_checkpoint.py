"""A GGUF as a checkpoint: llama.cpp's file of a whole model, dequantized as it is read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from .. import kernels
from ..arch import (
    EXPERT_PARTS,
    ExpertPart,
    GgufReader,
    dense_shapes,
    find_gguf_form,
    gguf_experts,
    gguf_lone_expert,
    gguf_name,
)
from ..errors import CheckpointError, UnsupportedError, shown
from ..types import F32, ModelConfig
from .base import Checkpoint, join_generation
from .gguf_file import GgufFile, read_parts
from .gguf_header import GgufTensor

LEVELS: Mapping[str, int] = MappingProxyType(
    {"Q5_0": 6, "Q5_1": 6, "Q5_K": 6, "Q6_K": 6, "Q8_0": 8, "F16": 8, "BF16": 8, "F32": 8}
)
"""Level worth keeping of weights of a type; 4 of all others, which have codes of 2 to 4 bits."""

_FUSED = "made with fused tensors: convert the model to GGUF again without --fuse options"
_ADVICE = (
    ("attn_qkv.weight", _FUSED),
    ("ffn_gate_up_exps.weight", _FUSED),
    ("rope_freqs.weight", "only plain RoPE can be run"),
    (".scale", "scaled quantization formats cannot be read: use another quantization"),
)
"""(end of a tensor's name, what to say of it) of tensors that are known but not supported."""


class GgufCheckpoint(Checkpoint):
    """An open GGUF, checked in full but for the weights' values.

    Raises:
        CheckpointError: something is missing, damaged or inconsistent; the message says what.
        UnsupportedError: the architecture, a key, a tensor, a type or the tokenizer is not
            implemented.
    """

    def __init__(self, path: Path, pool: kernels.Pool | None = None) -> None:
        headers = read_parts(path)
        metadata, where = headers[0].metadata, shown(path)
        self._source = GgufFile(headers, pool)
        form = find_gguf_form(metadata, where)
        _check_general(metadata, self._source, where)
        shapes = {name: info.shape for name, info in self._source.tensors.items()}
        config = form.parse(GgufReader(metadata, form.architecture, shapes, where))
        self._dense: dict[str, GgufTensor] = {}
        self._experts: dict[tuple[int, ExpertPart], list[GgufTensor]] = {}
        self._match_tensors(config, where)
        self._heads = {}
        if form.paired_rows:
            self._heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
        files = _text_files(metadata, config, where)
        config = join_generation(config, files, where)
        super().__init__(path, config, files, _level(self._experts.values()))

    @property
    def _without_tokenizer(self) -> str:
        return "tokenizer in its metadata (tokenizer.ggml.model); use a file that has one"

    def fingerprint_files(self) -> list[Path]:
        """The file, or all its parts."""
        return list(self._source.files)

    def _read_dense(self, name: str, first: int, count: int) -> F32:
        info = self._dense[name]
        role, _, kind = name.rsplit(".", 1)[-1].partition("_")
        if role not in self._heads or kind not in ("", "bias"):
            return self._source.read_rows(info, first, count)
        dim = self.config.head_dim
        if kind == "bias":
            bias = self._source.read_rows(info, 0, 1).reshape(-1, 1)
            return _unpaired(bias, dim).reshape(1, -1)
        head = first // dim
        span = -(-(first + count) // dim) - head
        rows = _unpaired(self._source.read_rows(info, head * dim, span * dim), dim)
        return rows[first - head * dim :][:count]

    def _read_expert(
        self, layer: int, expert: int, part: ExpertPart, first: int, count: int
    ) -> F32:
        infos = self._experts[layer, part]
        if len(infos) > 1:
            return self._source.read_rows(infos[expert], first, count)
        height = self.config.hidden_size if part == "down" else self.config.moe_intermediate_size
        return self._source.read_rows(infos[0], expert * height + first, count)

    def _match_tensors(self, config: ModelConfig, where: str) -> None:
        """Find every needed tensor, with the right shape, and no unknown one."""
        tensors = self._source.tensors
        for name, info in tensors.items():
            for ending, advice in _ADVICE:
                if name.endswith(ending):
                    raise UnsupportedError(f"{info.where} is not supported; {advice}")
        used: set[str] = set()

        def need(name: str, shape: tuple[int, ...]) -> GgufTensor:
            info = tensors.get(name)
            if info is None:
                raise CheckpointError(
                    f"{where} has no tensor {name}; the file is incomplete, or its metadata is"
                    " another model's"
                )
            # Leading axes of length 1 are left out at the writer's pleasure.
            if _stripped(info.shape) != _stripped(shape):
                raise CheckpointError(
                    f"{info.where} has shape {list(info.shape)}, where the metadata implies"
                    f" {list(shape)}"
                )
            used.add(name)
            return info

        for canonical, shape in dense_shapes(config).items():
            self._dense[canonical] = need(gguf_name(canonical), shape)
        experts = config.num_experts
        inter, hidden = config.moe_intermediate_size, config.hidden_size
        for layer in config.moe_layers:
            for part in EXPERT_PARTS:
                shape = (hidden, inter) if part == "down" else (inter, hidden)
                if gguf_lone_expert(layer, 0, part) in tensors:
                    names = [gguf_lone_expert(layer, e, part) for e in range(experts)]
                    self._experts[layer, part] = [need(name, shape) for name in names]
                else:
                    stack = need(gguf_experts(layer, part), (experts, *shape))
                    self._experts[layer, part] = [stack]
        unknown = [name for name in tensors if name not in used]
        if unknown:
            more = f" (and {len(unknown) - 1} more like it)" if len(unknown) > 1 else ""
            raise UnsupportedError(
                f"{tensors[unknown[0]].where}{more} is not part of a {config.model_type} model"
                " with this metadata"
            )


def _check_general(metadata: Mapping[str, Any], source: GgufFile, where: str) -> None:
    """What the general keys say of the file as a whole must be what is read here."""
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise UnsupportedError(
            f"{where}: general.type is {shown(kind)}; only a whole model can be read"
        )
    version = metadata.get("general.quantization_version", 2)
    plain = ("F32", "F16", "BF16")
    if version != 2 and any(info.type not in plain for info in source.tensors.values()):
        raise UnsupportedError(
            f"{where}: general.quantization_version is {shown(version)}; only 2 is supported: the"
            " model must be quantized again"
        )


def _text_files(metadata: Mapping[str, Any], config: ModelConfig, where: str) -> dict[str, bytes]:
    """The tokenizer as the files of a Hugging Face directory; none where there is no tokenizer."""
    if "tokenizer.ggml.model" not in metadata:
        return {}
    tokens = metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) > config.vocab_size:
        raise CheckpointError(
            f"{where} has {len(tokens)} tokens, but rows for {config.vocab_size} in"
            f" {gguf_name('embed')}; its metadata is another model's"
        )
    # A tokenizer takes a while to import and is needed nowhere else.
    from .gguf_tokenizer import tokenizer_files

    return tokenizer_files(metadata, where)


def _level(experts: Iterable[list[GgufTensor]]) -> int:
    """The level worth keeping, by the types of most expert weights."""
    weights: Counter[int] = Counter()
    for infos in experts:
        for info in infos:
            weights[LEVELS.get(info.type, 4)] += math.prod(info.shape)
    return max(weights, key=lambda level: (weights[level], level))


def _stripped(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without its leading axes of length 1."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


def _unpaired(rows: F32, head_dim: int) -> F32:
    """Rows of whole heads, in the order of RoPE over neighbours, in that of RoPE over halves.

    rows: float32 [heads * head_dim, columns].
    """
    columns = rows.shape[1]
    pairs = rows.reshape(-1, head_dim // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(-1, columns)
