"""Reading ahead: what is guessed, when guesses are trusted, and that nothing depends on them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import edgemoe
from edgemoe import kernels
from edgemoe.errors import ChecksumError
from edgemoe.model import Span
from edgemoe.opened import bundled_path
from edgemoe.opened import open_model as opened_store
from edgemoe.pipeline.ahead import TRUST, Guess, LookAhead, NextRouter, Routing
from edgemoe.types import F32, Streaming

EXPERTS, HIDDEN, TOP_K = 16, 64, 4


@pytest.fixture(scope="module")
def pool() -> kernels.Pool:
    return kernels.new_pool(2)


def routings(rng: np.random.Generator) -> list[Routing]:
    return [
        Routing(
            layer,
            rng.uniform(0.2, 2, HIDDEN).astype(np.float32),
            rng.normal(size=(EXPERTS, HIDDEN)).astype(np.float32),
        )
        for layer in (1, 2, 5)
    ]


def test_the_guess_is_what_the_next_router_says_of_this_state(pool: kernels.Pool) -> None:
    rng = np.random.default_rng(1)
    known = routings(rng)
    known[1].norm[3] = 0  # a channel that layer 2 does not see
    guess = NextRouter(pool, known, TOP_K)
    x = rng.normal(size=(3, HIDDEN)).astype(np.float32)
    for here, then in pairwise(known):
        state = x.copy()
        state[:, here.norm == 0] = 0
        logits = kernels.linear_f32(pool, kernels.rmsnorm(pool, state, then.norm, 0.0), then.router)
        ids, _ = kernels.route(logits, TOP_K, True)
        counts = np.bincount(ids.ravel(), minlength=EXPERTS)
        found = guess(here.layer, kernels.rmsnorm(pool, state, here.norm, 0.0))
        assert found is not None and found[0] == then.layer
        assert sorted(found[1]) == np.flatnonzero(counts).tolist()
        heat = [int(counts[e]) for e in found[1]]
        assert heat == sorted(heat, reverse=True)
    assert guess(5, x) is None and guess(3, x) is None


@pytest.mark.parametrize(
    ("right", "busy", "trusted"),
    [(1.0, 1.0, True), (0.6, 1.0, False), (0.6, 0.5, True), (0.2, 0.5, False), (0.0, 0.0, True)],
)
def test_trust_follows_what_proves_right(right: float, busy: float, trusted: bool) -> None:
    """A share of guesses proves right; the less the disk has to do, the less will do."""
    draw = random.Random(2)
    ahead = LookAhead(lambda layer, x: (layer + 1, [7, 3]))
    ahead.busy = busy
    x = np.zeros((1, 4), np.float32)
    assert not ahead.trusted
    made = 0
    for layer in range(3000):
        guess = ahead.missing(layer, x, lambda _: [2] * 7 + [1] + [2] * 8, 2)
        if guess is not None:
            made += 1
            assert guess == (layer + 1, [7])  # 3 is there
        ahead.learn(layer + 1, {7} if draw.random() < right else {4})
    assert ahead.trusted is trusted
    assert (made > 2500) is trusted
    assert TRUST > 0.6 > TRUST / 2


def test_nothing_is_learnt_of_a_step_that_was_broken_off() -> None:
    ahead = LookAhead(lambda layer, x: (layer + 1, [0]), always=True)
    for layer in range(100):
        assert ahead.missing(layer, np.zeros((1, 4), np.float32), lambda _: [0], 1) is not None
        ahead.forget()
        ahead.learn(layer + 1, {5})
    assert ahead._all == 0


def any_experts(guess: Guess, experts: int, recall: float) -> Guess:
    draw = random.Random(3)

    def worse(layer: int, x: F32) -> tuple[int, list[int]] | None:
        made = guess(layer, x)
        if made is None:
            return None
        ids = [e if draw.random() < recall else draw.randrange(experts) for e in made[1]]
        return made[0], list(dict.fromkeys(ids))

    return worse


def open_model(cache: str, recall: float | None, path: Path | None = None) -> edgemoe.Model:
    """recall None: no look-ahead; else read on all guesses, so many of them as they were made."""
    model = edgemoe.load(
        path or bundled_path(),
        bits=4,
        ctx_size=128,
        threads=2,
        cache=cache,
        streaming=Streaming(look_ahead=recall is not None),
    )
    if recall is not None:
        mixture = model._experts
        worse = any_experts(mixture._early._ahead._guess, model.config.num_experts, recall)
        mixture._early._ahead = LookAhead(worse, always=True)
    return model


def outputs(model: edgemoe.Model) -> Iterator[bytes]:
    """Logits of a prompt and 24 tokens, then of three sequences at once."""
    cache = model.new_cache()
    prompt = list(range(40, 75))
    logits = model.forward(prompt, [Span(cache, len(prompt))], [len(prompt) - 1])
    for _ in range(24):
        yield logits.tobytes()
        logits = model.forward([int(logits[0].argmax())], [Span(cache, 1)], [0])
    caches = [model.new_cache() for _ in range(3)]
    for step in range(6):
        yield model.step([5 + step, 90 - step, 300 + 7 * step], caches).tobytes()


@pytest.mark.parametrize("cache", ["700K", "1500K", "4M"])
@pytest.mark.parametrize("recall", [1.0, 0.5, 0.0])
def test_the_same_bits_whatever_is_read_ahead(cache: str, recall: float) -> None:
    with open_model(cache, None) as model:
        want = list(outputs(model))
    with open_model(cache, recall) as model:
        assert list(outputs(model)) == want
        source = model._experts._source
        assert source._slots.resident_bytes <= source.budget_bytes
        if cache == "4M":
            assert model._experts._early._ahead._all > 0
        model._experts._early.complete()
        assert not source._residency._leases and source._residency._held == 0


def test_what_was_read_early_is_let_go_in_batches_too() -> None:
    with open_model("4M", 0.0) as model:
        cache = model.new_cache()
        for token in range(4):
            model.forward([token], [Span(cache, 1)], [0])
        mixture = model._experts
        caches = [model.new_cache() for _ in range(2)]
        for token in range(3):
            model.step([token, token + 9], caches)
        assert not mixture._early and not mixture._source._residency._leases


def test_damage_that_is_read_ahead_is_told_and_survived(tmp_path: Path) -> None:
    """Of an expert that nobody asked for, too; the next step goes on as if it had not been."""
    path = tmp_path / "damaged.emoe"
    data = bytearray(bundled_path().read_bytes())
    with closing(opened_store(bundled_path())) as opened:
        store = opened.store
        last = store.config.moe_layers[-1]
        for expert in range(store.config.num_experts):
            data[store.expert_segment(last, expert, 0).offset + 5] ^= 1
    path.write_bytes(data)
    with open_model("4M", 1.0, path) as model:
        for _ in range(3):
            with pytest.raises(ChecksumError):
                model.forward([1], [Span(model.new_cache(), 1)], [0])
            assert not model._experts._early
