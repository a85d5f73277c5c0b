"""Reference distributions on disk: whole or not there, and of what they claim to be."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from cli_model import make_checkpoint, start
from evaluation_windows import some_windows
from tiny_checkpoints import OLMOE, make_tensors, write_checkpoint

import edgemoe
from edgemoe import reference_cache
from edgemoe.checkpoint import open_checkpoint
from edgemoe.errors import CheckpointError, OutputError
from edgemoe.evaluate import ReferenceRows, Window
from edgemoe.reference_cache import ReferenceFile, ReferenceWriter, path_for, row_type
from edgemoe.reference_logits import reference


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(directory))
    return directory


def rows_of(vocab: int, counts: Sequence[int], k: int, seed: int = 0) -> list[ReferenceRows]:
    rng = np.random.default_rng(seed)
    return [
        ReferenceRows.of(
            rng.standard_normal((n, vocab)).astype(np.float32), rng.integers(0, vocab, n), k
        )
        for n in counts
    ]


@pytest.mark.parametrize(("vocab", "k"), [(300, 7), (300, 4096), (70_000, 20)])
def test_rows_come_back_as_they_were(tmp_path: Path, vocab: int, k: int) -> None:
    counts, row = [5, 1, 9], row_type(vocab, k)
    path = tmp_path / "sub" / "r.ref"
    kept = rows_of(vocab, counts, k)
    with ReferenceWriter(path, row) as out:
        for rows in kept:
            out.add(rows.rows(0, 1))
            out.add(rows.rows(1, len(rows.rest)))
        assert not path.exists()
    opened = ReferenceFile.open(path, row, counts)
    assert opened is not None
    with opened as file:
        for i, (n, rows) in enumerate(zip(counts, kept, strict=True)):
            for first, stop in ((0, n), (n // 2, n), (0, 1)):
                got, want = file.rows(i, first, stop), rows.rows(first, stop)
                for name in ("ids", "logp", "rest", "true_logp"):
                    np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
    assert ReferenceFile.open(path, row, [5, 1, 8]) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:],
        lambda data: b"",
        lambda data: b"\0" * len(data),
    ],
    ids=["cut", "longer", "a bit", "empty", "zeros"],
)
def test_a_damaged_file_is_made_again(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, OLMOE))
    todo = some_windows(40, [30, 20])

    def make() -> None:
        reference(checkpoint, todo, threads=1, ceiling=1 << 30, used=0).close()

    make()
    (path,) = reference_cache.directory().iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    make()
    assert path.read_bytes() == whole
    stamp = path.stat().st_mtime_ns
    make()
    assert path.stat().st_mtime_ns == stamp


def test_what_the_cache_key_depends_on(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, OLMOE)
    todo = some_windows(40, [30, 20])

    def key(windows: Sequence[Window] = todo, kept: int = 10) -> Path:
        return path_for(open_checkpoint(directory), windows, kept)

    first = key()
    assert key() == first
    tokens = todo[1].tokens.copy()
    tokens[3] += 1
    assert key([todo[0], Window(tokens, todo[1].first)]) != first
    assert key([Window(todo[0].tokens, todo[0].first + 1), todo[1]]) != first
    assert key(todo[:1]) != first
    assert key(kept=11) != first
    weights = directory / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    assert key() != first
    config = json.loads((directory / "config.json").read_text())
    before = key()
    stamp = (directory / "config.json").stat()
    (directory / "config.json").write_text(json.dumps(config | {"rope_theta": 20000.0}))
    os.utime(directory / "config.json", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert key() != before


class Stop(BaseException):
    """Stands for a Ctrl-C."""


def test_nothing_is_left_of_an_interrupted_write(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, OLMOE))
    todo = some_windows(40, [30, 20])

    def progress(done: int, total: int) -> None:
        assert len(list(reference_cache.directory().iterdir())) == 1
        raise Stop

    with pytest.raises(Stop):
        reference(checkpoint, todo, threads=1, ceiling=1 << 30, used=0, progress=progress)
    assert list(reference_cache.directory().iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_pass_is_run_again(tmp_path: Path, cache: Path, number: signal.Signals) -> None:
    checkpoint = make_checkpoint(tmp_path / "tiny", max_position_embeddings=8192)
    store, text = tmp_path / "tiny.emoe", tmp_path / "text.txt"
    edgemoe.convert(checkpoint, store)
    text.write_text("".join(np.random.default_rng(0).choice(list("abcdefgh \n"), 20_000)))
    command = ["eval", store, "--text", text, "--bits", "2", "--ref", checkpoint, "--json"]
    directory = reference_cache.directory()
    process = start(*command)
    deadline = time.monotonic() + 60
    while not directory.is_dir() or not any(p.stat().st_size for p in directory.iterdir()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (-number, 128 + number)
    assert err == (b"edgemoe: interrupted\n" if number == signal.SIGINT else b"")
    left = [p.name for p in directory.iterdir()]
    assert not any(name.endswith(".ref") for name in left)
    assert len(left) == (number == signal.SIGKILL)
    with start(*command, "--chunks", "3") as again:  # other windows, another file
        out, err = again.communicate(timeout=60)
    assert again.returncode == 0, err
    assert json.loads(out)["kld"] > 0
    if number == signal.SIGKILL:  # the same file: what was left goes
        with start(*command) as again:
            out, err = again.communicate(timeout=120)
        assert again.returncode == 0, err
        assert all(p.name.endswith(".ref") for p in directory.iterdir())


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "m", OLMOE))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="set XDG_CACHE_HOME to a directory with room"):
        reference(checkpoint, some_windows(40, [30]), threads=1, ceiling=1 << 30, used=0)


def test_a_damaged_weight_is_named_and_nothing_kept(tmp_path: Path) -> None:
    tensors = make_tensors(OLMOE)
    tensors["model.layers.1.mlp.experts.2.down_proj.weight"][3, 4] = np.nan
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, OLMOE, tensors))
    with pytest.raises(CheckpointError, match=r"experts\.2\.down_proj.* nan at row 3, column 4"):
        reference(checkpoint, some_windows(40, [300]), threads=2, ceiling=1 << 30, used=0)
    assert list(reference_cache.directory().iterdir()) == []
