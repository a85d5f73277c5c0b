"""Reads that fail, files that go away, Ctrl-C and memory that runs short amid a layer."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgemoe
from edgemoe.errors import ChecksumError, StoreError
from edgemoe.loader.streaming import StreamedExperts
from edgemoe.model import Span
from edgemoe.opened import bundled_path
from edgemoe.pipeline import streamed
from edgemoe.store import Store
from edgemoe.types import F32, Streaming

CACHE = "2M"
PROMPT = list(range(40, 90))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    shutil.copy(bundled_path(), tmp_path / "copy.emoe")
    return tmp_path / "copy.emoe"


def open_streamed(path: Path, **settings: Any) -> edgemoe.Model:
    return edgemoe.load(path, bits=4, ctx_size=128, cache=CACHE, **settings)


def run(model: edgemoe.Model) -> F32:
    cache, rows = model.new_cache(), []
    rows.append(model.forward(PROMPT, [Span(cache, len(PROMPT))], [len(PROMPT) - 1]))
    for token in (5, 6, 7):
        rows.append(model.forward([token], [Span(cache, 1)], [0]))
    return np.concatenate(rows)


@pytest.fixture(scope="module")
def want() -> F32:
    with edgemoe.load(bits=4, ctx_size=128) as model:
        return run(model)


def source_of(model: edgemoe.Model) -> StreamedExperts:
    return model._experts._source


def flip(path: Path, store: Store) -> None:
    """Change one byte of a segment of every expert of a layer."""
    layer = store.config.moe_layers[2]
    with path.open("r+b") as file:
        for expert in range(store.config.num_experts):
            file.seek(store.expert_segment(layer, expert, 1).offset + 9)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))


def test_damage_is_an_error_and_no_more(path: Path, want: F32) -> None:
    with open_streamed(path) as model, Store.open(path) as store:
        flip(path, store)
        for _ in range(2):
            with pytest.raises(ChecksumError, match=r"layer 2 expert \d+ segment 3-bit is damaged"):
                run(model)
        flip(path, store)  # as it was
        assert run(model).tobytes() == want.tobytes()


def test_a_store_that_shrinks_or_goes_away(path: Path, want: F32) -> None:
    with open_streamed(path) as model:
        path.unlink()
        assert run(model).tobytes() == want.tobytes()
    shutil.copy(bundled_path(), path)
    with open_streamed(path) as model:
        with Store.open(path) as store:
            os.truncate(path, store.expert_segment(store.config.moe_layers[1], 3, 0).offset)
        begun = time.monotonic()
        for _ in range(2):
            with pytest.raises(StoreError, match="truncated"):
                run(model)
        assert time.monotonic() - begun < 10


def test_two_models_share_a_store(path: Path, want: F32) -> None:
    with open_streamed(path) as a, open_streamed(path) as b:
        assert run(a).tobytes() == run(b).tobytes() == want.tobytes()


@pytest.mark.parametrize("method", ["observe", "claim", "collect", "release"])
def test_ctrl_c_anywhere_in_a_step(
    method: str, path: Path, want: F32, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after some calls of the source; the next run is as if it had never been."""
    real: Callable[..., Any] = getattr(StreamedExperts, method)
    calls, stop = 0, -1

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == stop:
            raise KeyboardInterrupt
        out = real(*args, **kwargs)
        if calls == -stop:
            raise KeyboardInterrupt
        return out

    with open_streamed(path) as model:
        monkeypatch.setattr(StreamedExperts, method, interrupted)
        for at in (1, 2, 5, 9, 14):
            for sign in (1, -1):
                calls, stop = 0, at * sign
                with pytest.raises(KeyboardInterrupt):
                    run(model)
                calls = stop = -1 << 60
                assert run(model).tobytes() == want.tobytes()


def test_memory_that_runs_short_is_given_back(
    path: Path, want: F32, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed, "_LOOK_NS", 0)
    with open_streamed(path) as model:
        assert run(model).tobytes() == want.tobytes()
        source, guard = source_of(model), model._experts._guard
        before, resident = source.budget_bytes, source._slots.resident_bytes
        in_use = guard.ceiling - guard.margin // 4

        def read() -> int:
            return int(in_use - resident + source._slots.resident_bytes)

        guard._read = read
        assert guard.excess(source.unfilled_bytes) > 0
        assert run(model).tobytes() == want.tobytes()
        assert source.budget_bytes < before
        assert source._slots.resident_bytes <= source.budget_bytes
        in_use += 1 << 30  # not even all of it would do: room for one expert stays
        assert run(model).tobytes() == want.tobytes()
        assert 0 < source.budget_bytes < before // 4


def test_reading_keeps_to_its_limit(path: Path, want: F32) -> None:
    with open_streamed(path, io_limit=4e6) as model:
        begun = time.monotonic()
        assert run(model).tobytes() == want.tobytes()
        seconds, traffic = time.monotonic() - begun, model.usage().traffic
        assert traffic.bytes_read / seconds < 4.4e6
        assert traffic.wait_s > 0.5 * seconds


@pytest.fixture(params=[True, False], ids=["streamed", "resident"])
def traced(request: pytest.FixtureRequest, path: Path, tmp_path: Path) -> Iterator[Any]:
    how = Streaming(trace=tmp_path / "t.json")
    cache = CACHE if request.param else None
    with edgemoe.load(path, bits=4, ctx_size=128, cache=cache, streaming=how) as model:
        answer = model.generate("Once upon a time", max_tokens=8)
    yield request.param, answer.stats, json.loads((tmp_path / "t.json").read_text())


def test_a_trace_tells_what_was_waited_for(traced: Any) -> None:
    streamed, stats, trace = traced
    spans = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    by_name = {name: [e for e in spans if e["name"] == name] for name in {e["name"] for e in spans}}
    waited = sum(e["dur"] for e in by_name.get("wait", [])) / 1e6
    assert abs(waited - stats.unhidden_wait_s) < 1e-6 * (1 + len(by_name.get("wait", [])))
    assert {"dense", "experts", "head"} <= set(by_name)
    assert ("read" in by_name) == streamed
    if streamed:
        read = sum(e["args"]["bytes"] for e in by_name["read"])
        assert read <= stats.bytes_read <= 1.5 * read
        assert 0 < stats.hit_rate < 1
        assert stats.evictions > 0
        assert stats.mean_bits == pytest.approx(stats.gate_weighted_bits) == 4
        tokens = stats.prompt_tokens + stats.generated_tokens
        assert stats.bytes_read_per_token == stats.bytes_read / tokens
    busy = sorted((e["ts"], e["ts"] + e["dur"]) for e in spans if e["name"] != "read")
    assert all(a[1] <= b[0] + 1e-3 for a, b in pairwise(busy))
