"""Damaged and malicious GGUF files: counts, strings, values and files cut short."""

from __future__ import annotations

import os
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_hostile import ARCH, F32, HUGE, Q4_K, Q8_0, parse, refused
from gguf_samples import (
    ARRAY,
    BOOL,
    FLOAT32,
    FLOAT64,
    I8,
    I16,
    I32,
    I64,
    STRING,
    U8,
    U16,
    U32,
    U64,
    array_entry,
    entry,
    info,
    raw_gguf,
    string,
)

from edgemoe.checkpoint import gguf_source, open_checkpoint
from edgemoe.checkpoint.gguf_header import read_gguf_header
from edgemoe.errors import CheckpointError, UnsupportedError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "m.gguf"


def test_a_sound_file(path: Path) -> None:
    keys = [
        ARCH,
        entry("u8", U8, 255),
        entry("i8", I8, -128),
        entry("u16", U16, 65535),
        entry("i16", I16, -32768),
        entry("u32", U32, 1 << 31),
        entry("i32", I32, -(1 << 31)),
        entry("f32", FLOAT32, 0.5),
        entry("no", BOOL, 0),
        entry("yes", BOOL, 1),
        entry("text", STRING, "grüß\nGott\0"),
        entry("u64", U64, (1 << 64) - 1),
        entry("i64", I64, -(1 << 63)),
        entry("f64", FLOAT64, 1e-300),
        array_entry("numbers", I16, [1, -2, 3]),
        array_entry("flags", BOOL, [1, 0]),
        array_entry("words", STRING, ["", "a", "ß" * 40]),
        array_entry("nothing", STRING, []),
        array_entry("scores", FLOAT32, [0.25, -1.0]),
        entry("general.alignment", U32, 64),
    ]
    infos = [
        info("b", [32, 3], Q8_0, 64),
        info("a", [5], F32, 0),
        info("c", [256, 2, 2], Q4_K, 192),
    ]
    data = bytes(64 + 102 + 26 + 4 * 144)
    for version in (2, 3):
        header = parse(path, raw_gguf(keys, infos, data, version=version, alignment=64))
        assert header.metadata == {
            "general.architecture": "olmoe",
            "u8": 255,
            "i8": -128,
            "u16": 65535,
            "i16": -32768,
            "u32": 1 << 31,
            "i32": -(1 << 31),
            "f32": 0.5,
            "no": False,
            "yes": True,
            "text": "grüß\nGott\0",
            "u64": (1 << 64) - 1,
            "i64": -(1 << 63),
            "f64": 1e-300,
            "numbers": [1, -2, 3],
            "flags": [True, False],
            "words": ["", "a", "ß" * 40],
            "nothing": [],
            "scores": [0.25, -1.0],
            "general.alignment": 64,
        }
        assert header.metadata["no"] is False
        assert [type(v) for v in header.metadata["flags"]] == [bool, bool]
        start = path.stat().st_size - len(data)
        assert start % 64 == 0
        found = {
            t.name: (t.type, t.shape, t.offset - start, t.nbytes) for t in header.tensors.values()
        }
        assert found == {
            "a": ("F32", (5,), 0, 20),
            "b": ("Q8_0", (3, 32), 64, 102),
            "c": ("Q4_K", (2, 2, 256), 192, 576),
        }


