"""Exported files in llama.cpp itself: the same logits, tokens and perplexity.

Runs where EDGEMOE_LLAMA_PYTHON names a Python that has llama_cpp (pip install
'edgemoe[llamacpp]'); building that takes a quarter of an hour on 2 cores.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_export_tokens as samples
from cli_model import run
from convert_samples import SMALL
from convert_samples import make_checkpoint as make_plain
from tiny import make_tiny

import edgemoe
from edgemoe.export import WeightType, export
from edgemoe.tokenizer import Tokenizer

PYTHON = os.environ.get("EDGEMOE_LLAMA_PYTHON", "")
pytestmark = pytest.mark.skipif(
    not PYTHON, reason="EDGEMOE_LLAMA_PYTHON does not name a Python with llama_cpp"
)
HERE = Path(__file__).resolve().parent
BUNDLED = Path(edgemoe.__file__).parent / "data" / "default.emoe"

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("qwen3_moe", {"norm_topk_prob": True}),
    "qwen3_moe-tied": (
        "qwen3_moe",
        {
            "norm_topk_prob": True,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    ),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen2_moe-tied": ("qwen2_moe", {"tie_word_embeddings": True, "qkv_bias": False}),
    "olmoe": ("olmoe", {}),
    "olmoe-tied": ("olmoe", {"tie_word_embeddings": True}),
    "mixtral": ("mixtral", {}),
    "mixtral-options": ("mixtral-options", {"sliding_window": 256}),
    "granitemoe": ("granitemoe", {}),
    "granitemoe-options": ("granitemoe-options", {}),
}
"""Name -> (its entry in tiny.CONFIGS, what is changed of that): all that llama.cpp can compute."""


def llama(script: Path, *args: object, **job: Any) -> Any:
    """Run a script in the Python with llama_cpp; its answer, parsed."""
    done = subprocess.run(
        [PYTHON, str(script), *map(str, args)],
        input=json.dumps(job),
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout) if done.stdout else None


@pytest.mark.parametrize("name", MODELS)
def test_logits(name: str, tmp_path: Path) -> None:
    """A random float16 model against transformers in float32.

    llama.cpp rounds activations to float16, so logits differ by some 2^-11 of the largest, and once
    in a while a token whose experts are nearly tied takes others: one prompt of four may differ.
    """
    import torch

    kind, settings = MODELS[name]
    model = make_tiny(tmp_path / "src", kind, "float16", **settings)
    export(tmp_path / "src", tmp_path / "x.gguf")
    ids = np.random.default_rng(0).integers(0, 160, (4, 24))
    with torch.no_grad():
        want = model(torch.tensor(ids)).logits.numpy()
    out = tmp_path / "logits.npy"
    path = str(tmp_path / "x.gguf")
    llama(HERE / "llama_logits.py", path=path, ids=ids.tolist(), out=str(out))
    error = np.sort(np.abs(np.load(out) - want).max(axis=(1, 2)) / np.abs(want).max())
    print(f"{name}: largest difference a prompt, of the largest logit: {error}")
    assert error[2] <= 5e-3


def tokens(path: Path, texts: list[str]) -> dict[str, Any]:
    answer: dict[str, Any] = llama(
        HERE / "llama_tokens.py", path=str(path), texts=texts, add_special=True
    )
    return answer


def test_tokens_of_the_bundled_model(shared: Path, tmp_path: Path) -> None:
    text = (shared / "corpus" / "heldout" / "children_heldout.txt").read_text()[:50_000]
    export(BUNDLED, tmp_path / "x.gguf")
    with edgemoe.load(BUNDLED, mem="1G") as model:
        want = model.tokenizer.encode(text)
        ends = set(model.config.eos_token_ids)
    answer = tokens(tmp_path / "x.gguf", [text])
    assert answer["ids"] == [want]
    assert (answer["bos"], answer["add_bos"], answer["add_eos"]) == (0, False, False)
    assert set(answer["ends"]) == ends


KINDS: dict[str, dict[str, Any]] = {
    "gpt-2": samples.byte_level(),
    "digits": samples.byte_level(
        {"type": "Digits", "individual_digits": True}, samples.split(samples.GPT2)
    ),
    "qwen2": samples.byte_level(samples.split(samples.QWEN2)),
    "llama3": samples.byte_level(samples.split(samples.LLAMA3), ignore_merges=True),
    "bos": samples.byte_level() | {"post_processor": samples.template("<mark>", "A")},
    "sentencepiece": samples.sentencepiece(),
}


@pytest.mark.parametrize("name", KINDS)
def test_tokens(name: str, tmp_path: Path) -> None:
    """Texts cut by the original tokenizer.json and by llama.cpp."""
    changes = {"model_type": "mixtral", "vocab_size": samples.SIZE, "num_experts": None}
    changes |= {"num_local_experts": 3, "mlp_only_layers": None, "moe_intermediate_size": None}
    assert changes.keys() - SMALL.keys() == {"num_local_experts"}
    make_plain(tmp_path / "src", **changes)
    data = json.dumps(KINDS[name])
    (tmp_path / "src" / "tokenizer.json").write_text(data)
    export(tmp_path / "src", tmp_path / "x.gguf")
    tokenizer = Tokenizer(data.encode(), eos_token_ids=(1, 2))
    rng = random.Random(0)
    texts = samples.TEXTS + [
        "".join(rng.choices("  theringhello12 aé€\n.", k=40)) for _ in range(99)
    ]
    answer = tokens(tmp_path / "x.gguf", texts)
    assert answer["ids"] == [tokenizer.encode(text) for text in texts]
    assert answer["add_bos"] is (name == "bos")


@pytest.fixture(scope="module")
def heldout(shared: Path) -> Path:
    return shared / "corpus" / "heldout" / "tinystories_heldout.txt"


@pytest.fixture(scope="module")
def ours(heldout: Path) -> dict[str, Any]:
    """`edgemoe eval` of the bundled model."""
    code, out, err = run(
        *("eval", BUNDLED, "--text", heldout, "--chunks", 40, "--bits", 8, "--json")
    )
    assert code == 0, err
    figures: dict[str, Any] = json.loads(out)
    return figures


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_perplexity(kind: WeightType, heldout: Path, ours: dict[str, Any], tmp_path: Path) -> None:
    """Of the bundled model, exported, within 0.5 %; the same windows and scored tokens."""
    export(BUNDLED, tmp_path / "x.gguf", type=kind)
    script = HERE.parent / "scripts" / "llamacpp_perplexity.py"
    theirs = llama(script, tmp_path / "x.gguf", heldout, "--chunks", 40)
    print(f"{kind}: llama.cpp {theirs['ppl']:.4f}, edgemoe {ours['ppl']:.4f}")
    assert (theirs["tokens"], theirs["windows"]) == (ours["tokens"], ours["windows"])
    assert abs(theirs["ppl"] / ours["ppl"] - 1) <= 0.005
