"""Export to GGUF: what is refused, what is damaged, what is interrupted."""

from __future__ import annotations

import re
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from convert_samples import save_tensors
from export_samples import make_checkpoint, read

import edgemoe
from edgemoe.arch import FAMILIES
from edgemoe.errors import ChecksumError, OutputError, StoreError, UnsupportedError, UsageError
from edgemoe.export import export
from edgemoe.export.architectures import architecture_of, metadata
from edgemoe.store import Store
from edgemoe.types import ModelConfig


def test_weights_that_the_type_cannot_hold(tmp_path: Path) -> None:
    """An error that names the tensor and the way out, no infinity and no file."""
    source = make_checkpoint(tmp_path / "src", "mixtral", "F32", hidden_size=64)
    write_again(tmp_path / "src", source, {"layers.1.v": 65505.0})
    with pytest.raises(UnsupportedError, match=r"^blk\.1\.attn_v\.weight .* 65505, .*--type q8_0"):
        export(tmp_path / "src", tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()
    export(tmp_path / "src", tmp_path / "x.gguf", type="q8_0")
    write_again(tmp_path / "src", source, {"layers.1.v": 127.1 * 65504})
    with pytest.raises(UnsupportedError, match=r"which q8_0 cannot hold$"):
        export(tmp_path / "src", tmp_path / "y.gguf", type="q8_0")
    write_again(tmp_path / "src", source, {(1, 2, "down"): -65505.0})  # rows of 40
    with pytest.raises(UnsupportedError, match=r"which f16 cannot hold$"):
        export(tmp_path / "src", tmp_path / "y.gguf", type="q8_0")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["src", "x.gguf"]


def write_again(path: Path, source: Any, first: dict[Any, float]) -> None:
    """The checkpoint's weights with another first element in some of them."""
    names = FAMILIES["mixtral"].names
    tensors = {}
    for key, w in source.weights.items():
        name = names.dense(key) if isinstance(key, str) else names.expert_part(*key)
        w = w.copy()
        if key in first:
            w.flat[0] = first[key]
        tensors[name] = ("F32", w.shape, w.tobytes())
    save_tensors(path / "model.safetensors", tensors)


@pytest.mark.parametrize("what", ["layer 2 expert 1", "layers.1.o", "norm"])
def test_a_damaged_store(what: str, tmp_path: Path) -> None:
    """Is found, named, and nothing is left of the export."""
    make_checkpoint(tmp_path / "src", "mixtral")
    edgemoe.convert(tmp_path / "src", tmp_path / "s.emoe")
    with Store.open(tmp_path / "s.emoe") as store:
        if what.startswith("layer "):
            offset = store.expert_segment(2, 1, 3).offset
        else:
            offset = store.tensor_segments(what)[-1].offset
    data = bytearray((tmp_path / "s.emoe").read_bytes())
    data[offset + 70] ^= 1
    (tmp_path / "s.emoe").write_bytes(data)
    with pytest.raises(ChecksumError, match=rf"{what}.* is damaged \(byte {offset}"):
        export(tmp_path / "s.emoe", tmp_path / "x.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.emoe", "src"]


def test_bits_are_for_stores(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "src", "mixtral")
    with pytest.raises(UsageError, match="is a checkpoint: --bits chooses"):
        export(tmp_path / "src", tmp_path / "x.gguf", bits=4)
    edgemoe.convert(tmp_path / "src", tmp_path / "s.emoe")
    with pytest.raises(UsageError, match=r"has no 5-bit experts; it has 2, 3, 4, 6, 8$"):
        export(tmp_path / "s.emoe", tmp_path / "x.gguf", bits=5)
    with pytest.raises(UsageError, match="must be f16 or q8_0, not q4_0"):
        export(tmp_path / "s.emoe", tmp_path / "x.gguf", type="q4_0")  # type: ignore[arg-type]
    with pytest.raises(StoreError):
        export(tmp_path / "nowhere.emoe", tmp_path / "x.gguf")


# What llama.cpp's graphs cannot do: family, changes to its config, what the message names.
REFUSED = [
    ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob = False"),
    ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob = True"),
    ("olmoe", {"norm_topk_prob": True}, "norm_topk_prob = True"),
    ("qwen3_moe", {"attention_bias": True}, "attention_bias = True"),
    ("olmoe", {"attention_bias": True}, "attention_bias = True"),
    ("olmoe", {"clip_qkv": 0.5}, r"clip_qkv = 0\.5"),
    ("olmoe", {"num_key_value_heads": 2}, "num_key_value_heads = 2"),
    ("mixtral", {"sliding_window": 127}, "sliding_window = 127"),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 7}, "sliding_window = 7"),
    ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers = \[1\]"),
    ("qwen2_moe", {"decoder_sparse_step": 2}, r"mlp_only_layers = \[0, 2\]"),
    ("qwen2_moe", {"head_dim": 16}, "head_dim = 16"),
]


