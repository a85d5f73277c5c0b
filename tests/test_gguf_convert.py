"""GGUF files to stores: the same ones as from Hugging Face, and models that replay real routing."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cli_model import fails, run
from gguf_samples import all_of, read_hugging_face, to_gguf_tensors, write_gguf
from tiny import make_tiny
from tiny_checkpoints import QWEN3, make_tensors

import edgemoe
from edgemoe import kernels
from edgemoe.checkpoint import open_checkpoint
from edgemoe.cpu_attn.kv_cache import KVCache
from edgemoe.errors import UsageError
from edgemoe.loader.arena import Arena
from edgemoe.loader.resident import ResidentExperts, dense_bytes, expert_bytes
from edgemoe.model import Experts, Span, forward
from edgemoe.mwq.convert import convert
from edgemoe.pipeline.bit_router import OneLevel
from edgemoe.pipeline.serial import SerialExperts
from edgemoe.sampling import SamplingParams
from edgemoe.store import Store
from edgemoe.types import F32, I32, LEVELS
from edgemoe.weights import FloatExperts, from_checkpoint, from_store

MIB = 1 << 20
MEASURE = """
    import sys
    from edgemoe.mwq.convert import convert
    from edgemoe.checkpoint import gguf_tokenizer, open_checkpoint
    def peak():
        with open("/proc/self/status") as file:
            return next(int(l.split()[1]) * 1024 for l in file if l.startswith("VmHWM"))
    before = peak()
    convert(sys.argv[1], sys.argv[2])
    print(peak() - before)
"""
RAW = {**QWEN3, "max_position_embeddings": 64, "rms_norm_eps": 1e-6}


def records(store: Store) -> Iterator[tuple[object, bytes]]:
    """Every weight of a store, by what it is of."""
    config = store.config
    refs = {
        (layer, expert, i): store.expert_segment(layer, expert, i)
        for layer in config.moe_layers
        for expert in range(config.num_experts)
        for i in range(len(store.quant.levels))
    }
    refs |= {(n, i): ref for n in store.tensors for i, ref in enumerate(store.tensor_segments(n))}
    for key, ref in refs.items():
        data = np.empty(ref.size, np.uint8)
        store.read_into(ref, data)
        yield key, data.tobytes()


@pytest.mark.parametrize("name", ["qwen2_moe-options", "granitemoe-options", "mixtral", "olmoe"])
def test_the_same_store_as_from_hugging_face(tmp_path: Path, name: str) -> None:
    pytest.importorskip("torch")
    make_tiny(tmp_path / "hf", name)
    raw, tensors = read_hugging_face(tmp_path / "hf")
    write_gguf(tmp_path / "m.gguf", raw, to_gguf_tensors(raw, tensors))
    convert(tmp_path / "hf", tmp_path / "hf.emoe")
    report = convert(tmp_path / "m.gguf", tmp_path / "m.emoe")
    with Store.open(tmp_path / "hf.emoe") as want, Store.open(tmp_path / "m.emoe") as got:
        assert got.config == want.config
        assert dict(records(got)) == dict(records(want))
        assert got.verify() == []
        assert got.metadata["source"] == "m.gguf"
        assert report.experts == len(got.config.moe_layers) * got.config.num_experts


def test_float_forward_of_a_quantized_file(tmp_path: Path) -> None:
    """What `eval --ref` runs: the file's own weights, as the gguf package decodes them."""
    raw, tensors = RAW, to_gguf_tensors(RAW, make_tensors(RAW))
    decoded = write_gguf(tmp_path / "q.gguf", raw, tensors, all_of("F16"))
    write_gguf(tmp_path / "f.gguf", raw, decoded)
    ids = np.arange(20) % RAW["vocab_size"]
    pool = kernels.new_pool(1)
    logits = []
    for name in ("q.gguf", "f.gguf"):
        checkpoint = open_checkpoint(tmp_path / name, pool=pool)
        cache = KVCache(checkpoint.config, len(ids), "f32")
        args = from_checkpoint(checkpoint), FloatExperts(checkpoint), pool
        logits.append(forward(*args, ids, [Span(cache, len(ids))], np.arange(len(ids))))
    np.testing.assert_array_equal(*logits)


