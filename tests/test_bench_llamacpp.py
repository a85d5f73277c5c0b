"""`edgemoe bench --vs llama.cpp`: the other side of the pipe, its rounds and its end.

A module that computes nothing stands in for llama_cpp (fake_llama.py); the last test runs the real
one where EDGEMOE_LLAMA_PYTHON names a Python that has it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from cli_model import CONFIG, fails, make_store, run, start

from edgemoe.bench import bench
from edgemoe.bench.llamacpp import PYTHON, LlamaCpp
from edgemoe.bench.tokens import token_stream
from edgemoe.errors import EdgeMoEError, UsageError
from edgemoe.export import export
from edgemoe.opened import bundled_path

HERE = Path(__file__).resolve().parent
VOCAB = CONFIG["vocab_size"]

Fake = Callable[..., None]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_store(tmp_path_factory.mktemp("store"), mlp_only_layers=[])
    export(path, path.with_suffix(".gguf"))
    return path


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Makes children of this process find fake_llama.py, with these settings."""
    shutil.copy(HERE / "fake_llama.py", tmp_path / "llama_cpp.py")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv(PYTHON, sys.executable)

    def settings(**what: Any) -> None:
        what = {"log": str(tmp_path / "log"), "vocab": VOCAB} | what
        monkeypatch.setenv("FAKE_LLAMA", json.dumps(what))

    settings()
    return settings


def logs(directory: Path) -> list[list[dict[str, Any]]]:
    """What each child wrote down, that with repacking first."""
    texts = [path.read_text() for path in directory.glob("log.*")]
    found = [[json.loads(line) for line in text.splitlines()] for text in texts]
    return sorted(
        (log for log in found if log), key=lambda log: str(log[0]["repack"]), reverse=True
    )


def ended(directory: Path) -> bool:
    """Whether all children are gone, within a moment."""
    pids = [int(p.suffix[1:]) for p in directory.glob("log.*")]
    deadline = time.monotonic() + 5
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(pids) and not any(map(psutil.pid_exists, pids))


def test_rounds_in_turn(store: Path, fake: Fake, tmp_path: Path) -> None:
    """Same tokens, batches as llama.cpp's, both settings, ratios to the faster one."""
    fake(seconds={"on": 0.05, "off": 0.1})
    settings: dict[str, Any] = {"prompt_tokens": 600, "generated_tokens": 3, "threads": 2}
    steps: list[str] = []
    result = bench(
        store,
        gguf=store.with_suffix(".gguf"),
        rounds=2,
        progress=lambda done, total, what: steps.append(f"{done}/{total} {what}"),
        **settings,
    )
    other = result.llama_cpp
    assert other is not None and set(other.runs) == {"repack on", "repack off"}
    assert other.prefill is not None and other.decode is not None
    assert other.prefill.against == other.decode.against == "repack on"
    on, off = other.runs["repack on"], other.runs["repack off"]
    assert on.decode_tok_s is not None and off.prefill_tok_s is not None
    assert 15 < on.decode_tok_s.median <= 20
    assert 2000 < off.prefill_tok_s.median <= 3000
    for r in result.rounds:
        assert r.theirs["repack on"].prefill_s == pytest.approx(0.1, rel=0.5)
    want = [r.theirs["repack on"].decode_s / r.ours.decode_s for r in result.rounds]
    assert other.decode.ratio.median == pytest.approx(sum(want) / 2)
    assert other.bytes_per_token is not None and other.file_bytes > other.bytes_per_token
    assert steps[-1].startswith("12/12") and len(steps) == 12
    assert [s.split(", ", 1)[1] for s in steps[-6:]] == [
        "edgemoe", "llama.cpp, repack on", "llama.cpp, repack off",
        "llama.cpp, repack off", "llama.cpp, repack on", "edgemoe",
    ]  # fmt: skip
    tokens = token_stream(VOCAB, 603).tolist()
    batches = [tokens[:512], tokens[512:600], *([t] for t in tokens[600:])]
    expected = [{"clear": True}, *({"batch": b} for b in batches)] * 3  # one is the warm-up
    for log, repack in zip(logs(tmp_path), ("on", "off"), strict=True):
        gguf = str(store.with_suffix(".gguf"))
        assert log[0] == {"path": gguf, "repack": repack, "gpu": 0}
        assert log[1] == {"n_ctx": 1024, "n_batch": 512, "n_threads": 2, "n_threads_batch": 2}
        assert log[2:] == expected
    assert ended(tmp_path)


def test_table(store: Path, fake: Fake) -> None:
    gguf = store.with_suffix(".gguf")
    code, out, err = run(
        *("bench", store, "-p", 5, "-n", 2, "--rounds", 1, "--vs", "llama.cpp", "--gguf", gguf)
    )
    assert code == 0, err
    for words in ("llama.cpp, repack off, decoding", "prefill against repack o", "llama.cpp 0 rea"):
        assert words in out


