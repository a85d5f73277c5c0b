"""Checkpoints that are missing something, inconsistent or no checkpoints at all: in which words."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_checkpoints import (
    OLMOE,
    QWEN3,
    expert_names,
    make_tensors,
    pack_experts,
    refuse,
    write_checkpoint,
    write_raw,
    write_tensors,
)

from edgemoe.checkpoint import open_checkpoint
from edgemoe.errors import UnsupportedError

SHARD_2 = "model-00002-of-00003.safetensors"
Q0 = "model.layers.0.self_attn.q_proj.weight"


def test_missing_tensors(tmp_path: Path) -> None:
    for name in ["model.norm.weight", "lm_head.weight", expert_names(2, 3)[1]]:
        tensors = make_tensors(QWEN3)
        del tensors[name]
        refuse(write_checkpoint(tmp_path, QWEN3, tensors), name, "incomplete")
    packed = pack_experts(make_tensors(QWEN3))
    del packed["model.layers.2.mlp.experts.down_proj"]
    refuse(write_checkpoint(tmp_path, QWEN3, packed), "model.layers.2.mlp.experts.down_proj")


def test_unknown_tensors(tmp_path: Path) -> None:
    extra = "model.layers.0.mlp.shared_expert.gate_proj.weight"
    tensors = {**make_tensors(QWEN3), extra: np.ones((2, 2), np.float32)}
    refuse(write_checkpoint(tmp_path, QWEN3, tensors), extra, "qwen3_moe", kind=UnsupportedError)
    for stray in [
        "model.layers.0.self_attn.q_proj.bias",  # attention_bias is false
        "model.layers.1.mlp.gate.weight",  # layer 1 is dense
        "model.layers.3.input_layernorm.weight",  # there are three layers
        "model.layers.0.mlp.experts.4.gate_proj.weight",  # there are four experts
    ]:
        tensors = {**make_tensors(QWEN3), stray: np.ones((2,), np.float32)}
        refuse(write_checkpoint(tmp_path, QWEN3, tensors), stray, kind=UnsupportedError)
    # Packed and separate experts in one layer: which ones count is anybody's guess.
    both = {**make_tensors(QWEN3), **pack_experts(make_tensors(QWEN3))}
    refuse(write_checkpoint(tmp_path, QWEN3, both), "experts.0", kind=UnsupportedError)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", Q0, expert_names(0, 1)[2]])
def test_wrong_shapes(tmp_path: Path, name: str) -> None:
    tensors = make_tensors(OLMOE)
    right = list(tensors[name].shape)
    tensors[name] = np.ascontiguousarray(np.concatenate([tensors[name]] * 2))
    write_checkpoint(tmp_path, OLMOE, tensors)
    refuse(tmp_path, name, "model.safetensors", str(right), str([2 * right[0], right[1]]))


def test_wrong_shapes_of_packed_experts(tmp_path: Path) -> None:
    packed = pack_experts(make_tensors(OLMOE))
    name = "model.layers.1.mlp.experts.gate_up_proj"
    packed[name] = np.ascontiguousarray(packed[name].transpose(0, 2, 1))
    refuse(write_checkpoint(tmp_path, OLMOE, packed), name, "[4, 16, 24]", "[4, 24, 16]")


@pytest.mark.parametrize("dtype", ["F64", "I64", "F8_E4M3"])
def test_dtypes_that_are_no_weights(tmp_path: Path, dtype: str) -> None:
    write_checkpoint(tmp_path, OLMOE)
    path = tmp_path / "model.safetensors"
    size = {"F64": 8, "I64": 8, "F8_E4M3": 1}[dtype]
    header: dict[str, Any] = {}
    at = 0
    for name, array in make_tensors(OLMOE).items():
        wide = size if name == Q0 else 4
        kind = dtype if name == Q0 else "F32"
        end = at + array.size * wide
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [at, end]}
        at = end
    write_raw(path, header, bytes(at))
    refuse(tmp_path, Q0, dtype, "BF16", kind=UnsupportedError)


def test_shards_that_do_not_fit_their_index(tmp_path: Path) -> None:
    tensors = make_tensors(QWEN3)
    write_checkpoint(tmp_path, QWEN3, tensors, shards=3)
    shard = tmp_path / SHARD_2
    sound = shard.read_bytes()
    mine = dict(list(tensors.items())[1::3])
    write_tensors(shard, {**mine, "extra.weight": np.ones(3, np.float32)})
    refuse(tmp_path, SHARD_2, "holds tensor extra.weight", "index")
    write_tensors(shard, {**mine, "model.embed_tokens.weight": np.ones((40, 16), np.float32)})
    refuse(tmp_path, SHARD_2, "holds tensor model.embed_tokens.weight")
    first = mine.popitem()[0]
    write_tensors(shard, mine)
    refuse(tmp_path, SHARD_2, f"lacks tensor {first}", "index")
    shard.write_bytes(sound[:-1])
    refuse(tmp_path, SHARD_2, "truncated")
    shard.unlink()
    refuse(tmp_path, "1 of 3 shards", SHARD_2)


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", "", "..", "a\0b", 7, None])
def test_an_index_cannot_leave_its_directory(tmp_path: Path, file: object) -> None:
    write_checkpoint(tmp_path, QWEN3, shards=3)
    index = {"weight_map": {"model.norm.weight": file}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse(tmp_path, "model.norm.weight", "not a plain file name")


@pytest.mark.parametrize("text", ["{}", '{"weight_map": {}}', '{"weight_map": []}', "[1]", "{"])
def test_bad_indices(tmp_path: Path, text: str) -> None:
    write_checkpoint(tmp_path, QWEN3, shards=3)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    refuse(tmp_path, "model.safetensors.index.json")


def test_weights_that_are_not_there(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, QWEN3, shards=3)
    (tmp_path / "model.safetensors.index.json").unlink()
    refuse(tmp_path, "neither", "fetch model.safetensors.index.json")
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    refuse(tmp_path, "neither", "download")
    (tmp_path / "pytorch_model.bin").touch()
    refuse(tmp_path, "only safetensors weights are read")


def test_two_sets_of_weights(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, QWEN3, shards=3)
    write_checkpoint(tmp_path, QWEN3)
    refuse(tmp_path, "both", "model.safetensors.index.json")


def test_git_lfs_pointers(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, OLMOE)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    (tmp_path / "model.safetensors").write_text(pointer)
    refuse(tmp_path, "git lfs pull")


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b"{}", "model_type"),
        (b'{"model_type": "gpt2"}', "gpt2"),
        (b'{"model_type": "olmoe", "model_type": "olmoe"}', "model_type appears twice"),
        (b'{"model_type": "\xff"}', "not UTF-8"),
        (b'{"rope_theta": NaN}', "NaN"),
        (b'{"rope_theta": -Infinity}', "-Infinity"),
        (b'{"a": ' * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b" " * (16 * 1024 * 1024 + 1), "larger than 16 MiB"),
    ],
)
def test_bad_config_json(tmp_path: Path, data: bytes, word: str) -> None:
    write_checkpoint(tmp_path, OLMOE)
    (tmp_path / "config.json").write_bytes(data)
    refuse(tmp_path, "config.json", word)


def test_config_values_are_named_with_their_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {**OLMOE, "hidden_act": "gelu"}, make_tensors(OLMOE))
    refuse(tmp_path, str(tmp_path / "config.json"), "hidden_act = 'gelu'", kind=UnsupportedError)


def test_paths_that_are_no_checkpoint(tmp_path: Path) -> None:
    refuse(tmp_path / "nowhere", "nowhere", "does not exist")
    deep = tmp_path / ("x" * 120) / ("y" * 120) / "nowhere"
    refuse(deep, str(deep))
    refuse(tmp_path / "no\nwhere", r"no\nwhere")
    refuse(tmp_path / ("x" * 300), "cannot read", "name too long")
    refuse(tmp_path / "nul\0byte", r"nul\x00byte")
    refuse(tmp_path, "has no config.json")
    file = tmp_path / "notes.txt"
    file.write_text("hello")
    refuse(file, "neither a directory nor a GGUF file")
    file.write_bytes(b"EDGEMOE\0" + bytes(100))
    refuse(file, "is an edgemoe store already")
    file.write_bytes(b"GGUF" + bytes(100))
    refuse(file, "GGUF version 0", kind=UnsupportedError)
    (tmp_path / "m.gguf").touch()
    refuse(tmp_path / "m.gguf", "is not a GGUF file")
    refuse(tmp_path, f"give the file: {tmp_path / 'm.gguf'}")
    lone = tmp_path / "model.safetensors"
    write_tensors(lone, make_tensors(OLMOE))
    refuse(lone, "only weights", "config.json")
    (tmp_path / "config.json").write_text("{}")
    refuse(lone, f"give its directory: {tmp_path}")


def test_special_files_are_not_waited_on(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    refuse(pipe, "not a regular file")
    refuse(Path("/dev/zero"), "not a regular file")
    model = write_checkpoint(tmp_path / "model", OLMOE)
    for name in ["tokenizer.json", "config.json", "model.safetensors"]:
        kept = (model / name).read_bytes()
        (model / name).unlink()
        os.mkfifo(model / name)
        refuse(model, name, "not a regular file")
        (model / name).unlink()
        (model / name).mkdir()
        refuse(model, name, "not a regular file")
        (model / name).rmdir()
        (model / name).write_bytes(kept)
    assert open_checkpoint(model).dense_names()
