"""Small Hugging Face checkpoints written with NumPy alone, for the tests of what reads them.

Tensor names are spelled out here as transformers writes them, not taken from edgemoe.arch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgemoe.checkpoint import open_checkpoint
from edgemoe.errors import CheckpointError

Array = NDArray[Any]

QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 20,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [1],
    "rope_theta": 10000.0,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

OLMOE: dict[str, Any] = {
    "architectures": ["OlmoeForCausalLM"],
    "model_type": "olmoe",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "rope_theta": 10000.0,
    "eos_token_id": 2,
}


def make_tensors(raw: Mapping[str, Any], seed: int = 0) -> dict[str, Array]:
    """Random float32 tensors of a model with this config, experts one tensor each."""
    rng = np.random.default_rng(seed)
    hidden, vocab = raw["hidden_size"], raw["vocab_size"]
    heads, kv_heads = raw["num_attention_heads"], raw["num_key_value_heads"]
    head_dim = raw.get("head_dim", hidden // heads)
    olmoe = raw["model_type"] == "olmoe"
    inter = raw["intermediate_size"] if olmoe else raw["moe_intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(raw["num_hidden_layers"]):
        attn, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        shapes |= {
            f"model.layers.{i}.input_layernorm.weight": (hidden,),
            f"model.layers.{i}.post_attention_layernorm.weight": (hidden,),
            attn + "q_proj.weight": (heads * head_dim, hidden),
            attn + "k_proj.weight": (kv_heads * head_dim, hidden),
            attn + "v_proj.weight": (kv_heads * head_dim, hidden),
            attn + "o_proj.weight": (hidden, heads * head_dim),
            attn + "q_norm.weight": (heads * head_dim,) if olmoe else (head_dim,),
            attn + "k_norm.weight": (kv_heads * head_dim,) if olmoe else (head_dim,),
        }
        if raw.get("attention_bias"):
            shapes |= {
                attn + "q_proj.bias": (heads * head_dim,),
                attn + "k_proj.bias": (kv_heads * head_dim,),
                attn + "v_proj.bias": (kv_heads * head_dim,),
                attn + "o_proj.bias": (hidden,),
            }
        if i in raw.get("mlp_only_layers", []):
            wide = raw["intermediate_size"]
            shapes[mlp + "gate_proj.weight"] = shapes[mlp + "up_proj.weight"] = (wide, hidden)
            shapes[mlp + "down_proj.weight"] = (hidden, wide)
            continue
        shapes[mlp + "gate.weight"] = (raw["num_experts"], hidden)
        for e in range(raw["num_experts"]):
            shapes[f"{mlp}experts.{e}.gate_proj.weight"] = (inter, hidden)
            shapes[f"{mlp}experts.{e}.up_proj.weight"] = (inter, hidden)
            shapes[f"{mlp}experts.{e}.down_proj.weight"] = (hidden, inter)
    shapes["model.norm.weight"] = (hidden,)
    if not raw.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (vocab, hidden)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def pack_experts(tensors: Mapping[str, Array], experts: int = 4) -> dict[str, Array]:
    """The same model with each layer's experts in two 3-D tensors."""
    out = {name: array for name, array in tensors.items() if ".experts." not in name}
    for layer in range(16):
        prefix = f"model.layers.{layer}.mlp.experts."
        if f"{prefix}0.gate_proj.weight" not in tensors:
            continue
        parts = {
            part: np.stack([tensors[f"{prefix}{e}.{part}_proj.weight"] for e in range(experts)])
            for part in ("gate", "up", "down")
        }
        out[prefix + "gate_up_proj"] = np.concatenate([parts["gate"], parts["up"]], axis=1)
        out[prefix + "down_proj"] = parts["down"]
    return out


def encode(array: Array, dtype: str) -> bytes:
    """Little-endian bytes of float32 values in a safetensors dtype (BF16 by truncation)."""
    if dtype == "BF16":
        return (
            (np.ascontiguousarray(array, np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()
        )
    return array.astype({"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]).tobytes()


def write_raw(path: Path, header: object, data: bytes) -> None:
    """A .safetensors file of any header, sound or not; `header` is JSON text or an object."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_tensors(path: Path, tensors: Mapping[str, Array], dtype: str = "F32") -> None:
    """A sound .safetensors file of float arrays, all in one dtype."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, array in tensors.items():
        piece = encode(array, dtype)
        offsets = [len(data), len(data) + len(piece)]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": offsets}
        data += piece
    write_raw(path, header, data)


def write_checkpoint(
    directory: Path,
    raw: Mapping[str, Any],
    tensors: Mapping[str, Array] | None = None,
    *,
    dtype: str = "F32",
    shards: int = 1,
    tokenizer: bool = True,
) -> Path:
    """A whole checkpoint directory; `shards` > 1 deals the tensors out and writes the index."""
    directory.mkdir(exist_ok=True)
    tensors = make_tensors(raw) if tensors is None else tensors
    (directory / "config.json").write_text(json.dumps(raw))
    if tokenizer:
        (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    if shards == 1:
        write_tensors(directory / "model.safetensors", tensors, dtype)
        return directory
    weight_map: dict[str, str] = {}
    for s in range(shards):
        file = f"model-{s + 1:05}-of-{shards:05}.safetensors"
        mine = dict(list(tensors.items())[s::shards])
        write_tensors(directory / file, mine, dtype)
        weight_map |= dict.fromkeys(mine, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def refuse(path: Path, *words: str, kind: type[CheckpointError] = CheckpointError) -> None:
    """Opening fails with a one-line message that has all these words."""
    with pytest.raises(kind) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def expert_names(layer: int, expert: int) -> list[str]:
    """Names of gate, up and down of one expert stored apart."""
    prefix = f"model.layers.{layer}.mlp.experts.{expert}."
    return [f"{prefix}{part}_proj.weight" for part in ("gate", "up", "down")]
