"""Writing and reading stores: what goes in comes out, and damage of any kind is told."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from store_samples import SUPERBLOCK, TINY, WIDE, Sample, checksum, header_of, make_store, read

from edgemoe.errors import OutputError, StoreError, UsageError
from edgemoe.store import Store, StoreWriter, replace_section, tensor_shapes
from edgemoe.types import LEVELS, ModelConfig, QuantSpec


@pytest.fixture
def sample(tmp_path: Path) -> Sample:
    return make_store(tmp_path / "model.emoe")


def assert_same(store: Store, sample: Sample) -> None:
    assert store.config == sample.config
    assert store.quant == sample.quant
    for (layer, expert), segments in sample.experts.items():
        for i, want in enumerate(segments):
            assert read(store, store.expert_segment(layer, expert, i)) == want.tobytes()
    assert set(store.tensors) == set(sample.nested) | set(sample.plain)
    for name, segments in sample.nested.items():
        refs = store.tensor_segments(name)
        assert [read(store, r) for r in refs] == [s.tobytes() for s in segments]
    for name, array in sample.plain.items():
        np.testing.assert_array_equal(store.read_f32(name), array)
        assert [r.size for r in store.tensor_segments(name)] == [array.nbytes]
    assert list(store.sections) == list(sample.sections)
    for name, data in sample.sections.items():
        assert store.section(name) == data


def test_crc32c_is_the_one_the_format_names() -> None:
    """RFC 3720 B.4 and the check value of CRC-32C."""
    assert checksum(b"123456789") == 0xE3069283
    assert checksum(b"\0" * 32) == 0x8A9136AA
    assert checksum(b"\xff" * 32) == 0x62A8AB43
    assert checksum(b"") == 0


@pytest.mark.parametrize(
    ("config", "alignment"),
    [
        (TINY, 64),
        (WIDE, 4096),
        (replace(TINY, qk_norm="full", attention_bias=True, tie_word_embeddings=True), 64),
        (replace(TINY, dense_layers=(0, 1, 2)), 64),
        (replace(TINY, dense_layers=(), clip_qkv=8.0, sliding_window=64, bos_token_id=None), 64),
    ],
)
def test_what_goes_in_comes_out(tmp_path: Path, config: ModelConfig, alignment: int) -> None:
    sample = make_store(tmp_path / "m.emoe", config)
    with Store.open(sample.path) as store:
        assert_same(store, sample)
        assert {store.expert_layout(i).alignment for i in config.moe_layers} <= {alignment}
        assert store.metadata == {"source": "random", "note": "ünï"}
        assert store.verify() == []
        refs = [store.expert_segment(*key, i) for key in sample.experts for i in range(5)]
        refs += [r for name in sample.nested for r in store.tensor_segments(name)]
        assert all(r.offset % 64 == 0 for r in refs)
        assert all(
            store.expert_segment(*k, i).offset % alignment == 0
            for k in sample.experts
            for i in range(5)
        )
    assert os.listdir(tmp_path) == ["m.emoe"]


def test_a_level_is_one_contiguous_read(sample: Sample) -> None:
    with Store.open(sample.path) as store:
        layout = store.expert_layout(2)
        data = sample.path.read_bytes()
        first = store.expert_segment(2, 1, 0).offset
        prefix = data[first : first + layout.prefix_bytes(3)]
        for i in range(4):
            at, size = layout.segment_offsets[i], layout.segment_sizes[i]
            assert prefix[at : at + size] == sample.experts[2, 1][i].tobytes()


def test_superblock_as_documented(sample: Sample) -> None:
    data = sample.path.read_bytes()
    a, b = data[:SUPERBLOCK], data[SUPERBLOCK : 2 * SUPERBLOCK]
    assert a == b
    assert a[:8] == b"EDGEMOE\0"
    offset, raw = header_of(data)
    fields = [
        int.from_bytes(a[i : i + n], "little")
        for i, n in ((8, 4), (12, 4), (16, 8), (24, 8), (32, 8), (40, 8))
    ]
    assert fields == [3, checksum(raw), 1, offset, len(raw), len(data)]
    assert not any(a[48:4092])
    assert int.from_bytes(a[4092:], "little") == checksum(a[:4092])
    assert list(json.loads(raw)) == [
        "format",
        "version",
        "model",
        "quant",
        "experts",
        "tensors",
        "crc_table",
        "sections",
        "dead",
        "metadata",
    ]


def test_two_writes_give_the_same_bytes(tmp_path: Path) -> None:
    a, b = make_store(tmp_path / "a"), make_store(tmp_path / "b")
    assert a.path.read_bytes() == b.path.read_bytes()


def test_pieces_make_the_same_file_as_segments(tmp_path: Path) -> None:
    whole = make_store(tmp_path / "a")
    with Store.open(whole.path) as store:
        ahead = store.ahead
    metadata = {"source": "random", "note": "ünï"}
    with StoreWriter(tmp_path / "b", TINY, QuantSpec(), metadata, ahead) as w:
        for (layer, expert), segments in whole.experts.items():
            record = w.open_expert(layer, expert)
            layout = record.layout
            for i, data in enumerate(segments):
                steps = [(m, k) for m in range(len(layout.matrices)) for k in layout.steps(m, i)]
                pieces = []
                for m, k in steps:
                    scales, plane = layout.part_offsets[k, m]
                    size = layout.matrices[m].plane_bytes(layout.added_bits(k))
                    pieces += [(scales, layout.scale_parts(m, k)["end"]), (plane, size)]
                for at, size in reversed(pieces):
                    record.write(i, int(at), data[at : at + size])
                    data[at + size : -(-(at + size) // 64) * 64] = 0  # padding of a part
            record.close()
        for name in tensor_shapes(TINY):
            if name in whole.plain:
                w.write_f32(name, whole.plain[name])
            else:
                rows, cols = tensor_shapes(TINY)[name][1]
                w.write_nested(name, (rows, cols), whole.nested[name])
        for name, section in whole.sections.items():
            w.add_section(name, section)
        w.commit()
    with Store.open(tmp_path / "b") as store:
        assert_same(store, whole)
        assert store.verify() == []


def test_short_reads_and_many_threads(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv

    def short(fd: int, buffers: list[memoryview], offset: int) -> int:
        return preadv(fd, [buffers[0][: 1 + offset % 97]], offset)

    monkeypatch.setattr(os, "preadv", short)
    failures: list[BaseException] = []
    with Store.open(sample.path) as store:

        def work() -> None:
            try:
                assert_same(store, sample)
            except BaseException as exc:
                failures.append(exc)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert not failures


def test_read_errors_of_the_system_are_told(
    sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store.open(sample.path) as store:

        def fail(fd: int, buffers: list[memoryview], offset: int) -> int:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(StoreError, match=r"cannot read at byte \d+: Input/output error"):
            store.read_f32("norm")
        assert len(store.verify()) > 10


def test_size_report_adds_up(sample: Sample) -> None:
    replace_section(sample.path, "bit_router", b"new")
    with Store.open(sample.path) as store:
        report = json.loads(json.dumps(store.size_report()))
        assert report["file_bytes"] == sample.path.stat().st_size
        assert report["experts"]["records"] == len(sample.experts)
        assert report["experts"]["weights"] == len(sample.experts) * 3 * 48 * 36
        want = [sum(s[i].size for s in sample.experts.values()) for i in range(5)]
        assert list(report["experts"]["segments"].values()) == want
        assert report["dense"]["bytes"] == sum(s.size for p in sample.nested.values() for s in p)
        assert report["float32"]["bytes"] == sum(a.nbytes for a in sample.plain.values())
        assert report["sections"] == {"tokenizer.json": 160, "bit_router": 3}
        assert report["dead_bytes"] > 333
        total = sum(report[k]["bytes"] for k in ("experts", "dense", "float32"))
        total += sum(report["sections"].values()) + report["dead_bytes"]
        assert total + report["overhead_bytes"] == report["file_bytes"]
        bits = report["experts"]["bits_per_weight"]
        assert list(bits) == [str(b) for b in LEVELS]
        assert bits["8"] == pytest.approx(8 * sum(want) / report["experts"]["weights"])


def test_progress_of_verify_reaches_the_end(sample: Sample) -> None:
    calls: list[tuple[int, int, str]] = []
    with Store.open(sample.path) as store:
        store.verify(lambda done, total, what: calls.append((done, total, what)))
    size = sample.path.stat().st_size
    assert calls[-1] == (size, size, "header")
    assert [c[0] for c in calls] == sorted(c[0] for c in calls)


def test_parts_that_do_not_exist(sample: Sample) -> None:
    with Store.open(sample.path) as store:
        for layer, expert, i in (
            (1, 0, 0),
            (3, 0, 0),
            (-1, 0, 0),
            (0, 3, 0),
            (0, -1, 0),
            (0, 0, 5),
            (0, 0, -1),
        ):
            with pytest.raises(UsageError, match="no segment"):
                store.expert_segment(layer, expert, i)
        with pytest.raises(StoreError, match="no tensor x"):
            store.tensor_segments("x")
        with pytest.raises(StoreError, match="no section"):
            store.section("x")
        with pytest.raises(StoreError, match="nested, not float32"):
            store.read_f32("embed")
        ref = store.expert_segment(0, 0, 0)
        for out in (
            np.empty(ref.size - 1, np.uint8),
            np.empty(ref.size, np.int8),
            np.empty(2 * ref.size, np.uint8)[::2],
            np.empty((1, ref.size), np.uint8),
            np.frombuffer(bytes(ref.size), np.uint8),
        ):
            with pytest.raises(UsageError, match="read_into needs"):
                store.read_into(ref, out)  # type: ignore[arg-type]
    store.close()
    with pytest.raises(UsageError, match="closed"):
        read(store, ref)


def test_the_writer_refuses_what_does_not_fit(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "m.emoe", TINY, QuantSpec(), {}) as w:
        sizes = expert_sizes(w)
        good = [np.zeros(n, np.uint8) for n in sizes]
        with pytest.raises(UsageError, match="no expert 3 in layer 0"):
            w.write_expert(0, 3, good)
        with pytest.raises(UsageError, match="no expert 0 in layer 1"):
            w.write_expert(1, 0, good)
        with pytest.raises(UsageError, match="segment 0 of 3 bytes"):
            w.write_expert(0, 0, [b"abc"])
        with pytest.raises(UsageError, match="4 segments instead of 5"):
            w.write_expert(0, 1, good[:4])
        w.write_expert(0, 2, [g.tobytes() for g in good])
        with pytest.raises(UsageError, match="written before"):
            w.write_expert(0, 2, good)
        with pytest.raises(StoreError, match="no tensor nonsense"):
            w.write_f32("nonsense", np.zeros(4, np.float32))
        with pytest.raises(UsageError, match=r"norm is f32 of shape \(47,\)"):
            w.write_f32("norm", np.zeros(47, np.float32))
        with pytest.raises(UsageError, match="router is nested of shape"):
            w.open_nested("layers.0.router", (3, 48))
        record = w.open_nested("embed", (40, 48))
        with pytest.raises(UsageError, match="leave the segment"):
            record.write(0, record.layout.segment_sizes[0] - 1, good[0][:2])
        with pytest.raises(UsageError, match="were not written"):
            record.close()
        w.add_section("x", b"")
        with pytest.raises(UsageError, match="added before"):
            w.add_section("x", b"")
        for name in ("", "a\nb", "é", "x" * 201):
            with pytest.raises(StoreError, match="section is named"):
                w.add_section(name, b"")
        with pytest.raises(StoreError, match="parts of the model are missing, first layer 0"):
            w.commit()
    assert os.listdir(tmp_path) == []


def expert_sizes(writer: StoreWriter) -> tuple[int, ...]:
    return writer.open_expert(2, 2).layout.segment_sizes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 0}, "num_experts is 0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"num_experts_per_tok": 4}, "num_experts_per_tok is 4"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3"),
        ({"dense_layers": (2, 1)}, "dense_layers"),
        ({"dense_layers": (3,)}, "dense_layers"),
        ({"intermediate_size": 0}, "intermediate_size is 0"),
        ({"rope_theta": float("nan")}, "rope_theta is nan"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
        ({"qk_norm": "other"}, "qk_norm"),
    ],
)
def test_models_that_no_store_can_hold(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises(StoreError, match=message):
        StoreWriter(tmp_path / "m", replace(TINY, **change), QuantSpec(), {})  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "quant",
    [
        QuantSpec((2, 4)),
        QuantSpec((4, 8)),
        QuantSpec((8, 6)),
        QuantSpec(()),
        QuantSpec((0, 2, 4)),
        QuantSpec(group_size=100),
        QuantSpec(group_size=0),
        QuantSpec(group_size=1 << 20),
    ],
)
def test_quantizations_that_no_store_can_hold(tmp_path: Path, quant: QuantSpec) -> None:
    with pytest.raises(StoreError, match=r"quant\."):
        StoreWriter(tmp_path / "m", TINY, quant, {})
    with pytest.raises(StoreError, match="metadata"):
        StoreWriter(tmp_path / "m", TINY, QuantSpec(), {"a": "\ud800"})


def test_an_output_that_is_something_else_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "model.safetensors"
    other.write_bytes(b"precious weights")
    for target, message in (
        (other, "another kind of file"),
        (tmp_path, "not a file"),
        (tmp_path / "no" / "m", "no directory"),
        ("/dev/null", "not a file"),
    ):
        with pytest.raises(OutputError, match=message):
            StoreWriter(target, TINY, QuantSpec(), {})
    assert other.read_bytes() == b"precious weights"
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_an_existing_store_is_replaced_at_the_end_only(tmp_path: Path) -> None:
    old = make_store(tmp_path / "m", seed=1)
    link = tmp_path / "link"
    link.symlink_to("m")
    before = old.path.read_bytes()
    with StoreWriter(link, TINY, QuantSpec(), {}):
        pass
    assert old.path.read_bytes() == before
    new = make_store(link, seed=2)
    assert link.is_symlink()
    with Store.open(old.path) as store:
        assert_same(store, new)
