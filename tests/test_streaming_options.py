"""Options of how experts are read: what is accepted, and that it arrives where it is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_model import make_store, run

from edgemoe import cli, engine
from edgemoe.engine import Model
from edgemoe.types import Streaming, Traffic, Usage

ASKED = ["--cache", "64M", "--io-limit", "250", "--exact"]
GIVEN = {"cache": "64M", "io_limit": 250e6, "exact": True}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("store"))


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `engine.load` is called with; it then loads with none of it."""
    calls: list[dict[str, Any]] = []

    def load(opened: Any, **settings: Any) -> Model:
        calls.append(settings)
        ours = (*GIVEN, "streaming")
        return engine.load(opened, **{k: v for k, v in settings.items() if k not in ours})

    for room in ("terminal.session", "terminal.evaluate", "bench.measure"):
        monkeypatch.setattr(f"edgemoe.{room}.load", load)
    return calls


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at a model's usage finds that as much again was read."""
    looks = []
    usage = Model.usage

    def fake(self: Model) -> Usage:
        looks.append(1)
        n = len(looks)
        used = usage(self)
        traffic = Traffic(
            demands=10 * n, bits=30 * n, wished_bits=30 * n, gates=float(n), gated_bits=3.5 * n,
            wanted_bytes=100 * n, missed_bytes=29 * n, bytes_read=n * 3_000_000, evictions=n,
            wait_s=n / 4,
        )  # fmt: skip
        return Usage(used.peak_rss_bytes, used.mem_budget_bytes, used.cache_bytes, traffic)

    monkeypatch.setattr(Model, "usage", fake)


def ends_well(*args: object) -> None:
    assert cli.main([str(a) for a in args]) == 0


# What is said of them, and what is refused.


@pytest.mark.parametrize("command", ["run", "bench", "eval"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    ends_well(command, "--help")
    out = " ".join(capsys.readouterr().out.split())
    for option in ("--cache SIZE", "--io-limit MB/S", "--exact"):
        assert option in out
    for option in ("--policy [worth|lru|lfu]", "--order [shortest|hebf|fifo]", "--serial"):
        assert (option in out) == (command == "bench")
    assert ("--trace FILE" in out) == (command == "run")


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--cache", "auto", "must be a size such as 512M, 8G, 8GB or 8GiB, not auto"),
        ("--cache", "lots", "'lots' is not a memory size"),
        ("--cache", "0", "must be above zero"),
        ("--cache", "-1G", "is not a memory size"),
        ("--io-limit", "0", "must be a number above 0 to 1000000, not 0"),
        ("--io-limit", "-5", "must be a number above 0"),
        ("--io-limit", "nan", "must be a number above 0"),
        ("--io-limit", "inf", "must be a number above 0"),
        ("--io-limit", "100MB", "must be a number above 0 to 1000000, not 100MB"),
    ],
)
@pytest.mark.parametrize("command", ["run", "bench", "eval"])
def test_bad_values(
    command: str, option: str, value: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command, "x.emoe", f"{option}={value}"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and option in err and says in err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--policy mru", "'mru' is not one of 'worth', 'lru', 'lfu'"),
        ("--order random", "'random' is not one of 'shortest', 'hebf', 'fifo'"),
        ("--serial=no", "'--serial' does not take a value"),
    ],
)
def test_bad_values_of_bench(line: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "x.emoe", *line.split()]) == 2
    assert says in capsys.readouterr().err


# That they arrive.


def test_run_passes_them_on(store: Path, loaded: list[dict[str, Any]], tmp_path: Path) -> None:
    ends_well("run", store, "hi", "-n", 2, *ASKED, "--trace", tmp_path / "t.json")
    ends_well("run", store, "hi", "-n", 2)
    assert [{k: call[k] for k in GIVEN} for call in loaded] == [
        GIVEN,
        {"cache": None, "io_limit": None, "exact": False},
    ]
    assert [call["streaming"] for call in loaded] == [
        Streaming(trace=tmp_path / "t.json"),
        Streaming(),
    ]


