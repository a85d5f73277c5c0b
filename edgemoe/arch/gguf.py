"""Model families as llama.cpp's GGUF files spell them: metadata to ModelConfig.

Source: ggml-org/llama.cpp, src/llama-model.cpp (load_hparams), src/models/*.cpp for what is
computed, conversion/*.py for what a Hugging Face checkpoint becomes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from ..errors import CheckpointError, UnsupportedError
from ..types import ModelConfig
from .common import MAX_CONTEXT, MAX_EXPERTS, MAX_LAYERS, MAX_SIZE, MAX_VOCAB, ConfigReader
from .gguf_names import gguf_name

_FIXED: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "activation_function": ("silu",),
        "attention.causal": (True,),
        "attention.clamp_kqv": (0,),
        "attention.max_alibi_bias": (0,),
        "attention.scale": (0,),
        "attention.sliding_window": (0,),
        "attn_logit_softcapping": (0,),
        "embedding_scale": (0, 1),
        "expert_gating_func": (0, 1),
        "expert_group_count": (0, 1),
        "expert_group_used_count": (0, 1),
        "expert_shared_count": (0,),
        "expert_shared_feed_forward_length": (0,),
        "expert_weights_scale": (0, 1),
        "final_logit_softcapping": (0,),
        "hidden_activation": ("silu",),
        "leading_dense_block_count": (0,),
        "logit_scale": (0, 1),
        "nextn_predict_layers": (0,),
        "pooling_type": (0,),
        "residual_scale": (0, 1),
        "rope.scale_linear": (0, 1),
        "rope.scaling.alpha": (0,),
        "rope.scaling.attn_factor": (0, 1),
        "rope.scaling.factor": (0, 1),
        "rope.scaling.type": ("none", "linear"),
        "router_logit_softcapping": (0,),
        "tensor_data_layout": ("", "reference", "Meta AI original pth"),
        "use_parallel_residual": (False,),
    }
)
"""Keys that a family which does not read them itself takes only with one of these values; 0 is
llama.cpp's "not set", and 1 is softmax for expert_gating_func."""

_INERT = frozenset(
    {
        "attention.layer_norm_epsilon",
        "decoder_start_token_id",
        "rope.scaling.finetuned",
        "rope.scaling.original_context_length",
    }
)

_BY_LAYER = (
    "attention.head_count",
    "attention.head_count_kv",
    "expert_feed_forward_length",
    "expert_used_count",
    "feed_forward_length",
)
"""Keys that may be a list with a value for every layer; it counts where they are all the same."""


class GgufReader(ConfigReader):
    """Takes the keys of one architecture out of a GGUF's metadata, typed and range-checked.

    Methods take keys without the architecture they begin with; messages show it. A float that is a
    float32 counts as the shortest decimal that rounds to it: what the model's config.json said.
    Errors as ConfigReader's.

    Attributes:
        tensors: name -> shape of every tensor of the file, outermost axis first.
    """

    inert = _INERT
    fixed = _FIXED

    def __init__(
        self,
        metadata: Mapping[str, Any],
        architecture: str,
        tensors: Mapping[str, tuple[int, ...]],
        where: str,
    ) -> None:
        prefix = f"{architecture}."
        raw = {
            key[len(prefix) :]: _decimal(value)
            for key, value in metadata.items()
            if key.startswith(prefix)
        }
        for key in _BY_LAYER:
            value = raw.get(key)
            if isinstance(value, list) and value and value.count(value[0]) == len(value):
                raw[key] = value[0]
        super().__init__(raw, where, prefix)
        self.tensors = tensors

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        name = gguf_name("embed")
        shape = self.tensors.get(name)
        if shape is None or len(shape) != 2 or shape[0] > MAX_VOCAB:
            found = "is missing" if shape is None else f"has shape {list(shape)}"
            raise CheckpointError(
                f"{self.where}: tensor {name} {found}; it must be of at most {MAX_VOCAB} tokens by"
                f" {self.prefix}embedding_length"
            )
        return shape[0]

    def has_role(self, layer: int, role: str) -> bool:
        """Whether a layer has the tensor of this canonical role."""
        return gguf_name(f"layers.{layer}.{role}") in self.tensors

    def required(self, key: str, *, most: float) -> float:
        """A finite number in (0, most] that must be there."""
        value = self.optional_number(key, most=most)
        if value is None:
            raise self.bad(key, f"a number above 0, at most {most:g}")
        return value

    def scale(self, key: str, *, most: float) -> float | None:
        """A finite number in (0, most]; None where it is 0 or absent, which is "not set"."""
        if self.raw.get(key) == 0:
            self.skip(key)
            return None
        return self.optional_number(key, most=most)


def _decimal(value: Any) -> Any:
    """A float as the shortest decimal of its float32, if it is one; anything else as it is."""
    if isinstance(value, float) and abs(value) <= np.finfo(np.float32).max:
        single = np.float32(value)
        if float(single) == value:
            return float(str(single))
    return value