def test_chunks_do_not_show(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [f"token number {i}" for i in range(500)]
    keys = [ARCH, array_entry("words", STRING, words), array_entry("ids", U64, range(300))]
    data = raw_gguf(keys, [info("x", [8])], bytes(32))
    want = parse(path, data)
    for chunk in (1, 7, 64, 1000):
        monkeypatch.setattr(gguf_source, "_CHUNK", chunk)
        got = parse(path, data)
        assert (got.metadata, got.tensors) == (want.metadata, want.tensors)


SOUND = raw_gguf(
    [ARCH, array_entry("words", STRING, ["one", "two"]), entry("n", U64, 7)],
    [info("a", [32, 2], Q8_0, 0), info("b", [8], F32, 96)],
    bytes(96 + 32),
)


@pytest.mark.parametrize("cut", [*range(40), *range(40, len(SOUND), 3), len(SOUND) - 1])
def test_truncated_anywhere(path: Path, cut: int) -> None:
    parse(path, SOUND)
    refused(path, SOUND[:cut])


def test_bytes_after_the_last_tensor_are_padding(path: Path) -> None:
    assert parse(path, SOUND + bytes(100)).tensors == parse(path, SOUND).tensors


@pytest.mark.parametrize(
    ("data", "words", "kind"),
    [
        (b"", ("not a GGUF file",), CheckpointError),
        (b"GGML" + SOUND[4:], ("not a GGUF file",), CheckpointError),
        (b"GGUF\3\0\0", ("has 7 bytes",), CheckpointError),
        (b"version https://git-lfs.github.com/spec/v1\noid", ("git lfs pull",), CheckpointError),
        (raw_gguf(version=1), ("version 1", "2 and 3"), UnsupportedError),
        (raw_gguf(version=4), ("version 4",), UnsupportedError),
        (raw_gguf(version=0xFFFFFFFF), ("version 4294967295",), UnsupportedError),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), ("big-endian",), UnsupportedError),
        (b"GGUF" + struct.pack(">IQQ", 2, 0, 0), ("big-endian",), UnsupportedError),
        (raw_gguf(version=0), ("version 0",), UnsupportedError),
    ],
)
def test_other_files(
    path: Path, data: bytes, words: tuple[str, ...], kind: type[CheckpointError]
) -> None:
    refused(path, data, *words, kind=kind)


@pytest.mark.parametrize("count", [(1 << 16) + 1, 4_000_000_000, *HUGE])
def test_counts_in_the_billions(path: Path, count: int) -> None:
    refused(path, raw_gguf([ARCH], counts=(count, 1)), f"{count} tensors", kind=UnsupportedError)
    refused(path, raw_gguf([ARCH], counts=(0, count)), f"{count} keys", kind=UnsupportedError)
    # also where the file is long enough for them
    data = raw_gguf([ARCH], counts=(count, 1))
    refused(path, data, f"{count} tensors", kind=UnsupportedError, size=1 << 40)


@pytest.mark.parametrize("extra", [1, 100])
def test_counts_beyond_what_is_there(path: Path, extra: int) -> None:
    keys, infos = [ARCH], [info("a", [8])]
    refused(path, raw_gguf(keys, infos, counts=(1 + extra, 1))[:-40], "goes on to byte")
    # in a sparse file the rest is zeros: a key, then a tensor, without a name
    data = raw_gguf(keys, counts=(0, 1 + extra))
    refused(path, data, "key 1", "is empty", size=1 << 40)
    data = raw_gguf(keys, infos, counts=(1 + extra, 1))
    refused(path, data, "the name of tensor 1", size=1 << 40)


@pytest.mark.parametrize("length", [1000, *HUGE])
@pytest.mark.parametrize("where", ["key", "value", "element", "tensor"])
def test_strings_past_the_end(path: Path, length: int, where: str) -> None:
    long = struct.pack("<Q", length) + b"abc"
    keys, infos, counts = [ARCH], [], (0, 2)
    if where == "key":
        keys.append(long)
    elif where == "value":
        keys.append(string("k") + struct.pack("<I", STRING) + long)
    elif where == "element":
        keys.append(string("k") + struct.pack("<IIQ", ARRAY, STRING, 1) + long)
    else:
        infos, counts = [long], (1, 1)
    refused(path, raw_gguf(keys, infos, counts=counts), "goes on to byte")


def test_a_string_of_half_a_terabyte(path: Path) -> None:
    """A sparse file that has the bytes it claims."""
    keys = [ARCH, string("k") + struct.pack("<I", STRING) + struct.pack("<Q", 1 << 39)]
    data = raw_gguf(keys, counts=(0, 2))
    refused(path, data, "over the limit", kind=UnsupportedError, size=1 << 40)


