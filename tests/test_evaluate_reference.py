"""The reference of an evaluation: the same bits however much memory, and what may be one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import export_samples
import numpy as np
import pytest
from cli_model import CONFIG, fails, make_checkpoint, run, start, tokenizer_json
from evaluation_windows import some_windows
from tiny import CONFIGS, make_tiny
from tiny_checkpoints import OLMOE, QWEN3, make_tensors, write_checkpoint

import edgemoe
from edgemoe import reference_cache, reference_logits
from edgemoe.checkpoint import Checkpoint, open_checkpoint
from edgemoe.cpu_attn.kv_cache import KVCache, OnePass
from edgemoe.errors import MemoryBudgetError, UsageError
from edgemoe.evaluate import Window
from edgemoe.export import export
from edgemoe.model import Span
from edgemoe.reference_logits import FloatPlan, float_logits, plan_float

MIB = 1 << 20


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(directory))
    return directory


def logits_of(
    checkpoint: Checkpoint, todo: Sequence[Window], plan: FloatPlan, threads: int = 2
) -> list[np.ndarray]:
    """All scored rows of each window, float32 [targets, vocab]."""
    out: list[list[np.ndarray]] = [[] for _ in todo]
    for i, at, block in float_logits(checkpoint, todo, plan, threads):
        assert at == sum(map(len, out[i])), "rows come in order"
        out[i].append(block)
    return [np.concatenate(blocks) for blocks in out]


LENGTHS = (90, 90, 400, 700, 1300, 5, 2, 600)


@pytest.mark.parametrize("raw", [QWEN3, OLMOE], ids=["qwen3", "olmoe"])
def test_layer_by_layer_gives_the_bits_of_all_in_memory(
    tmp_path: Path, raw: dict[str, Any]
) -> None:
    raw = raw | {"max_position_embeddings": 2048}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, raw))
    todo = some_windows(raw["vocab_size"], LENGTHS)
    want = logits_of(checkpoint, todo, FloatPlan(True, 10**9), threads=1)
    assert [len(x) for x in want] == [len(w.targets) for w in todo]
    for plan in (FloatPlan(True, 1300), FloatPlan(False, 10**9), FloatPlan(False, 1300)):
        got = logits_of(checkpoint, todo, plan)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)


def test_every_matrix_is_read_once_a_batch_and_none_is_kept(tmp_path: Path) -> None:
    raw = QWEN3 | {"max_position_embeddings": 2048}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, raw))
    reads: list[str] = []
    tensor, expert = checkpoint.tensor, checkpoint.expert

    def counted_tensor(name: str, **rows: Any) -> Any:
        reads.append(name)
        return tensor(name, **rows)

    def counted_expert(layer: int, e: int) -> Any:
        reads.append(f"{layer}.{e}")
        return expert(layer, e)

    checkpoint.tensor = counted_tensor  # type: ignore[method-assign]
    checkpoint.expert = counted_expert  # type: ignore[method-assign]
    todo = some_windows(40, [500] * 8)
    logits_of(checkpoint, todo, FloatPlan(False, 2000))
    matrices = [n for n in set(reads) if n.endswith((".q", ".o", ".up", "lm_head"))]
    assert len(matrices) == 3 + 3 + 1 + 1
    for name in [*matrices, "0.0", "2.3"]:
        assert reads.count(name) == 2, name  # two batches of two groups
    reads.clear()
    logits_of(checkpoint, todo, FloatPlan(True, 2000))
    assert {reads.count(n) for n in [*matrices, "0.0", "2.3"]} == {1}


@pytest.mark.parametrize("name", [n for n in CONFIGS if n.endswith("-options")][:3])
def test_logits_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    model = make_tiny(tmp_path, name)
    todo = some_windows(160, [40, 41, 200, 9], seed=1)
    got = logits_of(open_checkpoint(tmp_path), todo, FloatPlan(False, 210))
    for window, ours in zip(todo, got, strict=True):
        with torch.no_grad():
            want = model(torch.from_numpy(window.tokens)[None]).logits[0].numpy()
        want = want[window.first : -1]
        assert np.abs(ours - want).max() / np.abs(want).max() <= 1e-4


def test_one_pass_attention_equals_the_cache() -> None:
    """Bit for bit, on a model whose rows do not depend on how a sequence is cut."""
    ids = np.random.default_rng(0).integers(1, 4000, 150)
    with edgemoe.load(bits=3, ctx_size=160) as model:
        whole = model.hidden(ids, [Span(OnePass(model.config), 150)])
        kept = KVCache(model.config, 160, "f32")
        parts = [model.hidden(p, [Span(kept, len(p))]) for p in np.split(ids, [100, 101])]
        np.testing.assert_array_equal(whole, np.concatenate(parts))
        used = OnePass(model.config)
        model.hidden(ids[:3], [Span(used, 3)])
        with pytest.raises(UsageError):
            model.hidden(ids[:3], [Span(used, 3)])
        with pytest.raises(UsageError):
            kept.rewind(151)


def test_how_a_reference_is_run_follows_from_the_ceiling(tmp_path: Path) -> None:
    raw = OLMOE | {"hidden_size": 256, "intermediate_size": 512, "num_experts": 8}
    raw |= {"max_position_embeddings": 600, "num_hidden_layers": 4}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, raw, dtype="BF16"))
    todo = some_windows(40, [512] * 40)
    plans = {}
    needed = None
    for mib in range(8, 400, 4):
        try:
            plans[mib] = plan_float(checkpoint, todo, 2, mib * MIB + 50 * MIB, 10 * MIB)
        except MemoryBudgetError as error:
            assert not plans
            assert error.budget_bytes == (mib + 50) * MIB
            assert f"give --mem {-(-error.needed_bytes >> 20)}M or more" in str(error)
            needed = error.needed_bytes
    assert needed is not None
    assert not plan_float(checkpoint, todo, 2, needed, 10 * MIB).keep
    with pytest.raises(MemoryBudgetError):
        plan_float(checkpoint, todo, 2, needed - MIB, 10 * MIB)
    kept = [plan.keep for plan in plans.values()]
    assert kept == sorted(kept) and set(kept) == {False, True}
    streamed = [plan.batch for plan in plans.values() if not plan.keep]
    assert streamed == sorted(streamed) and streamed[0] < streamed[-1]
    too_long = some_windows(40, [602])
    with pytest.raises(UsageError, match="context of 600"):
        plan_float(checkpoint, too_long, 2, 1 << 40, 0)


STREAM = """
import json, sys, time, numpy as np
from edgemoe.checkpoint import open_checkpoint
from edgemoe.evaluate import Window
from edgemoe.loader import budget
from edgemoe.reference_logits import plan_float, reference
path, mem, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
checkpoint = open_checkpoint(path)
todo = [Window(np.arange(512) * (2 * i + 7) % 4096, 255) for i in range(count)]
used, start = budget.rss_bytes(), time.monotonic()
keep = plan_float(checkpoint, todo, 2, mem, used).keep
reference(checkpoint, todo, threads=2, ceiling=mem, used=used).close()
print(json.dumps([keep, budget.peak_rss_bytes(), time.monotonic() - start]))
"""


def streamed(path: Path, mem: int, count: int) -> tuple[bool, int, float]:
    """(all in memory, peak memory in bytes, seconds) of so many windows of 512, in a process."""
    env = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", STREAM, str(path), str(mem), str(count)]
    out = subprocess.run(command, capture_output=True, text=True, env=env)
    assert out.returncode == 0, out.stderr
    keep, peak, seconds = json.loads(out.stdout)
    print(f"{count * 511} tokens: peak {peak / MIB:.0f} of {mem / MIB:.0f} MiB, {seconds:.0f} s")
    return keep, peak, seconds


def test_a_checkpoint_larger_than_the_ceiling_stays_below_it(tmp_path: Path) -> None:
    """197 MB of float32 weights in all, under a ceiling of 160 MiB for the whole process."""
    raw = OLMOE | {"hidden_size": 512, "intermediate_size": 256, "num_experts": 36}
    raw |= {"vocab_size": 4096, "num_hidden_layers": 3, "max_position_embeddings": 512}
    tensors = make_tensors(raw)
    assert sum(x.nbytes for x in tensors.values()) > 1.1 * 160 * MIB
    write_checkpoint(tmp_path / "big", raw, tensors, dtype="BF16")
    keep, peak, _ = streamed(tmp_path / "big", 160 * MIB, 4)
    assert not keep
    assert peak <= 160 * MIB


@pytest.mark.skipif("EDGEMOE_BIG_GGUF" not in os.environ, reason="EDGEMOE_BIG_GGUF is not set")
def test_a_model_far_larger_than_the_machine() -> None:
    """EDGEMOE_BIG_GGUF: a file of ../shared/bench/synth_gguf.py qwen3 q4k, 122 GB in float32."""
    keep, peak, _ = streamed(Path(os.environ["EDGEMOE_BIG_GGUF"]), 2500 * MIB, 4)
    assert not keep
    assert peak <= 2500 * MIB


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "tiny")
    store, text = tmp_path / "tiny.emoe", tmp_path / "text.txt"
    edgemoe.convert(checkpoint, store)
    text.write_text("some words " * 10)
    command = ["eval", store, "--text", text, "--ctx", "32", "--mem", "512M", "--ref"]
    larger = make_checkpoint(tmp_path / "larger", vocab_size=300)
    says = "larger has a vocabulary of 300 tokens and the store one of 264"
    fails(*command, larger, says=says, code=2)
    swapped = json.loads(tokenizer_json())
    vocab = swapped["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (checkpoint / "tokenizer.json").write_text(json.dumps(swapped))
    says = r"tiny: token \d+ is b'b' there and b'a' in the store"
    fails(*command, checkpoint, says=says, code=2)
    # the same tokens, otherwise spelled, are the same vocabulary
    (checkpoint / "tokenizer.json").write_text(json.dumps(json.loads(tokenizer_json()), indent=1))
    with start(*command, checkpoint) as process:
        process.communicate(timeout=60)
    assert process.returncode == 0


def test_top_and_groups_are_what_they_say() -> None:
    todo = some_windows(40, LENGTHS)
    groups = reference_logits._groups(todo)
    assert [i for g in groups for i in g] == list(range(len(todo)))
    assert [sum(len(todo[i].inputs) for i in g) for g in groups] == [577, 699, 1299, 604]
    assert CONFIG["vocab_size"] < reference_logits.TOP


def test_a_gguf_is_a_reference_too(tmp_path: Path) -> None:
    """Text is tokenized by the store; the same weights in F16 are the same reference."""
    checkpoint = tmp_path / "m"
    export_samples.make_checkpoint(checkpoint, "qwen3_moe")
    store, file, text = tmp_path / "m.emoe", tmp_path / "m.gguf", tmp_path / "text.txt"
    edgemoe.convert(checkpoint, store)
    export(checkpoint, file, type="f16")
    text.write_text("some words and some more " * 12)
    todo = some_windows(100, [300, 900, 4, 30])
    opened = open_checkpoint(file)
    want = logits_of(opened, todo, FloatPlan(True, 10**9), threads=1)
    for a, b in zip(logits_of(opened, todo, FloatPlan(False, 1000)), want, strict=True):
        np.testing.assert_array_equal(a, b)
    figures = []
    for ref in (checkpoint, file):
        arguments = ["eval", store, "--text", text, "--ctx", "64", "--bits", "8", "--ref", ref]
        code, out, err = run(*arguments, "--mem", "512M", "--json")
        assert code == 0, err
        figures.append(json.loads(out))
    assert figures[0]["ref_ppl"] == pytest.approx(figures[1]["ref_ppl"], rel=1e-5)
    assert figures[0]["kld"] == pytest.approx(figures[1]["kld"], rel=1e-3)
    assert len(list(reference_cache.directory().iterdir())) == 2
