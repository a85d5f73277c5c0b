"""`edgemoe convert` and `edgemoe inspect`."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
from cli_model import (
    CONFIG,
    make_checkpoint,
    make_store,
    run,
    start,
)

from edgemoe.store import Store
from edgemoe.terminal import long_job


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a chat template."""
    return make_store(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 26 M weights, that takes a second to convert."""
    directory = tmp_path_factory.mktemp("large") / "src"
    return make_checkpoint(directory, hidden_size=512, moe_intermediate_size=1024, num_experts=8)


# convert


def test_convert_and_run(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "src")
    code, out, err = run("convert", "src", "out name.emoe", cwd=tmp_path)
    assert code == 0
    assert re.fullmatch(
        r"out name\.emoe: [\d.]+ M weights in [\d.]+ KiB \([\d.]+ bits each, all levels up to 8"
        r" together\), [\d.]+ s; try: edgemoe run 'out name\.emoe'\n",
        out,
    )
    assert err == "out name.emoe: 100 %, 0:00 left (lm_head)\n"
    assert sorted(os.listdir(tmp_path)) == ["out name.emoe", "src"]
    assert run("run", "out name.emoe", "hi", "-n", "2", cwd=tmp_path)[0] == 0


def test_a_store_for_small_disks(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "src")
    run("convert", "src", "whole.emoe", cwd=tmp_path)
    code, out, _ = run("convert", "src", "small.emoe", "--max-level", "4", cwd=tmp_path)
    assert code == 0 and "all levels up to 4 together" in out
    sizes = [(tmp_path / name).stat().st_size for name in ("small.emoe", "whole.emoe")]
    assert sizes[0] < sizes[1]
    code, out, err = run("run", "small.emoe", "hi", "-n", "2", cwd=tmp_path)
    assert code == 0 and "4-bit experts" in err
    code, out, err = run("run", "small.emoe", "hi", "--bits", "6", cwd=tmp_path)
    assert code == 2 and "up to 4 bits; convert the model again with --max-level 6" in err
    code, out, _ = run("inspect", "small.emoe", "--json", "--verify", cwd=tmp_path)
    facts = json.loads(out)
    assert code == 0 and facts["quant"]["max_level"] == 4
    levels = facts["levels"]
    assert levels["8"]["experts_bytes"] == levels["4"]["experts_bytes"]
    assert levels["8"]["dense_bytes"] > levels["4"]["dense_bytes"]
    code, _, err = run("convert", "src", "x.emoe", "--max-level", "5", cwd=tmp_path)
    assert code == 2 and "'5' is not one of '4', '6', '8'" in err


def test_a_store_for_some_text(tmp_path: Path) -> None:
    """Any script will do; texts share the tokens that are taken."""
    make_checkpoint(tmp_path / "src")
    (tmp_path / "a.txt").write_text("Once upon a time there was a fox. " * 300)
    (tmp_path / "b.txt").write_text("昔々あるところに狐がいました。" * 99, encoding="utf-8")
    args = ("--calib", "a.txt", "--calib", "b.txt")
    code, _, err = run("convert", "src", "x.emoe", *args, cwd=tmp_path)
    assert code == 0 and "100 %" in err
    code, out, _ = run("inspect", "x.emoe", "--json", "--verify", cwd=tmp_path)
    assert code == 0 and json.loads(out)["metadata"]["quantizer"] == "affine8-nested"
    code, _, err = run("run", "x.emoe", "hi", "-n", "4", "--bits", "2", cwd=tmp_path)
    assert code == 0, err


def test_progress_in_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 1.0, 6.0, 7.0, 5400.0])
    monkeypatch.setattr("edgemoe.terminal.long_job.time.monotonic", lambda: next(clock))
    lines = long_job.Lines("m.emoe")
    for done in (1, 2, 3, 4):
        lines(done, 1000, f"part {done}")
    assert capsys.readouterr().err.splitlines() == [
        "m.emoe: 0 %, 49:54 left (part 2)",
        "m.emoe: 0 %, 373:30:00 left (part 4)",
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_conversion_that_is_ended_leaves_no_out(
    number: signal.Signals, large: Path, tmp_path: Path
) -> None:
    out = tmp_path / "x.emoe"
    with start("convert", large, out) as process:
        end = time.monotonic() + 60
        while not os.listdir(tmp_path):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.002)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert not out.exists() and b"Traceback" not in err
    if number != signal.SIGKILL:
        assert os.listdir(tmp_path) == []
    assert run("convert", large, out)[0] == 0
    assert os.listdir(tmp_path) == ["x.emoe"]


# inspect


def test_inspect_json(store: Path) -> None:
    code, out, err = run("inspect", store, "--json", "--verify")
    assert code == 0 and err == "" and out.count("\n") == 1
    facts = json.loads(out)
    assert facts["damaged"] == []
    assert facts["config"]["model_type"] == "qwen3_moe"
    assert facts["config"]["num_experts"] == 4
    sizes = facts["sizes"]
    assert sizes["file_bytes"] == store.stat().st_size
    parts = [sizes[k]["bytes"] for k in ("experts", "dense", "float32")]
    total = sum(parts) + sum(sizes["sections"].values())
    assert total + sizes["dead_bytes"] + sizes["overhead_bytes"] == sizes["file_bytes"]
    with Store.open(store) as opened_store:
        layout = opened_store.expert_layout(0)
        nested = [t.layout for t in opened_store.tensors.values() if t.layout is not None]
        for i, level in enumerate(opened_store.quant.levels):
            row = facts["levels"][str(level)]
            expert = sum(layout.segment_sizes[: i + 1])
            assert row["experts_bits_per_weight"] == 8 * expert / layout.weights()
            dense = sum(sum(x.segment_sizes[: i + 1]) for x in nested)
            assert row["dense_bytes"] == dense
            assert row["model_bytes"] == 8 * expert + dense + sizes["float32"]["bytes"]
            assert row["model_bits_per_weight"] == 8 * row["model_bytes"] / facts["weights"]
            assert row["experts_bits_per_weight"] > level  # scales are counted


def test_active_weights(tmp_path: Path) -> None:
    """Counted by hand: two of four experts, and one row of the embedding unless it is the head."""
    from tiny_checkpoints import make_tensors

    from edgemoe.terminal.inspect import describe

    for tied in (False, True):
        where = tmp_path / str(tied)
        where.mkdir()
        with Store.open(make_store(where, tie_word_embeddings=tied)) as opened_store:
            facts = describe(opened_store)
        active = everything = 0
        for name, array in make_tensors(CONFIG | {"tie_word_embeddings": tied}).items():
            everything += array.size
            if "embed" in name and not tied:
                active += array.shape[1]
            elif not re.search(r"experts\.[23]\.", name):
                active += array.size
        assert (facts["weights"], facts["active_weights"]) == (everything, active)


def test_inspect_text(store: Path) -> None:
    code, out, _ = run("inspect", store)
    assert code == 0
    for expected in (
        r"qwen3_moe, 0\.02 M weights",
        r"3 layers, 2 with 4 experts of which 2 work on a token; hidden size 16, expert size 12",
        r"KV cache \d+ B \(f16\) or \d+ B \(int8\) a token",
        r"vocabulary 264, context 32768",
        r"\nexperts +0\.00 M +[\d.]+ KiB +[\d.]+ %\n",
        r"\n2 bits +[\d.]+ KiB +[\d.]+ ",
        r"\n8 bits ",
        r"checksums: CRC32C of \d+ segments and 4 sections, not compared \(--verify does\)\n$",
    ):
        assert re.search(expected, out), out
    assert re.search(r"sections, all as written\n$", run("inspect", store, "--verify")[1])
