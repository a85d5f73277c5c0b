"""Sampling: the cuts equal transformers' warpers, draws follow the distribution, seeds repeat."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from edgemoe.errors import CheckpointError, EdgeMoEError, UnsupportedError, UsageError
from edgemoe.sampling import REPEAT_WINDOW, Sampler, SamplingParams, from_generation_config
from edgemoe.types import F32


def random_logits(vocab: int, seed: int = 0) -> F32:
    return np.random.default_rng(seed).normal(0, 3, vocab).astype(np.float32)


def reachable(logits: F32, params: SamplingParams, draws: int = 2500) -> set[int]:
    sampler = Sampler(params)
    return {sampler.sample(logits) for _ in range(draws)}


def test_greedy_takes_the_lowest_id_of_equals() -> None:
    logits = np.array([1, 5, 5, -np.inf, 5], np.float32)
    assert Sampler(SamplingParams()).sample(logits) == 1
    assert Sampler(SamplingParams(seed=3, top_k=4)).sample(logits) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 5},
        {"top_p": 0.6},
        {"top_p": 0.999},
        {"min_p": 0.05},
        {"top_k": 40, "top_p": 0.8, "min_p": 0.02},
        {"top_k": 1},
        {"top_p": 1e-9},
        {"min_p": 1.0},
        {"top_k": 10_000},
    ],
)
@pytest.mark.parametrize("vocab", [7, 300])
def test_cuts_keep_what_transformers_keeps(vocab: int, settings: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    warpers = pytest.importorskip("transformers.generation.logits_process")
    logits = random_logits(vocab)
    chain = {
        "top_k": warpers.TopKLogitsWarper,
        "top_p": warpers.TopPLogitsWarper,
        "min_p": warpers.MinPLogitsWarper,
    }
    scores = torch.from_numpy(logits.copy())[None].double()
    for name, warper in chain.items():
        if name in settings:
            scores = warper(settings[name])(None, scores)
    kept = set(torch.isfinite(scores[0]).nonzero().flatten().tolist())
    # A high temperature draws every token that survived: the cuts come before it.
    params = SamplingParams(temperature=100.0, seed=1, **settings)
    assert reachable(logits, params) == kept


def test_draws_follow_the_tempered_distribution() -> None:
    logits = np.array([2.0, 1.0, 0.0, -1.0, -np.inf], np.float32)
    temperature, draws = 1.7, 40_000
    sampler = Sampler(SamplingParams(temperature=temperature, seed=11))
    counts = np.bincount([sampler.sample(logits) for _ in range(draws)], minlength=5)
    weights = np.exp(logits.astype(np.float64) / temperature)
    expected = draws * weights / weights.sum()
    assert counts[4] == 0
    spread = np.sqrt(np.maximum(expected, 1))
    assert (np.abs(counts - expected) < 4.5 * spread).all()


def test_temperature_comes_after_the_cuts() -> None:
    """At temperature 1 the nucleus is {0}; flattened first it would hold more."""
    logits = np.array([3.0, 0.0, 0.0, 0.0], np.float32)
    assert reachable(logits, SamplingParams(temperature=50.0, top_p=0.8, seed=0)) == {0}


@pytest.mark.parametrize("temperature", [1e-320, 1e-9, 100.0])
def test_extreme_temperatures_are_sound(temperature: float) -> None:
    logits = np.array([-3e38, 1.0, 3e38, -np.inf], np.float32)
    assert Sampler(SamplingParams(temperature=temperature, seed=0)).sample(logits) == 2


def test_top_k_among_equals_keeps_the_lowest_ids() -> None:
    logits = np.array([0, 1, 1, 2, 1, 1], np.float32)
    assert reachable(logits, SamplingParams(temperature=1.0, top_k=3, seed=0)) == {1, 2, 3}


def test_seeds_repeat_and_differ() -> None:
    logits = random_logits(1000)

    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1.5, seed=seed))
        return [sampler.sample(logits) for _ in range(20)]

    assert draw(5) == draw(5) != draw(6)
    assert draw(None) != draw(None)
    # PCG64 of NumPy is stable over versions: these are part of the promise of --seed.
    assert draw(5)[:8] == [226, 654, 859, 603, 219, 79, 47, 219]


def test_repeat_penalty_is_transformers_within_the_window() -> None:
    torch = pytest.importorskip("torch")
    warpers = pytest.importorskip("transformers.generation.logits_process")
    logits = random_logits(50)
    recent = [int(i) for i in np.random.default_rng(2).integers(0, 50, 30)]
    penalised = warpers.RepetitionPenaltyLogitsProcessor(1.9)(
        torch.tensor([recent]), torch.from_numpy(logits.copy())[None]
    )[0].numpy()
    assert (penalised.argmax() != logits.argmax()) or logits.argmax() not in recent
    sampler = Sampler(SamplingParams(repeat_penalty=1.9))
    before = logits.copy()
    assert sampler.sample(logits, recent) == penalised.argmax()
    assert (logits == before).all()
    best = int(logits.argmax())
    strong = Sampler(SamplingParams(repeat_penalty=100.0))
    assert strong.sample(logits, [best, *[0] * (REPEAT_WINDOW - 1)]) != best
    assert strong.sample(logits, [best, *[0] * REPEAT_WINDOW]) == best


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_an_error(bad: float, temperature: float) -> None:
    logits = random_logits(10)
    logits[3] = bad
    sampler = Sampler(SamplingParams(temperature=temperature))
    with pytest.raises(EdgeMoEError, match="logits are not finite"):
        sampler.sample(logits)
    with pytest.raises(EdgeMoEError, match="logits are not finite"):
        sampler.sample(np.full(4, -np.inf, np.float32))


@pytest.mark.parametrize(
    ("name", "values", "says"),
    [
        ("temperature", [-1, 101, math.nan, math.inf, "1", None, True], "from 0 to 100"),
        ("top_k", [-1, 2**31, 1.5, True], "from 0 to 2147483647"),
        ("top_p", [0, 2, -0.5, math.nan], "above 0 to 1"),
        ("min_p", [-0.1, 1.1, math.nan], "from 0 to 1"),
        ("repeat_penalty", [0, -1, 101, math.inf], "above 0 to 100"),
        ("seed", [-1, 2**64, 0.5], "from 0 to 18446744073709551615"),
    ],
)
def test_ranges(name: str, values: list[Any], says: str) -> None:
    for value in values:
        with pytest.raises(UsageError, match=f"^{name} must be .*{says}, not "):
            SamplingParams(**{name: value})


def test_generation_config_as_transformers_reads_it() -> None:
    given: dict[str, Any] = {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 20,
        "repetition_penalty": 1.05,
    }
    same: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "repeat_penalty": 1.05}
    assert from_generation_config({**given, "do_sample": True}) == SamplingParams(**same)
    greedy = dataclasses.replace(SamplingParams(**same), temperature=0.0)
    assert from_generation_config(given) == greedy
    assert from_generation_config({**given, "do_sample": False}) == greedy
    assert from_generation_config({}) == SamplingParams()
    assert from_generation_config({"do_sample": True}) == SamplingParams(temperature=1.0)
    assert from_generation_config({"do_sample": True, "top_k": None}).top_k == 0
    inert = {"max_new_tokens": 5, "use_cache": True, "num_beams": 1, "typical_p": 1.0}
    assert from_generation_config(inert) == SamplingParams()


def test_transformers_own_defaults_are_accepted() -> None:
    transformers = pytest.importorskip("transformers")
    defaults = transformers.GenerationConfig().to_dict()
    assert from_generation_config(defaults).temperature == 0.0


@pytest.mark.parametrize(
    ("config", "error", "says"),
    [
        ({"num_beams": 4}, UnsupportedError, "num_beams = 4 is not supported"),
        ({"typical_p": 0.5}, UnsupportedError, "typical_p = 0.5"),
        ({"suppress_tokens": [1]}, UnsupportedError, r"suppress_tokens = \[1\]"),
        ({"temperature": "hot"}, CheckpointError, "temperature must be a number"),
        ({"top_p": 7}, CheckpointError, "top_p must be"),
        ({"repetition_penalty": -1}, CheckpointError, "repetition_penalty must be"),
        ({"do_sample": "no"}, CheckpointError, "do_sample must be true or false"),
    ],
)
def test_generation_config_errors_name_the_key(
    config: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=rf"generation_config\.json: {says}"):
        from_generation_config(config)
