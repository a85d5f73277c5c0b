"""What a person at a terminal meets: Ctrl-C, broken pipes, conversations, progress."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cli_model import (
    CHATML,
    FIGURES,
    make_checkpoint,
    make_store,
    run,
    start,
    tokenizer_json,
)
from cli_terminal import Terminal

from edgemoe.chat import ChatTemplate
from edgemoe.errors import UsageError
from edgemoe.terminal.interactive import fit
from edgemoe.terminal.session import RunOptions
from edgemoe.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a chat template."""
    return make_store(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without one."""
    return make_store(tmp_path_factory.mktemp("plain"), chat=False)


@pytest.fixture
def terminals() -> Iterator[type[Terminal]]:
    """`Terminal`, none of which outlives the test."""
    yield Terminal
    while Terminal.running:
        Terminal.running.pop().close()


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
    with start("run", plain, "--raw", "-n", "9", "-t", "1", stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(b"x" * 32_000)
        process.stdin.close()
        process.stdin = None
        wait_for(process.stderr, b"\n")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
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
    terminal.type("half a li")
    terminal.expect("half a li")
    time.sleep(0.3)  # CPython: a signal just before readline waits is seen with the next key
    terminal.type("\x03")  # clears the line
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
    from edgemoe.terminal.session import speak

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


def test_progress_on_a_terminal(tmp_path: Path, terminals: type[Terminal]) -> None:
    make_checkpoint(tmp_path / "src")
    terminal = terminals("convert", tmp_path / "src", tmp_path / "x.emoe", TERM="xterm")
    terminal.expect(r"x\.emoe.*100%")
    terminal.expect(r"try: edgemoe run")
    assert terminal.end() == 0