def test_command_line(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    write_gguf(
        tmp_path / "m.gguf",
        RAW | {"eos_token_id": None},
        to_gguf_tensors(RAW, make_tensors(RAW)),
        all_of("BF16"),
        extra=lambda writer: writer.add_chat_template(template),
        split_max_tensors=20,
    )
    part = sorted(tmp_path.glob("m-*.gguf"))[0]
    code, out, err = run("convert", part, tmp_path / "m.emoe")
    assert code == 0, err
    assert "M weights in" in out
    with Store.open(tmp_path / "m.emoe") as store:
        assert store.section("chat_template.jinja").decode() == template
        assert json.loads(store.section("tokenizer.json"))["model"]["type"] == "BPE"
    code, out, err = run("run", tmp_path / "m.emoe", "-p", "!", "--max-tokens", 5, "--temp", 0)
    assert (code, len(out) > 0) == (0, True), err
    code, out, err = run("convert", "--help")
    assert "GGUF" in out
    fails("run", part, says=rf"is a GGUF file, not a store; .*edgemoe convert {part} ")
    (tmp_path / "cut.gguf").write_bytes(part.read_bytes()[:500])
    fails("convert", tmp_path / "cut.gguf", tmp_path / "cut.emoe", says="its header goes on to")
    write_gguf(tmp_path / "mute.gguf", RAW, make_tensors_for_gguf(), tokenizer=False)
    fails("convert", tmp_path / "mute.gguf", tmp_path / "x.emoe", says="no tokenizer in its met")
    assert not (tmp_path / "cut.emoe").exists()
    assert not (tmp_path / "x.emoe").exists()


def make_tensors_for_gguf() -> dict[str, np.ndarray]:
    return to_gguf_tensors(RAW, make_tensors(RAW))


@pytest.mark.parametrize(
    ("kind", "asked", "kept"),
    [("Q4_K", None, 4), ("Q6_K", None, 6), ("Q8_0", None, 8), ("Q4_K", 8, 8), ("Q8_0", 2, 2)],
)
def test_experts_keep_what_the_source_has_or_what_is_asked_for(
    tmp_path: Path, kind: str, asked: int | None, kept: int
) -> None:
    raw = RAW | {"hidden_size": 256, "moe_intermediate_size": 256, "head_dim": 64}
    tensors = to_gguf_tensors(raw, make_tensors(raw))
    write_gguf(tmp_path / "m.gguf", raw, tensors, all_of(kind))
    report = convert(tmp_path / "m.gguf", tmp_path / "m.emoe", max_level=asked)
    assert report.max_level == kept
    with Store.open(tmp_path / "m.emoe") as store:
        assert store.quant.expert_levels == tuple(b for b in LEVELS if b <= kept)
        assert len(store.tensor_segments("layers.0.q")) == len(LEVELS)
        assert store.verify() == []
    with edgemoe.load(tmp_path / "m.emoe", ctx_size=16) as model:
        assert (model.plan.bits, model.plan.dense_bits) == (kept, 8 if kept == 8 else 6)
    if kept < 8:
        with pytest.raises(UsageError, match=f"up to {kept} bits; convert the model again"):
            edgemoe.load(tmp_path / "m.emoe", bits=8)


def test_memory_does_not_follow_the_model(tmp_path: Path) -> None:
    """A file of 96 MiB as float32, in three tensors."""
    raw = RAW | {"hidden_size": 256, "moe_intermediate_size": 2048, "num_experts": 16}
    raw |= {"num_hidden_layers": 1, "mlp_only_layers": [], "vocab_size": 4096, "head_dim": 64}
    tensors = to_gguf_tensors(raw, make_tensors(raw))
    write_gguf(tmp_path / "m.gguf", raw, tensors, all_of("Q8_0"))
    command = [sys.executable, "-c", textwrap.dedent(MEASURE), "m.gguf", "m.emoe"]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=tmp_path)
    peak = int(out.stdout)
    stack = tensors["blk.0.ffn_up_exps.weight"].nbytes
    print(f"peak {peak / MIB:.0f} MiB, largest tensor {stack / MIB:.0f} MiB")
    assert stack == 32 * MIB
    assert peak < stack


class Watched:
    """The experts of a model, and those picked for every token, by layer."""

    def __init__(self, experts: Experts) -> None:
        self._experts = experts
        self.picked: dict[int, list[frozenset[int]]] = defaultdict(list)

    def __call__(self, layer: int, x: F32, ids: I32, weights: F32) -> F32:
        self.picked[layer] += map(frozenset, ids.tolist())
        return self._experts(layer, x, ids, weights)


@pytest.fixture(scope="module")
def replaying(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(trace, store) of a model that picks the experts of the trace."""
    place = tmp_path_factory.mktemp("routes")
    trace, script = shared / "traces" / "olmoe_299.jsonl", shared / "bench" / "synth_gguf.py"
    command = [sys.executable, script, "tiny", "q4k", place / "m.gguf", "--routes", trace]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    convert(place / "m.gguf", place / "m.emoe", max_level=8)
    (place / "m.gguf").unlink()
    return trace, place / "m.emoe"


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_routes_are_replayed(replaying: tuple[Path, Path], bits: int) -> None:
    """Tokens 0, 1, 2, ... pick the experts of the trace in every layer, and each the next token."""
    trace, path = replaying
    routes = [json.loads(line)["layers"] for line in trace.read_text().splitlines()]
    steps = len(routes)
    assert steps == 299
    with Store.open(path) as store:
        config, levels = store.config, store.quant.levels
        level = levels.index(bits)
        arena = Arena(expert_bytes(store, level) + dense_bytes(store, level))
        pool = kernels.new_pool(2)
        weights = from_store(store, pool, arena, level)
        experts = Watched(
            SerialExperts(pool, ResidentExperts(store, arena, level), OneLevel(level))
        )
        tokens, cache = np.arange(steps), KVCache(config, steps, "f32")
        logits = [
            forward(weights, experts, pool, part, [Span(cache, len(part))], np.arange(len(part)))
            for part in np.split(tokens, [128, 256, 257])
        ]
    assert config.num_hidden_layers == 4
    for layer in range(4):
        want = [frozenset(step[layer]) for step in routes]
        assert experts.picked[layer] == want
    np.testing.assert_array_equal(np.concatenate(logits).argmax(-1), (tokens + 1) % steps)


def test_a_replaying_model_walks_its_trace(replaying: tuple[Path, Path]) -> None:
    with edgemoe.load(replaying[1], bits=4, ctx_size=320) as model:
        said = model.generate([0], max_tokens=298, sampling=SamplingParams(temperature=0.0))
    assert said.token_ids == list(range(1, 299))


def test_no_run_of_a_store_imports_gguf() -> None:
    code = "import sys, edgemoe.checkpoint, edgemoe.engine; print('gguf' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
