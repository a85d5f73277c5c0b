"""`edgemoe convert` at the terminal: what may be overwritten, progress, the closing line."""

from __future__ import annotations

import os
import shlex
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ..chat import ChatTemplate
from ..checkpoint import open_checkpoint
from ..checkpoint.files import parse_object
from ..errors import UsageError, shown
from ..loader.budget import format_size
from ..mwq.convert import convert
from ..sampling import from_generation_config
from ..store.header import MAGIC
from ..tokenizer import Tokenizer
from .model_path import refuse_hub_name

LINE_EVERY_S = 5.0
"""Pause between progress lines where stderr is no terminal."""

Progress = Callable[[int, int, str], None]


def run(src: str, out: str, *, force: bool = False) -> int:
    """Convert `src` to `out` and say so; returns the exit code.

    Raises:
        UsageError: `out` must not be written. CheckpointError, OutputError: as `convert`.
    """
    refuse_hub_name(src)
    check_output(out, force=force)
    check_text_files(src)
    with _progress(os.path.basename(out)) as progress, _stoppable(progress) as watched:
        report = convert(src, out, progress=watched)
    bits = 8 * report.file_bytes / report.weights
    print(
        f"{shown(out)}: {report.weights / 1e6:.1f} M weights in {format_size(report.file_bytes)} "
        f"({bits:.2f} bits each, all levels together), {report.seconds:.1f} s; "
        f"try: edgemoe run {shlex.quote(out)}"
    )
    return 0


def check_output(out: str, *, force: bool) -> None:
    """Raise UsageError unless `out` may be written: it does not exist, or is a store and `force`.

    Nothing but a store is ever replaced: SRC's own files, a device, or a slip of the keyboard.
    """
    name = shown(out)
    try:
        mode = os.lstat(out).st_mode
    except OSError:
        parent = os.path.dirname(out) or "."
        if not os.path.isdir(parent):
            raise UsageError(
                f"{name}: there is no directory {shown(parent)}; make it first"
            ) from None
        return
    except ValueError as error:
        raise UsageError(f"{name} is no file name: {error}") from None
    if stat.S_ISDIR(mode):
        raise UsageError(f"{name} is a directory; give a file name, such as {name}/model.emoe")
    if not stat.S_ISREG(mode):
        raise UsageError(f"{name} is not a regular file; give another name")
    if not force:
        raise UsageError(f"{name} exists already; give --force to replace it, or another name")
    with open(out, "rb") as file:
        if file.read(len(MAGIC)) not in (MAGIC, b""):
            raise UsageError(
                f"{name} is not a store, so --force does not replace it; remove it or give "
                "another name"
            )


def check_text_files(src: str) -> None:
    """Refuse a checkpoint whose text side could not be run, before hours are spent on its weights.

    Raises:
        CheckpointError: no tokenizer, or one of tokenizer, chat template and generation settings
            cannot be used.
    """
    checkpoint = open_checkpoint(src)
    checkpoint.require_tokenizer()
    files, config = checkpoint.files, checkpoint.config
    parsed: dict[str, dict[str, Any]] = {
        name: parse_object(files[name], f"{shown(src)}/{name}")
        for name in ("tokenizer_config.json", "generation_config.json")
        if name in files
    }
    settings = parsed.get("tokenizer_config.json")
    Tokenizer(
        files["tokenizer.json"],
        config=settings,
        bos_token_id=config.bos_token_id,
        eos_token_ids=config.eos_token_ids,
    )
    ChatTemplate.from_files(files.get("chat_template.jinja"), settings)
    from_generation_config(parsed.get("generation_config.json", {}))


@contextmanager
def _stoppable(progress: Progress) -> Iterator[Progress]:
    """Turn SIGINT and SIGTERM into an exception, but only between two runs of rows.

    There it always reaches the writer's clean-up; in the middle of opening the temporary file, say,
    it might not. The second Ctrl-C does not wait.
    """
    seen: list[int] = []

    def on_signal(signum: int, frame: FrameType | None) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(signum)

    def watched(done: int, total: int, what: str) -> None:
        progress(done, total, what)
        if seen and done < total:
            raise KeyboardInterrupt if seen[0] == signal.SIGINT else SystemExit(128 + seen[0])

    mine = threading.current_thread() is threading.main_thread()
    # A job that was told to ignore a signal (nohup, a shell's background) goes on ignoring it.
    handled = [
        number
        for number in (signal.SIGINT, signal.SIGTERM)
        if mine and signal.getsignal(number) is not signal.SIG_IGN
    ]
    before = [signal.signal(number, on_signal) for number in handled]
    try:
        yield watched
    finally:
        for number, handler in zip(handled, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def _progress(name: str) -> Iterator[Progress]:
    """A bar where stderr is a terminal, now and then a line where it is not."""
    if not sys.stderr.isatty():
        yield _Lines(name)
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.fields[name]}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None, name=name)
        yield lambda done, total, what: bar.update(
            task, completed=done, total=total, description=what
        )


class _Lines:
    """Progress as plain lines, with the time left."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._start = self._last = time.monotonic()

    def __call__(self, done: int, total: int, what: str) -> None:
        now = time.monotonic()
        if now - self._last < LINE_EVERY_S and done < total:
            return
        self._last = now
        left = (now - self._start) * (total - done) / done
        print(
            f"{self._name}: {100 * done // total} %, {_duration(left)} left ({what})",
            file=sys.stderr,
            flush=True,
        )


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"