@pytest.mark.parametrize("kind", [U8, U16, U32, FLOAT32, BOOL, STRING, U64, I64, FLOAT64])
@pytest.mark.parametrize("count", [1000, *HUGE])
def test_arrays_longer_than_the_file(path: Path, kind: int, count: int) -> None:
    keys = [ARCH, array_entry("k", kind, [], count)]
    refused(path, raw_gguf(keys), "k is said to have", "elements")


@pytest.mark.parametrize("kind", [U8, U64, STRING])
def test_arrays_as_long_as_a_sparse_file(path: Path, kind: int) -> None:
    keys = [ARCH, array_entry("k", kind, [], 1 << 36)]
    data = raw_gguf(keys)
    refused(path, data, "over the limit", kind=UnsupportedError, size=1 << 40)


def test_many_arrays_add_up(path: Path) -> None:
    keys = [array_entry(f"k{i}", U8, [], 1 << 19) + bytes(1 << 19) for i in range(5)]
    refused(
        path,
        raw_gguf([ARCH, *keys]),
        "with k4 the arrays",
        kind=UnsupportedError,
        memory=64 << 20,
    )


def test_the_most_elements_there_can_be(path: Path) -> None:
    """Two million empty strings: the worst that passes the limits."""
    keys = [ARCH, array_entry("k", STRING, [], gguf_source.MAX_VALUES)]
    path.write_bytes(raw_gguf(keys))
    os.truncate(path, len(raw_gguf(keys)) + 8 * gguf_source.MAX_VALUES)
    begin = time.process_time()
    header = read_gguf_header(path)
    assert len(header.metadata["k"]) == gguf_source.MAX_VALUES
    assert time.process_time() - begin < 2


@pytest.mark.parametrize("inner", [U8, STRING, ARRAY])
def test_arrays_of_arrays(path: Path, inner: int) -> None:
    body = struct.pack("<IIQ", ARRAY, ARRAY, 1) + struct.pack("<IQ", inner, 1) + bytes(8)
    keys = [ARCH, string("nest") + body]
    refused(path, raw_gguf(keys), "nest is an array of arrays", kind=UnsupportedError)
    deep = string("nest") + struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * 100_000
    refused(path, raw_gguf([ARCH, deep]), "an array of arrays", kind=UnsupportedError)


