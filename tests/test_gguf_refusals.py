"""GGUF files that ask for what edgemoe does not compute are refused, by key or tensor."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
from gguf_samples import (
    ARRAY,
    BOOL,
    FLOAT32,
    I32,
    STRING,
    U32,
    entry,
    raw_gguf,
    to_gguf_tensors,
    write_gguf,
)
from gguf_zeros import DIM, EXPERTS, HEADS, HIDDEN, VOCAB, WIDTH, Key, write
from tiny_checkpoints import OLMOE, make_tensors, refuse

from edgemoe.checkpoint import open_checkpoint
from edgemoe.checkpoint.gguf_header import read_gguf_header
from edgemoe.errors import CheckpointError, UnsupportedError
from edgemoe.types import ModelConfig


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "m.gguf"


def config(path: Path, architecture: str, **changes: Any) -> ModelConfig:
    return open_checkpoint(write(path, architecture, **changes)).config


@pytest.mark.parametrize(
    ("architecture", "keys"),
    [
        ("qwen3moe", {"rope.scaling.type": (STRING, "yarn")}),
        ("llama", {"rope.scaling.type": (STRING, "longrope")}),
        ("llama", {"rope.scaling.factor": (FLOAT32, 4.0)}),
        ("llama", {"rope.scale_linear": (FLOAT32, 4.0)}),
        ("llama", {"rope.scaling.attn_factor": (FLOAT32, 1.2)}),
        ("llama", {"rope.scaling.yarn_log_multiplier": (FLOAT32, 0.1)}),
        ("llama", {"rope.dimension_count": (U32, 2)}),
        ("qwen3moe", {"rope.dimension_sections": (ARRAY, (I32, [1, 1]))}),
        ("qwen3moe", {"attention.causal": (BOOL, 0)}),
        ("qwen3moe", {"pooling_type": (U32, 1)}),
        ("qwen3moe", {"expert_gating_func": (U32, 2)}),
        ("qwen3moe", {"expert_weights_scale": (FLOAT32, 2.5)}),
        ("qwen3moe", {"expert_group_count": (U32, 4)}),
        ("qwen3moe", {"expert_shared_count": (U32, 1)}),
        ("qwen3moe", {"leading_dense_block_count": (U32, 1)}),
        ("qwen3moe", {"nextn_predict_layers": (U32, 1)}),
        ("qwen3moe", {"attn_logit_softcapping": (FLOAT32, 50.0)}),
        ("qwen3moe", {"hidden_activation": (STRING, "gelu")}),
        ("qwen3moe", {"logit_scale": (FLOAT32, 2.0)}),
        ("qwen3moe", {"attention.scale": (FLOAT32, 0.5)}),
        ("qwen3moe", {"attention.clamp_kqv": (FLOAT32, 8.0)}),
        ("qwen3moe", {"embedding_length_out": (U32, 8)}),
        ("qwen3moe", {"vocab_size": (U32, VOCAB + 1)}),
        ("olmoe", {"attention.sliding_window": (U32, 9)}),
        ("olmoe", {"expert_feed_forward_length": (U32, 5)}),
        ("granitemoe", {"expert_shared_feed_forward_length": (U32, 8)}),
        ("llama", {"expert_shared_feed_forward_length": (U32, 8)}),
        ("llama", {"interleave_moe_layer_step": (U32, 2)}),
        ("llama", {"some.new.key": (STRING, "x")}),
    ],
)
def test_keys_that_change_what_is_computed(
    path: Path, architecture: str, keys: dict[str, Any]
) -> None:
    write(path, architecture, keys)
    refuse(path, f"{architecture}.{next(iter(keys))} = ", kind=UnsupportedError)


@pytest.mark.parametrize(
    ("architecture", "key", "value"),
    [
        ("olmoe", "block_count", None),
        ("olmoe", "block_count", (U32, 0)),
        ("olmoe", "block_count", (U32, 1 << 31)),
        ("olmoe", "block_count", (FLOAT32, 2.0)),
        ("olmoe", "embedding_length", None),
        ("olmoe", "embedding_length", (U32, 1 << 30)),
        ("olmoe", "context_length", None),
        ("olmoe", "context_length", (STRING, "64")),
        ("olmoe", "attention.head_count", (U32, 0)),
        ("olmoe", "attention.head_count", (U32, 6)),
        ("olmoe", "attention.head_count", (ARRAY, (U32, [4, 2]))),
        ("olmoe", "attention.head_count", (ARRAY, (U32, []))),
        ("olmoe", "attention.head_count_kv", (U32, 3)),
        ("olmoe", "attention.layer_norm_rms_epsilon", None),
        ("olmoe", "attention.layer_norm_rms_epsilon", (FLOAT32, 0.0)),
        ("olmoe", "attention.layer_norm_rms_epsilon", (FLOAT32, float("nan"))),
        ("olmoe", "expert_count", (I32, -3)),
        ("olmoe", "expert_count", (BOOL, 1)),
        ("olmoe", "expert_used_count", (U32, 4)),
        ("olmoe", "expert_used_count", (U32, 0)),
        ("olmoe", "feed_forward_length", None),
        ("olmoe", "rope.freq_base", (FLOAT32, float("inf"))),
        ("olmoe", "attention.clamp_kqv", (FLOAT32, -1.0)),
        ("qwen2moe", "expert_weights_norm", (U32, 1)),
        ("granitemoe", "logit_scale", None),
        ("granitemoe", "logit_scale", (FLOAT32, 0.0)),
        ("granitemoe", "residual_scale", (FLOAT32, float("nan"))),
        ("llama", "attention.sliding_window", (I32, -1)),
    ],
)
def test_bad_values_name_their_key(
    path: Path, architecture: str, key: str, value: Key | None
) -> None:
    write(path, architecture, {key: value})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert f"{architecture}.{key} is" in message, message
    assert str(path) in message
    assert "\n" not in message


@pytest.mark.parametrize("count", [None, (U32, 0)])
def test_models_without_experts(path: Path, count: Key | None) -> None:
    write(path, "llama", {"expert_count": count})
    refuse(path, "llama.expert_count", "only mixture-of-experts", kind=UnsupportedError)


def test_heads_of_unlike_width(path: Path) -> None:
    write(path, "llama", {"attention.key_length": (U32, 6)})
    refuse(path, "keys are 6 wide and values 4", kind=UnsupportedError)
    write(path, "llama", {"attention.key_length": (U32, 3), "attention.value_length": (U32, 3)})
    refuse(path, "even", kind=UnsupportedError)
    write(path, "olmoe", {"attention.key_length": (U32, 6), "attention.value_length": (U32, 6)})
    refuse(path, "QK-norm needs them equal", kind=UnsupportedError)


@pytest.mark.parametrize("name", ["mamba", "llama4", "deepseek2", "", "a\nb"])
def test_other_architectures(path: Path, name: str) -> None:
    path.write_bytes(raw_gguf([entry("general.architecture", STRING, name)]))
    refuse(path, "is not supported; supported: granitemoe, llama, olmoe", kind=UnsupportedError)


def test_a_file_must_name_its_architecture(path: Path) -> None:
    path.write_bytes(raw_gguf([]))
    refuse(path, "general.architecture is None")
    path.write_bytes(raw_gguf([entry("general.architecture", U32, 7)]))
    refuse(path, "general.architecture is 7")


def test_general_keys(path: Path) -> None:
    plain = {"general.type": (STRING, "model"), "general.quantization_version": (U32, 2)}
    plain |= {"general.name": (STRING, "x"), "quantize.imatrix.file": (STRING, "y")}
    plain |= {"mradermacher.quantized_by": (STRING, "z"), "general.file_type": (U32, 15)}
    assert config(path, "olmoe", plain=plain).num_experts == EXPERTS
    for kind in ["adapter", "mmproj", "imatrix"]:
        write(path, "olmoe", plain={"general.type": (STRING, kind)})
        refuse(path, f"general.type is {kind}", kind=UnsupportedError)
    # an old version of the quantized formats: no matter where nothing is quantized
    write(path, "olmoe", plain={"general.quantization_version": (U32, 1)})
    assert open_checkpoint(path).config.num_experts == EXPERTS


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("token_embd.weight", None, ["tensor token_embd.weight is missing"]),
        ("token_embd.weight", (HIDDEN,), ["token_embd.weight has shape [16]"]),
        ("token_embd.weight", (HIDDEN + 1, VOCAB), ["token_embd.weight has shape [10, 17]"]),
        ("output_norm.weight", None, ["has no tensor output_norm.weight"]),
        ("output.weight", (HIDDEN, VOCAB + 1), ["output.weight has shape [11, 16]", "[10, 16]"]),
        ("blk.1.attn_q.weight", (HEADS * DIM + 1, HIDDEN), ["blk.1.attn_q.weight has shape"]),
        ("blk.1.ffn_up_exps.weight", (HIDDEN, WIDTH, 2), ["has shape [2, 12, 16]", "[3, 12, 16]"]),
        ("blk.1.ffn_up_exps.weight", (HIDDEN, WIDTH * EXPERTS), ["has shape [36, 16]"]),
        ("blk.1.ffn_down_exps.weight", (HIDDEN, WIDTH, EXPERTS), ["has shape [3, 12, 16]"]),
        ("blk.1.ffn_down_exps.weight", None, ["has no tensor blk.1.ffn_down_exps.weight"]),
        ("blk.0.attn_norm.weight", (HIDDEN, 2), ["blk.0.attn_norm.weight has shape"]),
    ],
)
def test_tensors_that_do_not_fit(
    path: Path, name: str, shape: tuple[int, ...] | None, words: list[str]
) -> None:
    write(path, "olmoe", shapes={name: shape})
    refuse(path, *words)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rope_freqs.weight", ["rope_freqs.weight is not supported; only plain RoPE"]),
        ("blk.0.attn_qkv.weight", ["fused tensors"]),
        ("blk.0.ffn_gate_up_exps.weight", ["fused tensors"]),
        ("blk.0.ffn_up_exps.scale", ["scaled quantization"]),
        ("blk.2.attn_q.weight", ["blk.2.attn_q.weight is not part of a olmoe model"]),
        ("blk.0.ffn_gate.weight", ["not part of"]),
        ("blk.0.attn_output.bias2", ["not part of"]),
        ("a\nb", [r"a\nb"]),
    ],
)
def test_tensors_that_are_not_known(path: Path, name: str, words: list[str]) -> None:
    write(path, "olmoe", shapes={name: (8,)})
    refuse(path, *words, kind=UnsupportedError)


def test_mutated_files_never_escape(path: Path) -> None:
    """Any damage to a header gives a model that can be read or one of our errors, at once."""
    raw = {"norm_topk_prob": False, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, **OLMOE}
    write_gguf(path, raw, to_gguf_tensors(raw, make_tensors(raw)))
    sound = path.read_bytes()
    end = read_gguf_header(path).tensors["token_embd.weight"].offset
    rng = random.Random(0)
    outcomes = set()
    for _ in range(400):
        data = bytearray(sound)
        at, width = rng.randrange(end), rng.choice((1, 1, 2, 8))
        value = rng.choice((rng.getrandbits(8), 0, 255, data[at] ^ 1 << rng.randrange(8)))
        data[at : at + width] = bytes([value]) * width
        path.write_bytes(data)
        begin = time.process_time()
        try:
            assert open_checkpoint(path).tensor("layers.0.q").shape == (16, 16)
            outcomes.add("read")
        except CheckpointError as error:
            assert "\n" not in str(error)
            outcomes.add(type(error).__name__)
        assert time.process_time() - begin < 1
    assert outcomes == {"read", "CheckpointError", "UnsupportedError"}
