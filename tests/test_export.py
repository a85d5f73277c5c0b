"""Export to GGUF: every weight and every key read back with the gguf package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from export_samples import FAMILIES, make_checkpoint, read, types
from numpy.typing import NDArray

import edgemoe
import edgemoe.export as exporting
from edgemoe.arch import EXPERT_PARTS
from edgemoe.checkpoint import open_checkpoint
from edgemoe.export import export
from edgemoe.export.encode import encode
from edgemoe.mwq.packing import decode
from edgemoe.store import Store

Array = NDArray[Any]

# blk.{i}: canonical role -> name in the file
NAMES = {
    "input_norm": "attn_norm.weight",
    "post_norm": "ffn_norm.weight",
    "q": "attn_q.weight",
    "k": "attn_k.weight",
    "v": "attn_v.weight",
    "o": "attn_output.weight",
    "q_bias": "attn_q.bias",
    "k_bias": "attn_k.bias",
    "v_bias": "attn_v.bias",
    "o_bias": "attn_output.bias",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
    "router": "ffn_gate_inp.weight",
    "shared_router": "ffn_gate_inp_shexp.weight",
    "shared_gate": "ffn_gate_shexp.weight",
    "shared_up": "ffn_up_shexp.weight",
    "shared_down": "ffn_down_shexp.weight",
}
TOP = {"embed": "token_embd.weight", "norm": "output_norm.weight", "lm_head": "output.weight"}
HEAD_DIM = {"qwen3_moe": 16, "qwen2_moe": 18, "olmoe": 18, "mixtral": 16, "granitemoe": 16}


def interleaved(w: Array, d: int) -> Array:
    """Rows j and d/2 + j of every head become rows 2j and 2j + 1."""
    out = np.empty_like(w)
    for head in range(0, len(w), d):
        for j in range(d // 2):
            out[head + 2 * j] = w[head + j]
            out[head + 2 * j + 1] = w[head + d // 2 + j]
    return out


def expected(source: Any, family: str) -> dict[str, Array]:
    """float32 of every tensor the file must have."""
    out: dict[str, Array] = {}
    paired = family in ("mixtral", "granitemoe")
    for key, w in source.weights.items():
        if isinstance(key, tuple):
            continue
        if key in TOP:
            out[TOP[key]] = w
            continue
        _, layer, role = key.split(".")
        if paired and role in ("q", "k", "q_bias", "k_bias"):
            w = interleaved(w, HEAD_DIM[family])
        if role == "shared_router":
            w = w[0]
        out[f"blk.{layer}.{NAMES[role]}"] = w
    for layer in range(3):
        for part in EXPERT_PARTS:
            stack = [source.weights[layer, e, part] for e in range(3)]
            out[f"blk.{layer}.ffn_{part}_exps.weight"] = np.stack(stack)
    return out


def is_vector(name: str) -> bool:
    return "norm" in name or ".bias" in name or "ffn_gate_inp" in name


@pytest.mark.parametrize("family", FAMILIES)
def test_f16_holds_the_weights(family: str, tmp_path: Path) -> None:
    """Every tensor of a float16 checkpoint, bit for bit, in llama.cpp's names and order of rows."""
    source = make_checkpoint(tmp_path / "src", family)
    report = export(tmp_path / "src", tmp_path / "x.gguf")
    _, tensors = read(tmp_path / "x.gguf")
    want = expected(source, family)
    assert tensors.keys() == want.keys()
    for name, (kind, data) in tensors.items():
        assert kind == ("F32" if is_vector(name) else "F16"), name
        np.testing.assert_array_equal(data.astype(np.float32), want[name], name, strict=True)
    assert report.weights == sum(w.size for w in want.values())
    assert report.tensors == len(want)
    assert report.file_bytes == (tmp_path / "x.gguf").stat().st_size
    assert report.notes == ()


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_q8_0(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices are gguf.quants' bytes, in runs of few rows; rows of 40 stay f16 and are told of."""
    monkeypatch.setattr(exporting, "_RUN_WEIGHTS", 1)
    source = make_checkpoint(tmp_path / "src", family, "F32", hidden_size=64)
    report = export(tmp_path / "src", tmp_path / "x.gguf", type="q8_0")
    values, tensors = read(tmp_path / "x.gguf")
    assert values["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    for name, w in expected(source, family).items():
        kind, data = tensors[name]
        if is_vector(name):
            want, of = w, "F32"
        elif "down" in name:
            want, of = w.astype(np.float16), "F16"
        else:
            want, of = gguf.quants.quantize(w, gguf.GGMLQuantizationType.Q8_0), "Q8_0"
        assert kind == of, name
        np.testing.assert_array_equal(data, want, name, strict=True)
    assert report.notes == (
        "blk.0.ffn_down_exps.weight and 2 more stayed f16: the rows are no multiple of 32 long",
    )


def test_encoding_of_odd_blocks() -> None:
    """Zeros, halves that round away from zero, scales that float16 cannot hold, the largest."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((12, 64)).astype(np.float32)
    x[0] = 0
    x[1, :32] = np.arange(32) - 16 + np.float32(0.5)
    x[1, 0] = 127
    x[2] *= np.float32(1e-9)
    x[3] *= np.float32(3e-38)
    x[4] = 0.49999997
    x[4, ::32] = 127
    x[5, 3], x[5, 40] = 127 * 65504, -127 * 65504
    want = gguf.quants.quantize(x[np.arange(12) != 3], gguf.GGMLQuantizationType.Q8_0)
    data = encode(x, "q8_0", "w").reshape(12, -1)
    np.testing.assert_array_equal(data[np.arange(12) != 3], want)
    assert not gguf.quants.dequantize(data[3], gguf.GGMLQuantizationType.Q8_0).any()


METADATA: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "qwen3moe.feed_forward_length": 80,
        "qwen3moe.expert_feed_forward_length": 40,
    },
    "qwen2_moe": {
        "qwen2moe.feed_forward_length": 80,
        "qwen2moe.expert_feed_forward_length": 40,
        "qwen2moe.expert_shared_feed_forward_length": 24,
    },
    "olmoe": {"olmoe.feed_forward_length": 40},
    "mixtral": {"llama.feed_forward_length": 40},
    "granitemoe": {
        "granitemoe.feed_forward_length": 40,
        "granitemoe.embedding_scale": 12.0,
        "granitemoe.residual_scale": 0.25,
        "granitemoe.logit_scale": 6.0,
        "granitemoe.attention.scale": 0.125,
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_metadata(family: str, tmp_path: Path) -> None:
    """Every key-value about the model, spelled out."""
    make_checkpoint(tmp_path / "src", family)
    export(tmp_path / "src", tmp_path / "x.gguf")
    values, _ = read(tmp_path / "x.gguf")
    arch = values["general.architecture"]
    assert METADATA[family].keys() <= {k for k in values if k.startswith(f"{arch}.")}
    common = {
        "vocab_size": 100,
        "context_length": 128,
        "embedding_length": 72,
        "block_count": 3,
        "attention.head_count": 4,
        "attention.head_count_kv": 4 if family == "olmoe" else 2,
        "attention.key_length": HEAD_DIM[family],
        "attention.value_length": HEAD_DIM[family],
        "attention.layer_norm_rms_epsilon": float(np.float32(1e-6)),
        "rope.dimension_count": HEAD_DIM[family],
        "rope.freq_base": 10000.0,
        "expert_count": 3,
        "expert_used_count": 2,
    }
    want = {f"{arch}.{key}": value for key, value in common.items()} | METADATA[family]
    want |= {
        "general.architecture": arch,
        "general.type": "model",
        "general.name": "src",
        "general.file_type": int(gguf.LlamaFileType.MOSTLY_F16),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
    }
    assert {k: v for k, v in values.items() if not k.startswith("tokenizer.")} == want
    kinds = types(tmp_path / "x.gguf")
    for key, value in want.items():
        kind = {str: "STRING", int: "UINT32", float: "FLOAT32"}[type(value)]
        assert kinds[key] == [kind], key
    assert values["tokenizer.chat_template"] == "{{ messages[0].content }}"


@pytest.mark.parametrize("family", ["qwen2_moe", "olmoe", "qwen3_moe"])
def test_tied_embeddings(family: str, tmp_path: Path) -> None:
    """Where llama.cpp's loader insists on an output matrix, it gets the embedding."""
    source = make_checkpoint(tmp_path / "src", family, tie_word_embeddings=True)
    export(tmp_path / "src", tmp_path / "x.gguf")
    _, tensors = read(tmp_path / "x.gguf")
    if family == "qwen3_moe":
        assert "output.weight" not in tensors
        return
    for name in ("output.weight", "token_embd.weight"):
        np.testing.assert_array_equal(tensors[name][1], source.weights["embed"])


@pytest.mark.parametrize("family", FAMILIES)
def test_reading_it_back(family: str, tmp_path: Path) -> None:
    """edgemoe's own reader of GGUF files finds the same configuration and weights."""
    make_checkpoint(tmp_path / "src", family)
    export(tmp_path / "src", tmp_path / "x.gguf")
    one, two = open_checkpoint(tmp_path / "src"), open_checkpoint(tmp_path / "x.gguf")
    assert two.config == one.config
    for name in one.dense_names():
        np.testing.assert_array_equal(two.tensor(name), one.tensor(name), name)
    for layer in range(3):
        for e in range(3):
            for a, b in zip(one.expert(layer, e), two.expert(layer, e), strict=True):
                np.testing.assert_array_equal(a, b)
    export(tmp_path / "x.gguf", tmp_path / "y.gguf")
    first, second = read(tmp_path / "x.gguf"), read(tmp_path / "y.gguf")
    assert first[0] | {"general.name": "x"} == second[0]
    for name, (kind, data) in first[1].items():
        assert second[1][name][0] == kind
        np.testing.assert_array_equal(second[1][name][1], data, name)


@pytest.mark.parametrize("bits", [None, 2, 3, 8])
def test_a_store_at_a_level(
    bits: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts are what that level decodes to, everything else what the highest does."""
    monkeypatch.setattr(exporting, "_RUN_WEIGHTS", 1)
    make_checkpoint(tmp_path / "src", "mixtral", hidden_size=200)
    edgemoe.convert(tmp_path / "src", tmp_path / "s.emoe")
    export(tmp_path / "s.emoe", tmp_path / "x.gguf", bits=bits)
    values, tensors = read(tmp_path / "x.gguf")
    assert values["general.name"] == "src"
    with Store.open(tmp_path / "s.emoe") as store:
        top = (2, 3, 4, 6, 8).index(bits or 8)
        for layer in range(3):
            for e in range(3):
                refs = [store.expert_segment(layer, e, i) for i in range(top + 1)]
                weights = decode(store.expert_layout(layer), [load(store, r) for r in refs], top)
                for part, w in zip(EXPERT_PARTS, weights, strict=True):
                    data = tensors[f"blk.{layer}.ffn_{part}_exps.weight"][1][e]
                    np.testing.assert_array_equal(data, w.astype(np.float16))
        for key, role in (("embed", ""), ("layers.1.q", "q"), ("layers.2.o", "o")):
            refs, layout = store.tensor_segments(key), store.tensors[key].layout
            assert layout is not None
            (w,) = decode(layout, [load(store, r) for r in refs], 4)
            w = interleaved(w, 16) if role == "q" else w
            name = TOP.get(key) or f"blk.{key.split('.')[1]}.{NAMES[role]}"
            np.testing.assert_array_equal(tensors[name][1], w.astype(np.float16), name)
        for key in ("norm", "layers.0.router"):
            name = TOP.get(key) or f"blk.0.{NAMES['router']}"
            np.testing.assert_array_equal(tensors[name][1], store.read_f32(key), name)


def load(store: Store, ref: Any) -> Array:
    out = np.empty(ref.size, np.uint8)
    store.read_into(ref, out)
    return out


MEASURE = """
import sys
from edgemoe.export import export
def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
before = peak()
export(sys.argv[1], sys.argv[2], type=sys.argv[3])
print(peak() - before)
"""


def test_memory_does_not_follow_the_model(tmp_path: Path) -> None:
    """37 M weights: 142 MiB as float32, in matrices of up to 12 M and stacks of 8 M."""
    sizes = {"hidden_size": 512, "num_hidden_layers": 1, "tie_word_embeddings": True}
    sizes |= {"moe_intermediate_size": 4096, "num_experts": 4, "vocab_size": 24_000}
    make_checkpoint(tmp_path / "src", "qwen3_moe", **sizes)
    edgemoe.convert(tmp_path / "src", tmp_path / "s.emoe")
    for name, kind in (("src", "f16"), ("src", "q8_0"), ("s.emoe", "f16")):
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, str(tmp_path / name), str(tmp_path / "x.gguf"), kind],
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        )
        peak = int(done.stdout) / (1 << 20)
        assert peak < 60, f"{name} to {kind}: {peak:.0f} MiB"
