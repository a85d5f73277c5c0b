"""Sizes of a Qwen3-MoE model: presets, config.json, parameter count, size as an edgemoe store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

MIB = 1024 * 1024
STORE_LIMIT = 32 * MIB
STORE_BITS_PER_WEIGHT = 9.3
"""An 8-bit edgemoe store holds 8 bits and, for five levels, their scales and offsets a weight."""

MAX_VOCAB = 1 << 16
"""Token ids of the training text are kept as uint16."""

CONFIG_KEYS = {
    "vocab_size": "vocab_size",
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "experts": "num_experts",
    "top_k": "num_experts_per_tok",
    "moe_intermediate": "moe_intermediate_size",
    "context": "max_position_embeddings",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
}


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; all layers are mixtures, embeddings are tied, routing is renormalised."""

    vocab_size: int = 8192
    hidden: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    experts: int = 16
    top_k: int = 2
    moe_intermediate: int = 256
    context: int = 512
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value <= 0:
                raise ValueError(f"{name} must be positive, not {value}")
        if self.vocab_size > MAX_VOCAB:
            raise ValueError(f"vocab_size may be at most {MAX_VOCAB}, not {self.vocab_size}")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads do not divide among {self.kv_heads} KV heads")
        if self.top_k > self.experts:
            raise ValueError(f"top_k {self.top_k} is more than the {self.experts} experts")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, not {self.head_dim}")

    @property
    def parameters(self) -> int:
        """Number of weights, the tied embedding once."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        experts = self.experts * 3 * self.hidden * self.moe_intermediate
        small = self.experts * self.hidden + 2 * self.hidden + 2 * self.head_dim
        each = attention + experts + small
        return self.vocab_size * self.hidden + self.layers * each + self.hidden

    @property
    def active_parameters(self) -> int:
        """Weights that one token multiplies with, the output head included."""
        idle = (self.experts - self.top_k) * 3 * self.hidden * self.moe_intermediate
        return self.parameters - self.layers * idle

    @property
    def store_bytes(self) -> int:
        """Estimated size of the 8-bit edgemoe store."""
        return int(self.parameters * STORE_BITS_PER_WEIGHT / 8)

    def hf_config(self, aux_coefficient: float) -> dict[str, Any]:
        """config.json as Qwen3MoeForCausalLM reads it."""
        mine = asdict(self)
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            **{theirs: mine[ours] for ours, theirs in CONFIG_KEYS.items()},
            "intermediate_size": 4 * self.hidden,  # of dense layers, which there are none of
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "hidden_act": "silu",
            "rope_scaling": None,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "router_aux_loss_coef": aux_coefficient,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "sliding_window": None,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "torch_dtype": "bfloat16",
            "use_cache": True,
        }


REQUIRED = {
    "model_type": "qwen3_moe",
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "tie_word_embeddings": True,
    "attention_bias": False,
    "hidden_act": "silu",
}


def shape_from_config(raw: Mapping[str, Any]) -> Shape:
    """Shape of a config.json; ValueError where it has what the training model lacks."""
    for key, value in REQUIRED.items():
        if raw.get(key) != value:
            raise ValueError(f"{key} is {raw.get(key)!r}: this model knows only {value!r}")
    raw = {**raw, "rope_theta": (raw.get("rope_parameters") or raw).get("rope_theta")}
    return Shape(**{ours: raw[theirs] for ours, theirs in CONFIG_KEYS.items()})


PRESETS = {
    "default": Shape(),
    "quality": replace(Shape(), hidden=512, layers=8, heads=8, kv_heads=4, top_k=4),
}
