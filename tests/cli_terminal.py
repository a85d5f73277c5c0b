"""A command line on a pseudo-terminal, typed at and read from."""

from __future__ import annotations

import errno
import os
import pty
import re
import select
import time
from typing import ClassVar

from cli_model import start


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


def take_terminal() -> None:
    """In the child: make its stdin the controlling terminal, so that ^C becomes a signal."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
