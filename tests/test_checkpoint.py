"""Reading sound checkpoints: every value exactly, and no more bytes than needed."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_checkpoints import (
    OLMOE,
    QWEN3,
    Array,
    encode,
    expert_names,
    make_tensors,
    pack_experts,
    refuse,
    write_checkpoint,
)

from edgemoe.arch import EXPERT_PARTS
from edgemoe.checkpoint import Checkpoint, open_checkpoint, safetensors_dir
from edgemoe.errors import CheckpointError

Q0 = "model.layers.0.self_attn.q_proj.weight"


def assert_holds(checkpoint: Checkpoint, tensors: dict[str, Array]) -> None:
    """Every tensor reads as what was written, each of them somewhere."""
    left = dict(tensors)
    hf = {"embed": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}
    hf |= {"norm": "model.norm.weight"}
    roles = {"input_norm": "input_layernorm", "post_norm": "post_attention_layernorm"}
    roles |= {"router": "mlp.gate", "gate": "mlp.gate_proj", "up": "mlp.up_proj"}
    roles |= {"down": "mlp.down_proj", "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
    for name in checkpoint.dense_names():
        if name in hf:
            source = hf[name]
        else:
            _, at, role = name.split(".")
            ending = "bias" if role.endswith("_bias") else "weight"
            known = roles.get(role, f"self_attn.{role[0]}_proj")
            source = f"model.layers.{at}.{known}.{ending}"
        array = checkpoint.tensor(name)
        assert array.dtype == np.float32
        assert array.shape == checkpoint.shape(name)
        np.testing.assert_array_equal(array, left.pop(source))
    for layer in checkpoint.config.moe_layers:
        for expert in range(checkpoint.config.num_experts):
            matrices = checkpoint.expert(layer, expert)
            for name, matrix in zip(expert_names(layer, expert), matrices, strict=True):
                assert matrix.dtype == np.float32
                np.testing.assert_array_equal(matrix, left.pop(name))
    assert not left


@pytest.mark.parametrize("raw", [QWEN3, OLMOE, {**QWEN3, "attention_bias": True}])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_reads_back(tmp_path: Path, raw: dict[str, Any], shards: int) -> None:
    tensors = make_tensors(raw)
    write_checkpoint(tmp_path, raw, tensors, shards=shards)
    assert_holds(open_checkpoint(tmp_path), tensors)


def test_files_of_the_safetensors_library_read_back(tmp_path: Path) -> None:
    tensors = make_tensors(OLMOE)
    write_checkpoint(tmp_path, OLMOE, tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    assert_holds(open_checkpoint(str(tmp_path)), tensors)


@pytest.mark.parametrize("raw", [QWEN3, OLMOE])
@pytest.mark.parametrize("shards", [1, 2])
def test_packed_experts_equal_separate_ones(
    tmp_path: Path, raw: dict[str, Any], shards: int
) -> None:
    tensors = make_tensors(raw)
    write_checkpoint(tmp_path, raw, pack_experts(tensors), shards=shards)
    assert_holds(open_checkpoint(tmp_path), tensors)


def test_bf16_widens_exactly(tmp_path: Path) -> None:
    # Every finite bf16 there is, denormals and both zeros included.
    patterns = np.arange(1 << 16, dtype=np.uint32)
    finite = patterns[(patterns & 0x7F80) != 0x7F80]
    values = np.array([struct.unpack("<f", struct.pack("<I", p << 16))[0] for p in finite], "<f4")
    check_exact(tmp_path, values, "BF16")


def test_f16_widens_exactly(tmp_path: Path) -> None:
    patterns = np.arange(1 << 16, dtype=np.uint16)
    finite = patterns[(patterns & 0x7C00) != 0x7C00]
    values = [struct.unpack("<e", struct.pack("<H", int(p)))[0] for p in finite]
    check_exact(tmp_path, np.array(values, np.float32), "F16")


def test_f32_is_untouched(tmp_path: Path) -> None:
    patterns = np.random.default_rng(0).integers(0, 1 << 32, 50_000, np.uint32)
    values = patterns.view(np.float32)
    check_exact(tmp_path, values[np.isfinite(values)], "F32")


def check_exact(tmp_path: Path, values: Array, dtype: str) -> None:
    """The embedding, filled with `values`, comes back bit by bit."""
    hidden = 16
    embed = np.resize(values, (-(-values.size // hidden), hidden)).astype(np.float32)
    raw = {**OLMOE, "vocab_size": len(embed)}
    tensors = {**make_tensors(raw), "model.embed_tokens.weight": embed}
    write_checkpoint(tmp_path, raw, tensors, dtype=dtype)
    got = open_checkpoint(tmp_path).tensor("embed")
    np.testing.assert_array_equal(got.view(np.uint32), embed.view(np.uint32))


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_long_tensors_are_read_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr(safetensors_dir, "_CHUNK", 100)
    tensors = make_tensors(QWEN3)
    if dtype == "BF16":
        tensors = {
            name: (a.view(np.uint32) & 0xFFFF0000).view(np.float32) for name, a in tensors.items()
        }
    write_checkpoint(tmp_path, QWEN3, tensors, dtype=dtype)
    assert_holds(open_checkpoint(tmp_path), tensors)


@pytest.mark.parametrize("packed", [False, True])
def test_rows_are_slices(tmp_path: Path, packed: bool) -> None:
    tensors = make_tensors(QWEN3)
    write_checkpoint(tmp_path, QWEN3, pack_experts(tensors) if packed else tensors)
    checkpoint = open_checkpoint(tmp_path)
    whole = checkpoint.tensor("embed")
    np.testing.assert_array_equal(checkpoint.tensor("embed", rows=(7, 19)), whole[7:19])
    assert checkpoint.tensor("embed", rows=(5, 5)).shape == (0, 16)
    for part, matrix in zip(EXPERT_PARTS, checkpoint.expert(2, 3), strict=True):
        got = checkpoint.expert_matrix(2, 3, part, rows=(1, 6))
        np.testing.assert_array_equal(got, matrix[1:6])
    for rows in [(-1, 2), (0, 41), (3, 2)]:
        with pytest.raises(IndexError):
            checkpoint.tensor("embed", rows=rows)
    for layer, expert in [(1, 0), (3, 0), (0, 4), (0, -1)]:
        with pytest.raises(IndexError):
            checkpoint.expert(layer, expert)


class Reads:
    """Counts the bytes that pass through os.preadv, and can cut them short."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int | None = None) -> None:
        self.ranges: list[tuple[int, int]] = []
        real = os.preadv

        def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
            got = real(fd, [buffers[0][:most]], offset)
            self.ranges.append((offset, got))
            return got

        monkeypatch.setattr(os, "preadv", preadv)


