"""A checkpoint becomes a store: the right numbers, little memory, and nothing half-done."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from convert_samples import Source, make_checkpoint
from tiny_checkpoints import OLMOE, QWEN3, make_tensors, pack_experts, write_checkpoint

from edgemoe.arch import EXPERT_PARTS, is_nested
from edgemoe.checkpoint import open_checkpoint
from edgemoe.layout import RecordLayout, dense_layout
from edgemoe.mwq import convert as convert_module
from edgemoe.mwq.convert import convert
from edgemoe.mwq.packing import decode, pack_record
from edgemoe.mwq.quantize import quantize_matrix
from edgemoe.store import Store
from edgemoe.types import F32, U8, QuantSpec


def segments(store: Store, refs: list[Any]) -> list[U8]:
    out = [np.empty(r.size, np.uint8) for r in refs]
    for ref, array in zip(refs, out, strict=True):
        store.read_into(ref, array)
    return out


def packed(layout: RecordLayout, weights: list[F32]) -> list[bytes]:
    """What a record of these matrices must be, made in one go."""
    parts = [part for i, w in enumerate(weights) for part in quantize_matrix(w, layout, i)]
    return [s.tobytes() for s in pack_record(layout, *zip(*parts, strict=True))]


def assert_converted(source: Source, out: Path) -> None:
    with Store.open(out) as store:
        assert store.verify() == []
        config = store.config
        for layer in config.moe_layers:
            for expert in range(config.num_experts):
                weights = [source.weights[layer, expert, part] for part in EXPERT_PARTS]
                layout = store.expert_layout(layer)
                got = segments(store, [store.expert_segment(layer, expert, i) for i in range(5)])
                assert [s.tobytes() for s in got] == packed(layout, weights)
                for w, back in zip(weights, decode(layout, got, 4), strict=True):
                    assert np.abs(back - w).max() < 0.01 * np.abs(w).max()
        for name in store.tensors:
            w = source.weights[name]
            if is_nested(name):
                layout = store.expert_layout(layer)
                got = segments(store, store.tensor_segments(name))
                layout = dense_layout(w.shape[0], w.shape[1], store.quant)
                assert [s.tobytes() for s in got] == packed(layout, [w])
            else:
                np.testing.assert_array_equal(store.read_f32(name), w)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_every_weight_arrives(tmp_path: Path, dtype: str) -> None:
    source = make_checkpoint(tmp_path / "src", dtype)
    report = convert(source.path, tmp_path / "m.emoe")
    assert_converted(source, tmp_path / "m.emoe")
    assert report.weights == sum(w.size for w in source.weights.values())
    assert report.experts == 6
    assert report.tensors == sum(isinstance(key, str) for key in source.weights)
    assert report.file_bytes == (tmp_path / "m.emoe").stat().st_size
    with Store.open(tmp_path / "m.emoe") as store:
        assert store.config == open_checkpoint(source.path).config
        assert store.quant == QuantSpec()
        assert store.metadata["source"] == "src"
        for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
            assert store.section(name) == (source.path / name).read_bytes()
        assert "tokenizer_config.json" not in store.sections
    assert sorted(os.listdir(tmp_path)) == ["m.emoe", "src"]


def test_olmoe(tmp_path: Path) -> None:
    source = make_checkpoint(
        tmp_path / "src",
        model_type="olmoe",
        architectures=["OlmoeForCausalLM"],
        intermediate_size=40,
        moe_intermediate_size=None,
        head_dim=None,
        mlp_only_layers=None,
    )
    convert(source.path, tmp_path / "m.emoe")
    assert_converted(source, tmp_path / "m.emoe")
    with Store.open(tmp_path / "m.emoe") as store:
        assert store.config.qk_norm == "full"


@pytest.mark.parametrize("raw", [QWEN3, OLMOE], ids=["qwen3_moe", "olmoe"])
def test_packed_experts_and_shards_give_the_same_store(tmp_path: Path, raw: dict[str, Any]) -> None:
    tensors = make_tensors(raw)
    stores = []
    for i, (content, shards) in enumerate(
        ((tensors, 1), (pack_experts(tensors), 1), (tensors, 3), (pack_experts(tensors), 2))
    ):
        (tmp_path / str(i)).mkdir()
        source = write_checkpoint(tmp_path / str(i) / "src", raw, content, shards=shards)
        convert(source, tmp_path / f"{i}.emoe")
        stores.append((tmp_path / f"{i}.emoe").read_bytes())
    assert all(data == stores[0] for data in stores)


def test_runs_of_rows_do_not_change_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_checkpoint(tmp_path / "src")
    convert(source.path, tmp_path / "a")
    monkeypatch.setattr(convert_module, "_RUN_WEIGHTS", 1)
    convert(source.path, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_other_levels(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "src")
    convert(source.path, tmp_path / "m", quant=QuantSpec((2, 4, 6, 8), 64))
    with Store.open(tmp_path / "m") as store:
        assert store.quant == QuantSpec((2, 4, 6, 8), 64)
        got = segments(store, store.tensor_segments("embed"))
        layout = dense_layout(70, 72, store.quant)
        assert [s.tobytes() for s in got] == packed(layout, [source.weights["embed"]])


def test_progress_counts_every_weight_once(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "src")
    calls: list[tuple[int, int, str]] = []
    report = convert(source.path, tmp_path / "m", progress=lambda *a: calls.append(a))
    done = [c[0] for c in calls]
    assert done == sorted(done)
    assert done[-1] == report.weights
    assert {c[1] for c in calls} == {report.weights}
    assert calls[0][2] == "layer 0 expert 0"
    assert {"embed", "layers.1.down", "norm"} <= {c[2] for c in calls}


MEASURE = """
    import sys
    from edgemoe.mwq.convert import convert
    from edgemoe.checkpoint import open_checkpoint
    def peak():
        with open("/proc/self/status") as file:
            return next(int(l.split()[1]) * 1024 for l in file if l.startswith("VmHWM"))
    before = peak()
    convert(sys.argv[1], sys.argv[2])
    print(peak() - before)