@dataclass(frozen=True)
class GgufGraph:
    """What llama.cpp computes for an architecture, whatever a file says.

    norm_topk_prob, qk_norm: as in ModelConfig. expert_width: experts have a width of their own,
    and feed_forward_length is that of layers with a plain MLP and no router; else it is theirs.
    """

    norm_topk_prob: bool
    qk_norm: Literal["none", "head", "full"] = "none"
    expert_width: bool = False


def gguf_config(keys: GgufReader, model_type: str, graph: GgufGraph) -> ModelConfig:
    """The ModelConfig that the keys common to all architectures spell.

    Biases, dense layers and a tied head show in which tensors there are. Ids of special tokens are
    left to the tokenizer.

    Args:
        keys: reader of the metadata; the family reads its own keys after this and calls `finish`.
        graph: of the architecture; a file may say otherwise of norm_topk_prob.
    """
    layers = keys.integer("block_count", most=MAX_LAYERS)
    hidden = keys.size("embedding_length")
    keys.only("embedding_length_out", hidden)
    heads, kv_heads, head_dim = _heads(keys, hidden)
    if not keys.raw.get("expert_count"):
        raise UnsupportedError(
            f"{keys.where}: {keys.prefix}expert_count is missing or 0; only mixture-of-experts"
            " models can be run"
        )
    experts = keys.integer("expert_count", most=MAX_EXPERTS)
    per_tok = keys.integer("expert_used_count", most=experts)
    dense: tuple[int, ...] = ()
    if graph.expert_width:
        dense = tuple(i for i in range(layers) if not keys.has_role(i, "router"))
        if len(dense) == layers:
            name = gguf_name("layers.0.router")
            raise CheckpointError(f"{keys.where} has no {name}, nor one in any other layer")
    vocab_size = keys.vocab_size
    keys.only("vocab_size", vocab_size)
    biased = {r: any(keys.has_role(i, f"{r}_bias") for i in range(layers)) for r in ("q", "o")}
    return ModelConfig(
        model_type=model_type,
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        num_experts=experts,
        num_experts_per_tok=per_tok,
        moe_intermediate_size=_expert_size(keys, per_tok, graph),
        norm_topk_prob=keys.flag("expert_weights_norm", default=graph.norm_topk_prob),
        rms_norm_eps=keys.required("attention.layer_norm_rms_epsilon", most=1.0),
        rope_theta=keys.number("rope.freq_base", most=1e15, default=10000.0),
        max_position_embeddings=keys.integer("context_length", most=MAX_CONTEXT),
        tie_word_embeddings=gguf_name("lm_head") not in keys.tensors,
        qk_norm=graph.qk_norm,
        attention_bias=biased["o"],
        qkv_bias=biased["q"] and not biased["o"],
        intermediate_size=keys.size("feed_forward_length") if dense else 0,
        dense_layers=dense,
    )


def _heads(keys: GgufReader, hidden: int) -> tuple[int, int, int]:
    """Attention heads, KV heads, and the width that queries, keys and values of a head share."""
    heads = keys.size("attention.head_count")
    kv_heads = keys.integer("attention.head_count_kv", most=MAX_SIZE, default=heads)
    if heads % kv_heads:
        raise keys.bad("attention.head_count_kv", f"a divisor of attention.head_count ({heads})")
    if not keys.has("attention.key_length") and hidden % heads:
        raise keys.bad("attention.head_count", f"a divisor of embedding_length ({hidden})")
    head_dim = keys.integer("attention.key_length", most=MAX_SIZE, default=hidden // heads)
    value_dim = keys.integer("attention.value_length", most=MAX_SIZE, default=hidden // heads)
    if value_dim != head_dim or head_dim % 2 or heads * head_dim > MAX_SIZE:
        raise UnsupportedError(
            f"{keys.where}: keys are {head_dim} wide and values {value_dim}, with {heads} heads;"
            f" they must be alike and even, and the heads together at most {MAX_SIZE} wide"
        )
    keys.only("rope.dimension_count", head_dim)
    return heads, kv_heads, head_dim


def _expert_size(keys: GgufReader, per_tok: int, graph: GgufGraph) -> int:
    """Width of one expert."""
    if not graph.expert_width:
        size = keys.size("feed_forward_length")
        keys.only("expert_feed_forward_length", 0, size)
        return size
    keys.skip("feed_forward_length")
    if keys.raw.get("expert_feed_forward_length"):
        return keys.size("expert_feed_forward_length")
    # Files from before that key: the chosen experts together are as wide as a plain MLP.
    keys.skip("expert_feed_forward_length")
    return max(keys.size("feed_forward_length") // per_tok, 1)


def gguf_windows(keys: GgufReader, layers: int) -> tuple[int | None, tuple[int, ...]]:
    """(attention window, layers that see everything in spite of it)."""
    key = "attention.sliding_window_pattern"
    keys.skip(key)
    window = keys.optional_integer("attention.sliding_window", most=MAX_CONTEXT)
    if not window:
        return None, ()
    slides = keys.raw.get(key)
    if slides is None:
        return window, ()
    if not isinstance(slides, list) or len(slides) != layers or {*map(type, slides)} != {bool}:
        raise keys.unsupported(key)
    return window, tuple(i for i, sliding in enumerate(slides) if not sliding)
