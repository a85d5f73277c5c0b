"""What a run is said to have done: counters of the experts, and the statistics made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

import edgemoe
from edgemoe.generation import Generation
from edgemoe.loader.resident import expert_bytes
from edgemoe.pipeline import counts
from edgemoe.pipeline.bit_router import Grant
from edgemoe.pipeline.counts import DemandCounts
from edgemoe.pipeline.serial import SerialExperts
from edgemoe.sampling import SamplingParams
from edgemoe.store import Store
from edgemoe.terminal.session import report
from edgemoe.tokenizer import Tokenizer
from edgemoe.types import F32, I32, Streaming, Traffic, Usage

GREEDY = SamplingParams()

EARLIER = Traffic(
    demands=10, bits=40, wished_bits=41, gates=2.0, gated_bits=8.0, wanted_bytes=100,
    missed_bytes=50, bytes_read=60, evictions=1, wait_s=0.5,
)  # fmt: skip
LATER = Traffic(
    demands=30, bits=140, wished_bits=146, gates=6.0, gated_bits=30.0, wanted_bytes=1100,
    missed_bytes=300, bytes_read=60 + (10 << 20), evictions=8, wait_s=3.6,
)  # fmt: skip


def test_counters_are_additive() -> None:
    made = LATER - EARLIER
    for f in fields(Traffic):
        assert getattr(made, f.name) == getattr(LATER, f.name) - getattr(EARLIER, f.name)
    assert (made.mean_bits, made.gate_weighted_bits, made.hit_rate) == (5.0, 5.5, 0.75)
    assert LATER - Traffic() == LATER
    nothing = LATER - LATER
    assert nothing == Traffic()
    assert (nothing.mean_bits, nothing.gate_weighted_bits, nothing.hit_rate) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize("kept", [1, 3, 4096])
def test_counts_of_steps(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of one token and of many, summed up at any time, on arrays that are used again."""
    monkeypatch.setattr(counts, "_KEPT", kept)
    rng = np.random.default_rng(kept)
    bits, sizes = (2, 3, 4), {0: [1000, 500, 300], 2: [10, 5, 3]}
    out = DemandCounts(bits, sizes)
    demands = given = wished = wanted = 0
    gated = all_gates = 0.0
    buffers = {n: (np.empty((n, 4), np.int32), np.empty((n, 4), np.float32)) for n in (1, 2, 9)}
    for i in range(60):
        n, layer = (1, 2, 9)[i % 3], (0, 2)[i // 3 % 2]
        ids, gates = buffers[n]
        for row in range(n):
            ids[row] = rng.permutation(6)[:4]
        gates[:] = rng.uniform(0, 1, gates.shape)
        grant = Grant(*(rng.integers(0, 3, ids.shape, np.int32) for _ in range(2)))
        out.add(layer, ids, gates, grant)
        demands += ids.size
        as_bits = np.array(bits)[grant.levels]
        given += int(as_bits.sum())
        wished += int(np.array(bits)[grant.wished].sum())
        all_gates += float(gates.astype(np.float64).sum())
        gated += float((gates.astype(np.float64) * as_bits).sum())
        for expert in set(ids.ravel().tolist()):
            wanted += sum(sizes[layer][: int(grant.levels[ids == expert].max()) + 1])
        if i == 20:
            assert out.traffic.demands == demands
    got = out.traffic
    assert (got.demands, got.bits, got.wished_bits) == (demands, given, wished)
    assert got.wanted_bytes == wanted
    assert got.gates == pytest.approx(all_gates, rel=1e-12)
    assert got.gated_bits == pytest.approx(gated, rel=1e-12)
    assert (got.missed_bytes, got.bytes_read, got.evictions, got.wait_s) == (0, 0, 0, 0)
    assert out.traffic == got


def test_a_resident_model_counts_what_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each generation's own, against what the mixtures were called with."""
    seen: list[tuple[int, I32, F32]] = []
    original = SerialExperts.__call__

    def watched(self: SerialExperts, layer: int, x: F32, ids: I32, gates: F32, means: Any) -> F32:
        seen.append((layer, ids.copy(), gates.copy()))
        return original(self, layer, x, ids, gates, means)

    monkeypatch.setattr(SerialExperts, "__call__", watched)
    with edgemoe.load(bits=4, ctx_size=128, threads=2) as model:
        with Store.open(model.store_path) as store:
            level = store.quant.expert_levels.index(4)
            cache = expert_bytes(store, level)
            size = {
                i: sum(store.expert_layout(i).segment_sizes[: level + 1])
                for i in store.config.moe_layers
            }
        for prompt in ("Once upon a time", "The dog"):
            seen.clear()
            before = model.usage().traffic
            stats = model.generate(prompt, max_tokens=9, sampling=GREEDY).stats
            done = model.usage().traffic - before
            assert done.demands == sum(ids.size for _, ids, _ in seen) > 0
            assert done.bits == 4 * done.demands
            gates = sum(float(g.astype(np.float64).sum()) for _, _, g in seen)
            assert done.gates == pytest.approx(gates, rel=1e-9)
            assert done.wanted_bytes == sum(np.unique(ids).size * size[i] for i, ids, _ in seen)
            assert stats.mean_bits == stats.gate_weighted_bits == 4
            assert (stats.bytes_read, stats.bytes_read_per_token) == (0, 0)
            assert (stats.hit_rate, stats.unhidden_wait_s, stats.evictions) == (1.0, 0.0, 0)
            assert stats.cache_bytes == model.usage().cache_bytes == cache
        last = model.usage().traffic
        model.close()
        assert model.usage().traffic == last


class _Script:
    """A sequencer whose every token costs as much as the one before, and its usage."""

    def __init__(self) -> None:
        self.tokens = 0
        self.room = 100

    def prefill(self, tokens: Sequence[int]) -> F32:
        self.tokens += len(tokens)
        return np.eye(300, dtype=np.float32)[65]

    def step(self, token: int) -> F32:
        return self.prefill([token])

    def usage(self) -> Usage:
        n = self.tokens
        return Usage(
            peak_rss_bytes=1000 + n,
            mem_budget_bytes=5000,
            cache_bytes=700,
            traffic=Traffic(
                demands=20 * n, bits=60 * n, wished_bits=65 * n, gates=4.0 * n, gated_bits=14.0 * n,
                wanted_bytes=1000 * n, missed_bytes=290 * n, bytes_read=n << 20, evictions=3 * n,
                wait_s=n / 4,
            ),
        )  # fmt: skip


def _generation(script: _Script, tokenizer: Tokenizer, prompt: Sequence[int]) -> Generation:
    settings: dict[str, Any] = {"stop": (), "eos_token_ids": (), "logits_hash": False}
    return Generation(
        script, tokenizer, prompt, max_tokens=4, sampling=GREEDY, measure=script.usage,
        release=lambda: None, **settings,
    )  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    from edgemoe.opened import open_model

    return open_model().tokenizer


def test_statistics_are_of_one_generation(tokenizer: Tokenizer) -> None:
    script = _Script()
    script.tokens = 1000  # others were there before
    generation = _generation(script, tokenizer, [5, 6, 7])
    assert generation.stats.bytes_read == 0 and generation.stats.hit_rate == 1.0
    next(generation)
    assert generation.stats.bytes_read == 3 << 20
    assert len(list(generation)) == 3
    script.tokens += 5000  # and others come after
    stats = generation.stats
    # 3 of the prompt and 3 of the 4 that were generated: the last was not fed any more
    assert (stats.bytes_read, stats.bytes_read_per_token) == (6 << 20, (6 << 20) / 7)
    assert (stats.evictions, stats.unhidden_wait_s) == (18, 1.5)
    assert stats.hit_rate == pytest.approx(0.71)
    assert (stats.mean_bits, stats.gate_weighted_bits, stats.wished_mean_bits) == (3.0, 3.5, 3.25)
    assert (stats.peak_rss_bytes, stats.mem_budget_bytes, stats.cache_bytes) == (2006, 5000, 700)


def test_a_generation_that_was_closed_keeps_its_figures(tokenizer: Tokenizer) -> None:
    script = _Script()
    with _generation(script, tokenizer, [5]) as generation:
        next(generation)
    script.tokens += 100
    assert generation.stats.bytes_read == 1 << 20


def test_the_line_of_figures(tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    with _generation(_Script(), tokenizer, [5, 6, 7]) as generation:
        list(generation)
    report(generation, GREEDY, logits_hash=False)
    assert capsys.readouterr().err.endswith(
        "mean bits 3.00 (by gate weight 3.50, 3.25 had all been in memory), read 6.0 MiB "
        "(877.8 KiB a token, hits 71 %, waited 1.5 s), ended by --max-tokens\n"
    )


@pytest.mark.parametrize("setting", [{"policy": "mru"}, {"order": ""}])
def test_streaming_refuses_what_it_does_not_know(setting: dict[str, str]) -> None:
    with pytest.raises(edgemoe.UsageError, match="must be one of"):
        Streaming(**setting)  # type: ignore[arg-type]
