"""Random checkpoints that are converted in tests, with what every weight in them stands for."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.arch import EXPERT_PARTS, FAMILIES, ExpertPart, dense_shapes
from edgemoe.types import F32

SMALL = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 70,
    "hidden_size": 72,
    "intermediate_size": 88,
    "moe_intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [1],
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def save_tensors(path: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> None:
    header, at = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    raw = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for _, _, data in tensors.values():
            file.write(data)


def to_bytes(w: F32, dtype: str) -> tuple[bytes, F32]:
    """The array in a file's dtype, and what float32 that stands for."""
    if dtype == "BF16":
        high = (w.view(np.uint32) >> 16).astype("<u2")
        return high.tobytes(), (high.astype(np.uint32) << 16).view(np.float32)
    half: NDArray[Any] = w.astype("<f2" if dtype == "F16" else "<f4")
    return half.tobytes(), half.astype(np.float32)


Key = str | tuple[int, int, ExpertPart]
"""Canonical name of a tensor, or (layer, expert, part)."""


@dataclass
class Source:
    """A checkpoint directory and its weights."""

    path: Path
    weights: dict[Key, F32]


def unchanged(key: Key, w: F32) -> F32:
    return w


def make_checkpoint(
    path: Path,
    dtype: str = "BF16",
    seed: int = 0,
    change: Callable[[Key, F32], F32] = unchanged,
    **overrides: object,
) -> Source:
    """A random model of SMALL's shape with the given changes to its config.json and weights."""
    raw = {k: v for k, v in (SMALL | overrides).items() if v is not None}
    path.mkdir()
    (path / "config.json").write_text(json.dumps(raw))
    (path / "tokenizer.json").write_text('{"version": "1.0", "model": {}}')
    (path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    (path / "chat_template.jinja").write_text("{{ messages }}")
    family = FAMILIES[str(raw["model_type"])]
    config = family.parse_config(raw, "config.json")
    rng = np.random.default_rng(seed)
    source = Source(path, {})
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = {}

    def add(key: Key, name: str, shape: tuple[int, ...]) -> None:
        w = change(key, rng.standard_normal(shape, np.float32) * np.float32(0.05))
        data, source.weights[key] = to_bytes(w, dtype)
        tensors[name] = (dtype, shape, data)

    for canonical, shape in dense_shapes(config).items():
        add(canonical, family.names.dense(canonical), shape)
    inter, hidden = config.moe_intermediate_size, config.hidden_size
    for layer in config.moe_layers:
        for expert in range(config.num_experts):
            for part in EXPERT_PARTS:
                name = family.names.expert_part(layer, expert, part)
                add(
                    (layer, expert, part),
                    name,
                    (hidden, inter) if part == "down" else (inter, hidden),
                )
    save_tensors(path / "model.safetensors", tensors)
    return source
