"""Hostile .safetensors files: each is refused in one line, in bounded time and memory."""

from __future__ import annotations

import json
import random
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from tiny_checkpoints import OLMOE, make_tensors, refuse, write_checkpoint, write_raw, write_tensors

from edgemoe.checkpoint import safetensors_header
from edgemoe.checkpoint.safetensors_header import DTYPE_BITS, read_header
from edgemoe.errors import CheckpointError, UnsupportedError


def entry(shape: Any, begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def fails(path: Path, *words: str, kind: type[CheckpointError] = CheckpointError) -> None:
    """Reading the header fails with a short one-line message that has the file and these words."""
    with pytest.raises(kind) as caught:
        read_header(path)
    message = str(caught.value)
    assert all(word in message for word in [path.name, *words]), message
    assert "\n" not in message
    assert len(message) < 600


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def test_a_sound_file_is_described(file: Path) -> None:
    write_raw(file, {"a": entry([2, 3], 0, 24), "b": entry([], 24, 26, "BF16"),
                     "c": entry([0, 9], 26, 26)}, bytes(26))  # fmt: skip
    tensors, stamp = read_header(file)
    start = file.stat().st_size - 26
    assert stamp.size == file.stat().st_size
    assert {n: (t.dtype, t.shape, t.offset, t.nbytes) for n, t in tensors.items()} == {
        "a": ("F32", (2, 3), start, 24),
        "b": ("BF16", (), start + 24, 2),
        "c": ("F32", (0, 9), start + 26, 0),
    }


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 9, 100, -24, -1])
def test_truncated_anywhere(file: Path, cut: int) -> None:
    write_raw(file, {"a": entry([2, 3], 0, 24), "b": entry([2, 3], 24, 48)}, bytes(48))
    file.write_bytes(file.read_bytes()[:cut])
    fails(file, "download it again")


def test_bytes_after_the_last_tensor(file: Path) -> None:
    write_raw(file, {"a": entry([6], 0, 24)}, bytes(25))
    fails(file, "1 bytes after its last tensor")


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1, 1 << 40, 100_000_001, 1000, 16, 9])
def test_header_length_beyond_the_file(file: Path, length: int) -> None:
    file.write_bytes(length.to_bytes(8, "little") + b'{"a": 1}')
    fails(file, str(length), "16 bytes do not hold")


def test_header_length_over_the_limit(file: Path) -> None:
    length = 100_000_001
    file.write_bytes(length.to_bytes(8, "little") + b"{")
    with file.open("r+b") as sparse:
        sparse.truncate(length + 8)
    fails(file, str(length), "over the limit")


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"null", b'{"a": 1', b"\0\0\0", b"{} x"])
def test_headers_that_are_no_json_object(file: Path, text: bytes) -> None:
    write_raw(file, text, b"")
    fails(file, "JSON")


def test_nesting_without_end(file: Path) -> None:
    write_raw(file, b'{"a":' + b"[" * 1_000_000, b"")
    fails(file, "nested too deeply")


