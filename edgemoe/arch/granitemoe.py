"""GraniteMoE (Granite-3.x 1b-a400m and kin): four multipliers, a layer's experts in one tensor.

Source: transformers, models/granitemoe. Its softmax over the chosen experts' logits equals the
renormalised softmax over all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from ..types import ModelConfig
from .common import ConfigReader, base_config
from .family import Family, GgufForm
from .gguf import GgufGraph, GgufReader, gguf_config
from .tensors import LLAMA_ROLES, TensorNames

_MOST = 1e6

_GRAPH = GgufGraph(norm_topk_prob=True)


def parse_config(raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """ModelConfig of a parsed granitemoe config.json; errors as `ConfigReader`'s."""
    keys = ConfigReader(raw, where)
    base = base_config(
        keys,
        model_type="granitemoe",
        expert_size_key="intermediate_size",
        rms_norm_eps=1e-6,
        max_position_embeddings=2048,
    )
    keys.only("norm_topk_prob", None, True)
    keys.only("sliding_window", None)
    config = replace(
        base,
        norm_topk_prob=True,
        attention_bias=keys.flag("attention_bias", default=False),
        embedding_multiplier=keys.number("embedding_multiplier", most=_MOST, default=1.0),
        residual_multiplier=keys.number("residual_multiplier", most=_MOST, default=1.0),
        attention_multiplier=keys.number("attention_multiplier", most=_MOST, default=1.0),
        logits_scaling=keys.number("logits_scaling", most=_MOST, default=1.0),
    )
    keys.finish()
    return config


def parse_gguf(keys: GgufReader) -> ModelConfig:
    """ModelConfig of the metadata of a granitemoe GGUF."""
    base = gguf_config(keys, "granitemoe", _GRAPH)
    config = replace(
        base,
        embedding_multiplier=keys.scale("embedding_scale", most=_MOST) or 1.0,
        residual_multiplier=keys.scale("residual_scale", most=_MOST) or 1.0,
        attention_multiplier=keys.scale("attention.scale", most=_MOST),
        logits_scaling=keys.required("logit_scale", most=_MOST),
    )
    keys.finish()
    return config


FAMILY = Family(
    "granitemoe",
    parse_config,
    TensorNames(
        roles=MappingProxyType({**LLAMA_ROLES, "router": "block_sparse_moe.router.layer.weight"}),
        packed=(
            "block_sparse_moe.input_linear.weight",
            "block_sparse_moe.output_linear.weight",
        ),
    ),
    GgufForm("granitemoe", parse_gguf, _GRAPH, paired_rows=True),
)
