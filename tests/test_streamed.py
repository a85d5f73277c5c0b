"""Models whose experts come and go give the same bits as those whose experts are all there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import CONFIGS, make_tiny

import edgemoe
from edgemoe.errors import UsageError
from edgemoe.model import Span
from edgemoe.opened import bundled_path
from edgemoe.store import Store
from edgemoe.types import F32, Streaming


def one_expert(path: Path, bits: int) -> int:
    """A cache that has room for little more than one expert."""
    with Store.open(path) as store:
        depth = store.quant.levels.index(bits) + 1
        layout = store.expert_layout(store.config.moe_layers[0])
        pages = sum(-(-size // 4096) for size in layout.segment_sizes[:depth])
        return (pages + 60) * 4096 * 66 // 64


def logits_of(model: edgemoe.Model, prompts: Sequence[Sequence[int]], steps: int) -> list[F32]:
    """Each prompt in one go, then `steps` tokens of all sequences together."""
    caches = [model.new_cache() for _ in prompts]
    out = []
    for prompt, cache in zip(prompts, caches, strict=True):
        out.append(model.forward(prompt, [Span(cache, len(prompt))], range(len(prompt))))
    tokens = [int(rows[-1].argmax()) for rows in out]
    for _ in range(steps):
        rows = model.step(tokens, caches)
        out.append(rows)
        tokens = rows.argmax(axis=1).tolist()
    return out


def same(a: Sequence[F32], b: Sequence[F32]) -> bool:
    return all(x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module", params=CONFIGS)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("streamed")
    make_tiny(directory, request.param)
    edgemoe.convert(directory, directory / "tiny.emoe")
    return directory / "tiny.emoe"


@pytest.mark.parametrize("overlap", [True, False])
def test_every_family(store: Path, overlap: bool) -> None:
    settings: dict[str, Any] = {"bits": 3, "ctx_size": 32, "threads": 2}
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 50, n).tolist() for n in (9, 1, 4)]
    with edgemoe.load(store, **settings) as whole:
        want = logits_of(whole, prompts, 4)
    how = Streaming(overlap=overlap)
    settings["cache"] = one_expert(store, 3)
    with edgemoe.load(store, streaming=how, sequences=3, **settings) as few:
        assert few.plan.streamed
        assert same(logits_of(few, prompts, 4), want)


@pytest.mark.parametrize("policy", ["worth", "lru", "lfu"])
@pytest.mark.parametrize("order", ["shortest", "hebf", "fifo"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_bundled(policy: str, order: str, share: float) -> None:
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 4000, n).tolist() for n in (70, 12, 3, 33)]
    settings: dict[str, Any] = {"bits": 4, "ctx_size": 128, "threads": 2, "sequences": 4}
    with edgemoe.load(**settings) as whole:
        want = logits_of(whole, prompts, 12)
        cache = int(whole.plan.budget.experts * share)
    how = Streaming(policy=policy, order=order)
    with edgemoe.load(cache=cache, streaming=how, **settings) as few:
        assert same(logits_of(few, prompts, 12), want)
        traffic = few.usage().traffic
        assert traffic.evictions > 0
        assert 0 < traffic.missed_bytes <= traffic.wanted_bytes


def test_tokens_do_not_depend_on_the_cache() -> None:
    """Text, and the hash of all logits, of a run that streams and of one that does not."""
    sampling = edgemoe.SamplingParams(temperature=0.8, seed=3)
    settings: dict[str, Any] = {"max_tokens": 40, "sampling": sampling, "logits_hash": True}
    seen = set()
    for cache in (None, "600K", "3M", "64M"):
        with edgemoe.load(bits=8, ctx_size=128, cache=cache) as model:
            assert model.plan.streamed == (cache is not None)
            answer = model.generate("Once upon a time", **settings)
            seen.add((str(answer), answer.logits_hash))
    assert len(seen) == 1


def test_settings_out_of_range() -> None:
    for wrong, match in (
        ({"cache": "auto"}, "cache must be a size"),
        ({"cache": "x"}, "not a memory size"),
        ({"io_limit": 0.0}, "io_limit must be above 0"),
        ({"io_limit": float("nan")}, "io_limit must be above 0"),
        ({"sequences": 0}, "sequences must be at least 1"),
    ):
        with pytest.raises(UsageError, match=match):
            edgemoe.load(bundled_path(), ctx_size=64, **wrong)
    with pytest.raises(edgemoe.MemoryBudgetError, match="largest expert segment"):
        edgemoe.load(bundled_path(), ctx_size=64, cache="8K")
