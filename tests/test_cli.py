"""The command line at work: arguments, streams, figures, chat, signals, convert and inspect."""

from __future__ import annotations

import errno
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import click
import numpy as np
import pytest
from cli_model import CHATML, CONFIG, make_checkpoint, make_store, run, start

import edgemoe
from edgemoe import cli, kernels
from edgemoe.chat import ChatTemplate
from edgemoe.errors import UsageError
from edgemoe.store import Store
from edgemoe.terminal import convert as converting
from edgemoe.terminal.interactive import fit
from edgemoe.terminal.model_path import sort_arguments
from edgemoe.terminal.run import RunOptions
from edgemoe.tokenizer import Tokenizer
from edgemoe.types import LEVELS

FIGURES = re.compile(
    r"edgemoe: \d+ prompt tokens at [\d.]+/s, \d+ generated at [\d.]+/s, first after [\d.]+ s, "
    r"peak [\d.]+ MiB of [\d.]+ [MG]iB, mean bits [\d.]+, ended by [^,]+(, seed \d+)?"
)


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


@pytest.mark.parametrize("command", [[], ["run"], ["convert"], ["inspect"]])
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
        "--raw --mem 3G --bits 3 --dense-bits 4 -n 7 -c 99 -t 2 --temp 0.5 --top-k 9 --top-p 0.9 "
        "--min-p 0.1 --repeat-penalty 1.2 --seed 5 --stop A --stop B --json --logits-hash"
    )
    assert cli.main(["run", str(store), "hello", *line.split()]) == 0
    sampling = {"temperature": 0.5, "top_k": 9, "top_p": 0.9, "min_p": 0.1}
    assert seen == [
        RunOptions(
            model=str(store), prompt="hello", raw=True, mem="3G", bits=3, dense_bits=4,
            max_tokens=7, ctx_size=99, threads=2,
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
    """cli.py imports neither NumPy nor the kernels, so it repeats two of their figures."""
    assert tuple(map(str, LEVELS)) == cli._LEVELS
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
        "peak_rss_bytes", "mem_budget_bytes", "mean_bits", "stop_reason", "bits", "dense_bits",
        "ctx_size", "threads",
    }  # fmt: skip
    assert result["generated_tokens"] == 6 and result["stop_reason"] == "length"
    assert result["mem_budget_bytes"] == 400 * 1024**2
    assert 0 < result["peak_rss_bytes"] <= result["mem_budget_bytes"]
    assert result["bits"] == result["mean_bits"] == 8
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
    needs = {}
    for bits in (4, 8):
        _, _, err = run("run", big, "hi", "-n", "4", "--mem", "1M", "--bits", bits)
        needs[bits] = int(err.split("give --mem ")[1].split("M")[0])
    assert needs[4] + 8 < needs[8]
    mem = f"{(needs[4] + needs[8]) // 2}M"
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


# Signals and broken pipes.


def wait_for(stream: Any, text: bytes) -> bytes:
    seen = b""
    while text not in seen:
        byte = os.read(stream.fileno(), 1)
        assert byte, seen
        seen += byte
    return seen


def test_ctrl_c_ends_the_text_and_gives_the_figures(plain: Path) -> None:
    with start("run", plain, "hello", "-n", "30000") as process:
        assert process.stdout is not None and process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out.endswith(b"\n") and b"Traceback" not in err
    last = err.decode().splitlines()[-1]
    assert FIGURES.fullmatch(last) and "ended by Ctrl-C" in last


def test_ctrl_c_with_json(plain: Path) -> None:
    with start("run", plain, "hello", "-n", "30000", "--json") as process:
        wait_for(process.stderr, b"\n")
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    result = json.loads(out)
    assert result["stop_reason"] == "closed" and result["generated_tokens"] > 0


def test_ctrl_c_before_the_first_token(plain: Path) -> None:
    with start("run", plain, "--raw", "-n", "9", stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(b"x" * 32_000)
        process.stdin.close()
        process.stdin = None
        wait_for(process.stderr, b"\n")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == b"" and err.decode().splitlines()[-1] == "edgemoe: interrupted"
    assert b"Traceback" not in err


def test_a_reader_that_goes_away_is_no_error(plain: Path) -> None:
    with start("run", plain, "hello", "-n", "30000") as process:
        assert process.stdout is not None and process.stdout.read(10)
        process.stdout.close()
        process.stdout = None
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGPIPE
    assert b"Traceback" not in err and b"rror" not in err


# The interactive prompt.


class Terminal:
    """A command line on a terminal of its own."""

    running: ClassVar[list[Terminal]] = []

    def __init__(self, *args: object, **env: str) -> None:
        self.master, slave = pty.openpty()
        settings = {"TERM": "dumb", **env}
        self.process = start(*args, stdin=slave, stdout=slave, stderr=slave, env=settings,
                             start_new_session=True, preexec_fn=take_terminal)  # fmt: skip
        os.close(slave)
        self.seen = ""
        self.running.append(self)

    def expect(self, pattern: str, timeout: float = 60) -> re.Match[str]:
        """Wait for a pattern; what came up to its end is forgotten."""
        end = time.monotonic() + timeout
        while (found := re.search(pattern, self.seen, re.S)) is None:
            ready, _, _ = select.select([self.master], [], [], max(0, end - time.monotonic()))
            assert ready, f"no {pattern!r} in {self.seen!r}"
            try:
                data = os.read(self.master, 4096)
            except OSError as error:  # Linux: the other side is closed
                assert error.errno == errno.EIO
                data = b""
            assert data, f"ended without {pattern!r}: {self.seen!r}"
            self.seen += data.decode(errors="replace")
        self.seen = self.seen[found.end() :]
        return found

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def end(self) -> int:
        """The exit code, once it has ended by itself."""
        return self.process.wait(timeout=30)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.fixture
def terminals() -> Iterator[type[Terminal]]:
    """`Terminal`, none of which outlives the test."""
    yield Terminal
    while Terminal.running:
        Terminal.running.pop().close()


def take_terminal() -> None:
    """In the child: make its stdin the controlling terminal, so that ^C becomes a signal."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_conversation(store: Path, tmp_path: Path, terminals: type[Terminal]) -> None:
    home = {"XDG_STATE_HOME": str(tmp_path)}
    terminal = terminals("run", store, "-n", "30", "--temp", "0", **home)
    terminal.expect(r"context 4096.*a conversation; Ctrl-C ends an answer, Ctrl-D leaves\r\n")
    prompts = []
    for line in ("hello", "and you?"):
        terminal.expect("> ")
        terminal.type(line + "\n")
        prompts.append(int(terminal.expect(r"edgemoe: (\d+) prompt tokens .*\r\n")[1]))
    # The second prompt holds the first turn and its answer.
    assert prompts[1] > prompts[0] + 30
    terminal.expect("> ")
    terminal.type("\x04")
    assert terminal.end() == 0
    history = tmp_path / "edgemoe" / "history"
    assert history.read_text().splitlines() == ["hello", "and you?"]
    assert history.stat().st_mode & 0o077 == 0
    # The next session finds them.
    terminal = terminals("run", store, "-n", "3", **home)
    terminal.expect("> ")
    terminal.type("\x1b[A\x1b[A\n")
    terminal.expect(r"hello.*edgemoe: \d+ prompt tokens")
    terminal.expect("> ")
    terminal.type("\x04")
    assert terminal.end() == 0


def test_ctrl_c_in_a_conversation(plain: Path, tmp_path: Path, terminals: type[Terminal]) -> None:
    terminal = terminals("run", plain, "-n", "4000", XDG_STATE_HOME=str(tmp_path))
    terminal.expect("every line a prompt of its own")
    terminal.expect("> ")
    terminal.type("half a li\x03")  # clears the line
    terminal.expect("> ")
    terminal.type("go\n")
    terminal.expect("go\r\n.{30}")
    terminal.type("\x03")  # ends the answer
    first = terminal.expect(r"edgemoe: 2 prompt tokens .* ended by Ctrl-C, seed (\d+)")[1]
    terminal.expect("> ")
    terminal.type("go\n")
    terminal.expect("go\r\n.{30}")
    terminal.type("\x03")
    assert terminal.expect(r"edgemoe: 2 prompt tokens .*, seed (\d+)")[1] != first
    terminal.expect("> ")
    terminal.type("x" * 5000 + "\n")
    terminal.expect(r"this turn has 5000 tokens and the context 4096: shorten it")
    terminal.expect("> ")
    terminal.type("\x04")
    assert terminal.end() == 0


def test_control_characters_do_not_reach_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from edgemoe.terminal.run import speak

    class Fake:
        token_ids = (1,)

        def __enter__(self) -> Fake:
            return self

        def __exit__(self, *_: object) -> None: ...

        def __iter__(self) -> Iterator[str]:
            return iter(["a\x1b[2J\x07é\n", "\tb\x9b"])

    speak(Fake())  # type: ignore[arg-type]
    assert capsys.readouterr().out == "a\x1b[2J\x07é\n\tb\x9b\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    speak(Fake())  # type: ignore[arg-type]
    assert capsys.readouterr().out == "a^1B[2J^07é\n\tb^9B\n"


def opened(chat: bool = True) -> Any:
    from cli_model import tokenizer_json

    template = ChatTemplate(CHATML) if chat else None
    tokenizer = Tokenizer(tokenizer_json().encode())
    return SimpleNamespace(tokenizer=tokenizer, chat_template=template)


def test_a_long_conversation_forgets_its_oldest_turns(capsys: pytest.CaptureFixture[str]) -> None:
    talk = [{"role": ("user", "assistant")[i % 2], "content": "x" * 50} for i in range(9)]
    options = RunOptions(max_tokens=100)
    ids, kept = fit(opened(), talk, options, 4096)
    assert kept == talk and capsys.readouterr().err == ""
    ids, kept = fit(opened(), talk, options, 400)
    assert kept == talk[-len(kept) :] and kept[0]["role"] == "user" and len(kept) == 3
    assert len(ids) + 100 <= 400
    assert "the oldest 3 turns were forgotten" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"this turn has .* tokens and the context 40"):
        fit(opened(), talk, options, 40)


def test_json_needs_a_prompt(store: Path, terminals: type[Terminal]) -> None:
    terminal = terminals("run", store, "--json")
    terminal.expect(r"edgemoe: error: --json needs a prompt")
    assert terminal.end() == 2


def test_a_closed_stdin_is_no_prompt(store: Path) -> None:
    code, _, err = run("run", store, stdin=None, preexec_fn=lambda: os.close(0))
    assert code == 2 and err == "edgemoe: error: the prompt is empty: give some text\n"


# convert


def test_convert_and_run(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "src")
    code, out, err = run("convert", "src", "out name.emoe", cwd=tmp_path)
    assert code == 0
    assert re.fullmatch(
        r"out name\.emoe: [\d.]+ M weights in [\d.]+ KiB \([\d.]+ bits each, all levels together\),"
        r" [\d.]+ s; try: edgemoe run 'out name\.emoe'\n",
        out,
    )
    assert err == "out name.emoe: 100 %, 0:00 left (lm_head)\n"
    assert sorted(os.listdir(tmp_path)) == ["out name.emoe", "src"]
    assert run("run", "out name.emoe", "hi", "-n", "2", cwd=tmp_path)[0] == 0


def test_progress_on_a_terminal(tmp_path: Path, terminals: type[Terminal]) -> None:
    make_checkpoint(tmp_path / "src")
    terminal = terminals("convert", tmp_path / "src", tmp_path / "x.emoe", TERM="xterm")
    terminal.expect(r"x\.emoe.*100%")
    terminal.expect(r"try: edgemoe run")
    assert terminal.end() == 0


def test_progress_in_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 1.0, 6.0, 7.0, 5400.0])
    monkeypatch.setattr("edgemoe.terminal.convert.time.monotonic", lambda: next(clock))
    lines = converting._Lines("m.emoe")
    for done in (1, 2, 3, 4):
        lines(done, 1000, f"part {done}")
    assert capsys.readouterr().err.splitlines() == [
        "m.emoe: 0 %, 49:54 left (part 2)",
        "m.emoe: 0 %, 373:30:00 left (part 4)",
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_conversion_that_is_ended_leaves_no_out(
    number: signal.Signals, large: Path, tmp_path: Path
) -> None:
    out = tmp_path / "x.emoe"
    with start("convert", large, out) as process:
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
    assert run("convert", large, out)[0] == 0
    assert os.listdir(tmp_path) == ["x.emoe"]


# inspect


def test_inspect_json(store: Path) -> None:
    code, out, err = run("inspect", store, "--json", "--verify")
    assert code == 0 and err == "" and out.count("\n") == 1
    facts = json.loads(out)
    assert facts["damaged"] == []
    assert facts["config"]["model_type"] == "qwen3_moe"
    assert facts["config"]["num_experts"] == 4
    sizes = facts["sizes"]
    assert sizes["file_bytes"] == store.stat().st_size
    parts = [sizes[k]["bytes"] for k in ("experts", "dense", "float32")]
    total = sum(parts) + sum(sizes["sections"].values())
    assert total + sizes["dead_bytes"] + sizes["overhead_bytes"] == sizes["file_bytes"]
    with Store.open(store) as opened_store:
        layout = opened_store.expert_layout
        nested = [t.layout for t in opened_store.tensors.values() if t.layout is not None]
        for i, level in enumerate(opened_store.quant.levels):
            row = facts["levels"][str(level)]
            expert = sum(layout.segment_sizes[: i + 1])
            assert row["experts_bits_per_weight"] == 8 * expert / layout.weights()
            dense = sum(sum(x.segment_sizes[: i + 1]) for x in nested)
            assert row["dense_bytes"] == dense
            assert row["model_bytes"] == 8 * expert + dense + sizes["float32"]["bytes"]
            assert row["model_bits_per_weight"] == 8 * row["model_bytes"] / facts["weights"]
            assert row["experts_bits_per_weight"] > level  # scales are counted


def test_active_weights(tmp_path: Path) -> None:
    """Counted by hand: two of four experts, and one row of the embedding unless it is the head."""
    from tiny_checkpoints import make_tensors

    from edgemoe.inspect_store import describe

    for tied in (False, True):
        where = tmp_path / str(tied)
        where.mkdir()
        with Store.open(make_store(where, tie_word_embeddings=tied)) as opened_store:
            facts = describe(opened_store)
        active = everything = 0
        for name, array in make_tensors(CONFIG | {"tie_word_embeddings": tied}).items():
            everything += array.size
            if "embed" in name and not tied:
                active += array.shape[1]
            elif not re.search(r"experts\.[23]\.", name):
                active += array.size
        assert (facts["weights"], facts["active_weights"]) == (everything, active)


def test_inspect_text(store: Path) -> None:
    code, out, _ = run("inspect", store)
    assert code == 0
    for expected in (
        r"qwen3_moe, 0\.02 M weights",
        r"3 layers, 2 with 4 experts of which 2 work on a token; hidden size 16, expert size 12",
        r"vocabulary 264, context 32768",
        r"\nexperts +0\.00 M +[\d.]+ KiB +[\d.]+ %\n",
        r"\n2 bits +[\d.]+ KiB +[\d.]+ ",
        r"\n8 bits ",
        r"checksums: CRC32C of \d+ segments and 3 sections, not compared \(--verify does\)\n$",
    ):
        assert re.search(expected, out), out
    assert re.search(r"sections, all as written\n$", run("inspect", store, "--verify")[1])


def test_the_command_is_installed() -> None:
    command = Path(sys.executable).with_name("edgemoe")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"edgemoe {edgemoe.__version__}\n"


def test_internal_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], store: Path
) -> None:
    def broken(*_: object) -> int:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("edgemoe.inspect_store.describe", broken)
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

    monkeypatch.setattr("edgemoe.inspect_store.describe", greedy)
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
