"""Headers made to hurt: with every checksum right, each ends in a StoreError, fast and small."""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from store_samples import SUPERBLOCK, checksum, forge, header_of, make_store, superblock

from edgemoe.errors import StoreError
from edgemoe.store import Store

MIB = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make_store(tmp_path / "m.emoe").path


def refuse(path: Path, message: str) -> None:
    start = time.process_time()
    with pytest.raises(StoreError, match=message) as info:
        Store.open(path)
    assert time.process_time() - start < 1.0
    text = str(info.value)
    assert text.startswith(str(path))
    assert "\n" not in text and len(text) < 600


def test_the_forge_itself_makes_sound_stores(path: Path) -> None:
    forge(path, lambda top: None)
    with Store.open(path) as store:
        assert store.verify() == []


def edit(where: str, value: Any) -> Callable[[Any], None]:
    """A change of one field, e.g. edit("tensors.3.shape.0", 7); the last step may be new."""

    def change(top: Any) -> None:
        *steps, last = where.split(".")
        for step in steps:
            top = top[int(step) if isinstance(top, list) else step]
        if isinstance(top, list):
            top[int(last)] = value
        else:
            top[last] = value

    return change


HUGE = 1 << 61
FIELDS: list[tuple[str, Any, str]] = [
    ("format", "other", "not an edgemoe-store header"),
    ("version", 1, "not an edgemoe-store header"),
    ("version", 3.0, "version is 3.0"),
    ("extra", 1, "unknown key extra"),
    ("model.extra", 1, "model has an unknown key extra"),
    ("quant.extra", 1, "quant has an unknown key extra"),
    ("experts.0.extra", 1, r"experts\[0\] has an unknown key extra"),
    ("tensors.0.extra", 1, "unknown key extra"),
    ("model", [], "model must be an object"),
    ("model.num_hidden_layers", 10**9, "num_hidden_layers is 1000000000"),
    ("model.num_hidden_layers", -1, "num_hidden_layers is -1"),
    ("model.num_hidden_layers", 3.0, r"num_hidden_layers is 3\.0"),
    ("model.num_hidden_layers", "3", "num_hidden_layers is '3'"),
    ("model.num_hidden_layers", True, "num_hidden_layers is True"),
    ("model.num_hidden_layers", 4, "experts has 2 entries, must have 3"),
    ("model.num_hidden_layers", 2, "experts has 2 entries, must have 1"),
    ("model.num_experts", 1 << 16, "must be"),
    ("model.num_experts", 10**15, "num_experts is"),
    ("model.hidden_size", 1 << 20, "must be"),
    ("model.moe_intermediate_size", 1 << 20, "must be"),
    ("model.vocab_size", 1 << 24, "must be"),
    ("model.model_type", "a b", "model_type"),
    ("model.model_type", 5, "model_type"),
    ("model.rope_theta", "big", "rope_theta"),
    ("model.rope_theta", 10**19, "rope_theta"),
    ("model.dense_layers", [1, 1], "dense_layers"),
    ("model.dense_layers", [1.0], "dense_layers"),
    ("model.dense_layers", 1, "dense_layers is 1, must be a list"),
    ("model.dense_layers", list(range(100_000)), "dense_layers"),
    ("model.eos_token_ids", [-1], "eos_token_ids"),
    ("model.eos_token_ids", ["</s>"], "eos_token_ids"),
    ("model.qk_norm", None, "qk_norm"),
    ("quant", None, "quant must be an object"),
    ("quant.levels", [2, 3, 4, 6, 9], "levels"),
    ("quant.levels", [2, 3, 4, 6, "8"], "levels"),
    ("quant.levels", [], "levels"),
    ("quant.levels", list(range(1, 100_000)), "levels"),
    ("quant.levels", [2, 4, 6, 8], "must be"),
    ("quant.group_size", 0, "group_size is 0"),
    ("quant.group_size", 32, "must be"),
    ("quant.group_size", 128.0, "group_size"),
    ("quant.scale_encoding", "f32", "scale_encoding is 'f32', must be 'e4m4-z8-shift4'"),
    ("quant.plane_layout", 1, "plane_layout is 1"),
    ("experts.0.offset", 8256, "experts of layer 0 begins at byte 8256, must at 8192"),
    ("experts.0.offset", -64, r"experts\[0\].offset is -64"),
    ("experts.0.offset", HUGE, "begins at byte"),
    ("experts.0.offset", 10**30, "integer of 31 digits"),
    ("experts.0.offset", 8192.0, r"experts\[0\].offset is 8192"),
    ("experts.0.stride", 64, r"experts\[0\].stride is 64, must be"),
    ("experts.0.alignment", 1, r"experts\[0\].alignment is 1, must be 64"),
    ("experts.0.segments.0.size", 1, r"experts\[0\].segments\[0\].size is 1"),
    ("experts.0.segments.0.offset", 64, r"experts\[0\].segments\[0\].offset is 64"),
    ("experts.0.segments", [], r"experts\[0\].segments"),
    ("experts.0.segments", {}, r"experts\[0\].segments"),
    ("experts", {}, "experts is a dict"),
    ("experts", [], "experts has 0 entries"),
    ("experts.0.ahead", 31, r"experts\[0\].ahead is 31, must be a multiple of 32"),
    ("experts.0.ahead", 32, r"experts\[0\].*must be"),
    ("experts.0.ahead", -32, r"experts\[0\].ahead is -32"),
    ("experts.0.ahead", None, r"experts\[0\].ahead is None"),
    ("tensors", [], "missing, first embed"),
    ("tensors", {}, "tensors is a dict"),
    ("tensors.0", 5, r"tensors\[0\]"),
    ("tensors.0.name", 5, r"tensors\[0\].name is 5"),
    ("tensors.0.name", "evil\n\x1b[2J", "has no tensor"),
    ("tensors.0.name", "norm", "two tensors norm"),
    ("tensors.0.kind", "f32", r"tensors\[0\].kind is 'f32'"),
    ("tensors.0.shape", [1 << 40, 1 << 40], r"tensors\[0\].shape\[0\]"),
    ("tensors.0.shape", [40], r"tensors\[0\].shape"),
    ("tensors.0.offset", 8192, "overlap or leave a hole"),
    ("tensors.0.offset", -1, r"tensors\[0\].offset is -1"),
    ("tensors.0.offset", HUGE, "overlap or leave a hole"),
    ("tensors.0.offset", None, r"tensors\[0\].offset is None"),
    ("tensors.1.size", 0, r"tensors\[1\].size"),
    ("crc_table.size", 0, "crc_table.size is 0"),
    ("crc_table.size", HUGE, "crc_table.size"),
    ("crc_table.offset", 0, "overlap"),
    ("crc_table.crc32c", 1 << 32, "crc_table.crc32c"),
    ("crc_table.crc32c", 0, "CRC table is damaged"),
    ("sections.0.offset", 0, "overlap or leave a hole"),
    ("sections.0.size", HUGE, "at most"),
    ("sections.0.size", 300, "overlap or leave a hole|the parts end"),
    ("sections.0.name", "bit_router", "two sections bit_router"),
    ("sections.0.name", "a\nb", "section is named"),
    ("sections.0.name", "", "section is named"),
    ("sections", [], "overlap or leave a hole"),
    ("sections", {"a": 1}, "must be a list"),
    ("dead", [[8192, 64]], "overlap"),
    ("dead", [[0, HUGE]], "overlap"),
    ("dead", [[-64, 64]], r"dead\[0\]"),
    ("dead", [[0]], r"dead\[0\]"),
    ("dead", [["0", 1]], r"dead\[0\]"),
    ("dead", 7, "must be a list"),
    ("metadata", {"a": 1}, "metadata"),
    ("metadata", [], "metadata must be an object"),
]