@pytest.mark.parametrize("bad", [b"\xff", b"a\xc3", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80"])
@pytest.mark.parametrize("where", ["key", "value", "element", "tensor"])
def test_strings_that_are_not_utf8(path: Path, bad: bytes, where: str) -> None:
    keys, infos = [ARCH], []
    if where == "key":
        keys.append(entry(bad, U8, 1))
    elif where == "value":
        keys.append(entry("k", STRING, bad))
    elif where == "element":
        keys.append(array_entry("k", STRING, ["fine", bad, "x" * 100]))
    else:
        infos.append(info(bad, [8]))
    refused(path, raw_gguf(keys, infos, bytes(32)), "is not UTF-8: bad byte at")


@pytest.mark.parametrize("value", [2, 3, 255])
def test_booleans_that_are_neither(path: Path, value: int) -> None:
    refused(path, raw_gguf([ARCH, entry("k", BOOL, value)]), f"boolean of value {value}")
    refused(path, raw_gguf([ARCH, array_entry("k", BOOL, [0, 1, value])]), f"value {value}")


@pytest.mark.parametrize("kind", [13, 14, 255, 1 << 31, (1 << 32) - 1])
def test_unknown_types_of_values(path: Path, kind: int) -> None:
    key = string("k") + struct.pack("<I", kind) + bytes(8)
    refused(path, raw_gguf([ARCH, key]), f"k has the unknown type {kind}")
    key = string("k") + struct.pack("<IIQ", ARRAY, kind, 1) + bytes(8)
    refused(path, raw_gguf([ARCH, key]), f"k is an array of the unknown type {kind}")


def test_duplicates(path: Path) -> None:
    refused(path, raw_gguf([ARCH, ARCH]), "key 1, general.architecture, appears twice")
    twice = [info("a", [8]), info("a", [8], offset=32)]
    refused(path, raw_gguf([ARCH], twice, bytes(64)), "tensor 1, a, appears twice")


def test_names(path: Path) -> None:
    refused(path, raw_gguf([ARCH, entry("", U8, 1)]), "key 1", "is empty")
    for name in ["", "x" * 65, "ß" * 33]:
        refused(path, raw_gguf([ARCH], [info(name, [8])], bytes(32)), "is not of 1 to 64 bytes")
    parse(path, raw_gguf([ARCH], [info("x" * 64, [8])], bytes(32)))
    # names stay on one line, whatever they are
    refused(path, raw_gguf([ARCH, entry("a\nb\x1b[2J", BOOL, 7)]), r"a\nb\x1b[2J")
    refused(path, raw_gguf([ARCH], [info("a\nb", [])]), r"a\nb")
    refused(path, raw_gguf([ARCH, entry("k" * 100_000, BOOL, 7)]), "kkk...")


def test_a_vocabulary_of_qwen3(path: Path) -> None:
    """The header of an 18 GB file: 151,936 tokens with their types and scores, and the merges."""
    tokens, merges = 151_936, 151_387
    keys = [
        ARCH,
        array_entry("tokenizer.ggml.tokens", STRING, (f"token{i}" for i in range(tokens))),
        array_entry("tokenizer.ggml.token_type", I32, [1] * tokens),
        array_entry("tokenizer.ggml.scores", FLOAT32, [0.0] * tokens),
        array_entry("tokenizer.ggml.merges", STRING, (f"tok{i} en" for i in range(merges))),
    ]
    infos = [info(f"blk.{i}.ffn_up_exps.weight", [8], offset=32 * i) for i in range(600)]
    path.write_bytes(raw_gguf(keys, infos, bytes(32 * 600)))
    begin = time.process_time()
    header = read_gguf_header(path)
    took = time.process_time() - begin
    print(f"{path.stat().st_size / 1e6:.1f} MB in {took:.2f} s")
    assert header.metadata["tokenizer.ggml.merges"][-1] == f"tok{merges - 1} en"
    assert took < 1


def test_special_files_are_not_waited_on(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_checkpoint(tmp_path / "pipe.gguf")
    (tmp_path / "dir.gguf").mkdir()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_checkpoint(tmp_path / "dir.gguf")


def test_mutated_headers_never_escape(path: Path) -> None:
    """Any damage gives a sound header or one of our errors, quickly."""
    rng = random.Random(0)
    end = len(SOUND) - 128
    for _ in range(1500):
        data = bytearray(SOUND)
        for _ in range(rng.choice((1, 1, 2, 4))):
            at = rng.randrange(end)
            width = rng.choice((1, 1, 4, 8))
            values: list[Callable[[], int]] = [
                lambda: rng.getrandbits(8),
                lambda: 0,
                lambda: 255,
                lambda: 1 << rng.randrange(8),
            ]
            data[at : at + width] = bytes(rng.choice(values)() for _ in range(width))
        if rng.random() < 0.1:
            data = data[: rng.randrange(len(data))]
        begin = time.process_time()
        try:
            header = parse(path, bytes(data))
        except CheckpointError as error:
            assert "\n" not in str(error)
        else:
            size = path.stat().st_size
            for tensor in header.tensors.values():
                assert 0 <= tensor.offset <= tensor.offset + tensor.nbytes <= size
        assert time.process_time() - begin < 1


def test_numbers_come_as_plain_python(path: Path) -> None:
    """No NumPy scalar leaks into what is written as JSON later."""
    kinds: dict[int, Any] = {U8: 1, I64: -1, FLOAT32: 0.5, FLOAT64: 0.1, BOOL: 1}
    keys = [entry(f"k{k}", k, v) for k, v in kinds.items()]
    keys += [array_entry(f"a{k}", k, [v, v]) for k, v in kinds.items()]
    for value in parse(path, raw_gguf(keys)).metadata.values():
        for item in value if isinstance(value, list) else [value]:
            assert type(item) in (int, float, bool)
            assert not isinstance(item, np.generic)
