"""`edgemoe export` as a user meets it."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import gguf
import pytest
from cli_model import fails, make_checkpoint, run, start

import edgemoe


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without the dense layer and the missing end of text of cli_model.CONFIG."""
    directory = tmp_path_factory.mktemp("model") / "src"
    return make_checkpoint(directory, mlp_only_layers=[], eos_token_id=257)


@pytest.fixture(scope="module")
def store(checkpoint: Path) -> Path:
    out = checkpoint.parent / "tiny.emoe"
    edgemoe.convert(checkpoint, out)
    return out


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 38 M weights, that takes most of a second to export."""
    sizes = {"hidden_size": 512, "moe_intermediate_size": 1024, "num_experts": 8}
    directory = tmp_path_factory.mktemp("large") / "src"
    return make_checkpoint(directory, mlp_only_layers=[], **sizes)


def test_export(store: Path, tmp_path: Path) -> None:
    code, out, err = run("export", store, "out name.gguf", cwd=tmp_path)
    assert code == 0
    pattern = r"out name\.gguf: [\d.]+ M weights in [\d.]+ KiB \([\d.]+ bits each\), [\d.]+ s\n"
    assert re.fullmatch(pattern, out)
    assert err == "out name.gguf: 100 %, 0:00 left (output.weight)\n"
    assert os.listdir(tmp_path) == ["out name.gguf"]
    types = {t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out name.gguf").tensors}
    assert types == {"F32", "F16"}


def test_checkpoint_and_notes(checkpoint: Path, tmp_path: Path) -> None:
    """Rows of 16 and 12 stay f16, which is said."""
    code, out, _ = run("export", checkpoint, tmp_path / "x.gguf", "--type", "q8_0")
    assert code == 0
    assert re.search(r"\nnote: token_embd\.weight and \d+ more stayed f16: .* 32 long\n$", out)


def test_bits(store: Path, tmp_path: Path) -> None:
    for bits in ("2", "8"):
        assert run("export", store, tmp_path / f"{bits}.gguf", "--bits", bits)[0] == 0
    assert run("export", store, tmp_path / "top.gguf")[0] == 0
    two, eight, top = ((tmp_path / f"{n}.gguf").read_bytes() for n in ("2", "8", "top"))
    assert eight == top and len(two) == len(top) and two != top


def test_bad_input(store: Path, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    fails("export", "org/name", out, says="downloads nothing", code=2, cwd=tmp_path)
    fails("export", "nowhere", out, says="nowhere does not exist", cwd=tmp_path)
    fails("export", "nowhere.emoe", out, says="cannot open the store", cwd=tmp_path)
    fails("export", store, says="Missing argument 'OUT'", code=2)
    fails("export", store, out, "--type", "q4_0", says="'q4_0' is not one of", code=2)
    fails("export", store, out, "--bits", "5", says="must be 2, 3, 4, 6 or 8, not 5", code=2)
    fails("export", checkpoint, out, "--bits", "4", says="--bits chooses a level", code=2)
    fails("export", store, tmp_path / "no" / "x", says="there is no directory", code=2)
    fails("export", store, tmp_path, "--force", says=r"such as \S+/model\.gguf", code=2)
    fails("export", checkpoint.parent, out, says=r"has no config\.json")
    settings = tmp_path / "src"
    make_checkpoint(settings)
    fails("export", settings, out, says=r"mlp_only_layers = \[1\] cannot be exported: llama\.cpp")
    (settings / "tokenizer.json").unlink()
    fails("export", settings, out, says=r"has no tokenizer\.json")
    assert os.listdir(tmp_path) == ["src"]


def test_what_is_replaced(store: Path, tmp_path: Path) -> None:
    """A GGUF file, with --force; nothing else."""
    out = tmp_path / "x.gguf"
    assert run("export", store, out)[0] == 0
    first = out.read_bytes()
    fails("export", store, out, says="exists already; give --force", code=2)
    assert run("export", store, out, "--force", "--type", "q8_0")[0] == 0
    assert out.read_bytes() != first
    says = r"is not a GGUF file, so --force does not replace it"
    fails("export", store, store, "--force", says=says, code=2)
    fails("convert", store.parent / "src", out, "--force", says="is not a store, so", code=2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_export_that_is_ended_leaves_no_out(
    number: signal.Signals, large: Path, tmp_path: Path
) -> None:
    out = tmp_path / "x.gguf"
    with start("export", large, out, "--type", "q8_0") as process:
        end = time.monotonic() + 60
        while not os.listdir(tmp_path):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.002)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert not out.exists() and b"Traceback" not in err
    if number != signal.SIGKILL:
        assert os.listdir(tmp_path) == []
    assert run("export", large, out)[0] == 0
    assert os.listdir(tmp_path) == ["x.gguf"]


def test_help() -> None:
    code, out, _ = run("export", "--help")
    assert code == 0
    for word in ("q8_0", "--bits", "--force", "llama.cpp", "Examples"):
        assert word in out
