"""Trained weights to a Hugging Face checkpoint directory, and any such directory back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from tokenizers import Tokenizer
from torch import Tensor

from .data import END, END_ID
from .files import write_atomic
from .model import CausalLM
from .shape import shape_from_config

PARTS = ("gate_proj", "up_proj", "down_proj")


def unpack_experts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Packed experts as one tensor each, the form that every version of transformers reads."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        prefix, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for e, both in enumerate(tensor):
                for part, half in zip(PARTS[:2], both.chunk(2), strict=True):
                    out[f"{prefix}.{e}.{part}.weight"] = half
        elif last == "down_proj":
            out |= {f"{prefix}.{e}.down_proj.weight": one for e, one in enumerate(tensor)}
        else:
            out[name] = tensor
    return out


def pack_experts(tensors: dict[str, Tensor], layers: int, experts: int) -> dict[str, Tensor]:
    """The inverse of `unpack_experts`; tensors already packed pass through."""
    out = {name: t for name, t in tensors.items() if ".mlp.experts." not in name}
    for layer in range(layers):
        prefix = f"model.layers.{layer}.mlp.experts."
        if f"{prefix}gate_up_proj" in tensors:
            out |= {f"{prefix}{n}": tensors[f"{prefix}{n}"] for n in ("gate_up_proj", "down_proj")}
            continue
        gate, up, down = (
            torch.stack([tensors[f"{prefix}{e}.{part}.weight"] for e in range(experts)])
            for part in PARTS
        )
        out[f"{prefix}gate_up_proj"] = torch.cat([gate, up], dim=1)
        out[f"{prefix}down_proj"] = down
    return out


def write_checkpoint(
    out: Path, model: CausalLM, tokenizer: Tokenizer, aux_coefficient: float, add_bos: bool
) -> None:
    """config.json, model.safetensors (bfloat16), tokenizer and generation settings into `out`."""
    state = unpack_experts(model.state_dict())
    tensors = {n: t.detach().to("cpu", torch.bfloat16).contiguous() for n, t in state.items()}
    documents: dict[str, dict[str, Any]] = {
        "config.json": model.shape.hf_config(aux_coefficient),
        "generation_config.json": {
            "bos_token_id": END_ID,
            "eos_token_id": END_ID,
            "do_sample": True,
            "temperature": 0.7,
            "top_p": 0.9,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END,
            "eos_token": END,
            "add_bos_token": add_bos,
            "clean_up_tokenization_spaces": False,
            "model_max_length": model.shape.context,
        },
    }
    out.mkdir(parents=True, exist_ok=True)
    with write_atomic(out / "model.safetensors") as file:
        file.write(save(tensors, metadata={"format": "pt"}))
    with write_atomic(out / "tokenizer.json") as file:
        file.write(tokenizer.to_str(pretty=True).encode())
    for name, content in documents.items():
        with write_atomic(out / name) as file:
            file.write((json.dumps(content, indent=1) + "\n").encode())


def read_checkpoint(directory: Path) -> tuple[CausalLM, Tokenizer]:
    """Model in float32 and tokenizer of a checkpoint directory with one model.safetensors.

    Raises:
        OSError: a file is missing. ValueError: it is not a model of this kind, or damaged.
    """
    raw = json.loads((directory / "config.json").read_text())
    text = (directory / "tokenizer.json").read_text()
    try:
        model = CausalLM(shape_from_config(raw))
        tensors = load_file(directory / "model.safetensors")
        tensors.pop("lm_head.weight", None)  # tied: some writers store it all the same
        packed = pack_experts(tensors, model.shape.layers, model.shape.experts)
        model.load_state_dict({name: t.float() for name, t in packed.items()})
    except (KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{directory}: weights and config.json do not agree: {reason}") from error
    return model.eval(), Tokenizer.from_str(text)