@pytest.mark.parametrize("packed", [False, True])
def test_only_the_experts_bytes_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    tensors = make_tensors(QWEN3)
    write_checkpoint(tmp_path, QWEN3, pack_experts(tensors) if packed else tensors, dtype="BF16")
    checkpoint = open_checkpoint(tmp_path)
    reads = Reads(monkeypatch)
    checkpoint.expert(0, 2)
    assert sum(size for _, size in reads.ranges) == 3 * 12 * 16 * 2
    data = (tmp_path / "model.safetensors").read_bytes()
    got = b"".join(data[at : at + size] for at, size in reads.ranges)
    assert got == b"".join(encode(tensors[name], "BF16") for name in expert_names(0, 2))


def test_opening_reads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = Reads(monkeypatch)
    open_checkpoint(write_checkpoint(tmp_path, QWEN3))
    assert reads.ranges == []


def test_what_was_read_leaves_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, OLMOE))
    reads = Reads(monkeypatch)
    dropped: list[tuple[int, int]] = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda fd, offset, size, advice: dropped.append((offset, size))
    )
    checkpoint.expert(1, 1)
    assert dropped == reads.ranges


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = make_tensors(OLMOE)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, OLMOE, tensors))
    Reads(monkeypatch, most=7)
    np.testing.assert_array_equal(checkpoint.tensor("layers.0.q"), tensors[Q0])


