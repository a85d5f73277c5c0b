"""What commands that write a large file share: where it may go, progress, ending early."""

from __future__ import annotations

import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from ..errors import UsageError, shown

LINE_EVERY_S = 5.0
"""Pause between progress lines where stderr is no terminal."""

_KNOWN = 1000
"""Of so many parts one has to be done before the rest can be foreseen: a job starts slowly."""

Progress = Callable[[int, int, str], None]
"""Called with (weights done, weights in all, part at hand)."""


def check_output(out: str, *, force: bool, kind: str, magic: bytes, example: str) -> None:
    """Raise UsageError unless `out` may be written: it does not exist, or is of `kind` and `force`.

    Nothing else is ever replaced: SRC's own files, a device, or a slip of the keyboard.

    Args:
        kind: of the file, with its article. magic: the first bytes of that kind. example: a name.
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
        raise UsageError(f"{name} is a directory; give a file name, such as {name}/{example}")
    if not stat.S_ISREG(mode):
        raise UsageError(f"{name} is not a regular file; give another name")
    if not force:
        raise UsageError(f"{name} exists already; give --force to replace it, or another name")
    with open(out, "rb") as file:
        if file.read(len(magic)) not in (magic, b""):
            raise UsageError(
                f"{name} is not {kind}, so --force does not replace it; remove it or give "
                "another name"
            )


@contextmanager
def stoppable(report: Progress) -> Iterator[Progress]:
    """Turn SIGINT and SIGTERM into an exception, but only where the job reports.

    There it always reaches the writer's clean-up; in the middle of opening the temporary file, say,
    it might not. The second Ctrl-C does not wait.
    """
    seen: list[int] = []

    def on_signal(signum: int, frame: FrameType | None) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(signum)

    def watched(done: int, total: int, what: str) -> None:
        report(done, total, what)
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
def progress(name: str) -> Iterator[Progress]:
    """A bar where stderr is a terminal, now and then a line where it is not."""
    if not sys.stderr.isatty():
        yield Lines(name)
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
    # Parts of a job go at different paces: the time left follows from those of the last minutes.
    with Bar(*columns, console=Console(stderr=True), speed_estimate_period=600) as bar:
        task = bar.add_task("", total=None, name=name)
        yield lambda done, total, what: bar.update(
            task, completed=done, total=total, description=what
        )


class Lines:
    """Progress as plain lines, with the time left."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._start = self._last = time.monotonic()

    def __call__(self, done: int, total: int, what: str) -> None:
        now = time.monotonic()
        if now - self._last < LINE_EVERY_S and done < total:
            return
        self._last = now
        left = ""
        if done * _KNOWN >= total:
            left = f", {_duration((now - self._start) * (total - done) / done)} left"
        print(
            f"{self._name}: {100 * done // total} %{left} ({what})",
            file=sys.stderr,
            flush=True,
        )


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"