def test_eval_passes_them_on(store: Path, loaded: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "text").write_text("abcdefgh" * 20)
    ends_well("eval", store, "--text", tmp_path / "text", "--ctx", 64, *ASKED)
    assert [{k: call[k] for k in GIVEN} for call in loaded] == [GIVEN]


def test_bench_passes_them_on(
    store: Path, loaded: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["bench", store, "-p", 3, "-n", 2, "--rounds", 1, "--json"]
    ends_well(*small, *ASKED, "--policy", "lru", "--order", "fifo", "--serial")
    first = json.loads(capsys.readouterr().out)
    ends_well(*small)
    second = json.loads(capsys.readouterr().out)
    assert {k: loaded[0][k] for k in GIVEN} == GIVEN
    assert [call["streaming"] for call in loaded] == [
        Streaming("lru", "fifo", overlap=False),
        Streaming(),
    ]
    assert first["read_settings"] == {
        "exact": True, "io_limit": 250e6, "policy": "lru", "order": "fifo", "overlap": False,
    }  # fmt: skip
    assert second["read_settings"] == {
        "exact": False, "io_limit": None, "policy": "worth", "order": "shortest", "overlap": True,
    }  # fmt: skip


# What the commands say of reads.


def test_nothing_is_said_of_reads_where_there_are_none(store: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("abcdefgh" * 20)
    for line in (
        ["run", store, "hi", "-n", "2"],
        ["bench", store, "-p", 3, "-n", 2, "--rounds", 1],
        ["eval", store, "--text", tmp_path / "text", "--ctx", "64"],
    ):
        code, out, err = run(*line)
        assert code == 0
        for word in ("hits", "waited", "by gate weight"):
            assert word not in out + err, line


def test_bench_says_what_each_part_of_a_round_read(
    store: Path, streamed: None, capsys: pytest.CaptureFixture[str]
) -> None:
    ends_well("bench", store, "-p", 3, "-n", 2, "--rounds", 2, "--json")
    for r in json.loads(capsys.readouterr().out)["rounds"]:
        for part in ("prefill", "decode"):
            assert r[part] == {
                "bytes_read": 3_000_000,
                "hit_rate": pytest.approx(0.71),
                "unhidden_wait_s": pytest.approx(0.25),
                "mean_bits": 3.0,
            }
    ends_well("bench", store, "-p", 3, "-n", 2, "--rounds", 2)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["MB", "read", "a", "token", "1.0", "1.0", "1.0"] in lines  # of 3 prompt tokens
    assert ["MB", "read", "a", "token", "1.5", "1.5", "1.5"] in lines  # of 2 decoded
    assert lines.count(["hits,", "by", "bytes", *["71.0%"] * 3]) == 2
    assert lines.count(["mean", "bits", *["3.00"] * 3]) == 2
    assert lines.count(["waited", "for", "reads,", "s", *["0.25"] * 3]) == 2


def test_eval_says_what_was_read(
    store: Path, streamed: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("abcdefgh" * 20)
    line = ["eval", store, "--text", tmp_path / "text", "--ctx", 64, "--bits", 4]
    ends_well(*line, "--json")
    got = json.loads(capsys.readouterr().out)
    assert {k: got[k] for k in ("mean_bits", "gate_weighted_bits", "bytes_read", "evictions")} == {
        "mean_bits": 3.0, "gate_weighted_bits": 3.5, "bytes_read": 3_000_000, "evictions": 1,
    }  # fmt: skip
    assert (got["hit_rate"], got["unhidden_wait_s"]) == (pytest.approx(0.71), 0.25)
    assert 0 < got["cache_bytes"] < got["mem_budget_bytes"]
    ends_well(*line)
    out = capsys.readouterr().out
    assert "read             5.8 MiB, hits 71 %, waited 0.5 s" in out
    assert "mean bits        3.000, by gate weight 3.500" in out


def test_the_level_is_said_to_be_the_most_of_the_store(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ends_well("run", store, "hi", "-n", 2, "--exact")
    assert "8-bit experts (the store's most)" in capsys.readouterr().err
