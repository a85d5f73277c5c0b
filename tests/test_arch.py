"""config.json of every family: what is read, what is refused, and in which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoints import OLMOE, QWEN3

from edgemoe.arch import FAMILIES, TensorNames, dense_shapes, find_family, is_nested
from edgemoe.arch.inert import FIXED_KEYS, INERT_KEYS
from edgemoe.errors import CheckpointError, UnsupportedError
from edgemoe.types import ModelConfig

# The keys that the published config.json of these two carry.
QWEN3_30B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
OLMOE_7B: dict[str, Any] = {
    "architectures": ["OlmoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "clip_qkv": None,
    "eos_token_id": 50279,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 1024,
    "max_position_embeddings": 4096,
    "model_type": "olmoe",
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "output_router_logits": False,
    "pad_token_id": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 50304,
}

SAME_IN_TRANSFORMERS = """
    vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads num_experts
    num_experts_per_tok norm_topk_prob rms_norm_eps max_position_embeddings tie_word_embeddings
    attention_bias bos_token_id
"""


def parse(raw: dict[str, Any], **changes: Any) -> ModelConfig:
    """Parse `raw` with some keys changed; the value `...` removes a key."""
    raw = {**raw, **changes}
    raw = {key: value for key, value in raw.items() if value is not ...}
    return find_family(raw).parse_config(raw, "config.json")


def test_qwen3_30b_as_published() -> None:
    assert parse(QWEN3_30B) == ModelConfig(
        model_type="qwen3_moe",
        vocab_size=151936,
        hidden_size=2048,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        max_position_embeddings=40960,
        tie_word_embeddings=False,
        qk_norm="head",
        bos_token_id=151643,
        eos_token_ids=(151645,),
    )


def test_olmoe_7b_as_published() -> None:
    assert parse(OLMOE_7B) == ModelConfig(
        model_type="olmoe",
        vocab_size=50304,
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=128,
        num_experts=64,
        num_experts_per_tok=8,
        moe_intermediate_size=1024,
        norm_topk_prob=False,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        qk_norm="full",
        eos_token_ids=(50279,),
    )


def test_stories_as_shipped(shared: Path) -> None:
    raw = json.loads((shared / "models/stories-moe/config.json").read_text())
    config = parse(raw)
    assert (config.num_experts, config.head_dim, config.tie_word_embeddings) == (16, 64, True)


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"num_experts": ..., "num_local_experts": 8}, "num_experts", 8),
        ({"num_experts": 4, "num_local_experts": 4}, "num_experts", 4),
        ({"num_key_value_heads": None}, "num_key_value_heads", 4),
        ({"num_key_value_heads": ...}, "num_key_value_heads", 4),
        ({"head_dim": ...}, "head_dim", 4),
        ({"head_dim": None}, "head_dim", 4),
        ({"rope_theta": ...}, "rope_theta", 10000.0),
        ({"rope_theta": 5000000}, "rope_theta", 5e6),
        ({"rope_theta": ..., "rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}},
         "rope_theta", 7.0),
        ({"rope_theta": 7.0, "rope_parameters": {"rope_theta": 7}}, "rope_theta", 7.0),
        ({"rope_theta": 9.5, "rope_scaling": {"type": "default"}}, "rope_theta", 9.5),
        ({"rope_theta": 9.5, "rope_scaling": {"rope_type": "default", "factor": 1.0}},
         "rope_theta", 9.5),
        ({"eos_token_id": None}, "eos_token_ids", ()),
        ({"eos_token_id": ...}, "eos_token_ids", ()),
        ({"eos_token_id": [7, 3, 7]}, "eos_token_ids", (7, 3)),
        ({"bos_token_id": None}, "bos_token_id", None),
        ({"mlp_only_layers": None}, "dense_layers", ()),
        ({"mlp_only_layers": []}, "intermediate_size", 0),
        ({"mlp_only_layers": [2, 0]}, "dense_layers", (0, 2)),
        ({"mlp_only_layers": [2, 0]}, "intermediate_size", 20),
        ({"mlp_only_layers": [], "decoder_sparse_step": 2}, "dense_layers", (0, 2)),
        ({"mlp_only_layers": [2], "decoder_sparse_step": 3, "num_hidden_layers": 6},
         "dense_layers", (0, 1, 2, 3, 4)),
        ({"attention_bias": True}, "attention_bias", True),
        ({"use_sliding_window": False, "sliding_window": 4096}, "sliding_window", None),
        ({"use_sliding_window": True, "sliding_window": None}, "sliding_window", None),
        ({"use_sliding_window": True, "sliding_window": 8}, "sliding_window", 8),
        ({"layer_types": ["full_attention"] * 3}, "sliding_window", None),
        ({"hidden_act": "swish"}, "model_type", "qwen3_moe"),
        ({"quantization_config": None}, "model_type", "qwen3_moe"),
        ({"id2label": {"0": "LABEL_0"}, "temperature": 0.7}, "model_type", "qwen3_moe"),
    ],
)  # fmt: skip
def test_spellings_of_qwen3(changes: dict[str, Any], field: str, value: Any) -> None:
    assert getattr(parse(QWEN3, **changes), field) == value


def test_spellings_of_olmoe() -> None:
    assert parse(OLMOE, clip_qkv=8).clip_qkv == 8.0
    assert parse(OLMOE, clip_qkv=0.5).clip_qkv == 0.5
    assert parse(OLMOE, num_key_value_heads=None).num_key_value_heads == 4
    assert parse(OLMOE, sliding_window=None).sliding_window is None
    assert parse(OLMOE).rms_norm_eps == 1e-5
    assert parse(OLMOE, rms_norm_eps=1e-6).rms_norm_eps == 1e-6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'"]),
        ({"hidden_act": None}, ["hidden_act", "None"]),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, ["rope_scaling", "yarn", "null"]),
        ({"rope_parameters": {"rope_type": "llama3"}}, ["rope_parameters", "llama3"]),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor", "0.5"]),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, ["full_attention"]),
        ({"partial_rotary_factor": 0.25}, ["partial_rotary_factor", "0.25"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["quantization_config", "fp8"]),
        ({"quantization": {"bits": 4}}, ["quantization", "bits"]),
        ({"auto_map": {"AutoConfig": "x.Y"}}, ["auto_map", "x.Y"]),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
         ["max_window_layers", "2"]),
        ({"layer_types": ["sliding_attention"] * 3}, ["layer_types", "sliding_attention"]),
        ({"attention_multiplier": 0.5}, ["attention_multiplier", "0.5", "unknown"]),
        ({"is_encoder_decoder": True}, ["is_encoder_decoder", "True"]),
        ({"mlp_bias": 1}, ["mlp_bias", "1"]),
        ({"mlp_only_layers": [0, 1, 2]}, ["mlp_only_layers", "no layer"]),
        ({"decoder_sparse_step": 4}, ["decoder_sparse_step 4", "no layer"]),
        ({"a\nkey": "b\nvalue" * 100}, [r"a\nkey", r"b\nvalue", "..."]),
    ],
)  # fmt: skip
def test_unsupported_values_are_named(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UnsupportedError) as caught:
        parse(QWEN3, **changes)
    message = str(caught.value)
    assert all(word in message for word in ["config.json", *words]), message
    assert "\n" not in message
    assert len(message) < 500


def test_unsupported_values_of_olmoe() -> None:
    with pytest.raises(UnsupportedError, match="sliding_window = 128"):
        parse(OLMOE, sliding_window=128)
    with pytest.raises(UnsupportedError, match="head_dim 8 x num_attention_heads 4 is not"):
        parse(OLMOE, head_dim=8)
    with pytest.raises(UnsupportedError, match="mlp_only_layers"):
        parse(OLMOE, mlp_only_layers=[0])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", ...),
        ("vocab_size", None),
        ("vocab_size", 0),
        ("vocab_size", 1 << 40),
        ("hidden_size", -1),
        ("hidden_size", 16.0),
        ("hidden_size", "16"),
        ("hidden_size", True),
        ("hidden_size", (1 << 20) + 1),
        ("num_hidden_layers", 10**9),
        ("num_attention_heads", 0),
        ("num_key_value_heads", 3),
        ("num_key_value_heads", 8),
        ("head_dim", 5),
        ("head_dim", 0),
        ("head_dim", 1 << 19),
        ("num_experts", ...),
        ("num_experts", 0),
        ("num_local_experts", 5),
        ("num_experts_per_tok", 5),
        ("num_experts_per_tok", 0),
        ("moe_intermediate_size", []),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", "1e-6"),
        ("rms_norm_eps", 2.0),
        ("rope_theta", -1.0),
        ("rope_theta", float("inf")),
        ("rope_theta", float("nan")),
        ("rope_scaling", "yarn"),
        ("rope_parameters", {"rope_theta": 5.0}),
        ("norm_topk_prob", 1),
        ("tie_word_embeddings", "no"),
        ("max_position_embeddings", 0),
        ("eos_token_id", -1),
        ("eos_token_id", [1, "2"]),
        ("eos_token_id", 1.0),
        ("bos_token_id", [1]),
        ("decoder_sparse_step", 0),
        ("mlp_only_layers", [3]),
        ("mlp_only_layers", [-1]),
        ("mlp_only_layers", 1),
        ("intermediate_size", ...),
        ("use_sliding_window", 1),
        ("sliding_window", False),
    ],
)
def test_bad_values_name_their_key(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse(QWEN3, **{key: value})
    named = "rope_theta" if key == "rope_parameters" else key
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_window_of_zero_is_refused() -> None:
    with pytest.raises(CheckpointError, match="sliding_window is 0"):
        parse(QWEN3, use_sliding_window=True, sliding_window=0)


def test_heads_must_divide_the_width_without_head_dim() -> None:
    with pytest.raises(CheckpointError, match=r"num_attention_heads is 3.*hidden_size"):
        parse(QWEN3, head_dim=None, num_attention_heads=3, num_key_value_heads=1)


def test_unknown_family_lists_the_known_ones() -> None:
    with pytest.raises(UnsupportedError) as caught:
        find_family({"model_type": "llama"})
    assert all(name in str(caught.value) for name in ["llama", *FAMILIES])


@pytest.mark.parametrize("raw", [{}, {"model_type": None}, {"model_type": ["olmoe"]}])
def test_model_type_must_be_a_string(raw: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="model_type"):
        find_family(raw)


def test_inert_and_fixed_keys_do_not_meet() -> None:
    assert not INERT_KEYS & FIXED_KEYS.keys()


def test_dense_shapes_follow_the_config() -> None:
    shapes = dense_shapes(parse(QWEN3, attention_bias=True))
    assert next(iter(shapes)) == "embed"
    assert shapes["embed"] == shapes["lm_head"] == (40, 16)
    assert shapes["layers.0.q"] == (24, 16)
    assert shapes["layers.0.o"] == (16, 24)
    assert shapes["layers.0.v_bias"] == (12,)
    assert shapes["layers.0.q_norm"] == shapes["layers.0.k_norm"] == (6,)
    assert shapes["layers.0.router"] == (4, 16)
    assert shapes["layers.1.down"] == (16, 20)
    assert "layers.0.gate" not in shapes
    assert "layers.1.router" not in shapes
    olmoe = dense_shapes(parse(OLMOE, tie_word_embeddings=True))
    assert olmoe["layers.1.q_norm"] == (16,)
    assert olmoe["layers.1.k_norm"] == (8,)
    assert "lm_head" not in olmoe
    assert "layers.1.q_bias" not in olmoe


def test_what_a_store_nests() -> None:
    shapes = dense_shapes(parse(QWEN3, attention_bias=True))
    nested = {name.rsplit(".", 1)[-1] for name in shapes if is_nested(name)}
    assert nested == {"embed", "lm_head", "q", "k", "v", "o", "gate", "up", "down"}
    assert all(len(shapes[name]) == 2 for name in shapes if is_nested(name))


def test_another_family_is_only_names() -> None:
    mixtral = TensorNames(
        roles={"router": "block_sparse_moe.gate.weight"},
        expert={
            "gate": "block_sparse_moe.experts.{expert}.w1.weight",
            "up": "block_sparse_moe.experts.{expert}.w3.weight",
            "down": "block_sparse_moe.experts.{expert}.w2.weight",
        },
    )
    assert mixtral.dense("layers.3.router") == "model.layers.3.block_sparse_moe.gate.weight"
    name = mixtral.expert_part(3, 7, "up")
    assert name == "model.layers.3.block_sparse_moe.experts.7.w3.weight"


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Qwen3MoeConfig", {}),
        ("Qwen3MoeConfig", {"mlp_only_layers": [1], "decoder_sparse_step": 2}),
        ("Qwen3MoeConfig", {"head_dim": 32, "tie_word_embeddings": True, "norm_topk_prob": True}),
        ("Qwen3MoeConfig", {"use_sliding_window": True, "sliding_window": 16}),
        ("Qwen3MoeConfig", {"attention_bias": True, "eos_token_id": [3, 4]}),
        ("OlmoeConfig", {}),
        ("OlmoeConfig", {"clip_qkv": 4.0, "num_key_value_heads": 4, "norm_topk_prob": True}),
    ],
)
def test_agrees_with_transformers(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers, kind)(**settings)
    theirs.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    ours = find_family(raw).parse_config(raw, "config.json")
    for name in SAME_IN_TRANSFORMERS.split():
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)
    assert ours.clip_qkv == getattr(theirs, "clip_qkv", None)
    moe = getattr(theirs, "moe_intermediate_size", theirs.intermediate_size)
    assert ours.moe_intermediate_size == moe
    eos = theirs.eos_token_id
    assert ours.eos_token_ids == tuple(
        eos if isinstance(eos, list) else [] if eos is None else [eos]
    )
    step, listed = getattr(theirs, "decoder_sparse_step", 1), getattr(theirs, "mlp_only_layers", [])
    dense = [i for i in range(ours.num_hidden_layers) if i in listed or (i + 1) % step]
    assert list(ours.dense_layers) == dense
