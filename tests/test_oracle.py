"""transformers as the oracle: whole models, unquantized and quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import CONFIGS, make_tiny

import edgemoe
from edgemoe import kernels
from edgemoe.checkpoint import open_checkpoint
from edgemoe.cpu_attn.kv_cache import KVCache
from edgemoe.model import Span, forward
from edgemoe.weights import FloatExperts, from_checkpoint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PROMPT, STEPS = 40, 16


def oracle_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(torch.from_numpy(ids)[None]).logits[0].numpy())


class FloatRun:
    """A checkpoint run in float32 by model.forward."""

    def __init__(self, path: Path) -> None:
        checkpoint = open_checkpoint(path)
        self.config = checkpoint.config
        self._args = from_checkpoint(checkpoint), FloatExperts(checkpoint), kernels.new_pool(2)

    def cache(self) -> KVCache:
        return KVCache(self.config, 128, "f32")

    def __call__(self, cache: KVCache, ids: np.ndarray) -> np.ndarray:
        rows = np.arange(len(ids))
        return forward(*self._args, ids, [Span(cache, len(ids))], rows)


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


@pytest.mark.parametrize("name", CONFIGS)
def test_float_forward_equals_transformers(tmp_path: Path, name: str) -> None:
    model = make_tiny(tmp_path, name)
    run = FloatRun(tmp_path)
    ids = np.random.default_rng(1).integers(0, 160, PROMPT + STEPS)
    want = oracle_logits(model, ids)
    cache = run.cache()
    got = [run(cache, ids[:PROMPT])]
    got += [run(cache, ids[i : i + 1]) for i in range(PROMPT, PROMPT + STEPS)]
    assert relative(np.concatenate(got), want) <= 1e-4
    singles = run.cache()
    one_by_one = np.concatenate([run(singles, ids[i : i + 1]) for i in range(len(ids))])
    assert relative(one_by_one, want) <= 1e-4
    print(f"{name}: {relative(np.concatenate(got), want):.1e}, {relative(one_by_one, want):.1e}")
    # the oracle itself must react to what is tested: another token, other logits
    ids[3] = (ids[3] + 1) % 160
    assert relative(oracle_logits(model, ids), want) > 1e-3


@pytest.mark.parametrize("name", ["qwen3_moe-options", "olmoe"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_checkpoints(tmp_path: Path, name: str, dtype: str) -> None:
    model = make_tiny(tmp_path, name, dtype)
    run = FloatRun(tmp_path)
    ids = np.random.default_rng(2).integers(0, 160, 30)
    assert relative(run(run.cache(), ids), oracle_logits(model, ids)) <= 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_quantized_store_follows_the_oracle(tmp_path: Path, name: str) -> None:
    model = make_tiny(tmp_path / "hf", name)
    edgemoe.convert(tmp_path / "hf", tmp_path / "m.emoe")
    prompts = np.random.default_rng(3).integers(0, 160, (4, 64))
    want = np.concatenate([oracle_logits(model, ids) for ids in prompts])
    errors = []
    for bits in (8, 6, 4, 3, 2):
        with edgemoe.load(tmp_path / "m.emoe", bits=bits, dense_bits=8, ctx_size=64) as m:
            got = np.concatenate(
                [m.forward(ids, [Span(m.new_cache(), 64)], range(64)) for ids in prompts]
            )
        # random weights route near ties: the median token is not one whose experts flipped
        distance = np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)
        errors.append(float(np.median(distance)))
    assert errors[0] < 0.06, errors
    assert errors == sorted(errors), "fewer bits must not be closer to the oracle"


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z.astype(np.float64) - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def test_trained_model_at_8_bits(shared: Path) -> None:
    """20,000 held-out tokens: mean KL divergence <= 0.002 and same top token >= 98.5 %."""
    path = shared / "models" / "stories-moe"
    oracle = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    text = (shared / "corpus" / "heldout" / "tinystories_heldout.txt").read_text()
    divergence, same = [], []
    with edgemoe.load(bits=8, ctx_size=512) as model:
        ids = np.array(model.tokenizer.encode(text[:120_000], add_special=False)[: 40 * 512])
        assert len(ids) >= 20_000
        for window in ids.reshape(-1, 512):
            want = log_softmax(oracle_logits(oracle, window))
            cache, chunks = model.new_cache(), []
            for i in range(0, 512, 128):
                part = window[i : i + 128]
                chunks.append(model.forward(part, [Span(cache, 128)], range(128)))
            got = log_softmax(np.concatenate(chunks))
            divergence.append((np.exp(want) * (want - got)).sum(axis=-1))
            same.append(got.argmax(axis=-1) == want.argmax(axis=-1))
    mean, share = float(np.mean(divergence)), float(np.mean(same))
    print(f"mean KL divergence {mean:.6f}, same top token {share:.4%}")
    assert mean <= 0.002
    assert share >= 0.985