@pytest.mark.parametrize(("family", "changes", "says"), REFUSED)
def test_what_llama_cpp_cannot_compute(
    family: str, changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    make_checkpoint(tmp_path / "src", family, **changes)
    with pytest.raises(UnsupportedError, match=says) as caught:
        export(tmp_path / "src", tmp_path / "x.gguf")
    assert re.fullmatch(r"\S+src: .* cannot be exported: llama\.cpp's .*", str(caught.value))
    assert not (tmp_path / "x.gguf").exists()


def test_options_out_of_reach_of_a_checkpoint() -> None:
    """A store may hold what no family's config.json gives."""
    base = ModelConfig(
        "qwen3_moe", 70, 72, 3, 4, 2, 16, 3, 2, 40, True, 1e-6, 1e4, 128, False, qk_norm="head"
    )
    assert architecture_of(base, "m").name == "qwen3moe"
    assert architecture_of(replace(base, attention_multiplier=0.25), "m").name == "qwen3moe"
    for option, value in (
        ("model_type", "gpt_oss"),
        ("qk_norm", "none"),
        ("shared_expert_intermediate_size", 8),
        ("embedding_multiplier", 2.0),
        ("residual_multiplier", 0.5),
        ("attention_multiplier", 0.3),
        ("logits_scaling", 3.0),
        ("num_hidden_layers", 513),
        ("num_experts", 1025),
    ):
        with pytest.raises(UnsupportedError, match=f"^m: {option} "):
            architecture_of(replace(base, **{option: value}), "m")
    granite = replace(base, model_type="granitemoe", qk_norm="none", attention_multiplier=None)
    assert "granitemoe.attention.scale" not in metadata(granite, architecture_of(granite, "m"))
    with pytest.raises(UnsupportedError, match="residual_multiplier = 0"):
        architecture_of(replace(granite, residual_multiplier=0.0), "m")


def test_a_window_as_long_as_the_context_hides_nothing(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "src", "mixtral", sliding_window=128)
    export(tmp_path / "src", tmp_path / "x.gguf")


def test_progress_and_an_interruption(tmp_path: Path) -> None:
    """Progress adds up to all weights; an exception out of it leaves nothing."""
    make_checkpoint(tmp_path / "src", "granitemoe")
    seen: list[tuple[int, int, str]] = []
    report = export(tmp_path / "src", tmp_path / "x.gguf", progress=lambda *a: seen.append(a))
    assert [done for done, _, _ in seen] == sorted({done for done, _, _ in seen})
    assert seen[-1] == (report.weights, report.weights, "output.weight")
    assert {name for _, _, name in seen} == read(tmp_path / "x.gguf")[1].keys()

    def stop(done: int, total: int, what: str) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    (tmp_path / "x.gguf").unlink()
    with pytest.raises(KeyboardInterrupt):
        export(tmp_path / "src", tmp_path / "x.gguf", progress=stop)
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


def test_no_room(tmp_path: Path) -> None:
    """Said before anything is computed, with what to do; nothing is left."""
    make_checkpoint(tmp_path / "src", "olmoe")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OutputError, match=r"x\.gguf: File too large; raise the limit"):
            export(tmp_path / "src", tmp_path / "x.gguf", progress=lambda *a: pytest.fail("begun"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in tmp_path.iterdir()] == ["src"]