def test_no_files_stay_open(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, QWEN3, shards=3)
    before = len(os.listdir("/proc/self/fd"))
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.expert(0, 0)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, OLMOE))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"x")
    with pytest.raises(CheckpointError, match=r"model\.safetensors changed"):
        checkpoint.tensor("embed")
    weights.unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        checkpoint.tensor("embed")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_weights_that_are_no_numbers(tmp_path: Path, value: float, dtype: str) -> None:
    tensors = make_tensors(OLMOE)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    tensors[name][5, 2] = value
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, OLMOE, tensors, dtype=dtype))
    checkpoint.expert(1, 2)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.expert(1, 3)
    message = str(caught.value)
    assert all(word in message for word in [name, "model.safetensors", f"{value:g}"]), message
    assert "row 5, column 2" in message
    with pytest.raises(CheckpointError, match="row 5, column 2"):
        checkpoint.expert_matrix(1, 3, "up", rows=(3, 8))
    assert checkpoint.expert_matrix(1, 3, "up", rows=(6, 8)).shape == (2, 16)


def test_files_beside_the_weights(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, OLMOE, tokenizer=False)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.files == {}
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        checkpoint.require_tokenizer()
    contents = {
        "tokenizer.json": b'{"a": 1}',
        "tokenizer_config.json": b"{}",
        "generation_config.json": b'{"eos_token_id": [9, 2, 5], "bos_token_id": 4}',
        "chat_template.jinja": b"{{ messages }}",
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "README.md").write_text("not taken along")
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.require_tokenizer()
    assert checkpoint.files == contents
    assert checkpoint.config.eos_token_ids == (2, 9, 5)
    assert checkpoint.config.bos_token_id == 4
    assert checkpoint.model_type == "olmoe"
    assert checkpoint.path == tmp_path


@pytest.mark.parametrize("text", ["[]", "{", '{"eos_token_id": "x"}', '{"a": 1, "a": 2}'])
def test_bad_generation_config(tmp_path: Path, text: str) -> None:
    write_checkpoint(tmp_path, OLMOE)
    (tmp_path / "generation_config.json").write_text(text)
    refuse(tmp_path, "generation_config.json")


def test_tied_embeddings(tmp_path: Path) -> None:
    raw = {**QWEN3, "tie_word_embeddings": True}
    tensors = make_tensors(raw)
    assert_holds(open_checkpoint(write_checkpoint(tmp_path, raw, tensors)), tensors)
    # A copy of the embedding may be there too, or stand in for it.
    copy = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, raw, copy))
    assert "lm_head" not in checkpoint.dense_names()
    only = {name: array for name, array in copy.items() if "embed_tokens" not in name}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, raw, only))
    np.testing.assert_array_equal(checkpoint.tensor("embed"), copy["lm_head.weight"])
    copy["lm_head.weight"] = copy["lm_head.weight"] + np.float32(1)
    refuse(write_checkpoint(tmp_path, raw, copy), "lm_head.weight", "tie_word_embeddings")


def test_rotary_tables_are_ignored(tmp_path: Path) -> None:
    tensors = make_tensors(OLMOE)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    assert "embed" in open_checkpoint(write_checkpoint(tmp_path, OLMOE, tensors)).dense_names()


@pytest.mark.parametrize("kind", ["qwen3_moe", "olmoe"])
@pytest.mark.parametrize("original", [True, False], ids=["separate", "packed"])
def test_what_transformers_saves(tmp_path: Path, kind: str, original: bool) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    raw = {**(QWEN3 if kind == "qwen3_moe" else OLMOE), "architectures": None}
    config = transformers.AutoConfig.for_model(**raw)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="8KB", save_original_format=original)
    assert (tmp_path / "model.safetensors.index.json").exists()
    checkpoint = open_checkpoint(tmp_path)
    state = {name: t.float().numpy() for name, t in model.state_dict().items()}
    np.testing.assert_array_equal(checkpoint.tensor("embed"), state["model.embed_tokens.weight"])
    np.testing.assert_array_equal(checkpoint.tensor("layers.0.q"), state[Q0])
    for layer in checkpoint.config.moe_layers:
        prefix = f"model.layers.{layer}.mlp.experts."
        for expert in range(checkpoint.config.num_experts):
            gate, up, down = checkpoint.expert(layer, expert)
            packed = state[prefix + "gate_up_proj"][expert]
            np.testing.assert_array_equal(np.concatenate([gate, up]), packed)
            np.testing.assert_array_equal(down, state[prefix + "down_proj"][expert])
