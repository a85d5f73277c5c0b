"""scripts/simulate.py: traces, rivals against twins, the clairvoyant bound, and what it prints."""

from __future__ import annotations

import json
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgemoe
from edgemoe.errors import UsageError
from edgemoe.types import I32

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
if not (SCRIPTS / "simulate.py").is_file():
    pytest.skip(f"{SCRIPTS} is not here", allow_module_level=True)
sys.path.insert(0, str(SCRIPTS))

import simulate  # noqa: E402

BUNDLED = Path(edgemoe.__file__).parent / "data" / "default.emoe"
LAYERS, EXPERTS, TOP_K = 4, 8, 2


def routes(tokens: int = 60) -> I32:
    """Some experts are wanted more than others, and what was wanted is wanted again."""
    rng = np.random.default_rng(2)
    chance = 1 / np.arange(1, EXPERTS + 1)
    out = np.empty((tokens, LAYERS, TOP_K), np.int32)
    for token in range(tokens):
        for layer in range(LAYERS):
            weight = np.roll(chance, layer)
            if token:
                weight[out[token - 1, layer]] += 1
            out[token, layer] = rng.choice(EXPERTS, TOP_K, replace=False, p=weight / weight.sum())
    return out


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "routes.jsonl"
    lines = [json.dumps({"tok": i, "layers": r.tolist()}) for i, r in enumerate(routes())]
    path.write_text("\n".join(lines) + "\n")
    return path


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: object
) -> tuple[dict[str, Any], str]:
    monkeypatch.setattr(sys, "argv", ["simulate.py", *map(str, args)])
    simulate.main()
    out = capsys.readouterr().out
    return json.loads(out.splitlines()[-1]), out


SHAPE = "--shape", f"{LAYERS},{EXPERTS},64,64"


def lru_misses(picked: I32, slots: int) -> int:
    """Of whole experts, all of one size: the textbook's."""
    cache: OrderedDict[tuple[int, int], None] = OrderedDict()
    misses = 0
    for token in picked:
        for layer, ids in enumerate(token.tolist()):
            wanted = [(layer, e) for e in ids]
            misses += sum(key not in cache for key in wanted)
            for key in wanted:
                cache[key] = None
                cache.move_to_end(key)
            while len(cache) > slots:
                cache.popitem(last=False)
    return misses


def belady_misses(picked: I32, slots: int) -> int:
    """The same cache with the future known."""
    steps = [{(layer, e) for e in ids} for t in picked for layer, ids in enumerate(t.tolist())]
    cache: set[tuple[int, int]] = set()
    misses = 0
    for now, wanted in enumerate(steps):
        misses += len(wanted - cache)
        cache |= wanted

        def next_use(key: tuple[int, int], now: int = now) -> int:
            return next((i for i, s in enumerate(steps[now + 1 :]) if key in s), len(steps))

        while len(cache) > slots:
            cache.remove(max(cache - wanted, key=next_use))
    return misses


@pytest.mark.parametrize("slots", [4, 7, 12, 20])
def test_misses_against_twins(
    trace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], slots: int
) -> None:
    size = 64 * 64 * 3 // 2
    found, _ = run(monkeypatch, capsys, trace, *SHAPE, "--bits", 4, "--cache", slots * size)
    read = {r["policy"]: r["bytes_read"] / size for r in found["runs"]}
    assert read["lru"] == lru_misses(routes(), slots)
    assert read["belady"] == belady_misses(routes(), slots)
    assert all(read["belady"] <= n for name, n in read.items() if name != "edgemoe")
    assert read["worth"] < read["lru"] or slots == 20  # much of what is read then is cold


