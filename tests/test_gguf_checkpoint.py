"""GGUF files read as the Hugging Face checkpoints they were made of."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_samples import (
    ARCHITECTURES,
    Array,
    Pick,
    all_of,
    expected,
    read_hugging_face,
    to_gguf_tensors,
    write_gguf,
)
from tiny import CONFIGS, make_tiny
from tiny_checkpoints import refuse

from edgemoe import kernels
from edgemoe.arch import EXPERT_PARTS
from edgemoe.checkpoint import Checkpoint, gguf_file, open_checkpoint
from edgemoe.errors import CheckpointError, UnsupportedError

pytest.importorskip("torch")
pytest.importorskip("transformers")

WIDE = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
}
"""Rows of whole blocks of every type."""

Model = tuple[dict[str, Any], dict[str, Array]]


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Model]]:
    """(directory, (config.json, tensors as a GGUF has them)) of a tiny checkpoint, made once."""
    made: dict[Any, tuple[Path, Model]] = {}

    def get(name: str, dtype: str = "float32", wide: bool = False) -> tuple[Path, Model]:
        key = (name, dtype, wide)
        if key not in made:
            directory = tmp_path_factory.mktemp(f"{name}-{dtype}-{wide}")
            settings: dict[str, Any] = {}
            if wide:
                settings |= WIDE
                if name.startswith("qwen"):
                    settings |= {"moe_intermediate_size": 256, "num_experts": 3}
                    settings |= {"head_dim": 64} if name.startswith("qwen3") else {}
                else:
                    experts = "num_experts" if name == "olmoe" else "num_local_experts"
                    settings |= {experts: 3}
                if name == "qwen2_moe":
                    settings |= {"shared_expert_intermediate_size": 256}
            make_tiny(directory, name, dtype, **settings)
            raw, tensors = read_hugging_face(directory)
            made[key] = directory, (raw, to_gguf_tensors(raw, tensors))
        return made[key]

    return get


def every_tensor(checkpoint: Checkpoint) -> dict[Any, Array]:
    """All tensors by canonical name or (layer, expert, part)."""
    out: dict[Any, Array] = {name: checkpoint.tensor(name) for name in checkpoint.dense_names()}
    for layer in checkpoint.config.moe_layers:
        for expert in range(checkpoint.config.num_experts):
            for part in EXPERT_PARTS:
                out[layer, expert, part] = checkpoint.expert_matrix(layer, expert, part)
    return out


def assert_same(got: Mapping[Any, Array], want: Mapping[Any, Array]) -> None:
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert got[name].dtype == np.float32
        np.testing.assert_array_equal(got[name], array, err_msg=str(name))


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_hugging_face_checkpoint(
    tmp_path: Path, tiny_models: Callable[..., tuple[Path, Model]], name: str
) -> None:
    directory, model = tiny_models(name)
    write_gguf(tmp_path / "m.gguf", *model)
    want, got = open_checkpoint(directory), open_checkpoint(tmp_path / "m.gguf")
    assert got.config == want.config
    assert got.model_type == want.model_type
    assert got.dense_names() == want.dense_names()
    assert_same(every_tensor(got), every_tensor(want))
    assert (got.max_level, want.max_level) == (8, 8)


@pytest.mark.parametrize("name", ["qwen3_moe-options", "granitemoe-options"])
@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", "BF16"), ("float16", "F16")])
def test_half_precision_is_exact(
    tmp_path: Path,
    tiny_models: Callable[..., tuple[Path, Model]],
    name: str,
    dtype: str,
    kind: str,
) -> None:
    directory, model = tiny_models(name, dtype)
    write_gguf(tmp_path / "m.gguf", *model, all_of(kind))
    got = open_checkpoint(tmp_path / "m.gguf")
    assert_same(every_tensor(got), every_tensor(open_checkpoint(directory)))


@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize("kind", kernels.GGML_BLOCKS)
def test_every_type(
    tmp_path: Path, tiny_models: Callable[..., tuple[Path, Model]], family: str, kind: str
) -> None:
    _, (raw, tensors) = tiny_models(family, wide=True)
    stored = write_gguf(tmp_path / "m.gguf", raw, tensors, all_of(kind))
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    got = every_tensor(checkpoint)
    for name in checkpoint.dense_names():
        np.testing.assert_array_equal(got[name], expected(name, raw, stored), err_msg=name)
    for expert in range(3):
        for part in EXPERT_PARTS:
            want = stored[f"blk.0.ffn_{part}_exps.weight"][expert]
            np.testing.assert_array_equal(got[0, expert, part], want)


@pytest.mark.parametrize("name", ["mixtral-options", "granitemoe-options", "qwen2_moe-options"])
def test_rows_are_slices(
    tmp_path: Path, tiny_models: Callable[..., tuple[Path, Model]], name: str
) -> None:
    _, model = tiny_models(name)
    write_gguf(tmp_path / "m.gguf", *model)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    for tensor in ("layers.1.q", "layers.1.k", "layers.2.v", "embed"):
        whole = checkpoint.tensor(tensor)
        for rows in [(0, 8), (5, 31), (16, 16), (24, len(whole)), (len(whole), len(whole))]:
            got = checkpoint.tensor(tensor, rows=rows)
            np.testing.assert_array_equal(got, whole[slice(*rows)])
            assert got.flags.c_contiguous
        with pytest.raises(IndexError):
            checkpoint.tensor(tensor, rows=(0, len(whole) + 1))
    for part in EXPERT_PARTS:
        whole = checkpoint.expert_matrix(2, 5, part)
        np.testing.assert_array_equal(checkpoint.expert_matrix(2, 5, part, rows=(3, 9)), whole[3:9])
    with pytest.raises(IndexError):
        checkpoint.expert_matrix(2, 8, "up")


def test_long_tensors_are_read_in_pieces(
    tmp_path: Path,
    tiny_models: Callable[..., tuple[Path, Model]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, (raw, tensors) = tiny_models("granitemoe", wide=True)
    write_gguf(tmp_path / "m.gguf", raw, tensors, all_of("Q5_K"))
    want = every_tensor(open_checkpoint(tmp_path / "m.gguf"))
    monkeypatch.setattr(gguf_file, "_CHUNK", 512)
    assert_same(every_tensor(open_checkpoint(tmp_path / "m.gguf")), want)


def test_experts_stored_one_by_one(
    tmp_path: Path, tiny_models: Callable[..., tuple[Path, Model]]
) -> None:
    """As converters wrote them before experts were stacked."""
    _, (raw, tensors) = tiny_models("mixtral")
    lone: dict[str, Array] = {}
    for name, array in tensors.items():
        if "_exps" in name:
            names = [name.replace("_exps", f".{e}") for e in range(len(array))]
            lone |= dict(zip(names, array, strict=True))
        else:
            lone[name] = array
    write_gguf(tmp_path / "new.gguf", raw, tensors)
    write_gguf(tmp_path / "old.gguf", raw, lone)
    want = every_tensor(open_checkpoint(tmp_path / "new.gguf"))
    assert_same(every_tensor(open_checkpoint(tmp_path / "old.gguf")), want)
    del lone["blk.1.ffn_up.3.weight"]
    write_gguf(tmp_path / "less.gguf", raw, lone)
    refuse(tmp_path / "less.gguf", "has no tensor blk.1.ffn_up.3.weight")


def test_keys_that_old_files_lack(
    tmp_path: Path, tiny_models: Callable[..., tuple[Path, Model]]
) -> None:
    _, (raw, tensors) = tiny_models("qwen2_moe")
    write_gguf(tmp_path / "m.gguf", raw, tensors)
    want = open_checkpoint(tmp_path / "m.gguf").config
    drop_keys(tmp_path / "m.gguf", tmp_path / "old.gguf", "expert_feed_forward_length", "weights")
    # 3 experts of 40 were written as one MLP of 120 (or a few more)
    set_key(tmp_path / "old.gguf", "qwen2moe.feed_forward_length", 121)
    assert open_checkpoint(tmp_path / "old.gguf").config == want


def set_key(path: Path, key: str, value: int) -> None:
    """Overwrite a u32 of a file."""
    reader = gguf.GGUFReader(path, "r+")
    field = reader.fields[key]
    field.parts[field.data[0]][0] = value
    reader.data.flush()


def drop_keys(source: Path, target: Path, *words: str) -> None:
    """Copy a file without the keys that hold one of the words."""
    data = source.read_bytes()
    reader = gguf.GGUFReader(source)
    gone = [f for f in reader.fields.values() if any(word in f.name for word in words)]
    assert len(gone) == len(words)
    start = reader.data_offset
    head = data[:start]
    for field in sorted(gone, key=lambda f: -f.offset):
        size = sum(part.nbytes for part in field.parts)
        head = head[: field.offset] + head[field.offset + size :]
    count = int.from_bytes(head[16:24], "little") - len(gone)
    head = head[:16] + count.to_bytes(8, "little") + head[24:]
    table_end = reader.data_offset - (len(data[:start]) - len(head))
    head = head[:table_end]
    # what follows the table is padding, as long as before or longer by less than an alignment
    target.write_bytes(head + bytes(-len(head) % 32) + data[start:])


def test_types_decide_the_level(
    tmp_path: Path, tiny_models: Callable[..., tuple[Path, Model]]
) -> None:
    _, (raw, tensors) = tiny_models("olmoe", wide=True)

    def level(pick: Pick) -> int:
        write_gguf(tmp_path / "m.gguf", raw, tensors, pick)
        return open_checkpoint(tmp_path / "m.gguf").max_level

    assert {kind: level(all_of(kind)) for kind in kernels.GGML_BLOCKS} == {
        **dict.fromkeys(("Q2_K", "Q3_K", "Q4_0", "Q4_1", "Q4_K", "IQ4_NL", "MXFP4"), 4),
        **dict.fromkeys(("Q5_0", "Q5_1", "Q5_K", "Q6_K"), 6),
        **dict.fromkeys(("Q8_0", "F16", "BF16", "F32"), 8),
    }
    four, six = all_of("Q4_K"), all_of("Q6_K")
    assert level(lambda n, s: (six if "down" in n else four)(n, s)) == 4
    assert level(lambda n, s: (four if "down" in n else six)(n, s)) == 6
    # dense tensors have no say
    assert level(lambda n, s: (four if "exps" in n else six)(n, s)) == 4


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
def test_values_that_are_no_numbers(
    tmp_path: Path, tiny_models: Callable[..., tuple[Path, Model]], bad: float, kind: str
) -> None:
    _, (raw, tensors) = tiny_models("olmoe", wide=True)
    path = tmp_path / "m.gguf"
    write_gguf(path, raw, tensors, all_of(kind))
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.ffn_up_exps.weight")
    size = tensor.n_bytes // (3 * 256)
    data = bytearray(path.read_bytes())
    at = int(tensor.data_offset) + (2 * 256 + 7) * size
    width = "<f4" if kind == "F32" else "<f2"
    data[at : at + int(width[2])] = np.array(bad, width).tobytes()
    path.write_bytes(data)
    checkpoint = open_checkpoint(path)
    checkpoint.expert_matrix(0, 1, "up")
    checkpoint.expert_matrix(0, 2, "up", rows=(0, 7))
    for rows in [None, (7, 9)]:
        with pytest.raises(
            CheckpointError, match=r"m\.gguf: tensor blk\.0\.ffn_up_exps\.weight"
        ) as e:
            checkpoint.expert_matrix(0, 2, "up", rows=rows)
        assert "row 519, column 0" in str(e.value)
        assert "\n" not in str(e.value)


def test_a_file_that_changes(
    tmp_path: Path, tiny_models: Callable[..., tuple[Path, Model]]
) -> None:
    _, model = tiny_models("olmoe")
    path = tmp_path / "m.gguf"
    write_gguf(path, *model)
    checkpoint = open_checkpoint(path)
    assert checkpoint.fingerprint_files() == [path]
    os.utime(path, (1, 1))
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        checkpoint.tensor("norm")
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot read"):
        checkpoint.tensor("norm")


def test_tokenizer(tmp_path: Path, tiny_models: Callable[..., tuple[Path, Model]]) -> None:
    _, (raw, tensors) = tiny_models("olmoe")
    path = tmp_path / "m.gguf"
    write_gguf(path, raw, tensors)
    checkpoint = open_checkpoint(path)
    checkpoint.require_tokenizer()
    assert checkpoint.config.eos_token_ids == (3,)
    assert set(checkpoint.files) >= {"tokenizer.json", "tokenizer_config.json"}
    write_gguf(path, raw, tensors, tokenizer=False)
    without = open_checkpoint(path)
    assert not without.files
    assert without.config.eos_token_ids == ()
    with pytest.raises(CheckpointError, match=r"m\.gguf has no tokenizer in its metadata"):
        without.require_tokenizer()
    tokens = [f"t{i}" for i in range(raw["vocab_size"] + 1)]

    def too_many(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens)

    write_gguf(path, raw, tensors, tokenizer=False, extra=too_many)
    refuse(path, "161 tokens", "rows for 160 in token_embd.weight")

    def unknown(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("rwkv")
        writer.add_token_list(tokens[:-1])

    write_gguf(path, raw, tensors, tokenizer=False, extra=unknown)
    refuse(path, "tokenizer.ggml.model is rwkv", kind=UnsupportedError)