@pytest.mark.parametrize("bad", [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xc0\xaf"])
def test_invalid_utf8(file: Path, bad: bytes) -> None:
    write_raw(file, b'{"a' + bad + b'": {}}', b"")
    fails(file, "not UTF-8", "byte at 3")


def test_duplicate_keys(file: Path) -> None:
    good = json.dumps(entry([1], 0, 4)).encode()
    write_raw(file, b'{"a": ' + good + b', "a": ' + good + b"}", bytes(4))
    fails(file, "key a appears twice")
    twice = b'{"a": {"dtype": "F32", "shape": [1], "shape": [1], "data_offsets": [0, 4]}}'
    write_raw(file, twice, bytes(4))
    fails(file, "key shape appears twice")


@pytest.mark.parametrize(
    ("shape", "nbytes"),
    [
        ([1 << 33, 1 << 33], 0),  # 2^66 elements: none in 64-bit arithmetic
        ([1 << 32, 1 << 32], 0),
        ([1 << 62], 0),  # 2^64 bytes
        ([2, 3 + (1 << 61)], 24),  # 24 + 2^64 bytes
        ([2, 3 + (1 << 58)], 24),  # 24 * 8 + 2^64 bits
        ([11, 1676976733973595602], 24),  # 6 + 2^64 elements
        ([1 << 33, 1 << 33], 24),
        ([(1 << 64) + 6], 24),
        ([6, 1 << 64], 24),
        ([(1 << 63) - 1] * 16, 24),
        ([5], 24),
        ([7], 24),
        ([], 24),
        ([], 0),
    ],
)
def test_shapes_whose_product_is_not_the_length(file: Path, shape: list[int], nbytes: int) -> None:
    write_raw(file, {"bad": entry(shape, 0, nbytes)}, bytes(nbytes))
    fails(file, "tensor bad")


@pytest.mark.parametrize(
    "shape", ["[6]", None, 6, {}, [-6], [-2, -3], [6.0], [True, 6], ["6"], [None], [[6]], [1] * 17]
)
def test_shapes_of_the_wrong_kind(file: Path, shape: object) -> None:
    write_raw(file, {"bad": entry(shape, 0, 24)}, bytes(24))
    fails(file, "tensor bad", "bad shape")


@pytest.mark.parametrize(
    "offsets",
    [[24, 0], [-24, 0], [0, 24.0], [0], [0, 12, 24], None, "0-24", {"0": 24}, [False, 24],
     [0, 1 << 64], [1 << 63, (1 << 63) + 24]],
)  # fmt: skip
def test_offsets_of_the_wrong_kind(file: Path, offsets: object) -> None:
    bad = {"dtype": "F32", "shape": [6], "data_offsets": offsets}
    write_raw(file, {"bad": bad}, bytes(24))
    fails(file, "tensor bad", "bad data_offsets")


def test_offsets_past_the_end(file: Path) -> None:
    write_raw(file, {"bad": entry([1 << 60], 0, 1 << 62)}, bytes(24))
    fails(file, "truncated")
    write_raw(file, {"a": entry([6], 0, 24), "bad": entry([6], 1 << 62, (1 << 62) + 24)}, bytes(24))
    fails(file, "tensor bad", "hole")


def test_overlapping_tensors(file: Path) -> None:
    write_raw(file, {"a": entry([6], 0, 24), "b": entry([6], 20, 44)}, bytes(44))
    fails(file, "tensor b", "overlaps")
    write_raw(file, {"a": entry([6], 0, 24), "b": entry([6], 0, 24)}, bytes(24))
    fails(file, "overlaps")
    write_raw(file, {"a": entry([6], 0, 24), "b": entry([2], 8, 16)}, bytes(24))
    fails(file, "tensor b", "overlaps")


def test_holes(file: Path) -> None:
    write_raw(file, {"a": entry([6], 4, 28)}, bytes(28))
    fails(file, "tensor a", "hole")
    write_raw(file, {"a": entry([6], 0, 24), "b": entry([6], 28, 52)}, bytes(52))
    fails(file, "tensor b", "hole")


@pytest.mark.parametrize("dtype", ["F12", "f32", "", "F32 ", "A" * 10_000, "F\n32"])
def test_unknown_dtypes(file: Path, dtype: str) -> None:
    write_raw(file, {"bad": entry([6], 0, 24, dtype)}, bytes(24))
    fails(file, "tensor bad", "unknown dtype", kind=UnsupportedError)


@pytest.mark.parametrize("bad", [[], 1, None, {}, {"dtype": "F32"}, {**entry([6], 0, 24), "x": 1}])
def test_entries_of_the_wrong_form(file: Path, bad: object) -> None:
    write_raw(file, {"bad": bad}, bytes(24))
    fails(file, "tensor bad", "not described")


def test_entries_with_a_dtype_that_is_no_text(file: Path) -> None:
    for dtype in (None, 4, ["F32"], {"F32": 1}):
        write_raw(file, {"bad": entry([6], 0, 24, dtype)}, bytes(24))
        fails(file, "tensor bad", "dtype")


@pytest.mark.parametrize("metadata", [1, [], "pt", {"format": 1}, {"a": {"b": "c"}}])
def test_metadata_of_the_wrong_kind(file: Path, metadata: object) -> None:
    write_raw(file, {"__metadata__": metadata, "a": entry([6], 0, 24)}, bytes(24))
    fails(file, "__metadata__")


def test_names_cannot_break_the_message(file: Path) -> None:
    write_raw(file, {"x\n\x1b[31m" + "y" * 5000: entry([5], 0, 24)}, bytes(24))
    fails(file, r"x\n\x1b[31m")


def test_whatever_the_library_refuses_is_refused(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(path: Path, framework: str) -> None:
        raise SafetensorError("it knows\nbetter")

    write_raw(file, {"a": entry([6], 0, 24)}, bytes(24))
    assert library_names(file) == read_header(file)[0].keys()
    monkeypatch.setattr(safetensors_header, "safe_open", refusing)
    fails(file, "damaged", r"it knows\nbetter")


def library_names(path: Path) -> set[str]:
    with safe_open(path, framework="np") as opened:
        return set(opened.keys())


def test_a_hundred_thousand_tensors(file: Path) -> None:
    count = 100_000
    header = {
        f"model.layers.{i % 48}.mlp.experts.{i}.gate_proj.weight": entry(
            [1, 2], 4 * i, 4 * i + 4, "BF16"
        )
        for i in range(count)
    }
    write_raw(file, header, bytes(4 * count))
    del header
    took = []
    for _ in range(3):
        start = time.process_time()
        tensors, _ = read_header(file)
        took.append(time.process_time() - start)
    assert len(tensors) == count
    # Under a second where nothing else runs; the bound leaves room for a busy machine.
    assert min(took) < 2.0


def test_a_huge_sparse_tensor_costs_nothing_to_open(tmp_path: Path) -> None:
    raw = {**OLMOE, "vocab_size": 1 << 24, "hidden_size": 1 << 10}
    raw |= {"num_attention_heads": 1, "num_key_value_heads": 1}
    small = {**raw, "vocab_size": 1, "hidden_size": 1}
    write_checkpoint(tmp_path, raw, make_tensors(small))
    path = tmp_path / "model.safetensors"
    header: dict[str, Any] = {"model.embed_tokens.weight": entry([1 << 24, 1 << 10], 0, 1 << 36)}
    write_raw(path, header, b"")
    with path.open("r+b") as sparse:
        sparse.truncate(path.stat().st_size + (1 << 36))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refuse(tmp_path, "model.layers.0.input_layernorm.weight")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


def test_mutated_headers_never_escape(tmp_path: Path) -> None:
    """Random damage gives a CheckpointError or a file that the library reads the same way."""
    path = tmp_path / "m.safetensors"
    tensors = dict(list(make_tensors(OLMOE).items())[:5])
    write_tensors(path, {name: a.astype(np.float16) for name, a in tensors.items()}, "F16")
    sound = path.read_bytes()
    header_end = 8 + int.from_bytes(sound[:8], "little")
    rng = random.Random(7)
    survived = 0
    for _ in range(3000):
        data = bytearray(sound)
        for _ in range(rng.choice([1, 1, 2, 8])):
            at = rng.randrange(header_end)
            what = rng.randrange(4)
            if what == 0:
                data[at] ^= 1 << rng.randrange(8)
            elif what == 1:
                data[at] = rng.choice(b'0123456789{}[],:"-.eE ')
            elif what == 2:
                del data[at : at + rng.randrange(1, 9)]
            else:
                data[at:at] = data[at : at + rng.randrange(1, 40)]
        path.write_bytes(data)
        try:
            ours, _ = read_header(path)
        except CheckpointError as error:
            assert "\n" not in str(error)
            continue
        survived += 1
        assert library_names(path) == ours.keys()
        for info in ours.values():
            count = int(np.prod(info.shape, dtype=object))
            assert info.nbytes * 8 == count * DTYPE_BITS[info.dtype]
            assert info.offset + info.nbytes <= len(data)
    assert 0 < survived < 3000
