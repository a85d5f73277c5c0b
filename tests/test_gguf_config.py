"""What the metadata of a GGUF file means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_samples import ARRAY, BOOL, FLOAT32, FLOAT64, I32, STRING, U32
from gguf_zeros import DIM, EXPERTS, HEADS, HIDDEN, KV, LAYERS, OWN, VOCAB, WIDTH, Key, write
from tiny_checkpoints import refuse

from edgemoe.arch import FAMILIES
from edgemoe.checkpoint import open_checkpoint
from edgemoe.errors import UnsupportedError
from edgemoe.types import ModelConfig


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "m.gguf"


def config(path: Path, architecture: str, **changes: Any) -> ModelConfig:
    return open_checkpoint(write(path, architecture, **changes)).config


def test_every_family_has_a_form() -> None:
    forms = {name: family.gguf for name, family in FAMILIES.items()}
    assert all(form is not None for form in forms.values())
    assert {form.architecture for form in forms.values() if form} == set(OWN)
    assert {n for n, f in forms.items() if f and f.paired_rows} == {"mixtral", "granitemoe"}


@pytest.mark.parametrize("architecture", OWN)
def test_defaults_are_llama_cpps(path: Path, architecture: str) -> None:
    """What an architecture computes where the file says nothing of it."""
    names = {form.gguf.architecture: name for name, form in FAMILIES.items() if form.gguf}
    want: dict[str, Any] = {
        "model_type": names[architecture],
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV,
        "head_dim": DIM,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": WIDTH,
        "norm_topk_prob": architecture in ("qwen3moe", "llama", "granitemoe"),
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "qk_norm": {"qwen3moe": "head", "olmoe": "full"}.get(architecture, "none"),
        "shared_expert_intermediate_size": 7 if architecture == "qwen2moe" else 0,
        "logits_scaling": 6.0 if architecture == "granitemoe" else 1.0,
    }
    assert config(path, architecture) == ModelConfig(**want)


@pytest.mark.parametrize(
    ("architecture", "keys", "field", "value"),
    [
        ("qwen3moe", {"rope.freq_base": (FLOAT32, 5e6)}, "rope_theta", 5e6),
        ("qwen3moe", {"rope.freq_base": (FLOAT64, 0.1)}, "rope_theta", 0.1),
        ("qwen3moe", {"rope.scaling.type": (STRING, "none")}, "rope_theta", 1e4),
        (
            "llama",
            {"rope.scaling.type": (STRING, "linear"), "rope.scaling.factor": (FLOAT32, 1.0)},
            "rope_theta",
            1e4,
        ),
        ("llama", {"rope.scaling.original_context_length": (U32, 64)}, "rope_theta", 1e4),
        ("llama", {"rope.scaling.finetuned": (BOOL, 1)}, "rope_theta", 1e4),
        ("qwen3moe", {"attention.head_count": (ARRAY, (U32, [4, 4]))}, "num_attention_heads", 4),
        ("olmoe", {"feed_forward_length": (ARRAY, (I32, [12, 12]))}, "moe_intermediate_size", 12),
        ("qwen3moe", {"expert_feed_forward_length": None}, "moe_intermediate_size", 12),
        ("qwen3moe", {"expert_feed_forward_length": (U32, 0)}, "moe_intermediate_size", 12),
        ("qwen3moe", {"expert_weights_norm": (BOOL, 0)}, "norm_topk_prob", False),
        ("qwen2moe", {"expert_weights_norm": (BOOL, 1)}, "norm_topk_prob", True),
        ("olmoe", {"attention.clamp_kqv": (FLOAT32, 0.1)}, "clip_qkv", 0.1),
        ("olmoe", {"attention.clamp_kqv": (FLOAT32, 0.0)}, "clip_qkv", None),
        ("llama", {"attention.sliding_window": (U32, 9)}, "sliding_window", 9),
        ("llama", {"attention.sliding_window": (U32, 0)}, "sliding_window", None),
        ("granitemoe", {"embedding_scale": (FLOAT32, 12.0)}, "embedding_multiplier", 12.0),
        ("granitemoe", {"embedding_scale": (FLOAT32, 0.0)}, "embedding_multiplier", 1.0),
        ("granitemoe", {"residual_scale": (FLOAT32, 0.22)}, "residual_multiplier", 0.22),
        ("granitemoe", {"attention.scale": (FLOAT32, 0.015625)}, "attention_multiplier", 1 / 64),
        ("granitemoe", {"attention.scale": (FLOAT32, 0.0)}, "attention_multiplier", None),
        ("olmoe", {"expert_gating_func": (U32, 1)}, "num_experts", EXPERTS),
        ("olmoe", {"vocab_size": (U32, VOCAB)}, "vocab_size", VOCAB),
        ("llama", {"tensor_data_layout": (STRING, "Meta AI original pth")}, "num_experts", EXPERTS),
    ],
)
def test_what_keys_mean(
    path: Path, architecture: str, keys: dict[str, Any], field: str, value: Any
) -> None:
    if keys.get("expert_feed_forward_length", (0, 1)) in (None, (U32, 0)):
        keys = {**keys, "feed_forward_length": (U32, 2 * WIDTH)}
    got = getattr(config(path, architecture, keys=keys), field)
    assert got == value
    assert type(got) is type(value)


def test_kv_heads_are_as_many_as_heads_unless_told(path: Path) -> None:
    shapes = {f"blk.{i}.attn_{part}.weight": (HIDDEN, HIDDEN) for i in (0, 1) for part in "kv"}
    got = config(path, "llama", keys={"attention.head_count_kv": None}, shapes=shapes)
    assert got.num_key_value_heads == HEADS


def test_floats_are_the_decimals_they_were(path: Path) -> None:
    """float32 is all a file has; config.json had decimals."""
    for text in ["1e-06", "1e-05", "0.22", "0.015625", "123456.7", "1e-30"]:
        single = np.float32(text)
        assert float(single) != float(text) or text == "0.015625"
        key = {"residual_scale": (FLOAT32, float(single))}
        assert config(path, "granitemoe", keys=key).residual_multiplier == float(text)


@pytest.mark.parametrize("architecture", ["qwen3moe", "qwen2moe"])
def test_windows_by_layer(path: Path, architecture: str) -> None:
    keys: dict[str, Key | None] = {"attention.sliding_window": (U32, 5)}
    assert config(path, architecture, keys=keys).full_attention_layers == ()
    pattern = "attention.sliding_window_pattern"
    keys[pattern] = (ARRAY, (BOOL, [0, 1]))
    got = config(path, architecture, keys=keys)
    assert (got.sliding_window, got.full_attention_layers) == (5, (0,))
    for bad in [(U32, 2), (ARRAY, (BOOL, [1])), (ARRAY, (U32, [1, 0])), (ARRAY, (BOOL, []))]:
        write(path, architecture, {**keys, pattern: bad})
        refuse(path, f"{architecture}.{pattern}", kind=UnsupportedError)
    write(path, architecture, {pattern: (ARRAY, (BOOL, [0, 1]))})
    assert open_checkpoint(path).config.sliding_window is None


def test_what_tensors_tell(path: Path) -> None:
    """A tied head, biases and dense layers."""
    assert config(path, "llama", shapes={"output.weight": None}).tie_word_embeddings
    qkv = {
        f"blk.{i}.attn_{p}.bias": (n,) for i in (0, 1) for p, n in (("q", 16), ("k", 8), ("v", 8))
    }
    o = {f"blk.{i}.attn_output.bias": (HIDDEN,) for i in (0, 1)}
    got = config(path, "qwen2moe", shapes=qkv)
    assert (got.qkv_bias, got.attention_bias) == (True, False)
    got = config(path, "qwen3moe", shapes=qkv | o)
    assert (got.qkv_bias, got.attention_bias) == (False, True)
    write(path, "qwen3moe", shapes=o)
    refuse(path, "has no tensor blk.0.attn_q.bias")
    write(path, "qwen3moe", shapes={"blk.1.attn_q.bias": (16,)})
    refuse(path, "has no tensor blk.0.attn_q.bias")
    router = {"blk.0.ffn_gate_inp.weight": None}
    gone = {f"blk.0.ffn_{part}_exps.weight": None for part in ("gate", "up", "down")}
    mlp = {"blk.0.ffn_gate.weight": (HIDDEN, 20), "blk.0.ffn_up.weight": (HIDDEN, 20)}
    mlp |= {"blk.0.ffn_down.weight": (20, HIDDEN)}
    keys = {"feed_forward_length": (U32, 20)}
    got = config(path, "qwen3moe", keys=keys, shapes=router | gone | mlp)
    assert (got.dense_layers, got.intermediate_size, got.moe_intermediate_size) == ((0,), 20, WIDTH)
    write(path, "llama", shapes=router)
    refuse(path, "has no tensor blk.0.ffn_gate_inp.weight")
    write(path, "qwen3moe", shapes=router | {"blk.1.ffn_gate_inp.weight": None})
    refuse(path, "has no blk.0.ffn_gate_inp.weight, nor one in any other layer")


def test_axes_of_length_one_may_be_left_out(path: Path) -> None:
    """ggml's shapes end where only ones follow."""
    one = {"expert_count": (U32, 1), "expert_used_count": (U32, 1)}
    shapes: dict[str, tuple[int, ...] | None] = {}
    for i in range(LAYERS):
        shapes[f"blk.{i}.ffn_gate_inp.weight"] = (HIDDEN,)
        shapes[f"blk.{i}.ffn_gate_exps.weight"] = (HIDDEN, WIDTH)
        shapes[f"blk.{i}.ffn_up_exps.weight"] = (HIDDEN, WIDTH, 1)
        shapes[f"blk.{i}.ffn_down_exps.weight"] = (WIDTH, HIDDEN, 1, 1)
    checkpoint = open_checkpoint(write(path, "olmoe", one, shapes))
    assert checkpoint.tensor("layers.1.router").shape == (1, HIDDEN)
    assert [m.shape for m in checkpoint.expert(1, 0)] == [(12, 16), (12, 16), (16, 12)]
