"""llama.cpp as the oracle of GGUF files: what it computes of one, edgemoe computes of it.

Needs EDGEMOE_LLAMA_PYTHON, a Python that has llama_cpp (pip install llama-cpp-python).
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_samples import all_of, read_hugging_face, to_gguf_tensors, write_gguf
from tiny import make_tiny

from edgemoe import kernels
from edgemoe.checkpoint import open_checkpoint
from edgemoe.cpu_attn.kv_cache import KVCache
from edgemoe.model import Span, forward
from edgemoe.weights import FloatExperts, from_checkpoint

PYTHON = os.environ.get("EDGEMOE_LLAMA_PYTHON")
if not PYTHON:
    pytest.skip("EDGEMOE_LLAMA_PYTHON is not set", allow_module_level=True)

IDS = [int(i) for i in np.random.default_rng(3).integers(0, 160, 24)]

MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"norm_topk_prob": True},
    "qwen2_moe": {},
    "olmoe": {},
    "mixtral": {},
    "granitemoe": {},
    "granitemoe-options": {},
}
"""Names of tiny.CONFIGS, with what llama.cpp's graph of the architecture always does."""


def theirs(path: Path) -> np.ndarray:
    """llama.cpp's logits [n, vocab]."""
    out = path.with_suffix(".npy")
    job = {"path": str(path), "ids": [IDS], "out": str(out)}
    script = Path(__file__).with_name("llama_logits.py")
    subprocess.run([PYTHON, str(script)], input=json.dumps(job), text=True, check=True)
    return np.load(out)[0]


def ours(path: Path) -> np.ndarray:
    checkpoint, pool = open_checkpoint(path), kernels.new_pool(1)
    args = from_checkpoint(checkpoint), FloatExperts(checkpoint), pool
    cache = KVCache(checkpoint.config, len(IDS), "f32")
    return forward(*args, np.array(IDS), [Span(cache, len(IDS))], np.arange(len(IDS)))


@pytest.mark.parametrize("name", MODELS)
def test_same_logits(tmp_path: Path, name: str) -> None:
    make_tiny(tmp_path / "hf", name, **MODELS[name])
    raw, tensors = read_hugging_face(tmp_path / "hf")
    path = tmp_path / "m.gguf"
    write_gguf(path, raw, to_gguf_tensors(raw, tensors))
    want, got = theirs(path), ours(path)
    error = float(np.abs(got - want).max() / np.abs(want).max())
    print(f"{name}: {error:.1e}")
    assert error < 1e-4


@pytest.mark.parametrize("kind", kernels.GGML_BLOCKS)
def test_every_type(tmp_path: Path, kind: str) -> None:
    """In the embedding, whose rows llama.cpp decodes; elsewhere it would round activations too."""
    make_tiny(tmp_path / "hf", "olmoe", hidden_size=256, num_hidden_layers=1)
    raw, tensors = read_hugging_face(tmp_path / "hf")
    path, of_kind = tmp_path / "m.gguf", all_of(kind)
    write_gguf(
        path,
        raw,
        to_gguf_tensors(raw, tensors),
        lambda name, shape: of_kind(name, shape) if name == "token_embd.weight" else "F32",
    )
    want, got = theirs(path), ours(path)
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()
