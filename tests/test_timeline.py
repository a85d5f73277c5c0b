"""The trace of a run, read back: lanes, sums, what is left behind when something goes wrong."""

from __future__ import annotations

import itertools
import json
import os
import resource
import signal
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgemoe.errors import OutputError, UsageError
from edgemoe.pipeline import timeline
from edgemoe.pipeline.timeline import Timeline


def read_back(path: Path) -> tuple[list[dict[str, Any]], dict[int, str], dict[str, float]]:
    """(spans, name of each thread, seconds by name) of a trace."""
    trace = json.loads(path.read_text())
    spans = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    names = [e for e in trace["traceEvents"] if e["ph"] == "M"]
    assert len(spans) + len(names) == len(trace["traceEvents"])
    assert {e["name"] for e in names} == {"thread_name"}
    threads = {e["tid"]: e["args"]["name"] for e in names}
    assert len(threads) == len(names)
    return spans, threads, trace["otherData"]["total_s"]


@pytest.mark.parametrize("held", [1, 7, 1024])
def test_a_trace_read_back(held: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2,000 spans of each kind: all there, in their lanes, and the sums agree."""
    monkeypatch.setattr(timeline, "_HELD", held)
    rng = np.random.default_rng(0)
    path = tmp_path / "run.json"
    clock, reads = 10**15, []
    expected: dict[str, int] = defaultdict(int)
    with Timeline(path) as line:
        assert os.listdir(tmp_path) != ["run.json"], "it has its own name when it is whole"
        for i in range(2000):
            for name, long in (("dense", 2000), ("wait", 500), ("experts", 3001)):
                took = int(rng.integers(0, long))
                line.add(name, clock, clock + took, layer=i % 16)
                expected[name] += took
                clock += took
            reads.append((clock - int(rng.integers(1, 20_000)), clock))
            line.add("read", *reads[-1], bytes=i)
    assert os.listdir(tmp_path) == ["run.json"]

    spans, threads, total = read_back(path)
    expected["read"] = sum(end - begin for begin, end in reads)
    assert total == {name: ns / 1e9 for name, ns in expected.items()}
    for name, ns in expected.items():
        mine = [s for s in spans if s["name"] == name]
        assert len(mine) == 2000
        assert sum(s["dur"] for s in mine) == pytest.approx(ns / 1e3, rel=1e-9)
        assert {threads[s["tid"]] for s in mine} == {"disk" if name == "read" else "compute"}
    assert [s["args"]["bytes"] for s in spans if s["name"] == "read"] == list(range(2000))
    assert "compute" in threads.values() and list(threads.values()).count("compute") == 1

    by_thread = defaultdict(list)
    for s in spans:
        # whole nanoseconds, so that what touches does not seem to overlap
        by_thread[s["tid"]].append((round(s["ts"] * 1e3), round((s["ts"] + s["dur"]) * 1e3)))
    for row in by_thread.values():
        row.sort()
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(row))
    edges = sorted([(end, -1) for _, end in reads] + [(begin, 1) for begin, _ in reads])
    most = int(np.cumsum([step for _, step in edges]).max())
    assert len(by_thread) == 1 + most, "no more lanes than reads at one time"


def test_without_spans(tmp_path: Path) -> None:
    path = tmp_path / "empty.json"
    Timeline(path).close()
    assert read_back(path) == ([], {0: "compute"}, {})


def test_a_trace_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    for name in ("dense", "head"):
        with Timeline(path) as line:
            line.add(name, 0, 1)
    assert read_back(path)[2] == {"head": 1e-9}
    path.write_text('{"other": 1}')
    with pytest.raises(OutputError, match="another kind of file"):
        Timeline(path)
    assert path.read_text() == '{"other": 1}'


@pytest.mark.parametrize(
    ("name", "says"),
    [("no/t.json", "no directory"), ("", "not a file"), ("/dev/null", "not a file")],
)
def test_where_nothing_can_be_written(
    name: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match=says):
        Timeline(name)
    assert os.listdir(tmp_path) == []


def test_closed_is_closed(tmp_path: Path) -> None:
    line = Timeline(tmp_path / "t.json")
    line.close()
    line.close()
    with pytest.raises(UsageError, match="closed"):
        line.add("dense", 0, 1)


@pytest.mark.parametrize("at_close", [False, True])
def test_a_full_disk(at_close: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit on file sizes stands for it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    monkeypatch.setattr(timeline, "_HELD", 1000 if at_close else 100)
    line = Timeline(tmp_path / "t.json")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        with pytest.raises(OutputError, match=r"cannot write .*t\.json: File too large"):
            for i in range(500):
                line.add("dense", i, i + 1)
            line.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert os.listdir(tmp_path) == []
    line.close()
    with pytest.raises(UsageError, match="closed"):
        line.add("dense", 0, 1)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_ctrl_c_while_spans_are_written(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the bytes were in the file already or not: each span is there once."""
    monkeypatch.setattr(timeline, "_HELD", 10)
    write, calls = timeline.write_exactly, []

    def interrupted(fd: int, data: memoryview, offset: int) -> None:
        calls.append(offset)
        if len(calls) == 3 and moment == "before":
            raise KeyboardInterrupt
        write(fd, data, offset)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(timeline, "write_exactly", interrupted)
    with pytest.raises(KeyboardInterrupt), Timeline(tmp_path / "t.json") as line:
        for i in range(1000):
            line.add("read" if i % 2 else "wait", 10 * i, 10 * i + 25)
    spans, threads, total = read_back(tmp_path / "t.json")
    assert [s["dur"] for s in spans] == [0.025] * 20
    assert total == {"wait": 250e-9, "read": 250e-9}
    assert sorted(threads.values()) == ["compute", "disk", "disk"]
