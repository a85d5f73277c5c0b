"""scripts/bench_streaming.py: misses of a trace, the bound, and what rounds add up to."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgemoe
from edgemoe.errors import EdgeMoEError
from edgemoe.types import PlaneRef, Streaming

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
if not (SCRIPTS / "bench_streaming.py").is_file():
    pytest.skip(f"{SCRIPTS} is not here", allow_module_level=True)
sys.path.insert(0, str(SCRIPTS))

from bench_streaming import fenced, pieces  # noqa: E402
from streaming_bound import (  # noqa: E402
    Compute,
    bound,
    cap_summary,
    decoding,
    pair_summary,
    passes_of,
    prefilling,
    same,
)


def span(name: str, ts: float, dur: float, **args: Any) -> dict[str, Any]:
    return {"name": name, "ph": "X", "ts": ts, "dur": dur, "args": args}


def token(at: float) -> list[dict[str, Any]]:
    """Layers 0 and 2 have experts; the first computes before and after a read, the other waits."""
    return [
        span("read", at + 11, 5, layer=0, bytes=100),
        span("read", at + 12, 20, layer=0, bytes=50),
        span("dense", at, 10, layer=0),
        span("experts", at + 10, 6, layer=0),
        span("wait", at + 16, 16, layer=0),
        span("experts", at + 32, 8, layer=0),
        span("dense", at + 40, 20, layer=2),
        span("read", at + 41, 3, layer=2, bytes=7),  # begins before the layer's step
        span("read", at + 50, 3, layer=0, bytes=9),  # and after it
        span("experts", at + 60, 4, layer=2),
        span("head", at + 70, 5),
    ]


def test_passes() -> None:
    other = [{"name": "thread_name", "ph": "M", "args": {"name": "disk"}}]
    found = passes_of([*other, *token(0), *token(100), span("dense", 200, 1, layer=0)])
    np.testing.assert_allclose(found.dense, [[10e-6, 20e-6]] * 2)
    np.testing.assert_allclose(found.experts, [[14e-6, 4e-6]] * 2)
    np.testing.assert_allclose(found.head, [5e-6] * 2)
    assert found.missed.tolist() == [[150, 0]] * 2
    with pytest.raises(EdgeMoEError, match="no pass"):
        passes_of(other)


def test_misses_of_a_real_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with edgemoe.load(
        bits=4, ctx_size=32, threads=2, cache="3M", streaming=Streaming(trace=path)
    ) as model:
        caches = [model.new_cache()]
        for i in range(6):
            model.step([i], caches)
        read = model.usage().traffic.bytes_read
    found = passes_of(json.loads(path.read_text())["traceEvents"])
    assert found.missed.shape == (6, len(model.config.moe_layers))
    assert 0 < found.missed.sum() <= read
    assert (found.dense > 0).all() and (found.experts > 0).all()


def test_compute_of_passes() -> None:
    found = passes_of([*token(0), *token(100), *token(200)])
    found.dense[0] = 1.0  # the prompt
    assert decoding(found).dense.tolist() == pytest.approx([10e-6, 20e-6])
    assert prefilling(found).experts.tolist() == pytest.approx([42e-6, 12e-6])
    assert prefilling(found).head == pytest.approx(15e-6)


COMPUTE = Compute(np.array([1.0, 2.0]), np.array([3.0, 4.0]), 0.5)


def test_bound() -> None:
    missed = np.array([[0.0, 0.0], [20.0, 60.0]])
    assert bound(missed, 10.0, COMPUTE).tolist() == [10.5, 3.5 + 3 + 6]


def test_caps() -> None:
    run = {"bytes_read_per_token": 9.0, "hit_rate": 0.5, "unhidden_wait_s": 1.0, "bytes_read": 90}
    rounds = [
        {
            "run": {**run, "decode_tok_s": rate, "peak_rss_bytes": peak, "kills": 1, "peak_mib": 7},
            "llama": {"on": 0.5, "off": 0.25},
            "bandwidth": 10.0,
            "compute": COMPUTE,
        }
        for rate, peak in ((0.04, 5), (0.05, 3))
    ]
    found = cap_summary(rounds, np.array([[10.0, 0.0], [20.0, 60.0]]))
    assert found["of_llama"]["median"] == pytest.approx(0.09)
    assert found["bound_s"]["median"] == 12.5  # of the second token alone
    assert found["time_of_bound"]["median"] == pytest.approx((25 + 20) / 2 / 12.5)
    assert (found["kills"], found["peak_rss_bytes"], found["traced_of_read"]) == (2, 5, 1.0)


def test_pairs() -> None:
    round_ = {"overlapped": 20.0, "serial": 30.0, "resident": 8.0, "bandwidth": 10.0}
    missed = np.array([[20.0, 100.0]])  # 3 + 10 + 3.5 s; 12 s to read
    found = pair_summary([{**round_, "compute": COMPUTE}], missed, 40, True)
    assert found["tok_s"]["median"] == 2
    assert found["gain"]["median"] == 1.5
    assert found["possible_gain"]["median"] == pytest.approx(30 / 16.5)
    assert found["time_of_bound"]["median"] == pytest.approx(20 / 16.5)
    assert found["of_limit"]["median"] == pytest.approx(12 / 20)


def test_what_capped_sh_says() -> None:
    text = "2 prompt tokens\ncapped: rc=0 limit=3000M peak_mb=2999 oom_kill 2\n"
    assert fenced(text) == {"peak_mib": 2999, "kills": 2}
    assert fenced("nothing") == {}


def test_pieces_cover_an_expert() -> None:
    prefix = [PlaneRef(8192, 4096, 1), PlaneRef(12288, 5000, 2)]
    found = [(r.offset, r.size) for (r,) in pieces(prefix, 8192)]
    assert found == [(8192, 8192), (16384, 4096)]


def test_other_tokens_are_an_error() -> None:
    same("the tokens", ["a", "a"])
    with pytest.raises(EdgeMoEError, match="the tokens differ"):
        same("the tokens", ["a", "b"])
