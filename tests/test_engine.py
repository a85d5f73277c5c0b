"""The Python API on the bundled model: streaming, stopping, refusing, giving memory back."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from convert_samples import make_checkpoint
from tiny import byte_tokenizer

import edgemoe
from edgemoe.cpu_attn.kv_cache import KVCache
from edgemoe.generation import StopMatcher
from edgemoe.loader import budget
from edgemoe.model import Span
from edgemoe.mwq.convert import convert
from edgemoe.opened import bundled_path, open_model
from edgemoe.types import QuantSpec, RunPlan

GREEDY = edgemoe.SamplingParams()


@pytest.fixture(scope="module")
def model() -> Iterator[edgemoe.Model]:
    with edgemoe.load(bits=8, ctx_size=256, threads=2) as m:
        yield m


def test_stream_equals_generate(model: edgemoe.Model) -> None:
    with model.stream("Once upon a time", max_tokens=40, sampling=GREEDY) as generation:
        pieces = list(generation)
    whole = model.generate("Once upon a time", max_tokens=40, sampling=GREEDY)
    assert "".join(pieces) == whole == generation.text
    assert len(pieces) > 20
    assert generation.token_ids == whole.token_ids
    stats = whole.stats
    assert (stats.generated_tokens, stats.stop_reason, stats.mean_bits) == (40, "length", 8.0)
    assert stats.prompt_tokens == len(generation.prompt_ids) == 4
    assert stats.decode_tok_s > 0
    assert stats.prefill_tok_s > 0
    assert 0 < stats.ttft_s < 10
    assert 0 < stats.peak_rss_bytes <= stats.mem_budget_bytes


def test_defaults_come_from_the_model(model: edgemoe.Model) -> None:
    assert model.generation_defaults.temperature == 0.7
    assert model.generation_defaults.top_p == 0.9
    seeded = edgemoe.SamplingParams(temperature=0.7, top_p=0.9, seed=5)
    a, b = (model.generate("The cat", max_tokens=30, sampling=seeded) for _ in range(2))
    assert a == b
    others = {model.generate("The cat", max_tokens=30) for _ in range(4)}
    assert len(others) > 1, "without a seed, runs differ"


def test_stop_strings(model: edgemoe.Model) -> None:
    full = model.generate("Once upon a time", max_tokens=60, sampling=GREEDY)
    stop = full[20:26]
    cut = model.generate("Once upon a time", max_tokens=60, sampling=GREEDY, stop=["zzz", stop])
    assert cut == full[: full.index(stop)]
    assert cut.stats.stop_reason == "stop"


@pytest.mark.parametrize(
    ("stops", "pieces", "text"),
    [
        (["abc"], ["xa", "b", "cd"], "x"),
        (["abc"], ["xa", "b", "d"], "xabd"),
        (["bc", "abc"], ["ab", "c"], ""),
        (["aab"], ["aa", "ab"], "a"),
        ([], ["a", "b"], "ab"),
        ([""], ["a", "b"], "ab"),
    ],
)
def test_stop_matcher(stops: list[str], pieces: list[str], text: str) -> None:
    matcher = StopMatcher(stops)
    out = ""
    for piece in pieces:
        out += matcher.push(piece)
        if matcher.hit:
            break
    assert out + matcher.flush() == text


def test_closing_early_keeps_what_there_is(model: edgemoe.Model) -> None:
    generation = model.stream("Once upon a time", max_tokens=100, sampling=GREEDY)
    first = [next(generation) for _ in range(5)]
    with pytest.raises(edgemoe.UsageError, match="already"):
        model.stream("Another")
    generation.close()
    generation.close()
    assert generation.text == "".join(first)
    assert generation.stats.stop_reason == "closed"
    assert generation.stats.generated_tokens >= 5
    with pytest.raises(StopIteration):
        next(generation)
    assert model.generate("Another", max_tokens=3, sampling=GREEDY)


def test_a_generation_dropped_unstarted_frees_the_model(model: edgemoe.Model) -> None:
    generation = model.stream("Once", max_tokens=5)
    generation.close()
    assert model.generate("Once", max_tokens=2, sampling=GREEDY)


def test_context_is_never_overrun(model: edgemoe.Model) -> None:
    out = model.generate([7] * 250, max_tokens=50, sampling=GREEDY)
    assert out.stats.stop_reason in ("context", "eos")
    assert out.stats.generated_tokens <= 7
    with pytest.raises(edgemoe.UsageError, match="256"):
        model.stream([7] * 256)


@pytest.mark.parametrize(
    ("prompt", "settings", "match"),
    [
        ([], {}, "empty"),
        ([4096], {}, "4095"),
        ([-1], {}, "4095"),
        ("x", {"max_tokens": 0}, "max_tokens"),
        ("\udcff", {}, "UTF-8"),
    ],
)
def test_bad_requests(model: edgemoe.Model, prompt: object, settings: dict, match: str) -> None:
    with pytest.raises(edgemoe.UsageError, match=match):
        model.stream(prompt, **settings)  # type: ignore[arg-type]
    assert model.generate("ok", max_tokens=1, sampling=GREEDY).stats.generated_tokens == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 5},
        {"dense_bits": 7},
        {"threads": 0},
        {"threads": 10_000},
        {"ctx_size": 0},
        {"ctx_size": 1025},
        {"kv_type": "f32"},
        {"kv_type": "q4"},
        {"mem": "lots"},
        {"mem": "0"},
    ],
)
def test_bad_settings(settings: dict) -> None:
    with pytest.raises(edgemoe.UsageError):
        edgemoe.load(**settings)


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(edgemoe.StoreError, match=r"nosuch\.emoe"):
        edgemoe.load(tmp_path / "nosuch.emoe")
    (tmp_path / "x.emoe").write_bytes(b"hello")
    with pytest.raises(edgemoe.StoreError):
        edgemoe.load(tmp_path / "x.emoe")


def test_damaged_weights_are_found_at_load(tmp_path: Path) -> None:
    data = bytearray(bundled_path().read_bytes())
    data[len(data) // 3] ^= 1
    (tmp_path / "m.emoe").write_bytes(data)
    with pytest.raises(edgemoe.ChecksumError, match="damaged"):
        edgemoe.load(tmp_path / "m.emoe", bits=8)


@pytest.mark.parametrize("quant", [QuantSpec(group_size=512), QuantSpec(levels=(2, 4, 6, 8))])
def test_layouts_the_kernels_lack_are_refused(tmp_path: Path, quant: QuantSpec) -> None:
    make_checkpoint(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps(byte_tokenizer(160)))
    convert(tmp_path / "hf", tmp_path / "m.emoe", quant=quant)
    with pytest.raises(edgemoe.StoreError, match="kernels"):
        edgemoe.load(tmp_path / "m.emoe")


def test_closed_model_says_so() -> None:
    model = edgemoe.load(bits=2, ctx_size=64)
    model.close()
    model.close()
    with pytest.raises(edgemoe.UsageError, match="closed"):
        model.generate("x", max_tokens=2)


def test_memory_comes_back() -> None:
    edgemoe.load(bits=8, ctx_size=64).close()
    before = budget.rss_bytes()
    for _ in range(4):
        with edgemoe.load(bits=8, ctx_size=64) as model:
            model.generate("x", max_tokens=2)
    assert budget.rss_bytes() < before + (20 << 20)


def test_opened_model_is_usable_and_owned() -> None:
    opened = open_model()
    assert opened.tokenizer.encode("Once upon a time")
    assert opened.config.num_experts == 16
    with edgemoe.load(opened, bits=4, ctx_size=128) as model:
        assert model.store_path == bundled_path()
    with pytest.raises(edgemoe.UsageError):
        opened.store.fileno()


def test_gil_is_free_while_kernels_run(model: edgemoe.Model) -> None:
    """Another Python thread advances while a prefill is in native code."""
    ticks, done = 0, threading.Event()

    def run() -> None:
        for _ in range(6):
            model.generate([7] * 250, max_tokens=1, sampling=GREEDY)
        done.set()

    worker = threading.Thread(target=run)
    worker.start()
    while not done.wait(0.001):
        ticks += 1
    worker.join()
    assert ticks > 20


def test_logits_hash(model: edgemoe.Model) -> None:
    def digest(prompt: str) -> str | None:
        out = model.generate(prompt, max_tokens=8, sampling=GREEDY, logits_hash=True)
        return out.logits_hash

    assert digest("Once upon") == digest("Once upon") != digest("Once there")
    assert model.generate("Once", max_tokens=1).logits_hash is None
    assert len(digest("x") or "") == 64


def test_forward_rows(model: edgemoe.Model) -> None:
    from edgemoe.model import Span

    cache = model.new_cache()
    out = model.forward([1, 2, 3], [Span(cache, 3)], [2, 0])
    assert out.shape == (2, 4096)
    assert out.dtype == np.float32
    assert cache.length == 3


@pytest.mark.parametrize(("kv_type", "limit"), [("f16", 5e-4), ("int8", 1e-3)])
def test_what_the_kv_type_costs(kv_type: str, limit: float) -> None:
    """Mean KL divergence from a float32 cache; any change moves activations to other codes."""
    texts = json.loads((Path(__file__).parent / "golden" / "greedy.json").read_text())["tokens"]
    ids = np.concatenate(texts)[:500]

    def log_softmax(z: np.ndarray) -> np.ndarray:
        z = z.astype(np.float64) - z.max(axis=-1, keepdims=True)
        return np.asarray(z - np.log(np.exp(z).sum(axis=-1, keepdims=True)))

    with edgemoe.load(bits=8, ctx_size=512, kv_type=kv_type) as model:
        assert model.plan.kv_type == kv_type
        exact = KVCache(model.config, 512, "f32")
        want, got = (
            log_softmax(model.forward(ids, [Span(cache, 500)], range(500)))
            for cache in (exact, model.new_cache())
        )
        divergence = float((np.exp(want) * (want - got)).sum(axis=-1).mean())
        assert 0 < divergence <= limit


def test_a_smaller_cache_leaves_more_room() -> None:
    sizes = {}
    for kv_type in ("f16", "int8"):
        with edgemoe.load(bits=2, ctx_size=1024, kv_type=kv_type) as model:
            sizes[kv_type] = model.plan.budget.kv_cache
            held = model.new_cache()._data.nbytes
            assert held <= sizes[kv_type] <= held + 64
    assert 0.5 < sizes["int8"] / sizes["f16"] < 0.56


def test_prefill_takes_as_many_tokens_at_once_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The level comes first: a larger chunk never lowers it, nor crosses the ceiling."""
    monkeypatch.setattr(budget, "rss_bytes", lambda: 100 << 20)

    def plan(mem: int) -> RunPlan:
        with edgemoe.load(mem=mem, bits=8, ctx_size=1024) as loaded:
            assert loaded.plan.budget.needed <= mem
            return loaded.plan

    most = plan(1 << 30)  # of which the margin is the least there is, whatever the ceiling
    assert most.prefill_chunk == 512
    less = plan(most.budget.needed - 1)
    assert less.prefill_chunk == 256 and less.budget.scratch < most.budget.scratch
    least = plan(less.budget.needed - 1)
    assert least.prefill_chunk == 128
    assert not least.streamed
    assert plan(least.budget.needed - 1).streamed
    with edgemoe.load(ctx_size=200) as short:
        assert short.plan.prefill_chunk == 200


def test_batches_of_nothing_are_refused(model: edgemoe.Model) -> None:
    cache = model.new_cache()
    for tokens, counts in (([], []), ([], [0]), ([5], [1, 0]), ([5, 6], [1])):
        with pytest.raises(edgemoe.UsageError):
            model.forward(tokens, [Span(cache, n) for n in counts], [0])
    assert cache.length == 0
    with pytest.raises(edgemoe.UsageError, match="--ctx-size"):
        model.forward([5] * (cache.capacity + 1), [Span(cache, cache.capacity + 1)], [0])
