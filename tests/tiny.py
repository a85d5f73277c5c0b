"""Tiny random checkpoints made with transformers, in Hugging Face form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3MoeConfig", {}),
    "qwen3_moe-options": (
        "Qwen3MoeConfig",
        {
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 7,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "eos_token_id": [3, 5],
        },
    ),
    "qwen3_moe-sparse-step": ("Qwen3MoeConfig", {"decoder_sparse_step": 2}),
    "qwen2_moe": ("Qwen2MoeConfig", {"shared_expert_intermediate_size": 72}),
    "qwen2_moe-options": (
        "Qwen2MoeConfig",
        {
            "shared_expert_intermediate_size": 40,
            "mlp_only_layers": [0],
            "norm_topk_prob": True,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 2,
        },
    ),
    "qwen2_moe-unbiased": (
        "Qwen2MoeConfig",
        {
            "shared_expert_intermediate_size": 33,
            "qkv_bias": False,
            "decoder_sparse_step": 2,
        },
    ),
    "mixtral": ("MixtralConfig", {"eos_token_id": 3}),
    "mixtral-options": (
        "MixtralConfig",
        {"sliding_window": 9, "tie_word_embeddings": True, "head_dim": 24},
    ),
    "granitemoe": ("GraniteMoeConfig", {"attention_multiplier": 0.25}),
    "granitemoe-options": (
        "GraniteMoeConfig",
        {
            "attention_bias": True,
            "tie_word_embeddings": True,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.015625,
            "logits_scaling": 6.0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
        },
    ),
    "olmoe": ("OlmoeConfig", {"eos_token_id": 3}),
    "olmoe-options": (
        "OlmoeConfig",
        {
            "norm_topk_prob": True,
            "tie_word_embeddings": True,
            "clip_qkv": 0.5,
            "num_key_value_heads": 2,
            "attention_bias": True,
            "eos_token_id": None,
        },
    ),
}


def make_tiny(
    directory: Path, name: str, dtype: str = "float32", seed: int = 0, **settings: Any
) -> Any:
    """Write a tiny random checkpoint with a byte tokenizer; returns the transformers model.

    `settings` go over those of CONFIGS.

    Weights are larger than at initialisation, so that routing and attention have something to say.
    """
    import torch
    import transformers

    kind, extra = CONFIGS[name]
    base: dict[str, Any] = {
        "vocab_size": 160,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if kind.startswith("Olmoe") else 2,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "max_position_embeddings": 256,
        "pad_token_id": None,
    }
    if kind.startswith("Qwen"):
        base |= {"moe_intermediate_size": 40}
    if kind.startswith("Qwen3"):
        base |= {"head_dim": 24}
    if kind.startswith(("Mixtral", "Granite")):
        base["num_local_experts"] = base.pop("num_experts")
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, kind)(**(base | extra | settings)), attn_implementation="eager"
    )
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "norm" in key:
                p.copy_(1 + 0.2 * torch.randn_like(p))
            elif "embed" in key or "lm_head" in key:
                p.copy_(0.5 * torch.randn_like(p))
            else:
                p.copy_(torch.randn_like(p) * (1.0 if p.ndim < 2 else 1.2 * p.shape[-1] ** -0.5))
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    (directory / "tokenizer.json").write_text(json.dumps(byte_tokenizer(160)))
    # Read back: casting a live model also rounds its rotary frequencies.
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def byte_tokenizer(vocab_size: int) -> dict[str, Any]:
    """A tokenizer.json of single printable bytes, for tests that never look at text quality."""
    vocab = {chr(33 + i): i for i in range(94)}
    vocab |= {"Ġ": 94, "Ċ": 95}
    vocab |= {f"tok{i}": i for i in range(96, vocab_size)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": byte_level | {"use_regex": True},
        "post_processor": None,
        "decoder": byte_level | {"use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": False},
    }
