"""Qwen3-MoE (Qwen3-30B-A3B and kin): QK-norm a head, optional dense layers among the sparse.

Source: transformers, models/qwen3_moe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..types import ModelConfig
from .common import ConfigReader, base_config, dense_layers, sliding_window
from .family import Family, GgufForm
from .gguf import GgufGraph, GgufReader, gguf_config, gguf_windows
from .tensors import TensorNames

_GRAPH = GgufGraph(norm_topk_prob=True, qk_norm="head", expert_width=True)


def parse_config(raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """ModelConfig of a parsed qwen3_moe config.json; errors as `ConfigReader`'s."""
    keys = ConfigReader(raw, where)
    base = base_config(
        keys,
        model_type="qwen3_moe",
        expert_size_key="moe_intermediate_size",
        rms_norm_eps=1e-6,
        max_position_embeddings=32768,
    )
    dense = dense_layers(keys, base.num_hidden_layers)
    config = replace(
        base,
        qk_norm="head",
        attention_bias=keys.flag("attention_bias", default=False),
        sliding_window=sliding_window(keys, base.num_hidden_layers),
        dense_layers=dense,
        # Present in every config of the family, but only dense layers have this width.
        intermediate_size=keys.size("intermediate_size") if dense else 0,
    )
    keys.skip("intermediate_size")
    keys.finish()
    return config


def parse_gguf(keys: GgufReader) -> ModelConfig:
    """ModelConfig of the metadata of a qwen3moe GGUF."""
    base = gguf_config(keys, "qwen3_moe", _GRAPH)
    window, full = gguf_windows(keys, base.num_hidden_layers)
    keys.finish()
    return replace(base, sliding_window=window, full_attention_layers=full)


FAMILY = Family("qwen3_moe", parse_config, TensorNames(), GgufForm("qwen3moe", parse_gguf, _GRAPH))
