"""Streamed runs stay under their ceiling, and the floor a refusal names is right: in processes."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
from cli_model import CONFIG, make_checkpoint, run
from safetensors.numpy import save_file
from tiny_checkpoints import make_tensors

import edgemoe

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import check_ceilings

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 512,
    "head_dim": 64,
    "num_hidden_layers": 3,
    "num_experts": 64,
    "num_experts_per_tok": 4,
}
PROMPT = 700
"""Tokens: prefill in several chunks."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random, with 25 MiB of experts at 4 bits: more than streaming needs beside them."""
    directory = tmp_path_factory.mktemp("ceilings")
    tensors = make_tensors(CONFIG | SIZES)
    checkpoint = make_checkpoint(
        directory / "x", tensors={"none": tensors["lm_head.weight"]}, **SIZES
    )
    save_file(tensors, checkpoint / "model.safetensors")
    edgemoe.convert(checkpoint, directory / "x.emoe", max_level=4)
    return directory / "x.emoe"


def command(store: Path, name: str, directory: Path) -> list[str]:
    """An `edgemoe` command that takes PROMPT tokens of a store."""
    text = directory / "text"
    text.write_text(check_ceilings.text_of(str(store), PROMPT))
    Path(f"{text}.twice").write_text(2 * text.read_text())
    args = argparse.Namespace(store=str(store), bits="4")
    return check_ceilings.command_line(name, args, PROMPT, text)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("name", ["run", "eval", "bench"])
def test_floor_is_right(name: str, store: Path, tmp_path: Path) -> None:
    verdict, outcomes = check_ceilings.check(command(store, name, tmp_path), 80, None)
    assert verdict == "refused", outcomes
    assert len(outcomes) == 3
    assert "come and go" in outcomes[0].message


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_streamed_runs_stay_below(store: Path, tmp_path: Path) -> None:
    wanted = command(store, "run", tmp_path)
    floor = check_ceilings.watch(wanted, 40, None).floor
    assert floor is not None
    evictions = []
    for more in (0, 3, 8):
        mem = (floor + more) << 20
        out = subprocess.run([*wanted, "--mem", str(mem)], capture_output=True, check=True)
        figures = json.loads(out.stdout)
        assert figures["peak_rss_bytes"] <= mem
        assert figures["bytes_read"] > 0 and figures["prompt_tokens"] == PROMPT
        evictions.append(figures["evictions"])
    assert evictions[0] > evictions[-1] > 0


def test_floor_of_a_model_that_is_smaller_than_streaming(tmp_path: Path) -> None:
    """The bundled one: keeping all its experts takes less memory than streaming them."""
    code, _, message = run("run", "Hi", "--mem", "40M", "--bits", "4", "-n", "2")
    assert code == 1 and "all 4-bit experts" in message
    floor = int(check_ceilings.FLOOR.search(message)[1])
    for mem, expected in ((floor, 0), (floor - check_ceilings.BELOW_MIB, 1)):
        assert run("run", "Hi", "--mem", f"{mem}M", "--bits", "4", "-n", "2")[0] == expected


def test_a_peak_above_the_ceiling_is_seen(tmp_path: Path) -> None:
    """What the script is for: a process that takes more than it says, and one that dies."""
    greedy = (
        "import time; x = b'1' * (100 << 20); time.sleep(0.3); print('{\"peak_rss_bytes\": 9}')"
    )
    verdict, (outcome,) = check_ceilings.check([sys.executable, "-c", greedy], 64, None)
    assert verdict == "BROKEN" and outcome.seen > 100 << 20 and outcome.stated == 9
    verdict, (outcome,) = check_ceilings.check(
        [sys.executable, "-c", "import os; os.abort()"], 64, None
    )
    assert verdict == "BROKEN" and outcome.code == -6


def test_wrong_floors_are_seen(tmp_path: Path) -> None:
    """One that does not suffice, and one that is too high."""
    refusing = (
        "import sys; mem = int(sys.argv[2][:-1]); need, named = {0}\n"
        "if mem < need: sys.exit(f'give --mem {{named}}M or more')\n"
        "print('{{\"peak_rss_bytes\": 9}}')"
    )
    for sizes, expected in (
        ((100, 90), "FLOOR TOO LOW"),
        ((100, 110), "FLOOR TOO HIGH"),
        ((100, 60), "FLOOR NOT ABOVE THE CEILING"),
        ((100, 101), "refused"),
    ):
        code = refusing.format(sizes)
        assert check_ceilings.check([sys.executable, "-c", code], 64, None)[0] == expected
