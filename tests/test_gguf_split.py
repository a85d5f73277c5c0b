"""GGUF files in parts."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from gguf_samples import (
    I32,
    STRING,
    U16,
    Array,
    entry,
    info,
    raw_gguf,
    to_gguf_tensors,
    write_gguf,
)
from tiny_checkpoints import QWEN3, make_tensors, refuse

from edgemoe.arch import EXPERT_PARTS
from edgemoe.checkpoint import Checkpoint, open_checkpoint
from edgemoe.errors import UnsupportedError

RAW = {**QWEN3, "max_position_embeddings": 64, "rms_norm_eps": 1e-6}
ONE = Path("m.gguf")


@pytest.fixture
def tensors() -> dict[str, Array]:
    return to_gguf_tensors(RAW, make_tensors(RAW))


@pytest.fixture
def parts(tmp_path: Path, tensors: Mapping[str, Array]) -> list[Path]:
    """A model in five or more parts."""
    write_gguf(tmp_path / ONE, RAW, tensors, split_max_tensors=8)
    found = sorted(tmp_path.glob("*.gguf"))
    assert len(found) >= 5
    assert found[1].name == f"m-00002-of-{len(found):05}.gguf"
    return found


def everything(checkpoint: Checkpoint) -> list[Array]:
    dense = [checkpoint.tensor(name) for name in checkpoint.dense_names()]
    experts = [
        checkpoint.expert_matrix(layer, expert, part)
        for layer in checkpoint.config.moe_layers
        for expert in range(checkpoint.config.num_experts)
        for part in EXPERT_PARTS
    ]
    return dense + experts


def test_any_part_opens_all(
    tmp_path: Path, parts: list[Path], tensors: Mapping[str, Array]
) -> None:
    (tmp_path / "whole").mkdir()
    write_gguf(tmp_path / "whole" / ONE, RAW, tensors)
    whole = open_checkpoint(tmp_path / "whole" / ONE)
    for part in (parts[0], parts[2], parts[-1]):
        checkpoint = open_checkpoint(part)
        assert checkpoint.fingerprint_files() == parts
        assert checkpoint.config == whole.config
        assert checkpoint.files == whole.files
        for got, want in zip(everything(checkpoint), everything(whole), strict=True):
            np.testing.assert_array_equal(got, want)


def test_a_first_part_without_tensors(tmp_path: Path, tensors: Mapping[str, Array]) -> None:
    write_gguf(tmp_path / ONE, RAW, tensors, split_max_tensors=1000, small_first_shard=True)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) == 2
    want = [tensors["token_embd.weight"], tensors["output_norm.weight"]]
    checkpoint = open_checkpoint(parts[0])
    for name, array in zip(("embed", "norm"), want, strict=True):
        np.testing.assert_array_equal(checkpoint.tensor(name), array)


def test_missing_parts(parts: list[Path]) -> None:
    parts[3].unlink()
    refuse(parts[0], f"1 of {len(parts)} parts are missing", str(parts[3]))
    refuse(parts[4], str(parts[3]))
    parts[0].unlink()
    refuse(parts[4], f"2 of {len(parts)} parts are missing", str(parts[0]))


def test_renamed_parts(tmp_path: Path, parts: list[Path]) -> None:
    for name in ["model.gguf", "m-1-of-5.gguf", f"m-00003-of-{len(parts):05}.gguf.gguf"]:
        other = parts[0].rename(tmp_path / name)
        refuse(other, "is part 1 of", f"rename it to NAME-00001-of-{len(parts):05}.gguf")
        parts[0] = other
    # two parts that took each other's name
    swapped = parts[1].rename(tmp_path / "x")
    parts[2].rename(parts[1])
    swapped.rename(parts[2])
    refuse(parts[1], "is part 3 of", "rename it")
    refuse(parts[3], "parts are missing", "m-00001-of-")


def test_parts_of_another_model(
    tmp_path: Path, parts: list[Path], tensors: Mapping[str, Array]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    names = list(tensors)
    fewer = {name: tensors[name] for name in names[1:]}
    write_gguf(other / ONE, RAW, fewer, split_max_tensors=8)
    foreign = sorted(other.glob("*.gguf"))
    assert len(foreign) == len(parts)
    kept = parts[1].read_bytes()
    shutil.copy(foreign[1], parts[1])
    refuse(parts[0], str(parts[1]), "does not belong to", "tensors in all", "download it again")
    # as many tensors, but cut elsewhere: some are twice
    parts[1].write_bytes(kept)
    turned = {name: tensors[name] for name in [*names[1:], names[0]]}
    write_gguf(other / ONE, RAW, turned, split_max_tensors=8)
    shutil.copy(foreign[1], parts[1])
    refuse(parts[0], "both hold tensor", names[16])


def test_parts_that_promise_more(tmp_path: Path, tensors: Mapping[str, Array]) -> None:
    paths = [tmp_path / f"m-0000{i}-of-00002.gguf" for i in (1, 2)]
    for i, path in enumerate(paths):
        keys = [entry("split.no", U16, i), entry("split.count", U16, 2)]
        keys += [entry("split.tensors.count", I32, 3)]
        keys += [entry("general.architecture", STRING, "olmoe")] * (i == 0)
        path.write_bytes(raw_gguf(keys, [info(f"t{i}", [8])], bytes(32)))
    refuse(paths[0], "hold 2 tensors, not 3", "download them again")


@pytest.mark.parametrize("key", ["split.no", "split.count", "split.tensors.count"])
def test_split_keys_of_the_wrong_kind(tmp_path: Path, key: str) -> None:
    path = tmp_path / "m-00001-of-00002.gguf"
    for kind, value in [(I32, -1), (STRING, "2"), (I32, (1 << 31) - 1)]:
        found = {"split.no": (U16, 0), "split.count": (U16, 2), "split.tensors.count": (I32, 0)}
        found[key] = (kind, value)
        data = raw_gguf([entry(name, *what) for name, what in found.items()])
        for i in (1, 2):
            (tmp_path / f"m-0000{i}-of-00002.gguf").write_bytes(data)
        refuse(path, f"{key} is {value}")


def test_a_file_that_is_not_split(tmp_path: Path, tensors: Mapping[str, Array]) -> None:
    """Names do not matter where the file does not say that it is a part."""
    path = tmp_path / "m-00001-of-00002.gguf"
    write_gguf(path, RAW, tensors)
    assert open_checkpoint(path).fingerprint_files() == [path]


def test_a_damaged_part_is_named(parts: list[Path]) -> None:
    parts[2].write_bytes(parts[2].read_bytes()[:-4000])
    refuse(parts[0], str(parts[2]), "ends at byte")
    parts[2].write_bytes(b"GGUF" + (1).to_bytes(4, "little") + bytes(100))
    refuse(parts[0], str(parts[2]), "version 1", kind=UnsupportedError)
