"""OLMoE: QK-norm over the whole projection, optional clipping of q, k and v.

Source: transformers, models/olmoe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..errors import UnsupportedError
from ..types import ModelConfig
from .common import ConfigReader, Family, base_config
from .tensors import TensorNames


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
    if base.num_attention_heads * base.head_dim != base.hidden_size:
        raise UnsupportedError(
            f"{where}: head_dim {base.head_dim} x num_attention_heads {base.num_attention_heads}"
            f" is not hidden_size {base.hidden_size}; OLMoE's QK-norm needs them equal"
        )
    config = replace(
        base,
        qk_norm="full",
        attention_bias=keys.flag("attention_bias", default=False),
        clip_qkv=keys.optional_number("clip_qkv", most=1e9),
    )
    keys.only("sliding_window", None)
    keys.finish()
    return config


FAMILY = Family("olmoe", parse_config, TensorNames())
