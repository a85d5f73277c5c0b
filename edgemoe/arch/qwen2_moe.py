"""Qwen2-MoE (Qwen1.5-MoE-A2.7B and kin): a gated shared expert beside the routed ones, QKV bias.

Source: transformers, models/qwen2_moe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..types import ModelConfig
from .common import ConfigReader, base_config, dense_layers, windows_by_layer
from .family import Family, GgufForm
from .gguf import GgufGraph, GgufReader, gguf_config, gguf_windows
from .tensors import TensorNames

_GRAPH = GgufGraph(norm_topk_prob=False, expert_width=True)


def parse_config(raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """ModelConfig of a parsed qwen2_moe config.json; errors as `ConfigReader`'s."""
    keys = ConfigReader(raw, where)
    base = base_config(
        keys,
        model_type="qwen2_moe",
        expert_size_key="moe_intermediate_size",
        rms_norm_eps=1e-6,
        max_position_embeddings=32768,
    )
    dense = dense_layers(keys, base.num_hidden_layers)
    window, full = windows_by_layer(keys, base.num_hidden_layers)
    config = replace(
        base,
        qkv_bias=keys.flag("qkv_bias", default=True),
        sliding_window=window,
        full_attention_layers=full,
        dense_layers=dense,
        intermediate_size=keys.size("intermediate_size") if dense else 0,
        shared_expert_intermediate_size=keys.size("shared_expert_intermediate_size"),
    )
    keys.skip("intermediate_size")
    keys.finish()
    return config


def parse_gguf(keys: GgufReader) -> ModelConfig:
    """ModelConfig of the metadata of a qwen2moe GGUF."""
    base = gguf_config(keys, "qwen2_moe", _GRAPH)
    window, full = gguf_windows(keys, base.num_hidden_layers)
    key = "expert_shared_feed_forward_length"
    # Files from before that key: the shared expert is as wide as a plain MLP.
    shared = keys.size(key if keys.raw.get(key) else "feed_forward_length")
    keys.skip(key)
    keys.skip("expert_shared_count")
    keys.finish()
    return replace(
        base,
        sliding_window=window,
        full_attention_layers=full,
        shared_expert_intermediate_size=shared,
    )


FAMILY = Family("qwen2_moe", parse_config, TensorNames(), GgufForm("qwen2moe", parse_gguf, _GRAPH))