@pytest.mark.parametrize(("where", "value", "message"), FIELDS)
def test_one_wrong_field(path: Path, where: str, value: Any, message: str) -> None:
    forge(path, edit(where, value))
    refuse(path, message)


@pytest.mark.parametrize(
    "key", ["format", "model", "tensors", "dead", "metadata", "sections", "crc_table"]
)
def test_one_missing_field(path: Path, key: str) -> None:
    forge(path, lambda top: top.pop(key) and None)
    refuse(path, f"lacks the key '?{key}|must be")


def as_text(old: bytes, new: bytes) -> Callable[[Any], bytes]:
    def change(top: Any) -> bytes:
        raw = json.dumps(top).encode()
        assert old in raw
        return raw.replace(old, new, 1)

    return change


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"version": 3,', b'"version": 3, "version": 3,', "key version twice"),
        (b'"head_dim": 8,', b'"head_dim": 8, "head_dim": 8,', "key head_dim twice"),
        (b'"rope_theta": 10000.0', b'"rope_theta": NaN', "holds NaN"),
        (b'"rope_theta": 10000.0', b'"rope_theta": -Infinity', "holds -Infinity"),
        (b'"rope_theta": 10000.0', b'"rope_theta": 1e999', "rope_theta is inf"),
        (b'"vocab_size": 40', b'"vocab_size": ' + b"9" * 100_000, "integer of 100000 digits"),
        (b'"random"', b'"\\ud800"', "not valid Unicode"),
        (b'"random"', b'"\xff"', "not sound JSON"),
        (b'"random"', b'"a\nb"', "not sound JSON"),
        (b'"random"}', b'"random"}}', "not sound JSON"),
    ],
)
def test_text_that_json_libraries_let_through(
    path: Path, old: bytes, new: bytes, message: str
) -> None:
    if old.endswith(b"}"):
        forge(path, lambda top: json.dumps(top).encode() + b"}")
    else:
        forge(path, as_text(old, new))
    refuse(path, message)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[",
        b"null",
        b"[" * 200_000,
        b"[" * (16 * MIB),
        b'{"a":' * 200_000,
        b"[" + b"[]," * (5 * MIB) + b"0]",
        b"[" + b"{}," * (5 * MIB) + b"0]",
        b"[" + b"1," * (8 * MIB - 8) + b"0]",
        b"[" + b"{}," * 120_000 + b"0]",
        b'"' + b"a" * (16 * MIB - 2) + b'"',
        b" " * (16 * MIB),
        b"{" + b",".join(b'"%d":0' % i for i in range(240_000)) + b"}",
        b"{" + b",".join(b'"%d":0' % (i % 239_999) for i in range(240_000)) + b"}",
    ],
    ids=lambda raw: f"{raw[:6].decode()}-{len(raw)}",
)
def test_headers_that_are_large_or_deep(path: Path, raw: bytes) -> None:
    forge(path, lambda top: raw)
    refuse(path, "header|superblock")


