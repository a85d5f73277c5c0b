"""`edgemoe run` and the command line around it: arguments, help, streams, figures."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from cli_model import (
    FIGURES,
    make_checkpoint,
    make_store,
    run,
    start,
)

import edgemoe
from edgemoe import cli, kernels
from edgemoe.errors import UsageError
from edgemoe.loader.resident import expert_bytes
from edgemoe.store import Store
from edgemoe.terminal import options
from edgemoe.terminal.bench import bench
from edgemoe.terminal.model_path import sort_arguments
from edgemoe.terminal.session import RunOptions
from edgemoe.types import LEVELS, ORDERS, POLICIES, Streaming


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a chat template."""
    return make_store(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without one."""
    return make_store(tmp_path_factory.mktemp("plain"), chat=False)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 26 M weights, that takes a second to convert."""
    directory = tmp_path_factory.mktemp("large") / "src"
    return make_checkpoint(directory, hidden_size=512, moe_intermediate_size=1024, num_experts=8)


@pytest.fixture
def answer(store: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs `edgemoe run STORE ... --json` in this process; the object it prints."""

    def ask(*args: object, model: Path = store) -> dict[str, Any]:
        assert cli.main(["run", str(model), *map(str, args), "--json"]) == 0
        captured = capsys.readouterr()
        result: dict[str, Any] = json.loads(captured.out)
        return result

    return ask


# Help and arguments.


@pytest.mark.parametrize("command", [[], ["run"], ["convert"], ["inspect"], ["bench"]])
def test_help_teaches_by_example(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*command, "--help"]) == 0
    text = capsys.readouterr().out
    examples = text.split("Examples:")[1]
    assert f"edgemoe {' '.join(command)}".strip() in examples
    assert all(len(line) <= 100 for line in text.splitlines())


def test_no_arguments_give_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert "Usage: edgemoe" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"edgemoe {edgemoe.__version__}\n"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from edgemoe.cli import main; main(['run', '--help'])\n"
        "heavy = {'numpy', 'tokenizers', 'jinja2', 'rich', 'psutil'} & set(sys.modules)\n"
        "print(heavy, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "set()"


def test_every_option_reaches_the_run(monkeypatch: pytest.MonkeyPatch, store: Path) -> None:
    seen: list[RunOptions] = []

    def record(options: RunOptions) -> int:
        seen.append(options)
        return 0

    monkeypatch.setattr("edgemoe.terminal.run.run", record)
    line = (
        "--raw --mem 3G --cache 1G --bits 3 --dense-bits 4 --exact --io-limit 1.5 --trace t.json "
        "-n 7 -c 99 -t 2 --kv-type int8 --temp 0.5 "
        "--top-k 9 --top-p 0.9 --min-p 0.1 --repeat-penalty 1.2 --seed 5 --stop A --stop B --json "
        "--logits-hash"
    )
    assert cli.main(["run", str(store), "hello", *line.split()]) == 0
    sampling = {"temperature": 0.5, "top_k": 9, "top_p": 0.9, "min_p": 0.1}
    assert seen == [
        RunOptions(
            model=str(store), prompt="hello", raw=True, mem="3G", cache="1G", bits=3, dense_bits=4,
            exact=True, io_limit=1.5e6, trace="t.json",
            max_tokens=7, ctx_size=99, threads=2, kv_type="int8",
            sampling=sampling | {"repeat_penalty": 1.2, "seed": 5},
            stop=("A", "B"), as_json=True, logits_hash=True,
        )
    ]  # fmt: skip
    assert cli.main(["run", "hello"]) == 0
    assert seen[1] == RunOptions(prompt="hello", sampling={}, stop=())


def test_ranges_of_options_and_sampling_agree() -> None:
    """The command line and SamplingParams draw the same lines."""
    names = {"temp": "temperature"}
    for option, values in {
        "temp": ["0", "100", "100.1", "-0.1", "inf"],
        "top-k": ["0", "2147483647", "2147483648"],
        "top-p": ["0.001", "1", "0", "1.01"],
        "min-p": ["0", "1", "1.01"],
        "repeat-penalty": ["0.1", "100", "0", "101"],
        "seed": ["0", "18446744073709551615", "18446744073709551616"],
    }.items():
        param = next(p for p in cli.run.params if f"--{option}" in p.opts)
        name = names.get(option, option.replace("-", "_"))
        for value in values:
            assert param.callback is not None
            number = float(value) if "." in value or value == "inf" else int(value)
            outcomes = []
            for attempt in (
                lambda p=param, v=value: p.callback(None, p, v),
                lambda n=name, v=number: edgemoe.SamplingParams(**{n: v}),
            ):
                try:
                    attempt()
                    outcomes.append(True)
                except (click.BadParameter, UsageError):
                    outcomes.append(False)
            assert outcomes[0] == outcomes[1], (option, value)


def test_constants_that_are_spelled_twice() -> None:
    """The command line imports neither NumPy nor kernels, so it repeats some of their figures."""
    assert tuple(map(str, LEVELS)) == options._LEVELS
    for option, known, default in (
        ("--policy", POLICIES, Streaming().policy),
        ("--order", ORDERS, Streaming().order),
    ):
        param = next(p for p in bench.params if option in p.opts)
        assert isinstance(param.type, click.Choice)
        assert (tuple(param.type.choices), param.default) == (known, default)
    threads = next(p for p in cli.run.params if "--threads" in p.opts)
    assert threads.callback is not None
    context = click.Context(cli.run)
    assert threads.callback(context, threads, str(kernels.MAX_THREADS)) == kernels.MAX_THREADS
    with pytest.raises(click.BadParameter):
        threads.callback(context, threads, str(kernels.MAX_THREADS + 1))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((None, None, None, None), (None, None)),
        (("hello", None, None, None), (None, "hello")),
        (("org/name", None, None, None), (None, "org/name")),
        (("x.emoe", None, None, None), ("x.emoe", None)),
        (("x.gguf", None, None, None), ("x.gguf", None)),
        (("x.safetensors", None, None, None), ("x.safetensors", None)),
        (("here", None, None, None), ("here", None)),
        (("a", "b", None, None), ("a", "b")),
        (("x.emoe", None, None, "p"), ("x.emoe", "p")),
        ((None, None, None, "x.emoe"), (None, "x.emoe")),
        ((None, None, "m", None), ("m", None)),
        (("here", None, "m", None), ("m", "here")),
        ((None, None, "m", "p"), ("m", "p")),
    ],
)
def test_what_an_argument_is(
    given: tuple[Any, ...],
    expected: tuple[Any, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "here").touch()
    monkeypatch.chdir(tmp_path)
    assert sort_arguments(*given) == expected


# Text, streams and figures.


def test_text_goes_to_stdout_and_all_else_to_stderr(plain: Path) -> None:
    code, out, err = run("run", plain, "hello", "-n", "40", "--mem", "512M", "--seed", "3")
    assert code == 0
    assert len(out.encode()) > 10 and out.endswith("\n")
    first, last = err.splitlines()
    assert first == (
        "edgemoe: tiny.emoe: 8-bit experts (the most that fit), 8-bit dense weights, context 256, "
        f"{len(os.sched_getaffinity(0))} threads, ceiling 512.0 MiB"
    )
    assert FIGURES.fullmatch(last) and last.endswith("ended by --max-tokens, seed 3")


def test_the_bundled_model_tells_a_story() -> None:
    code, out, err = run("run", "--mem", "512M", "--temp", "0", "-n", "40", "Once upon a time")
    assert code == 0
    assert out.startswith(", there was a little girl named ")
    assert "default.emoe" in err and FIGURES.fullmatch(err.splitlines()[-1])


def test_pieces_are_flushed_as_they_come(plain: Path) -> None:
    with start("run", plain, "hello", "-n", "30000") as process:
        assert process.stdout is not None
        assert process.stdout.read(5)
        assert process.poll() is None  # the rest is still being made
        process.send_signal(signal.SIGINT)
        process.communicate()


def test_json_is_one_object_with_the_promised_keys(store: Path) -> None:
    code, out, err = run("run", store, "hi", "-n", "6", "--json", "--mem", "400M", "--temp", "0")
    assert code == 0 and out.count("\n") == 1
    result = json.loads(out)
    assert set(result) == {
        "text", "prompt_tokens", "generated_tokens", "prefill_tok_s", "decode_tok_s", "ttft_s",
        "peak_rss_bytes", "mem_budget_bytes", "cache_bytes", "mean_bits", "gate_weighted_bits",
        "wished_mean_bits", "bytes_read", "bytes_read_per_token", "hit_rate", "unhidden_wait_s",
        "evictions", "stop_reason", "bits", "dense_bits", "ctx_size", "threads", "kv_type",
    }  # fmt: skip
    assert result["generated_tokens"] == 6 and result["stop_reason"] == "length"
    assert result["mem_budget_bytes"] == 400 * 1024**2
    assert 0 < result["peak_rss_bytes"] <= result["mem_budget_bytes"]
    assert result["bits"] == result["mean_bits"] == result["gate_weighted_bits"] == 8
    assert (result["bytes_read"], result["hit_rate"], result["evictions"]) == (0, 1.0, 0)
    assert 0 < result["cache_bytes"] < result["peak_rss_bytes"]
    assert min(result[k] for k in ("prefill_tok_s", "decode_tok_s", "ttft_s")) > 0
    assert FIGURES.fullmatch(err.splitlines()[-1])


def test_json_survives_any_encoding_of_stdout(plain: Path) -> None:
    args = ["run", plain, "hi", "-n", "60", "--seed", "1"]
    utf8 = json.loads(run(*args, "--json", env={"PYTHONIOENCODING": "utf-8"})[1])["text"]
    assert not utf8.isascii()
    assert json.loads(run(*args, "--json", env={"PYTHONIOENCODING": "ascii"})[1])["text"] == utf8
    code, out, _ = run(*args, env={"PYTHONIOENCODING": "ascii"})
    assert code == 0 and "?" in out


def test_prompt_from_a_pipe(store: Path, answer: Any) -> None:
    expected = answer("Grüße\nan alle", "-n", 12, "--temp", 0)
    text = "Grüße\nan alle\r\n".encode()
    _, out, _ = run("run", store, "--json", "-n", "12", "--temp", "0", text=text)
    got = json.loads(out)
    assert (got["text"], got["prompt_tokens"]) == (expected["text"], expected["prompt_tokens"])


def test_chat_template_and_raw(answer: Any, plain: Path) -> None:
    wrapped = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    tokens = len(wrapped) - 2 * len("<|im_start|>") - len("<|im_end|>") + 3
    chat = answer("hi", "-n", 8, "--temp", 0)
    assert chat["prompt_tokens"] == tokens
    raw = answer("hi", "-n", 8, "--temp", 0, "--raw")
    assert raw["prompt_tokens"] == 2 and raw["text"] != chat["text"]
    assert answer(wrapped, "-n", 8, "--temp", 0, "--raw")["text"] == chat["text"]
    assert answer("hi", "-n", 8, "--temp", 0, model=plain)["prompt_tokens"] == 2


def test_context_is_what_the_run_needs(answer: Any, tmp_path: Path) -> None:
    assert answer("x" * 100, "--raw", "-n", 156)["ctx_size"] == 256
    assert answer("x" * 100, "--raw", "-n", 157)["ctx_size"] == 512
    assert answer("x" * 100, "--raw", "-n", 5, "-c", 300)["ctx_size"] == 300
    small = make_store(tmp_path, max_position_embeddings=200)
    full = answer("x" * 190, "--raw", "-n", 50, model=small)
    assert full["ctx_size"] == 200 and full["stop_reason"] == "context"
    # The last token sampled needs no place of its own.
    assert full["generated_tokens"] in (10, 11)


def test_bits_and_dense_bits_are_used(answer: Any) -> None:
    hashes = {}
    for bits, dense, expected in [(2, None, 6), (3, 3, 3), (6, None, 6), (8, None, 8), (8, 2, 2)]:
        more = [] if dense is None else ["--dense-bits", dense]
        got = answer("hi", "-n", 4, "--temp", 0, "--bits", bits, *more, "--logits-hash")
        assert (got["bits"], got["dense_bits"], got["mean_bits"]) == (bits, expected, bits)
        hashes[bits, expected] = got["logits_hash"]
    assert len(set(hashes.values())) == len(hashes)


def test_bits_are_the_most_that_fit(large: Path, tmp_path: Path) -> None:
    """A ceiling between what two levels need gives the lower one, and it is held."""
    big = tmp_path / "big.emoe"
    edgemoe.convert(large, big)
    _, _, err = run("run", big, "hi", "-n", "4", "--mem", "1M", "--bits", 4)
    least = int(err.split("give --mem ")[1].split("M")[0])
    with Store.open(big) as store:
        experts = expert_bytes(store, store.quant.levels.index(4)) >> 20
    mem = f"{least + experts - 10}M"  # streaming needs 12 MiB itself
    _, out, err = run("run", big, "hi", "-n", "4", "--mem", mem, "--json")
    result = json.loads(out)
    assert result["bits"] in (4, 6) and "(the most that fit)" in err
    assert result["peak_rss_bytes"] <= result["mem_budget_bytes"]


def test_logits_hash_does_not_depend_on_threads(answer: Any) -> None:
    got = {answer("hi", "-n", 9, "--temp", 0, "-t", t, "--logits-hash")["logits_hash"]
           for t in (1, 2, 3)}  # fmt: skip
    assert len(got) == 1 and re.fullmatch(r"[0-9a-f]{64}", got.pop())


def test_logits_hash_in_text_form(store: Path) -> None:
    _, _, err = run("run", store, "hi", "-n", "3", "--logits-hash")
    assert re.fullmatch(r"edgemoe: logits hash [0-9a-f]{64}", err.splitlines()[-2])


def test_seeds_and_sampling(answer: Any) -> None:
    first = answer("hi", "-n", 20)
    assert answer("hi", "-n", 20, "--seed", first["seed"])["text"] == first["text"]
    assert answer("hi", "-n", 20, "--seed", first["seed"] + 1)["text"] != first["text"]
    greedy = answer("hi", "-n", 20, "--temp", 0)["text"]
    assert answer("hi", "-n", 20, "--top-k", 1)["text"] == greedy
    assert answer("hi", "-n", 20, "--top-p", 0.0001)["text"] == greedy
    assert answer("hi", "-n", 20, "--min-p", 1)["text"] == greedy
    assert answer("hi", "-n", 60, "--temp", 0, "--repeat-penalty", 50)["text"] != answer(
        "hi", "-n", 60, "--temp", 0
    )["text"]  # fmt: skip


def test_settings_without_effect_are_said(store: Path) -> None:
    _, _, err = run("run", store, "hi", "-n", "2", "--temp", "0", "--top-k", "5", "--min-p", "0.1")
    assert "--top-k, --min-p without effect" in err.splitlines()[0]


def test_stop_strings_end_the_text(answer: Any) -> None:
    whole = answer("hi", "-n", 60, "--temp", 0)["text"]
    middle = whole[20:24]
    cut = answer("hi", "-n", 60, "--temp", 0, "--stop", "no such text", "--stop", middle)
    assert cut["text"] == whole[: whole.index(middle)] and cut["stop_reason"] == "stop"


def test_the_command_is_installed() -> None:
    command = Path(sys.executable).with_name("edgemoe")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"edgemoe {edgemoe.__version__}\n"


def test_internal_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], store: Path
) -> None:
    def broken(*_: object) -> int:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("edgemoe.terminal.inspect.describe", broken)
    assert cli.main(["inspect", str(store)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("edgemoe: error: internal error, please report it: RuntimeError: two li")
    assert err.count("\n") == 1
    monkeypatch.setenv("EDGEMOE_DEBUG", "1")
    assert cli.main(["inspect", str(store)]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_memory_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], store: Path
) -> None:
    def greedy(*_: object) -> int:
        return int(np.empty(1 << 60, np.uint8)[0])

    monkeypatch.setattr("edgemoe.terminal.inspect.describe", greedy)
    assert cli.main(["inspect", str(store)]) == 1
    assert capsys.readouterr().err.startswith("edgemoe: error: out of memory: give a lower --mem")


def test_blas_threads_are_one() -> None:
    code = (
        "import os, sys; from edgemoe.cli import main\n"
        "main(['run', '-n', '2', 'hi'])\n"
        "print(os.environ['OPENBLAS_NUM_THREADS'], os.environ['OMP_NUM_THREADS'], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "8"},
    )  # fmt: skip
    assert done.stderr.splitlines()[-1] == "1 1"


def test_piped_prompts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgemoe.terminal import run as running

    monkeypatch.setattr(running, "MAX_PIPED", 10)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"x" * 11)))
    with pytest.raises(UsageError, match="longer than"):
        running.read_pipe()