def test_segments_under_a_budget(
    trace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = trace, *SHAPE, "--cache", "40%", "--cache", "100%", "--level", 4, "--skip", 10
    found, out = run(monkeypatch, capsys, *args)
    assert found["tokens"] == 50 and found["level"] == 4
    assert [r["policy"] for r in found["runs"]] == 2 * list(simulate.POLICIES)
    for r in found["runs"]:
        assert r["demand_bytes_per_token"] == found["token_bytes"]
        assert r["bytes_read_per_token"] * 50 == pytest.approx(r["bytes_read"])
        assert r["hit_rate"] == pytest.approx(1 - r["bytes_read"] / found["token_bytes"] / 50)
        assert r["cache_bytes"] <= found["expert_bytes"]
    whole = [r for r in found["runs"] if r["cache_bytes"] == found["expert_bytes"]]
    assert len(whole) == 6 and not any(r["evictions"] for r in whole)
    assert whole[0]["bytes_read"] == whole[2]["bytes_read"] < found["runs"][0]["bytes_read"]
    assert out.count("\n") == 2 + 12 + 1


def test_wait_is_what_reading_does_not_hide(
    trace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    size = 64 * 64 * 3 // 2
    args = trace, *SHAPE, "--bits", 4, "--cache", 8 * size, "--policy", "lru"
    waits = {}
    for order in simulate.ORDERS:
        for rate, ms in ((1e-3, 1e-6), (1e-3, 12.0), (1e6, 1.0)):
            found, _ = run(
                monkeypatch, capsys, *args, "--order", order, "--bandwidth", rate,
                "--compute-ms", ms,
            )  # fmt: skip
            waits[order, ms] = found["runs"][0]["unhidden_wait_s"]
        read = found["runs"][0]["bytes_read"]
        assert waits[order, 1e-6] == pytest.approx(read / 1e6, rel=1e-3)  # nothing to hide behind
        assert waits[order, 1.0] < 1e-6
        assert 0 < waits[order, 12.0] < 0.9 * waits[order, 1e-6]
    assert waits["johnson", 12.0] <= waits["fifo", 12.0]


def test_the_prompt_warms_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "routes.csv"
    header = "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes\n"
    decoded = "".join(f"0,1,{i},0,0,{i},1,0,0\n" for i in range(4))
    read = []
    for prompt in ("", "0,0,0,0,0,2,1,0,0\n0,0,0,0,1,3,1,0,0\n"):
        path.write_text(header + prompt + decoded)
        args = path, "--shape", "1,8,64,64", "--bits", 4, "--cache", "100%"
        found, _ = run(monkeypatch, capsys, *args)
        read.append([r["bytes_read"] // (64 * 64 * 3 // 2) for r in found["runs"]])
    assert read == [[4, 4, 4, 4, 0, 4], [2, 2, 2, 2, 0, 2]]  # EdgeMoE's knows the trace


def test_below_one_token_lru_finds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "same.jsonl"
    path.write_text(20 * (json.dumps({"layers": [[0, 1]] * LAYERS}) + "\n"))
    args = path, *SHAPE, "--bits", 4, "--cache", 6 * 64 * 64 * 3 // 2
    found, out = run(monkeypatch, capsys, *args)
    hits = {r["policy"]: r["hit_rate"] for r in found["runs"]}
    assert hits["lru"] == 0 and hits["worth"] > 0.3
    assert "below what one token wants" in out


def test_a_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from edgemoe.store import Store

    with Store.open(BUNDLED) as store:
        c = store.config
        each = [sum(store.expert_layout(i).segment_sizes[:2]) for i in c.moe_layers]
    rng = np.random.default_rng(0)
    path = tmp_path / "routes.csv"
    rows = [
        f"1,1,{token},{layer},{slot},{expert},0.5,0,0"
        for token in range(12)
        for layer in range(len(c.moe_layers))
        for slot, expert in enumerate(rng.permutation(c.num_experts)[: c.num_experts_per_tok])
    ]
    header = "# a comment\nturn,phase,step,layer,slot,expert,weight,residency,expert_bytes\n"
    prompt = [f"0,0,0,{layer},0,5,1,0,0" for layer in (0, 0, 2)]
    path.write_text(header + "\n".join([*prompt, *rows]) + "\n")
    trace = simulate.read_trace(path)
    assert trace.routes.shape == (12, len(c.moe_layers), c.num_experts_per_tok)
    assert trace.prompt[:4] == [[5], [], [5], []]
    found, _ = run(
        monkeypatch, capsys, path, "--store", BUNDLED, "--level", 3, "--cache", "50%"
    )  # fmt: skip
    assert found["expert_bytes"] == sum(each) * c.num_experts
    by_name = {r["policy"]: r for r in found["runs"]}
    assert by_name["lru"]["demand_bytes_per_token"] == found["token_bytes"]
    mixed = by_name["edgemoe"]["demand_bytes_per_token"]
    assert mixed != found["token_bytes"] and 0.5 < mixed / found["token_bytes"] < 2
    assert by_name["quality"]["bytes_read"] != by_name["worth"]["bytes_read"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--shape", "4,8,64,64", "--cache", "0%"], "a share is above 0 %"),
        (["--shape", "4,8,64,64", "--cache", "x%"], "a share is above 0 %"),
        (["--shape", "4,8,64,64", "--cache", "auto"], "give a size or a share"),
        (["--shape", "4,8,64,64", "--cache", "1000"], "layer 0 needs"),
        (["--shape", "5,8,64,64"], "the trace has 4 layers"),
        (["--shape", "4,7,64,64"], "experts up to 7"),
        (["--shape", "4,8,64,64", "--level", "5"], "have levels"),
        (["--shape", "4,8,64,64", "--skip", "60"], "the trace has 60 tokens"),
    ],
)
def test_refusals(
    trace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: list[str],
    message: str,
) -> None:
    with pytest.raises(edgemoe.EdgeMoEError, match=message):
        run(monkeypatch, capsys, trace, *args)


@pytest.mark.parametrize(
    "args",
    [
        ["--shape", "4,8,64"],
        ["--shape", "4,8,64,0"],
        ["--store", "x", "--bits", "4"],
        ["--shape", "qwen3", "--bandwidth", "0"],
        [],
    ],
)
def test_bad_options(
    trace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: list[str],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, capsys, trace, *args)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}\n",
        "[1]\n",
        '{"layers": 3}\n',
        '{"layers": [["a"]]}\n',
        '{"layers": [[0, 0]]}\n',
        '{"layers": [[0, -1]]}\n',
        '{"layers": [[0, 1.5]]}\n',
        '{"layers": [[0, 1000000000000000000000000]]}\n',
        '{"layers": [[0, 1], [2]]}\n',
        '{"layers": [[0], [1]]}\n{"layers": [[0]]}\n',
        "\x00",
    ],
)
def test_bad_traces(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"bad\.jsonl: "):
        simulate.read_trace(path)
    with pytest.raises(UsageError, match="No such file"):
        simulate.read_trace(tmp_path / "nothing.csv")


def test_real_traces(
    shared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """LRU reads what others measured of the same routes (REFERENCES, section 3); others less."""
    path = shared / "traces" / "qwen.route.csv"
    args = path, "--shape", "qwen3", "--bits", 4.25, "--cache", "10%"
    found, _ = run(monkeypatch, capsys, *args, "--policy", "lru", "--policy", "worth")
    lru, worth = (r["bytes_read_per_token"] / 1e6 for r in found["runs"])
    assert found["token_bytes"] / 1e6 == pytest.approx(722, abs=1)
    assert lru == pytest.approx(360, rel=0.01)
    assert worth < 0.85 * lru