@pytest.mark.parametrize(
    ("offset", "length", "total"),
    [
        (0, 100, None),
        (1 << 62, 100, None),
        ((1 << 64) - 100, 100, None),
        (8192, 1 << 63, None),
        (8192, 17 * MIB, 8192 + 17 * MIB),
        (100_000, 100, 50_000),
        (None, None, 1 << 62),
    ],
)
def test_superblocks_that_lie(
    path: Path, offset: int | None, length: int | None, total: int | None
) -> None:
    data = path.read_bytes()
    at, raw = header_of(data)
    block = bytearray(superblock(raw, at))
    values = (at if offset is None else offset, len(raw) if length is None else length)
    for i, value in zip((24, 32), values, strict=True):
        block[i : i + 8] = value.to_bytes(8, "little")
    end = total if total is not None else min(sum(values), (1 << 64) - 1)
    block[40:48] = end.to_bytes(8, "little")
    block[-4:] = checksum(bytes(block[:-4])).to_bytes(4, "little")
    path.write_bytes(bytes(block) * 2 + data[2 * SUPERBLOCK :])
    refuse(path, "superblock|truncated|header")
    # the same with a sparse file that is as long as the superblock says
    if end < 1 << 40:
        os.truncate(path, max(end, 0))
        refuse(path, "superblock|truncated|header")


def test_version_and_reserved_bytes(path: Path) -> None:
    data = path.read_bytes()
    at, raw = header_of(data)
    path.write_bytes(superblock(raw, at, version=1) * 2 + data[2 * SUPERBLOCK :])
    refuse(path, "format version 1, this edgemoe reads version 3")
    block = bytearray(superblock(raw, at))
    block[1000] = 1
    block[-4:] = checksum(bytes(block[:-4])).to_bytes(4, "little")
    path.write_bytes(bytes(block) * 2 + data[2 * SUPERBLOCK :])
    refuse(path, "reserved bytes")


def test_a_hole_between_parts(path: Path) -> None:
    """64 declared-nowhere bytes before the header."""
    data = path.read_bytes()
    at, raw = header_of(data)
    at += -at % 64
    moved = superblock(raw, at + 64) * 2 + data[2 * SUPERBLOCK : at] + bytes(64) + raw
    path.write_bytes(moved)
    refuse(path, "header begins at byte .* leave a hole")


MEMORY = """
import resource, sys
from edgemoe.errors import StoreError
from edgemoe.store import Store
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    Store.open(sys.argv[1])
except StoreError:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize(
    "raw",
    [b"[" + b"{}," * 124_000 + b"0]", b'"' + b"a" * (16 * MIB - 2) + b'"', b"[" * 200_000],
    ids=["objects", "string", "deep"],
)
def test_memory_of_refusing_is_bounded(path: Path, raw: bytes) -> None:
    forge(path, lambda top: raw)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(path)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) * 1024 < 100 * MIB


def test_a_sparse_file_of_many_experts_costs_nothing(path: Path) -> None:
    """A header may claim 65536 experts a layer with all offsets right: the file must be as long."""

    def change(top: Any) -> None:
        top["model"]["num_experts"] = 1 << 16
        top["model"]["num_hidden_layers"] = 1024

    forge(path, change)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refuse(path, "at most 1048576")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


def test_random_edits_of_the_header(path: Path) -> None:
    """Bytes changed at random, checksums right: a StoreError or a sound store, no other end."""
    rng = random.Random(1)
    original = path.read_bytes()
    _, raw = header_of(original)
    opened = 0
    for _ in range(400):
        edited = bytearray(raw)
        for _ in range(rng.choice((1, 1, 2, 8))):
            at = rng.randrange(len(edited))
            edited[at : at + rng.choice((0, 1, 1, 3))] = rng.choice(
                [b"", b"0", b"9", b"-", b"[", b"]", b"}", b'"', b",", b"e9", b"null", b"\x00"]
            )
        path.write_bytes(original)
        forge(path, lambda top, data=bytes(edited): data)  # type: ignore[misc]
        try:
            with Store.open(path) as store:
                store.verify()
                store.size_report()
                opened += 1
        except StoreError:
            pass
    assert opened < 100
