"""Mixtral (Mixtral-8x7B and kin): no QK-norm, weights of the chosen experts renormalised.

Source: transformers, models/mixtral.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from ..types import ModelConfig
from .common import MAX_CONTEXT, ConfigReader, base_config
from .family import Family, GgufForm
from .gguf import GgufGraph, GgufReader, gguf_config, gguf_windows
from .tensors import LLAMA_ROLES, TensorNames

_GRAPH = GgufGraph(norm_topk_prob=True)


def parse_config(raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """ModelConfig of a parsed mixtral config.json; errors as `ConfigReader`'s."""
    keys = ConfigReader(raw, where)
    base = base_config(
        keys,
        model_type="mixtral",
        expert_size_key="intermediate_size",
        rms_norm_eps=1e-5,
        max_position_embeddings=131072,
        rope_theta=1e6,
    )
    keys.only("norm_topk_prob", None, True)
    config = replace(
        base,
        norm_topk_prob=True,
        sliding_window=keys.optional_integer("sliding_window", least=1, most=MAX_CONTEXT),
    )
    keys.finish()
    return config


def parse_gguf(keys: GgufReader) -> ModelConfig:
    """ModelConfig of the metadata of a GGUF of the llama architecture that has experts."""
    base = gguf_config(keys, "mixtral", _GRAPH)
    window, full = gguf_windows(keys, base.num_hidden_layers)
    keys.finish()
    return replace(base, sliding_window=window, full_attention_layers=full)


FAMILY = Family(
    "mixtral",
    parse_config,
    TensorNames(
        roles=MappingProxyType({**LLAMA_ROLES, "router": "block_sparse_moe.gate.weight"}),
        expert={
            "gate": "block_sparse_moe.experts.{expert}.w1.weight",
            "up": "block_sparse_moe.experts.{expert}.w3.weight",
            "down": "block_sparse_moe.experts.{expert}.w2.weight",
        },
    ),
    GgufForm("llama", parse_gguf, _GRAPH, paired_rows=True),
)
