"""Which level each demand gets: means that hold, the right gains, and reads that are worth it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from tiny import make_tiny

import edgemoe
from edgemoe.errors import UsageError
from edgemoe.evaluate import log_softmax
from edgemoe.model import Span
from edgemoe.mwq import sensitivity
from edgemoe.opened import bundled_path
from edgemoe.pipeline.aim import Aim
from edgemoe.pipeline.bit_router import ExpertLevels, GateGains, OneLevel, slopes
from edgemoe.pipeline.mean_bits import MeanBits
from edgemoe.pipeline.serial import SerialExperts
from edgemoe.pipeline.streamed import StreamedMixture
from edgemoe.store import Store
from edgemoe.types import F32, I32, LEVELS, Streaming

GREEDY = edgemoe.SamplingParams()
LAYERS, EXPERTS, TOP_K = (1, 2, 4), 12, 3
PER_TOKEN = len(LAYERS) * TOP_K


def a_loss(rng: np.random.Generator) -> F32:
    """Errors that fall by about four a bit, of experts that differ."""
    scale = np.exp(rng.normal(0, 1, (len(LAYERS), EXPERTS, 1)))
    noise = np.exp(rng.normal(0, 0.1, (len(LAYERS), EXPERTS, len(LEVELS))))
    return (scale * noise * 4.0 ** -np.array(LEVELS)).astype(np.float32)


def demands(rng: np.random.Generator, n: int) -> tuple[F32, I32, F32]:
    """A layer step: x, ids and gates."""
    ids = np.array([rng.permutation(EXPERTS)[:TOP_K] for _ in range(n)], np.int32)
    gates = -np.sort(-rng.dirichlet([0.5] * TOP_K, n)).astype(np.float32)
    return np.zeros((n, 8), np.float32), ids, gates


def router(mean_bits: float, read_price: float = 1.0, loss: F32 | None = None) -> MeanBits:
    return MeanBits(GateGains(LAYERS, LEVELS, loss), LEVELS, mean_bits, read_price, PER_TOKEN)


def test_slopes_are_those_of_the_lower_hull() -> None:
    rng = np.random.default_rng(0)
    bits = np.array(LEVELS, np.float64)
    for _ in range(200):
        error = rng.uniform(0, 1, len(LEVELS))
        got = slopes(error[None], bits)[0]
        assert (got >= 0).all() and (np.diff(got) <= 1e-12).all()
        hull = error[0] - np.concatenate([[0], np.cumsum(got * np.diff(bits))])
        best = np.minimum.accumulate(error)
        assert (hull <= best + 1e-12).all()
        for at in range(len(LEVELS)):  # no line between two points lies below the hull
            chords = [
                best[i] + (best[j] - best[i]) * (bits[at] - bits[i]) / (bits[j] - bits[i])
                for i, j in itertools.product(range(at + 1), range(at, len(LEVELS)))
                if i != j
            ]
            assert hull[at] == pytest.approx(min([best[at], *chords]))


@pytest.mark.parametrize("mean_bits", [2.0, 2.3, 3.0, 3.5, 5.0, 7.7, 8.0])
@pytest.mark.parametrize("rows", [(1,), (128, 128, 1, 1, 1), (500, 3)])
def test_a_mean_is_held(mean_bits: float, rows: tuple[int, ...]) -> None:
    """Over runs of some hundred tokens, one by one, in chunks, or both in turn."""
    rng = np.random.default_rng(1)
    choose = router(mean_bits, loss=a_loss(rng))
    given = count = 0
    sizes = itertools.cycle(rows)
    while count < 600 * PER_TOKEN:
        n = next(sizes)
        for layer in LAYERS:
            x, ids, gates = demands(rng, n)
            grant = choose(layer, x, ids, gates, None)
            assert grant.levels.shape == ids.shape and grant.levels.dtype == np.int32
            given += int(np.array(LEVELS)[grant.levels].sum())
            count += ids.size
    assert given / count == pytest.approx(mean_bits, abs=0.05)


def test_a_mean_is_held_where_gains_change_or_are_all_the_same() -> None:
    rng = np.random.default_rng(2)
    for factor in (lambda i: 1.0, lambda i: 1e-4 if i < 300 else 1.0):
        choose = router(3.25, loss=None)
        given = count = 0
        for i in range(900):
            for layer in LAYERS:
                x, ids, gates = demands(rng, 1)
                gates[:] = factor(i)
                levels = choose(layer, x, ids, gates, None).levels
                given += int(np.array(LEVELS)[levels].sum())
                count += ids.size
        assert given / count == pytest.approx(3.25, abs=0.05)


def test_what_gains_most_gets_most() -> None:
    """The error that is left, by gate and sensitivity, is that of the best levels of this mean."""
    rng = np.random.default_rng(3)
    loss = a_loss(rng)
    choose = router(3.0, loss=loss)
    steps = []
    for i in range(400):
        for at, layer in enumerate(LAYERS):
            x, ids, gates = demands(rng, 1)
            levels = choose(layer, x, ids, gates, None).levels
            if i >= 100:
                steps.append((gates[0], loss[at][ids[0]], levels[0]))
    bits = np.array(LEVELS)
    power = np.concatenate([gates**2 for gates, _, _ in steps])
    error = np.concatenate([loss for _, loss, _ in steps]) * power[:, None]
    levels = np.concatenate([levels for _, _, levels in steps])
    found = error[np.arange(len(levels)), levels].sum()
    spent = bits[levels].sum()
    lambdas = np.geomspace(1e-12, 1, 4000)  # the best for a price, a lower bound between prices
    bound = max((error + price * bits).min(axis=1).sum() - price * spent for price in lambdas)
    uniform = error[:, 1].sum()
    assert bound <= found <= 1.05 * bound
    assert found < 0.7 * uniform


def test_what_is_not_there_has_to_gain_more() -> None:
    rng = np.random.default_rng(4)
    held = rng.integers(0, len(LEVELS) + 1, EXPERTS).tolist()
    read = {}
    for price in (1.0, 8.0, 1e6):
        draw = np.random.default_rng(5)
        choose = router(3.0, price)
        missing = given = count = 0
        for _ in range(500):
            for layer in LAYERS:
                x, ids, gates = demands(draw, 1)
                grant = choose(layer, x, ids, gates, held)
                assert (grant.levels <= grant.wished).all()
                has = np.array(held)[ids]
                missing += int(np.maximum(grant.levels + 1 - np.maximum(has, 1), 0).sum())
                given += int(np.array(LEVELS)[grant.levels].sum())
                count += ids.size
        assert given / count == pytest.approx(3.0, abs=0.05)
        read[price] = missing
    assert read[1e6] < 0.5 * read[8.0] < 0.5 * read[1.0]


def test_tokens_of_a_batch_share_what_is_read() -> None:
    """None of them gains enough for a read by itself; all together do."""
    choose = router(2.5, 8.0)
    for _ in range(60):  # to know what gains there are: half of them 16 times the others
        for layer in LAYERS:
            x, ids, gates = demands(np.random.default_rng(6), 2)
            gates[:] = [[0.4], [0.1]]
            choose(layer, x, ids, gates, None)
    ids = np.zeros((1, TOP_K), np.int32)
    ids[:] = np.arange(TOP_K)
    gates = np.full(ids.shape, 0.4, np.float32)
    held = [1] * EXPERTS
    alone = choose(LAYERS[1], np.zeros((1, 8), np.float32), ids, gates, held)
    assert (alone.levels == 0).all() and (alone.wished > 0).all()
    many = choose(
        LAYERS[1], np.zeros((40, 8), np.float32), np.repeat(ids, 40, 0), np.repeat(gates, 40, 0),
        held,
    )  # fmt: skip
    assert (many.levels > 0).all()


def test_levels_for_good() -> None:
    ids = np.array([[0, 2], [1, 0]], np.int32)
    gates = np.ones(ids.shape, np.float32)
    x = np.zeros((2, 8), np.float32)
    assert (OneLevel(3)(1, x, ids, gates, None).levels == 3).all()
    fixed = ExpertLevels({1: [0, 1, 2], 4: [2, 2, 2]})
    assert fixed(1, x, ids, gates, None).levels.tolist() == [[0, 2], [1, 0]]
    assert fixed(4, x, ids, gates, None).levels.tolist() == [[2, 2], [2, 2]]
    assert (fixed.early_depth, OneLevel(3).early_depth) == (1, 4)


def test_means_that_cannot_be() -> None:
    for mean in (1.0, 1.99, 8.5, float("nan")):
        with pytest.raises(UsageError, match="mean_bits must be from 2 to 8"):
            router(mean)
    with pytest.raises(UsageError, match="read_price must be 1 or more"):
        router(3.0, 0.5)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"mean_bits": 1}, "mean_bits must be from 2 to 8"),
        ({"mean_bits": 9}, "mean_bits must be from 2 to 8"),
        ({"mean_bits": 3, "exact": True}, "leave out bits and exact"),
        ({"mean_bits": 3, "bits": 4}, "leave out bits and exact"),
        ({"read_price": 2}, "give that too"),
        ({"mean_bits": 3, "read_price": 0}, "read_price must be 1 or more"),
        ({"mean_bits": 3, "read_price": float("inf")}, "read_price must be 1 or more"),
    ]
    for settings, match in wrong:
        with pytest.raises(UsageError, match=match):
            edgemoe.load(ctx_size=64, **settings)


def test_the_first_price_is_right_for_what_is_known() -> None:
    rng = np.random.default_rng(9)
    bits = np.array(LEVELS)
    for mean in (2.0, 2.7, 4.4, 8.0):
        gains = -np.sort(-rng.uniform(0, 1, (300, len(LEVELS) - 1)).astype(np.float32))
        levels = (gains >= Aim(mean, LEVELS).first_price(gains)).sum(axis=1)
        assert bits[levels].mean() == pytest.approx(mean, abs=2 / 300)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bits")
    make_tiny(directory, "qwen2_moe")
    edgemoe.convert(directory, directory / "tiny.emoe")
    return directory / "tiny.emoe"


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("cache", ["60K", "150K"])
def test_streamed_levels_are_those_of_resident_experts(
    store: Path, overlap: bool, cache: str
) -> None:
    """With a read price of 1 memory does not matter to what is chosen: the bits are the same."""
    rng = np.random.default_rng(7)
    prompt = rng.integers(0, 50, 20).tolist()
    settings: dict[str, Any] = {"mean_bits": 3.3, "read_price": 1, "ctx_size": 64, "threads": 2}

    def outputs(**more: Any) -> tuple[list[bytes], Any]:
        with edgemoe.load(store, **settings, **more) as model:
            assert model.plan.streamed == bool(more)
            kept = model.new_cache()
            out = [model.forward(prompt, [Span(kept, len(prompt))], [len(prompt) - 1])]
            for _ in range(20):
                out.append(model.step([int(out[-1][0].argmax())], [kept]))
            return [each.tobytes() for each in out], model.usage().traffic

    want, whole = outputs()
    got, few = outputs(cache=cache, streaming=Streaming(overlap=overlap))
    assert got == want
    assert few.evictions > 0
    assert (few.bits, few.demands) == (whole.bits, whole.demands)
    assert few.wished_bits == few.bits and few.gated_bits == whole.gated_bits


def test_a_batch_and_two_sequences_stream_with_mixed_levels(store: Path) -> None:
    """Both halves of a batch, experts that do not all fit at once, and any order of reads."""
    rng = np.random.default_rng(8)
    for order in ("shortest", "hebf", "fifo"):
        with edgemoe.load(
            store, mean_bits=4, ctx_size=64, cache="80K", sequences=3,
            streaming=Streaming(order=order),
        ) as model:  # fmt: skip
            caches = [model.new_cache() for _ in range(3)]
            for cache in caches:
                tokens = rng.integers(0, 50, 12).tolist()
                model.forward(tokens, [Span(cache, 12)], [11])
            for _ in range(30):
                logits = model.step(rng.integers(0, 50, 3).tolist(), caches)
                assert np.isfinite(logits).all()
            traffic = model.usage().traffic
        assert traffic.mean_bits == pytest.approx(4, abs=0.25)
        assert traffic.bits <= traffic.wished_bits and traffic.missed_bytes > 0


def test_mean_bits_beat_one_level_on_the_bundled_model() -> None:
    """Divergence from 8 bits at a mean of 3 against 3 bits for all; what a mean is for."""
    text = "Once upon a time there was a little girl who had a red ball. One day she went to "
    text += "the park with her mother and saw a big dog. The dog wanted to play, so the girl "
    text += "threw the ball and the dog ran after it. They were happy and became good friends."

    def logits(**settings: Any) -> tuple[F32, float]:
        with edgemoe.load(ctx_size=256, dense_bits=8, **settings) as model:
            ids = model.tokenizer.encode(text)
            cache, rows = model.new_cache(), []
            for token in ids:
                rows.append(model.step([token], [cache])[0])
            return np.array(rows), model.usage().traffic.mean_bits

    want = log_softmax(logits(bits=8)[0])
    kld = {}
    for name, settings in {"one": {"bits": 3}, "mean": {"mean_bits": 3}}.items():
        rows, mean = logits(**settings)
        assert mean == pytest.approx(3, abs=0.1)
        kld[name] = float((np.exp(want) * (want - log_softmax(rows))).sum(axis=1).mean())
    assert kld["mean"] < 0.8 * kld["one"]


def test_the_bundled_store_tells_sensitivities() -> None:
    with Store.open(bundled_path()) as store:
        loss = sensitivity.of_store(store)
        assert loss is not None and (loss > 0).all()


def test_sequences_of_a_batch_have_means_of_their_own(store: Path) -> None:
    """Each as if it were alone in what it is given, whatever else is in the batch."""
    rng = np.random.default_rng(10)
    wanted = [2.2, 5.5, None]
    for cache in (None, "150K"):
        with edgemoe.load(
            store, mean_bits=3.5, read_price=1, ctx_size=256, cache=cache, sequences=3
        ) as model:
            caches = [model.new_cache() for _ in wanted]
            for _ in range(250):
                model.step(rng.integers(0, 50, 3).tolist(), caches, wanted)
            assert isinstance(model._experts, SerialExperts | StreamedMixture)
            router = model._experts.router
            assert isinstance(router, MeanBits)
            assert sorted(router._targets) == [2.2, 3.5, 5.5]
            for mean, target in router._targets.items():
                owed = target.aim._owed / (250 * router._demands_per_token)
                assert abs(owed) < 0.05, mean
            traffic = model.usage().traffic
            assert traffic.mean_bits == pytest.approx((2.2 + 3.5 + 5.5) / 3, abs=0.05)


def test_prompts_may_have_another_mean(store: Path) -> None:
    settings: dict[str, Any] = {"mean_bits": 3, "ctx_size": 256, "threads": 2}
    prompt = np.random.default_rng(11).integers(0, 50, 150).tolist()
    with edgemoe.load(store, prefill_mean_bits=6, **settings) as model:
        cache = model.new_cache()
        model.forward(prompt, [Span(cache, 150)], [149])
        before = model.usage().traffic
        assert before.mean_bits == pytest.approx(6, abs=0.1)
        for token in prompt[:100]:
            model.step([token], [cache])
        assert (model.usage().traffic - before).mean_bits == pytest.approx(3, abs=0.1)


def test_a_generation_may_have_another_mean() -> None:
    with edgemoe.load(mean_bits=3, ctx_size=256) as model:
        text = "Once upon a time there was a little girl"
        for mean in (2.5, None, 6.0):
            answer = model.generate(text, max_tokens=100, mean_bits=mean)
            assert answer.stats.mean_bits == pytest.approx(mean or 3, abs=0.1)
        with pytest.raises(UsageError, match="mean_bits must be from 2 to 8"):
            model.generate(text, mean_bits=1)
        assert model.generate(text, max_tokens=2).token_ids
    with (
        edgemoe.load(bits=4, ctx_size=256) as model,
        pytest.raises(UsageError, match="load the model with mean_bits"),
    ):
        model.generate(text, mean_bits=3)


@pytest.mark.parametrize("levels", [{"bits": 4}, {"mean_bits": 3}])
@pytest.mark.parametrize("cache", ["2M", "64M"])
def test_memory_is_filled_before_anything_is_asked_for(levels: dict[str, Any], cache: str) -> None:
    calls: list[tuple[int, int]] = []
    how = Streaming(preload=True, look_ahead=False)
    settings: dict[str, Any] = {"ctx_size": 128, "cache": cache, **levels}
    with edgemoe.load(
        streaming=how, progress=lambda done, total: calls.append((done, total)), **settings
    ) as model:
        assert isinstance(model._experts, StreamedMixture)
        books = model._experts._source._residency
        depth = 3 if "bits" in levels else 1
        layers = range(len(model.config.moe_layers))
        whole = sum(books.prefix(i)[depth] for i in layers) * model.config.num_experts
        assert calls[-1] == (books.used_bytes, books.used_bytes)
        if cache == "64M":
            assert books.used_bytes == whole
        else:
            assert 0.5 * books.budget < books.used_bytes < books.budget
        assert not books._leases and not books._flying
        evictions = model.usage().traffic.evictions
        assert evictions == 0
        got = model.generate("Once upon a time", max_tokens=20, sampling=GREEDY, logits_hash=True)
    if "bits" in levels:
        with edgemoe.load(**settings) as model:
            want = model.generate(
                "Once upon a time", max_tokens=20, sampling=GREEDY, logits_hash=True
            )
        assert got.logits_hash == want.logits_hash


def test_ctrl_c_while_memory_is_filled() -> None:
    """No file or queue is left open, and the next model loads."""

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    how = Streaming(preload=True)
    before = psutil.Process().num_fds()
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            edgemoe.load(bits=4, ctx_size=64, cache="4M", streaming=how, progress=stop)
    assert psutil.Process().num_fds() == before
    with edgemoe.load(bits=4, ctx_size=64, cache="4M", streaming=how) as model:
        assert model.generate("Once", max_tokens=3).token_ids
