"""Options a family has and edgemoe lacks are refused by name; what it accepts, it reads right."""

from __future__ import annotations

from typing import Any

import pytest

from edgemoe.arch import FAMILIES, find_family
from edgemoe.errors import CheckpointError, UnsupportedError
from edgemoe.types import ModelConfig

COMMON: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "hidden_act": "silu",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": COMMON | {"num_local_experts": 4},
    "granitemoe": COMMON | {"num_local_experts": 4},
    "olmoe": COMMON | {"num_experts": 4},
    "qwen3_moe": COMMON | {"num_experts": 4, "moe_intermediate_size": 32},
    "qwen2_moe": COMMON
    | {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 40},
}


def parse(family: str, **changes: Any) -> ModelConfig:
    raw = {"model_type": family} | CONFIGS[family] | changes
    return find_family(raw).parse_config(raw, "config.json")


def test_every_family_is_here() -> None:
    assert set(CONFIGS) == set(FAMILIES)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("rope_scaling", {"type": "yarn", "factor": 4.0}),
        ("rope_scaling", {"rope_type": "nosuch"}),
        ("rope_parameters", {"rope_type": "llama3", "rope_theta": 1e4}),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("quantization_config", {"quant_method": "awq"}),
        ("auto_map", {"AutoModel": "x.Y"}),
        ("some_new_key", 1),
        ("partial_rotary_factor", 0.5),
        ("mlp_bias", True),
    ],
)
def test_unsupported_options_are_named(family: str, key: str, value: Any) -> None:
    with pytest.raises(UnsupportedError, match=key) as info:
        parse(family, **{key: value})
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("mixtral", "norm_topk_prob", False),
        ("mixtral", "qkv_bias", True),
        ("granitemoe", "norm_topk_prob", False),
        ("granitemoe", "sliding_window", 8),
        ("olmoe", "sliding_window", 8),
        ("qwen2_moe", "attention_bias", True),
        ("mixtral", "shared_expert_intermediate_size", 32),
        ("granitemoe", "shared_intermediate_size", 32),
    ],
)
def test_options_of_other_families_are_refused(family: str, key: str, value: Any) -> None:
    with pytest.raises(UnsupportedError, match=key):
        parse(family, **{key: value})


@pytest.mark.parametrize(
    ("family", "changes", "match"),
    [
        ("mixtral", {"num_local_experts": 1}, "num_experts_per_tok"),
        ("mixtral", {"sliding_window": 0}, "sliding_window"),
        ("granitemoe", {"logits_scaling": 0}, "logits_scaling"),
        ("granitemoe", {"residual_multiplier": "big"}, "residual_multiplier"),
        ("qwen2_moe", {"shared_expert_intermediate_size": None}, "shared_expert"),
        ("qwen2_moe", {"num_key_value_heads": 3}, "num_key_value_heads"),
        ("qwen2_moe", {"mlp_only_layers": [9]}, "mlp_only_layers"),
        (
            "qwen2_moe",
            {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["odd"] * 4},
            "layer_types",
        ),
    ],
)
def test_bad_values_are_named(family: str, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        parse(family, **changes)


def test_windows_without_layer_types_are_ambiguous() -> None:
    with pytest.raises(UnsupportedError, match="layer_types"):
        parse("qwen2_moe", use_sliding_window=True, sliding_window=8)
    assert parse("qwen2_moe", sliding_window=8).sliding_window is None
    kinds = ["sliding_attention", "full_attention"] * 2
    config = parse("qwen2_moe", use_sliding_window=True, sliding_window=8, layer_types=kinds)
    assert (config.sliding_window, config.full_attention_layers) == (8, (1, 3))


def test_what_a_family_means() -> None:
    mixtral = parse("mixtral", sliding_window=16)
    assert (mixtral.norm_topk_prob, mixtral.sliding_window, mixtral.qk_norm) == (True, 16, "none")
    assert (mixtral.rope_theta, mixtral.moe_intermediate_size) == (1e6, 48)
    granite = parse("granitemoe", embedding_multiplier=12, attention_multiplier=0.5)
    assert (granite.embedding_multiplier, granite.attention_multiplier) == (12.0, 0.5)
    assert parse("granitemoe").attention_multiplier == 1.0  # not head_dim ** -0.5
    qwen2 = parse("qwen2_moe")
    assert (qwen2.biases, qwen2.shared_expert_intermediate_size) == (("q", "k", "v"), 40)
    assert parse("qwen2_moe", qkv_bias=False).biases == ()
    assert parse("qwen3_moe", attention_bias=True).biases == ("q", "k", "v", "o")
