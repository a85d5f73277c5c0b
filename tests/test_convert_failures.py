"""A conversion that fails or is killed at any moment leaves no store and no rubbish."""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from convert_samples import Source, make_checkpoint

from edgemoe.errors import CheckpointError, OutputError
from edgemoe.mwq.convert import convert
from edgemoe.store import StoreWriter


def damage_weight(source: Source, value: int) -> None:
    """Overwrite a weight of expert 2 in layer 2 with this bfloat16 bit pattern."""
    path = source.path / "model.safetensors"
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    at = header["model.layers.2.mlp.experts.2.up_proj.weight"]["data_offsets"][0] + 8 + length
    struct.pack_into("<H", data, at + 100, value)
    path.write_bytes(data)


@pytest.mark.parametrize("value", [0x7FC0, 0x7F80, 0xFF80])
def test_weights_that_are_not_finite(tmp_path: Path, value: int) -> None:
    source = make_checkpoint(tmp_path / "src")
    damage_weight(source, value)
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.experts\.2\.up_proj"):
        convert(source.path, tmp_path / "m.emoe")
    assert os.listdir(tmp_path) == ["src"]


def test_weights_that_cannot_be_decoded_in_float32(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "src")
    damage_weight(source, 0x7F7F)  # 3.4e38
    with pytest.raises(CheckpointError, match=r"layer 2 expert 2: .*beyond 1e38"):
        convert(source.path, tmp_path / "m.emoe")
    assert os.listdir(tmp_path) == ["src"]


def test_a_checkpoint_without_tokenizer(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "src")
    (source.path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        convert(source.path, tmp_path / "m.emoe")
    assert os.listdir(tmp_path) == ["src"]


def test_a_checkpoint_that_is_cut_short_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_checkpoint(tmp_path / "src")

    def cut(done: int, total: int, what: str) -> None:
        os.truncate(source.path / "model.safetensors", 5000)

    with pytest.raises(CheckpointError):
        convert(source.path, tmp_path / "m.emoe", progress=cut)
    assert os.listdir(tmp_path) == ["src"]


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "src")
    total = convert(source.path, tmp_path / "m").weights
    os.unlink(tmp_path / "m")
    for stop in (1, total // 2, total):

        def interrupt(done: int, total: int, what: str, stop: int = stop) -> None:
            if done >= stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            convert(source.path, tmp_path / "m", progress=interrupt)
        assert os.listdir(tmp_path) == ["src"]


def test_the_source_is_never_overwritten(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "src")
    before = {p.name: p.read_bytes() for p in source.path.iterdir()}
    for target in (source.path / "model.safetensors", source.path, source.path / "config.json"):
        with pytest.raises(OutputError):
            convert(source.path, target)
    assert {p.name: p.read_bytes() for p in source.path.iterdir()} == before


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_checkpoint(tmp_path / "src")
    monkeypatch.setattr(StoreWriter, "_check_room", lambda self: None)
    real, written = os.pwrite, [0]

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        written[0] += len(data)
        if written[0] > 50_000:
            raise OSError(28, "No space left on device")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OutputError, match=r"No space left on device; free \d+ bytes"):
        convert(source.path, tmp_path / "m.emoe")
    assert os.listdir(tmp_path) == ["src"]


CHILD = """
    import sys
    from edgemoe.mwq import convert as module
    module._RUN_WEIGHTS = 1
    module.convert(sys.argv[1], sys.argv[2], progress=lambda *a: print(*a, flush=True))
    print("finished", flush=True)
"""


def test_killed_at_any_moment(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "src")
    out = tmp_path / "m.emoe"
    clean = convert(source.path, tmp_path / "reference")
    lines = sum(1 for _ in child_lines(source.path, out))
    assert out.read_bytes() == (tmp_path / "reference").read_bytes()
    out.unlink()
    rng = random.Random(5)
    stops = [0, lines - 2, lines - 1, *(rng.randrange(lines) for _ in range(5))]
    for stop in stops:
        for line in child_lines(source.path, out, kill_after=stop):
            assert line
        if out.exists():  # it was renamed before the signal arrived
            assert stop >= lines - 2
            assert out.read_bytes() == (tmp_path / "reference").read_bytes()
            out.unlink()
        left = [p for p in os.listdir(tmp_path) if p not in ("src", "reference")]
        assert len(left) <= 1, "each run removes what the one before left"
    assert convert(source.path, out).weights == clean.weights
    assert sorted(os.listdir(tmp_path)) == ["m.emoe", "reference", "src"]
    assert out.read_bytes() == (tmp_path / "reference").read_bytes()


def child_lines(source: Path, out: Path, kill_after: int = -1) -> list[str]:
    """Lines that a converting process prints; killed with SIGKILL after so many of them."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CHILD), str(source), str(out)],
        stdout=subprocess.PIPE,
        text=True,
    )
    lines = []
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            lines.append(line)
            if len(lines) > kill_after >= 0:
                process.send_signal(signal.SIGKILL)
                break
    code = process.wait()
    assert code in (0, -signal.SIGKILL)
    return lines
