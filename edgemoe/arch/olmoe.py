"""OLMoE: QK-norm over the whole projection, optional clipping of q, k and v.

Source: transformers, models/olmoe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..errors import UnsupportedError
from ..types import ModelConfig
from .common import ConfigReader, base_config
from .family import Family, GgufForm
from .gguf import GgufGraph, GgufReader, gguf_config
from .tensors import TensorNames

_GRAPH = GgufGraph(norm_topk_prob=False, qk_norm="full")


def parse_config(raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """ModelConfig of a parsed olmoe config.json; errors as `ConfigReader`'s."""
    keys = ConfigReader(raw, where)
    base = base_config(
        keys,
        model_type="olmoe",
        expert_size_key="intermediate_size",
        rms_norm_eps=1e-5,
        max_position_embeddings=4096,
    )
    _check_width(base, where)
    config = replace(
        base,
        qk_norm="full",
        attention_bias=keys.flag("attention_bias", default=False),
        clip_qkv=keys.optional_number("clip_qkv", most=1e9),
    )
    keys.only("sliding_window", None)
    keys.finish()
    return config


def parse_gguf(keys: GgufReader) -> ModelConfig:
    """ModelConfig of the metadata of an olmoe GGUF."""
    base = gguf_config(keys, "olmoe", _GRAPH)
    _check_width(base, keys.where)
    config = replace(base, clip_qkv=keys.scale("attention.clamp_kqv", most=1e9))
    keys.finish()
    return config


def _check_width(config: ModelConfig, where: str) -> None:
    if config.num_attention_heads * config.head_dim != config.hidden_size:
        raise UnsupportedError(
            f"{where}: head_dim {config.head_dim} x num_attention_heads"
            f" {config.num_attention_heads} is not hidden_size {config.hidden_size}; OLMoE's"
            " QK-norm needs them equal"
        )


FAMILY = Family("olmoe", parse_config, TensorNames(), GgufForm("olmoe", parse_gguf, _GRAPH))
