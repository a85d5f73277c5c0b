"""Which of llama.cpp's architectures a model is, what it is told of it, and its tensors by name.

An architecture of llama.cpp is a fixed graph: options that its graph does not have are refused by
name, so that what is written computes the same model or is not written.

Source: ggml-org/llama.cpp, src/models (graphs and the tensors they load) and conversion (metadata
and the order of rows).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ..arch import (
    EXPERT_PARTS,
    FAMILIES,
    GgufForm,
    dense_shapes,
    gguf_experts,
    gguf_name,
    is_nested,
)
from ..errors import UnsupportedError, shown
from ..types import ModelConfig
from .file import Value
from .source import Key

_MAX_LAYERS = 512
_MAX_EXPERTS = 1024


@dataclass(frozen=True)
class Architecture:
    """What one of llama.cpp's graphs does, beyond what its GgufForm says.

    Attributes:
        form: how its files spell a model.
        ties_output: a missing output.weight stands for the embedding.
        output_bias: the projection after attention may have a bias.
        square: attention is as wide as the hidden state.
        all_heads: keys and values have as many heads as queries.
        shared_expert: every layer has one.
        multipliers: Granite's four.
    """

    form: GgufForm
    ties_output: bool = True
    output_bias: bool = False
    square: bool = False
    all_heads: bool = False
    shared_expert: bool = False
    multipliers: bool = False

    @property
    def name(self) -> str:
        """general.architecture, and the prefix of its keys."""
        return self.form.architecture


def _form(model_type: str) -> GgufForm:
    form = FAMILIES[model_type].gguf
    if form is None:
        raise LookupError(f"family {model_type} does not say how its GGUF files are read")
    return form


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "qwen3_moe": Architecture(_form("qwen3_moe")),
        "qwen2_moe": Architecture(
            _form("qwen2_moe"), ties_output=False, square=True, shared_expert=True
        ),
        "olmoe": Architecture(_form("olmoe"), ties_output=False, square=True, all_heads=True),
        "mixtral": Architecture(_form("mixtral"), output_bias=True),
        "granitemoe": Architecture(_form("granitemoe"), output_bias=True, multipliers=True),
    }
)
"""model_type -> architecture."""


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the GGUF file and where its values come from.

    shape: outermost axis first. parts: the matrices that it is made of, one after the other: those
    of all experts, else one. matrix: it may be quantized; float32 otherwise. heads: the rows are
    reordered in each of so many heads; 0: they stay.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Key, ...]
    matrix: bool
    heads: int = 0


def architecture_of(config: ModelConfig, where: str) -> Architecture:
    """The architecture that computes this model.

    Raises:
        UnsupportedError: there is none; the message names the option that llama.cpp lacks.
    """
    arch = ARCHITECTURES.get(config.model_type)
    if arch is None:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UnsupportedError(
            f"{where}: model_type {shown(config.model_type)} cannot be exported; these can: {known}"
        )
    for option, value, reason in _obstacles(config, arch):
        raise UnsupportedError(
            f"{where}: {option} = {shown(value)} cannot be exported: llama.cpp's {arch.name}"
            f" {reason}"
        )
    return arch


def _obstacles(config: ModelConfig, arch: Architecture) -> Iterator[tuple[str, Any, str]]:
    """(option, value, what llama.cpp does instead) of all that the graph cannot compute."""
    c, graph = config, arch.form.graph
    if c.norm_topk_prob != graph.norm_topk_prob:
        does = "always" if graph.norm_topk_prob else "never"
        yield "norm_topk_prob", c.norm_topk_prob, f"{does} renormalises the experts' weights"
    if c.qk_norm != graph.qk_norm:
        yield "qk_norm", c.qk_norm, f"has {graph.qk_norm}"
    if c.attention_bias and not arch.output_bias:
        yield "attention_bias", True, "has no bias after attention"
    if c.clip_qkv is not None:
        yield "clip_qkv", c.clip_qkv, "does not clip"
    # a window as long as the context hides nothing
    window, slides = c.sliding_window, len(c.full_attention_layers) < c.num_hidden_layers
    if window is not None and window < c.max_position_embeddings and slides:
        yield "sliding_window", window, "lets every token see all before it"
    if c.dense_layers:
        yield "mlp_only_layers", list(c.dense_layers), "has experts in every layer"
    if bool(c.shared_expert_intermediate_size) != arch.shared_expert:
        size = c.shared_expert_intermediate_size
        does = "wants a" if arch.shared_expert else "has no"
        yield "shared_expert_intermediate_size", size, f"{does} shared expert"
    if arch.square and c.num_attention_heads * c.head_dim != c.hidden_size:
        yield "head_dim", c.head_dim, "wants heads that are together as wide as hidden_size"
    if arch.all_heads and c.num_key_value_heads != c.num_attention_heads:
        yield "num_key_value_heads", c.num_key_value_heads, "wants as many as num_attention_heads"
    if c.num_hidden_layers > _MAX_LAYERS:
        yield "num_hidden_layers", c.num_hidden_layers, f"takes at most {_MAX_LAYERS}"
    if c.num_experts > _MAX_EXPERTS:
        yield "num_experts", c.num_experts, f"takes at most {_MAX_EXPERTS}"
    yield from _multipliers(c, arch)


def _multipliers(config: ModelConfig, arch: Architecture) -> Iterator[tuple[str, Any, str]]:
    usual = config.head_dim**-0.5
    attention = usual if config.attention_multiplier is None else config.attention_multiplier
    for option, value, neutral in (
        ("embedding_multiplier", config.embedding_multiplier, 1.0),
        ("residual_multiplier", config.residual_multiplier, 1.0),
        ("attention_multiplier", attention, usual),
        ("logits_scaling", config.logits_scaling, 1.0),
    ):
        if arch.multipliers and value == 0:
            yield option, value, "takes 0 for not set"
        elif not arch.multipliers and not math.isclose(value, neutral, rel_tol=1e-6):
            yield option, value, f"has {neutral:g}"


def metadata(config: ModelConfig, arch: Architecture) -> dict[str, Value]:
    """The key-values that describe the model itself, those of `arch`."""
    c, own_width = config, arch.form.graph.expert_width
    width = c.moe_intermediate_size
    out: dict[str, Value] = {
        "vocab_size": c.vocab_size,
        "context_length": min(c.max_position_embeddings, (1 << 31) - 1),
        "embedding_length": c.hidden_size,
        "block_count": c.num_hidden_layers,
        "feed_forward_length": width * c.num_experts_per_tok if own_width else width,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "rope.dimension_count": c.head_dim,
        "rope.freq_base": c.rope_theta,
        "expert_count": c.num_experts,
        "expert_used_count": c.num_experts_per_tok,
    }
    if own_width:
        out["expert_feed_forward_length"] = width
    if arch.shared_expert:
        out["expert_shared_feed_forward_length"] = c.shared_expert_intermediate_size
    if arch.multipliers:
        out["embedding_scale"] = c.embedding_multiplier
        out["residual_scale"] = c.residual_multiplier
        out["logit_scale"] = c.logits_scaling
        if c.attention_multiplier is not None:
            out["attention.scale"] = c.attention_multiplier
    return {f"{arch.name}.{key}": value for key, value in out.items()}


def plan(config: ModelConfig, arch: Architecture) -> list[list[PlannedTensor]]:
    """All tensors of the file, in its order; the stacked experts of a layer are one group of three,
    to be written an expert at a time, every other tensor is a group of its own."""
    out: list[list[PlannedTensor]] = []
    for canonical, shape in dense_shapes(config).items():
        out.append([_dense(canonical, shape, config, arch)])
        if canonical.endswith(".router"):
            out.append(list(_stacks(int(canonical.split(".")[1]), config)))
    if config.tie_word_embeddings and not arch.ties_output:
        embedding = (config.vocab_size, config.hidden_size)
        out.append([PlannedTensor(gguf_name("lm_head"), embedding, ("embed",), True)])
    return out


def _dense(
    canonical: str, shape: tuple[int, ...], config: ModelConfig, arch: Architecture
) -> PlannedTensor:
    role = canonical.rsplit(".", 1)[-1]
    heads = 0
    if arch.form.paired_rows and role in ("q", "q_bias"):
        heads = config.num_attention_heads
    elif arch.form.paired_rows and role in ("k", "k_bias"):
        heads = config.num_key_value_heads
    if role == "shared_router":
        shape = shape[1:]
    return PlannedTensor(gguf_name(canonical), shape, (canonical,), is_nested(canonical), heads)


def _stacks(layer: int, config: ModelConfig) -> Iterator[PlannedTensor]:
    """The experts of a layer, part by part."""
    count, inter, hidden = config.num_experts, config.moe_intermediate_size, config.hidden_size
    for part in EXPERT_PARTS:
        rows, cols = (hidden, inter) if part == "down" else (inter, hidden)
        keys = tuple((layer, expert, part) for expert in range(count))
        yield PlannedTensor(gguf_experts(layer, part), (count, rows, cols), keys, True)