"""


def peak_of_converting(source: Path, out: Path) -> int:
    """Bytes of resident memory that a conversion adds to the interpreter and its imports."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURE), str(source), str(out)],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
    )
    return int(done.stdout)


MIB = 1 << 20


def test_memory_does_not_follow_the_model(tmp_path: Path) -> None:
    """26 M weights: 100 MiB as float32, most of it in one matrix."""
    source = make_checkpoint(
        tmp_path / "src",
        vocab_size=24_000,
        hidden_size=512,
        tie_word_embeddings=True,
        moe_intermediate_size=4096,
        num_hidden_layers=2,
        num_experts=2,
        mlp_only_layers=[],
    )
    peak = peak_of_converting(source.path, tmp_path / "m.emoe")
    assert peak < 72 * MIB, f"{peak / MIB:.0f} MiB"


@pytest.mark.skipif("EDGEMOE_BIG_TESTS" not in os.environ, reason="EDGEMOE_BIG_TESTS is not set")
def test_memory_and_speed_of_a_large_model(tmp_path: Path) -> None:
    """A checkpoint of 600 MB in bfloat16."""
    source = make_checkpoint(
        tmp_path / "src",
        vocab_size=100_000,
        hidden_size=1024,
        num_hidden_layers=4,
        num_experts=16,
        moe_intermediate_size=1024,
        mlp_only_layers=[],
    )
    weights = sum(w.size for w in source.weights.values())
    source.weights.clear()
    start = time.monotonic()
    peak = peak_of_converting(source.path, tmp_path / "m.emoe")
    seconds = time.monotonic() - start
    print(
        f"{2 * weights / 1e6:.0f} MB, {seconds:.1f} s, {weights / seconds / 1e6:.1f} M weights/s,"
        f" peak {peak / MIB:.0f} MiB"
    )
    assert weights > 290e6
    assert peak < 300 * MIB
    shutil.rmtree(tmp_path)


def test_descriptors_are_given_back(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "src")
    before = len(os.listdir("/proc/self/fd"))
    convert(source.path, tmp_path / "m")
    assert len(os.listdir("/proc/self/fd")) == before
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + 8, hard))
    try:
        convert(source.path, tmp_path / "m")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
