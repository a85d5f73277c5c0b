"""A directory of products, each made once: a run that was stopped goes on where it was.

Beside every product lies NAME.key, the JSON of all it depends on; a product whose key is another
one than asked for is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgemoe.errors import OutputError, UsageError, shown

# Threads that wait must sleep: on shared cores spinning ones take the time of working ones.
_ENV = {**os.environ, "OMP_WAIT_POLICY": "passive"}
_ENV.pop("OMP_NUM_THREADS", None)  # measure_quality.py's own

TELL_EVERY_S = 10.0
"""Pause between signs of life of a program that runs."""


def say(line: str) -> None:
    """A line of progress, on stderr: stdout is for results."""
    print(time.strftime("%H:%M:%S", time.gmtime()), line, file=sys.stderr, flush=True)


def identity(path: Path) -> dict[str, Any]:
    """What tells a file from another of its name, without reading it.

    Raises:
        UsageError: there is no such file.
    """
    try:
        stat = path.stat()
    except OSError as exc:
        raise UsageError(f"{shown(path)}: cannot be read: {exc.strerror}") from None
    return {"file": str(path.resolve()), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


@dataclass(frozen=True)
class Product:
    """A file of the work directory. digest: of all it depends on, for the keys of what follows."""

    path: Path
    digest: str


class Work:
    """The products under one directory, which is made if it is not there."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise OutputError(f"{shown(directory)}: cannot be made: {exc.strerror}") from None

    def product(
        self,
        name: str,
        key: Mapping[str, Any],
        make: Callable[[Path], None],
        *,
        fresh: bool = False,
    ) -> Product:
        """The file `name`, which `make` writes under the path it is given if it has to.

        Args:
            key: all that the product depends on, JSON-ready.
            fresh: make it again even so, because the key cannot say all.
        """
        path, key_path = self.directory / name, self.directory / f"{name}.key"
        text = json.dumps(key, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        known = not fresh and path.is_file() and key_path.is_file()
        if known and key_path.read_text() == text:
            say(f"{name}: there already")
            return Product(path, digest)
        key_path.unlink(missing_ok=True)
        temporary = self.directory / f"part-{name}"
        say(f"{name}: being made")
        start = time.monotonic()
        try:
            make(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        unfinished = key_path.with_name(f"part-{key_path.name}")
        unfinished.write_text(text)
        unfinished.replace(key_path)
        say(f"{name}: {time.monotonic() - start:.1f} s")
        return Product(path, digest)


def run(command: Sequence[str | Path], log: Path) -> None:
    """Run a program, its output into `log`, with a sign of life now and then.

    Raises:
        UsageError: it cannot be started, or fails; the message has the end of its output.
    """
    words = [str(word) for word in command]
    with log.open("wb") as out:
        try:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=_ENV
            )
        except OSError as exc:
            raise UsageError(f"{shown(words[0])}: cannot be started: {exc.strerror}") from None
        start = time.monotonic()
        try:
            while True:
                try:
                    status = process.wait(TELL_EVERY_S)
                    break
                except subprocess.TimeoutExpired:
                    said = _tail(log, 60)
                    say(f"  {Path(words[0]).name}, {time.monotonic() - start:.0f} s: {said}")
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if status:
        said = _tail(log, 300)
        raise UsageError(f"{' '.join(words)} ended with status {status}: {said} (all in {log})")


def _tail(log: Path, characters: int) -> str:
    """The end of a log as one line."""
    with log.open("rb") as file:
        file.seek(max(log.stat().st_size - 4 * characters, 0))
        text = file.read().decode("utf-8", "replace")
    return " ".join(text.split())[-characters:]
