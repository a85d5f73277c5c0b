"""What llama.cpp's GGUF files call the tensors; the same for every architecture.

Source: ggml-org/llama.cpp, src/llama-arch.cpp.
"""

from __future__ import annotations

from .tensors import ExpertPart

_TOP = {"embed": "token_embd.weight", "lm_head": "output.weight", "norm": "output_norm.weight"}

_ROLES = {
    "input_norm": "attn_norm.weight",
    "post_norm": "ffn_norm.weight",
    "q": "attn_q.weight",
    "k": "attn_k.weight",
    "v": "attn_v.weight",
    "o": "attn_output.weight",
    "q_bias": "attn_q.bias",
    "k_bias": "attn_k.bias",
    "v_bias": "attn_v.bias",
    "o_bias": "attn_output.bias",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
    "router": "ffn_gate_inp.weight",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
    "shared_router": "ffn_gate_inp_shexp.weight",
    "shared_gate": "ffn_gate_shexp.weight",
    "shared_up": "ffn_up_shexp.weight",
    "shared_down": "ffn_down_shexp.weight",
}


def gguf_name(canonical: str) -> str:
    """Name in a GGUF of a canonical non-expert tensor."""
    if canonical in _TOP:
        return _TOP[canonical]
    _, layer, role = canonical.split(".")
    return f"blk.{layer}.{_ROLES[role]}"


def gguf_experts(layer: int, part: ExpertPart) -> str:
    """Name in a GGUF of one part of all experts of a layer: [E, I, H], down [E, H, I]."""
    return f"blk.{layer}.ffn_{part}_exps.weight"


def gguf_lone_expert(layer: int, expert: int, part: ExpertPart) -> str:
    """Name of one matrix of one expert in files made before experts were stacked (early 2024)."""
    return f"blk.{layer}.ffn_{part}.{expert}.weight"
