"""Checkpoints that are exported in tests, and GGUF files read back with the gguf package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import convert_samples
import gguf
import numpy as np
from numpy.typing import NDArray
from tiny import byte_tokenizer

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"mlp_only_layers": None, "norm_topk_prob": True},
    "qwen2_moe": {
        "mlp_only_layers": None,
        "head_dim": 18,
        "shared_expert_intermediate_size": 24,
    },
    "olmoe": {
        "mlp_only_layers": None,
        "moe_intermediate_size": None,
        "head_dim": None,
        "num_key_value_heads": 4,
        "intermediate_size": 40,
    },
    "mixtral": {
        "mlp_only_layers": None,
        "moe_intermediate_size": None,
        "num_experts": None,
        "num_local_experts": 3,
        "intermediate_size": 40,
    },
    "granitemoe": {
        "mlp_only_layers": None,
        "moe_intermediate_size": None,
        "num_experts": None,
        "num_local_experts": 3,
        "intermediate_size": 40,
        "attention_bias": True,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.25,
        "attention_multiplier": 0.125,
        "logits_scaling": 6.0,
    },
}
"""Changes to convert_samples.SMALL by which a family's checkpoint can be exported."""


def make_checkpoint(path: Path, family: str, dtype: str = "F16", **changes: Any) -> Any:
    """A random checkpoint of a family, with a byte tokenizer; see convert_samples."""
    changes = {"model_type": family, "vocab_size": 100} | FAMILIES[family] | changes
    source = convert_samples.make_checkpoint(path, dtype, **changes)
    (path / "tokenizer.json").write_text(json.dumps(byte_tokenizer(100)))
    (path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return source


def read(path: Path) -> tuple[dict[str, Any], dict[str, tuple[str, NDArray[Any]]]]:
    """Key-values as plain Python, and (type, data) of every tensor; q8_0 data is bytes."""
    reader = gguf.GGUFReader(path)
    values = {
        name: field.contents()
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    tensors = {t.name: (t.tensor_type.name, np.array(t.data)) for t in reader.tensors}
    return values, tensors


def types(path: Path) -> Mapping[str, list[str]]:
    """Types of the key-values, outermost first: ["ARRAY", "STRING"]."""
    return {
        name: [t.name for t in field.types] for name, field in gguf.GGUFReader(path).fields.items()
    }
