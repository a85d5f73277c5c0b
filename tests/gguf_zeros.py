"""Small GGUF files of zeros, of every architecture, with any key or shape changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf_samples import ARRAY, FLOAT32, STRING, U32, array_entry, entry, info, raw_gguf

Key = tuple[int, Any]

HIDDEN, HEADS, KV, DIM, EXPERTS, WIDTH, VOCAB, LAYERS = 16, 4, 2, 4, 3, 12, 10, 2

COMMON: dict[str, Key] = {
    "block_count": (U32, LAYERS),
    "context_length": (U32, 64),
    "embedding_length": (U32, HIDDEN),
    "feed_forward_length": (U32, WIDTH),
    "attention.head_count": (U32, HEADS),
    "attention.head_count_kv": (U32, KV),
    "attention.layer_norm_rms_epsilon": (FLOAT32, 1e-6),
    "expert_count": (U32, EXPERTS),
    "expert_used_count": (U32, 2),
}
OWN: dict[str, dict[str, Key]] = {
    "qwen3moe": {"expert_feed_forward_length": (U32, WIDTH)},
    "qwen2moe": {
        "expert_feed_forward_length": (U32, WIDTH),
        "expert_shared_feed_forward_length": (U32, 7),
    },
    "olmoe": {},
    "llama": {},
    "granitemoe": {"logit_scale": (FLOAT32, 6.0)},
}


def tensor_shapes(architecture: str) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors, innermost axis first, as files have them."""
    out: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (HIDDEN, VOCAB),
        "output_norm.weight": (HIDDEN,),
        "output.weight": (HIDDEN, VOCAB),
    }
    for i in range(LAYERS):
        layer: dict[str, tuple[int, ...]] = {
            "attn_norm": (HIDDEN,),
            "attn_q": (HIDDEN, HEADS * DIM),
            "attn_k": (HIDDEN, KV * DIM),
            "attn_v": (HIDDEN, KV * DIM),
            "attn_output": (HEADS * DIM, HIDDEN),
            "ffn_norm": (HIDDEN,),
            "ffn_gate_inp": (HIDDEN, EXPERTS),
            "ffn_gate_exps": (HIDDEN, WIDTH, EXPERTS),
            "ffn_up_exps": (HIDDEN, WIDTH, EXPERTS),
            "ffn_down_exps": (WIDTH, HIDDEN, EXPERTS),
        }
        if architecture == "qwen3moe":
            layer |= {"attn_q_norm": (DIM,), "attn_k_norm": (DIM,)}
        if architecture == "olmoe":
            layer |= {"attn_q_norm": (HEADS * DIM,), "attn_k_norm": (KV * DIM,)}
        if architecture == "qwen2moe":
            layer |= {"ffn_gate_inp_shexp": (HIDDEN,), "ffn_gate_shexp": (HIDDEN, 7)}
            layer |= {"ffn_up_shexp": (HIDDEN, 7), "ffn_down_shexp": (7, HIDDEN)}
        out |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
    return out


def write(
    path: Path,
    architecture: str,
    keys: dict[str, Key | None] | None = None,
    shapes: dict[str, tuple[int, ...] | None] | None = None,
    plain: dict[str, Key] | None = None,
) -> Path:
    """A file of zeros; `keys` and `shapes` go over the usual ones, None leaves one out."""
    settings: dict[str, Key | None] = {**COMMON, **OWN[architecture], **(keys or {})}
    entries = {f"{architecture}.{k}": v for k, v in settings.items()} | (plain or {})
    entries = {"general.architecture": (STRING, architecture)} | entries
    packed = []
    for name, found in entries.items():
        if found is not None and found[0] == ARRAY:
            packed.append(array_entry(name, *found[1]))
        elif found is not None:
            packed.append(entry(name, *found))
    infos, data = [], b""
    for name, shape in {**tensor_shapes(architecture), **(shapes or {})}.items():
        if shape is not None:
            infos.append(info(name, shape, 0, len(data)))
            data += bytes(-(-4 * int(np.prod(shape)) // 32) * 32)
    path.write_bytes(raw_gguf(packed, infos, data))
    return path
