"""`edgemoe bench`: what is fed, what is counted, what the rounds add up to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from cli_model import CONFIG, fails, make_store, run
from coded import random_record

from edgemoe import kernels
from edgemoe.bench import bench
from edgemoe.bench.machine import OtherPrograms, cpu_name
from edgemoe.bench.measure import Workload, feed
from edgemoe.bench.result import Reading, Round, decoding, prefilling, rates, versus
from edgemoe.bench.timing import Spread, Timing
from edgemoe.bench.tokens import token_stream
from edgemoe.bench.traffic import bytes_read, gguf_traffic, products, traffic
from edgemoe.engine import Model, load
from edgemoe.errors import UsageError
from edgemoe.export import export
from edgemoe.layout import dense_layout
from edgemoe.store import Store
from edgemoe.terminal import bench as bench_output
from edgemoe.types import LEVELS, QuantSpec


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("store"), mlp_only_layers=[])


# What is fed.


@pytest.mark.parametrize("steps", [None, 129])
def test_tokens_are_those_of_the_shared_baseline(shared: Path, steps: int | None) -> None:
    """The lines of that script which make its stream, run here."""
    text = (shared / "bench" / "llamacpp_baseline.py").read_text()
    law = text[text.index("p = 1 / (") : text.index("def decode")]
    for vocab, prompt, rest in ((50304, 512, 64), (264, 7, 900)):
        env = {} if steps is None else {"STEPS": str(steps)}
        names = {"np": np, "vocab": vocab, "npp": prompt, "ntg": rest}
        names["os"] = SimpleNamespace(environ=env)
        exec(law, names)
        got = token_stream(vocab, prompt + rest, steps)
        assert got.dtype == np.int64 and np.array_equal(got, names["stream"])


def test_tokens_follow_the_law() -> None:
    """Frequencies of the first tokens within four standard errors, and every id in range."""
    vocab, n = 1000, 200_000
    got = token_stream(vocab, n)
    assert got.min() >= 0 and got.max() < vocab
    p = 1 / (np.arange(vocab) + 2.7)
    p /= p.sum()
    seen = np.bincount(got, minlength=vocab) / n
    assert (np.abs(seen - p) < 4 * np.sqrt(p / n) + 1e-6)[:50].all()
    assert token_stream(10, 5, 3).tolist() == [0, 1, 2, 0, 1]
    with pytest.raises(UsageError, match="--steps 11 is more than the 10 tokens"):
        token_stream(10, 5, 11)


def test_a_round_feeds_the_stream_and_nothing_else(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[list[int]] = []
    caches = []
    original = Model.forward

    def forward(self: Model, tokens: Any, spans: Any, want: Any) -> Any:
        batches.append(list(tokens))
        caches.append(spans[0].cache)
        assert spans[0].count == len(tokens) and want == [len(tokens) - 1]
        return original(self, tokens, spans, want)

    monkeypatch.setattr(Model, "forward", forward)
    monkeypatch.setattr("edgemoe.planning.PREFILL_CHUNKS", (128,))
    tokens = token_stream(CONFIG["vocab_size"], 307)
    with load(store, ctx_size=307) as model:
        between: list[int] = []
        for _ in range(2):
            batches.clear()
            timing = feed(model, Workload(tokens, 300), lambda: between.append(len(batches)))
            assert [len(b) for b in batches] == [128, 128, 44, *[1] * 7]
            assert np.concatenate(batches).tolist() == tokens.tolist()
            assert between.pop() == 3 and len(timing.steps_s) == 7
            assert min(timing.prefill_s, *timing.steps_s) > 0
            assert caches[-1].length == 307
    assert caches[0] is not caches[-1]  # each round has a fresh sequence


# What is counted.


@pytest.mark.parametrize("level", range(len(LEVELS)))
def test_bytes_read_are_those_that_matter(level: int) -> None:
    """Of a matrix whose parts need no padding: the bytes whose change changes its product."""
    rng = np.random.default_rng(level)
    layout = dense_layout(128, 32, QuantSpec())
    segments = random_record(layout, rng)[0][: level + 1]
    matrix = kernels.NestedMatrix.of(layout, segments)
    pool = kernels.new_pool(1)
    x = rng.uniform(1, 2, (1, 32)).astype(np.float32)  # no code is 0
    before = kernels.linear(pool, x, [matrix])[0].tobytes()
    mattered = 0
    for segment in segments:
        for i in range(segment.size):
            segment[i] ^= 1
            mattered += kernels.linear(pool, x, [matrix])[0].tobytes() != before
            segment[i] ^= 1
    assert mattered == bytes_read(layout, level)


@pytest.mark.parametrize("tied", [False, True])
def test_traffic_of_a_store(tied: bool, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"mlp_only_layers": [], "tie_word_embeddings": tied}
    with Store.open(make_store(tmp_path, **settings)) as opened:
        cfg, done = opened.config, products(opened)
        layers, heads = cfg.num_hidden_layers, cfg.num_attention_heads
        attention = cfg.hidden_size * cfg.head_dim * 2 * (heads + cfg.num_key_value_heads)
        expert = 3 * cfg.hidden_size * cfg.moe_intermediate_size
        assert done.body == layers * (attention + cfg.num_experts_per_tok * expert)
        assert done.head == cfg.vocab_size * cfg.hidden_size
        read = [traffic(opened, i, i) for i in range(len(LEVELS))]
        for part in ("experts", "dense", "head", "embedding", "total"):
            sizes = [getattr(t, part) for t in read]
            assert sizes == sorted(sizes) and 0 < sizes[0] < sizes[-1], part
        expert_read = bytes_read(opened.expert_layout(0), 4)
        assert read[4].experts == layers * cfg.num_experts_per_tok * expert_read
        assert read[4].head >= done.head  # a byte a weight, and scales
        assert read[4].embedding == read[4].head // cfg.vocab_size
        assert len({t.float32 for t in read}) == 1
        mixed = traffic(opened, 0, 4)
        assert (mixed.experts, mixed.dense) == (read[0].experts, read[4].dense)


@pytest.mark.parametrize("tied", [False, True])
def test_traffic_of_a_gguf(tied: bool, tmp_path: Path) -> None:
    """Float16 matrices: two bytes for each multiply-add of a token, a row of the embedding."""
    path = make_store(tmp_path, mlp_only_layers=[], tie_word_embeddings=tied)
    export(path, tmp_path / "x.gguf")
    with Store.open(path) as opened:
        done, cfg = products(opened), opened.config
        float32 = traffic(opened, 0, 0).float32
    size, read = gguf_traffic(tmp_path / "x.gguf", cfg)
    assert size == (tmp_path / "x.gguf").stat().st_size
    assert read == 2 * (done.body + done.head + cfg.hidden_size) + float32


# What the rounds add up to.


def test_rates_shares_and_ratios() -> None:
    times = [(2.0, 1.0), (1.0, 1.0), (4.0, 2.0), (2.0, 4.0), (2.0, 2.0)]
    rounds = [
        Round(
            Timing(p, (d / 2, d / 2)),
            prefill=Reading(0, 1.0, 0.0, 4.0),
            decode=Reading(0, 1.0, 0.0, 4.0),
            stream_bytes_s=10e9,
            int8_peak=100e9,
            theirs={"a": Timing(6.0, (3.0,)), "b": Timing(3.0, (6.0,))},
            others_cpus=0.0,
        )
        for p, d in times
    ]
    prefill = prefilling(rounds, 100, 40 * 10**9)
    assert prefill.tok_s == Spread(p10=25 + 0.4 * 25, median=50.0, p90=50 + 0.6 * 50)
    assert (prefill.gmac_s.median, prefill.share.median) == (20.0, pytest.approx(0.2))
    assert prefill.int8_peak_gmac_s.median == 100
    decode = decoding(rounds, 10, 10**9)
    assert (decode.tok_s.median, decode.gb_s.median, decode.stream_gb_s.p90) == (5, 5, 10)
    assert decode.share.median == pytest.approx(0.5)
    against = versus(rounds, 100, lambda t: t.prefill_s)
    assert against is not None and (against.against, against.ratio.median) == ("b", 1.5)
    against = versus(rounds, 10, lambda t: t.decode_s)
    assert against is not None and (against.against, against.ratio.median) == ("a", 1.5)
    assert versus(rounds, 0, lambda t: t.decode_s) is None
    assert rates(rounds, "a", 12, lambda t: t.prefill_s) == Spread(2.0, 2.0, 2.0)


def test_a_benchmark(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgemoe.planning.PREFILL_CHUNKS", (128,))
    seen: list[tuple[int, int, str]] = []
    result = bench(
        store, prompt_tokens=140, generated_tokens=5, rounds=3, bits=3, dense_bits=4, threads=2,
        kv_type="int8", progress=lambda *step: seen.append(step),
    )  # fmt: skip
    assert (result.bits, result.dense_bits, result.kv_type) == (3, 4, "int8")
    assert (result.prompt_tokens, result.generated_tokens, len(result.rounds)) == (140, 5, 3)
    assert result.machine.threads == 2 and result.machine.isa == kernels.isa()
    assert result.prefill is not None and result.decode is not None
    with Store.open(store) as opened:
        read, done = traffic(opened, 1, 2), products(opened)
    assert result.bytes_per_token == read
    for r in result.rounds:
        assert len(r.ours.steps_s) == 5 and r.stream_bytes_s > 1e8 and r.int8_peak > 1e8
    prefill, decode = result.prefill, result.decode
    macs = 140 * done.body + 2 * done.head  # two chunks, each with the logits of its last token
    assert prefill.gmac_s.median == pytest.approx(prefill.tok_s.median * macs / 140e9)
    assert decode.gb_s.median == pytest.approx(decode.tok_s.median * read.total / 1e9)
    assert 0 < decode.share.median < 1 and 0 < prefill.share.median < 1
    assert [step[:2] for step in seen] == [(i + 1, 5) for i in range(5)]
    memory = result.memory
    assert read.total < memory.weights_bytes < memory.peak_rss_bytes <= memory.mem_budget_bytes


def test_parts_can_be_left_out(store: Path) -> None:
    settings: dict[str, Any] = {"rounds": 1, "threads": 1}
    decoded = bench(store, prompt_tokens=0, generated_tokens=2, **settings)
    assert decoded.prefill is None and decoded.decode is not None
    assert decoded.rounds[0].int8_peak == 0
    prefilled = bench(store, prompt_tokens=2, generated_tokens=0, steps=2, **settings)
    assert prefilled.decode is None and prefilled.prefill is not None
    assert prefilled.tokens == "0 .. 1 in turn" and prefilled.rounds[0].stream_bytes_s == 0


def test_cpu_name(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: Some CPU\nmodel name\t: other\n")
    assert cpu_name(info) == "Some CPU"
    assert cpu_name(tmp_path / "nothing") != ""


def test_other_programs() -> None:
    """A busy child counts, unless it is one of those that are measured."""
    spin = "import time; print(flush=True); end = time.time() + 20\nwhile time.time() < end: pass"
    with subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline()
        without = OtherPrograms([os.getpid()])
        with_it = OtherPrograms([os.getpid(), child.pid])
        used = psutil.Process(child.pid)
        before, start = sum(used.cpu_times()[:2]), time.monotonic()
        time.sleep(1)
        share = (sum(used.cpu_times()[:2]) - before) / (time.monotonic() - start)
        difference = without.cpus() - with_it.cpus()
        child.kill()
    assert share > 0.1 and abs(difference - share) < 0.1


def test_warning_of_other_programs() -> None:
    assert bench_output._warning(0.1) == []
    assert "other programs used 1.3 CPUs" in bench_output._warning(1.3)[0]


# The command.


def test_json(store: Path) -> None:
    code, out, err = run(
        "bench", store, "-p", 20, "-n", 3, "--rounds", 2, "--bits", 2, "--dense-bits", 3,
        "-t", 2, "--mem", "600M", "--json",
    )  # fmt: skip
    assert code == 0 and out.count("\n") == 1, err
    got = json.loads(out)
    assert set(got) == {
        "model", "machine", "bits", "mean_bits", "dense_bits", "kv_type", "read_settings",
        "prompt_tokens", "generated_tokens",
        "tokens", "prefill", "decode", "bytes_per_token", "products_per_token", "memory",
        "llama_cpp", "others_cpus", "rounds",
    }  # fmt: skip
    assert (got["bits"], got["dense_bits"], got["machine"]["threads"]) == (2, 3, 2)
    assert got["llama_cpp"] is None and len(got["rounds"]) == 2
    assert len(got["rounds"][0]["ours"]["steps_s"]) == 3
    parts = dict(got["bytes_per_token"])
    assert parts.pop("total") == sum(parts.values())
    assert got["memory"]["mem_budget_bytes"] == 600 << 20
    for part in ("prefill", "decode"):
        for spread in got[part].values():
            assert 0 < spread["p10"] <= spread["median"] <= spread["p90"]


def test_table_and_progress(store: Path) -> None:
    code, out, err = run("bench", store, "-p", 9, "-n", 2, "--rounds", 1, "-t", 1)
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith("tiny.emoe: 8-bit experts, 8-bit dense weights, f16 keys and values")
    assert lines[4].startswith("prefill of 9, tokens/s")
    assert "share of reading memory" in out and "MB of weights: experts" in out
    assert err.splitlines()[-1].startswith("bench: 100 %")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("-p 0 -n 0", "-p 0 and -n 0 leave nothing to measure"),
        ("-p 32768 -n 1", "more than the context of 32768 tokens"),
        ("-p -1", "must be a whole number from 0"),
        ("--rounds 0", "must be a whole number from 1"),
        ("--steps 265", "--steps 265 is more than the 264 tokens"),
        ("--steps 0", "must be a whole number from 1"),
        ("-t 10000", "must be a whole number from 1 to 1024"),
        ("--kv-type f64", "'f64' is not one of"),
        ("--bits 5", "must be 2, 3, 4, 6 or 8, not 5"),
        ("--vs llama.cpp", "needs --gguf FILE"),
        ("--gguf x.gguf", "are for --vs llama.cpp"),
        ("--vs vllm --gguf x.gguf", "'vllm' is not 'llama.cpp'"),
    ],
)
def test_bad_input(store: Path, line: str, says: str) -> None:
    fails("bench", store, *line.split(), says=says, code=2)


def test_bad_models(tmp_path: Path, store: Path) -> None:
    fails("bench", tmp_path / "x.emoe", says="cannot open the model")
    fails("bench", store, "--mem", "64M", says="--mem 64.0 MiB is too little")
