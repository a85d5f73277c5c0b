"""The bundled model end to end: the same tokens and the same logits however it is run.

The recorded tokens change only when the model, the quantizer or the documented arithmetic changes;
`python tests/test_golden.py` writes them anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import edgemoe
from edgemoe import kernels
from edgemoe.model import Span

GOLDEN = Path(__file__).parent / "golden" / "greedy.json"
GREEDY = edgemoe.SamplingParams()  # temperature 0
TOKENS = 128
PROMPTS = [
    "Once upon a time",
    "The little dog was",
    "Tom and Lily went to the park.",
    '"Mom, can I have',
    "One day, a big bear",
    "It was raining, and Sam",
    "The old man looked at the sea and",
    "Anna had a red ball. She",
    "In the forest there lived a",
    "They were very happy because",
]


def greedy(model: edgemoe.Model, prompt: str) -> list[int]:
    """128 tokens, past the end of a story if it comes earlier."""
    ids, cache, out = model.tokenizer.encode(prompt), model.new_cache(), []
    for _ in range(TOKENS):
        logits = model.forward(ids, [Span(cache, len(ids))], [len(ids) - 1])
        ids = [int(logits[0].argmax())]
        out += ids
    return out


@pytest.mark.parametrize("threads", [1, 2])
def test_greedy_tokens(isa: str, threads: int) -> None:
    golden = json.loads(GOLDEN.read_text())
    assert golden["prompts"] == PROMPTS
    with edgemoe.load(bits=8, ctx_size=256, threads=threads) as model:
        for prompt, want in zip(PROMPTS, golden["tokens"], strict=True):
            assert greedy(model, prompt) == want, prompt


def test_generate_walks_the_same_path() -> None:
    golden = json.loads(GOLDEN.read_text())
    with edgemoe.load(bits=8, ctx_size=256) as model:
        text = model.generate(PROMPTS[0], max_tokens=TOKENS, sampling=GREEDY)
        want = golden["tokens"][0]
        assert text.token_ids == want[: len(text.token_ids)]
        if len(text.token_ids) < TOKENS:
            assert want[len(text.token_ids)] in model.config.eos_token_ids
        assert text == model.tokenizer.decode(text.token_ids)


def run_hash(threads: int, bits: int, chunk: int) -> str:
    """Hash of the logits of all positions of a text, prefilled in chunks, then decoded on."""
    with edgemoe.load(bits=bits, ctx_size=512, threads=threads) as model:
        ids = model.tokenizer.encode(" ".join(PROMPTS * 2))[:150]
        cache, digest = model.new_cache(), hashlib.sha256()
        for first in range(0, len(ids), chunk):
            part = ids[first : first + chunk]
            digest.update(model.forward(part, [Span(cache, len(part))], range(len(part))).tobytes())
        return digest.hexdigest()


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_logits_do_not_depend_on_threads_or_chunks(bits: int) -> None:
    hashes = {
        (isa, threads, chunk): _with_isa(isa, threads, bits, chunk)
        for isa in kernels.isa_names()
        for threads, chunk in [(1, 150), (2, 150), (3, 64), (2, 7)]
    }
    hashes["single"] = run_hash(2, bits, 1)
    assert len(set(hashes.values())) == 1, hashes


def _with_isa(isa: str, threads: int, bits: int, chunk: int) -> str:
    before = kernels.isa()
    kernels.set_isa(isa)
    try:
        return run_hash(threads, bits, chunk)
    finally:
        kernels.set_isa(before)


def test_logits_do_not_depend_on_the_batch() -> None:
    """Three sequences in one batch, at different positions, equal each alone."""
    with edgemoe.load(bits=4, ctx_size=256, threads=2) as model:
        texts = [model.tokenizer.encode(p * 3) for p in PROMPTS[:3]]

        def alone(ids: Sequence[int]) -> np.ndarray:
            cache = model.new_cache()
            return model.forward(ids, [Span(cache, len(ids))], range(len(ids)))

        want = [alone(t) for t in texts]
        caches = [model.new_cache() for _ in texts]
        got: list[list[np.ndarray]] = [[] for _ in texts]
        at = [0, 0, 0]
        steps = [(3, 1, 5), (1, 4, 2), (2, 0, 1)]
        while any(a < len(t) for a, t in zip(at, texts, strict=True)):
            for step in steps:
                spans, tokens, owners = [], [], []
                for s, n in enumerate(step):
                    part = texts[s][at[s] : at[s] + n]
                    if part:
                        spans.append(Span(caches[s], len(part)))
                        tokens += part
                        owners += [s] * len(part)
                        at[s] += len(part)
                if tokens:
                    out = model.forward(tokens, spans, range(len(tokens)))
                    for row, owner in zip(out, owners, strict=True):
                        got[owner].append(row)
        for g, w in zip(got, want, strict=True):
            assert np.array_equal(np.stack(g).view(np.uint32), w.view(np.uint32))


if __name__ == "__main__":
    with edgemoe.load(bits=8, ctx_size=256) as bundled:
        tokens = [greedy(bundled, p) for p in PROMPTS]
    GOLDEN.write_text(json.dumps({"prompts": PROMPTS, "tokens": tokens}) + "\n")