def test_ctrl_c_leaves_no_child(store: Path, fake: Fake, tmp_path: Path) -> None:
    fake(seconds={"on": 60, "off": 60})
    gguf = store.with_suffix(".gguf")
    with start("bench", store, "-n", 1, "--vs", "llama.cpp", "--gguf", gguf) as process:
        deadline = time.monotonic() + 60
        while not any("batch" in log[-1] for log in logs(tmp_path) if log):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and err.decode().endswith("edgemoe: interrupted\n")
    assert ended(tmp_path)


def test_a_killed_parent_leaves_no_child(store: Path, fake: Fake, tmp_path: Path) -> None:
    fake(seconds={"on": 0.3, "off": 0.3})
    gguf = store.with_suffix(".gguf")
    with start("bench", store, "-n", 1, "--vs", "llama.cpp", "--gguf", gguf) as process:
        deadline = time.monotonic() + 60
        while not any("batch" in log[-1] for log in logs(tmp_path) if log):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.kill()
    assert ended(tmp_path)


def test_what_goes_wrong(store: Path, fake: Fake, tmp_path: Path) -> None:
    gguf = store.with_suffix(".gguf")
    line = ["bench", store, "-p", 3, "-n", 1, "--vs", "llama.cpp", "--gguf"]
    nowhere = tmp_path / "x.gguf"
    fails(*line, nowhere, says=f"llama.cpp could not load {nowhere}")
    fails(*line, gguf, "--llama-python", nowhere, says="cannot start .*EDGEMOE_LLAMA_PY", code=2)
    fake(vocab=9)
    fails(*line, gguf, says=f"has 9 tokens and .* {VOCAB}: they are not the same model", code=2)
    (tmp_path / "llama_cpp.py").write_text("raise ImportError('no such library')\n")
    says = r"cannot run llama.cpp: .*no such library.*pip install 'edgemoe\[llamacpp\]'"
    fails(*line, gguf, says=says, code=2)


def test_a_child_that_fails_says_why(store: Path, fake: Fake, tmp_path: Path) -> None:
    fake(fail=3)
    tokens = token_stream(VOCAB, 4)
    settings: dict[str, Any] = {"threads": 1, "repack": True, "tokens": tokens, "prompt_tokens": 2}
    with LlamaCpp(None, store.with_suffix(".gguf"), **settings) as child:
        assert len(child.round().steps_s) == 2
        assert child.peak_rss_bytes > 1 << 20
        with pytest.raises(EdgeMoEError, match="llama_decode failed"):
            child.round()
        with pytest.raises(EdgeMoEError, match="process ended with code 0"):
            child.round()
    child.close()
    (tmp_path / "llama_cpp.py").write_text("import os\nos.kill(os.getpid(), 9)\n")
    with pytest.raises(EdgeMoEError, match=r"ended by SIGKILL \(out of memory\?\)"):
        LlamaCpp(None, store.with_suffix(".gguf"), **settings)
    (tmp_path / "llama_cpp.py").write_text("raise ValueError('odd')\n")
    with pytest.raises(EdgeMoEError, match="ended with code 1: ValueError: odd"):
        LlamaCpp(None, store.with_suffix(".gguf"), **settings)
    with pytest.raises(UsageError, match="cannot start"):
        LlamaCpp(str(tmp_path), store.with_suffix(".gguf"), **settings)


@pytest.mark.skipif(
    not os.environ.get(PYTHON), reason=f"{PYTHON} does not name a Python with llama_cpp"
)
def test_the_real_one(tmp_path: Path) -> None:
    """The bundled model on both sides; the child is idle between its rounds."""
    gguf = tmp_path / "x.gguf"
    export(bundled_path(), gguf, type="q8_0")
    result = bench(prompt_tokens=64, generated_tokens=16, rounds=3, threads=2, bits=8, gguf=gguf)
    other = result.llama_cpp
    assert other is not None and other.prefill is not None and other.decode is not None
    print(f"prefill {other.prefill}\ndecoding {other.decode}")
    assert other.bytes_per_token is not None
    assert 0.8 < other.bytes_per_token / result.bytes_per_token.total < 1.25
    assert 0.05 < other.decode.ratio.median < 50
    tokens = token_stream(4096, 40)
    settings: dict[str, Any] = {"threads": 2, "repack": True, "tokens": tokens, "prompt_tokens": 20}
    with LlamaCpp(None, gguf, **settings) as child:
        child.round()
        time.sleep(0.1)
        process = psutil.Process(child.pid)
        before = sum(process.cpu_times()[:2])
        time.sleep(0.5)
        assert sum(process.cpu_times()[:2]) - before < 0.05
