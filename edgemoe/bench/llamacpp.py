"""llama.cpp as the other side: a child process that loads a model once and runs rounds on call."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ..closing import Closing
from ..cpus import BLAS_THREADS
from ..errors import EdgeMoEError, UsageError, shown
from ..types import I64
from .timing import Timing

PYTHON = "EDGEMOE_LLAMA_PYTHON"
"""The environment variable that names a Python with llama_cpp."""

_CHILD = Path(__file__).with_name("llamacpp_child.py")


class LlamaCpp(Closing):
    """A GGUF loaded by llama.cpp in a process of its own; close it, or use it in a `with`.

    Between rounds it waits for a line on its stdin, so it is idle. Ctrl-C reaches it only through
    `close`; where this process dies, its stdin ends, and it with it.

    Args:
        python: an interpreter that has llama_cpp; None: EDGEMOE_LLAMA_PYTHON's, else this one.
        repack: let llama.cpp keep a second copy of the weights, in an order it multiplies faster.
        tokens: int64 [n]: of a round; the first `prompt_tokens` are prefilled, the others decoded.

    Raises:
        UsageError: no such interpreter, or it has no llama_cpp.
        EdgeMoEError: llama.cpp cannot load the file.

    Attributes:
        vocab_size: of the model. version: of llama-cpp-python. peak_rss_bytes: after a round, the
            most memory the child had resident, pages of the mapped file included.
    """

    def __init__(
        self,
        python: str | None,
        gguf: Path,
        *,
        threads: int,
        repack: bool,
        tokens: I64,
        prompt_tokens: int,
    ) -> None:
        self._python = python or os.environ.get(PYTHON) or sys.executable
        self.peak_rss_bytes = 0
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (`close` does)
        # The command line holds NumPy's BLAS to one thread; llama.cpp may have been built with one.
        env = {name: value for name, value in os.environ.items() if name not in BLAS_THREADS}
        try:
            self._process = subprocess.Popen(
                [self._python, str(_CHILD)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=env,
                text=True,
                start_new_session=True,
            )
        except OSError as error:
            self._log.close()
            raise UsageError(
                f"cannot start {shown(self._python)}: {error.strerror or error}; --llama-python or "
                f"{PYTHON} must name a Python that has llama-cpp-python"
            ) from None
        try:
            every = tokens.tolist()
            loaded = self._ask(
                path=str(gguf),
                repack=repack,
                threads=threads,
                prefill=every[:prompt_tokens],
                decode=every[prompt_tokens:],
            )
        except BaseException:
            self.close()
            raise
        self.vocab_size, self.version = int(loaded["vocab"]), str(loaded["version"])

    @property
    def pid(self) -> int:
        """The child's."""
        return self._process.pid

    def close(self) -> None:
        """End the child at once, whatever it is doing; twice is fine."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdout, self._process.stdin):
            try:
                if pipe is not None:
                    pipe.close()
            except BrokenPipeError:
                pass
        self._log.close()

    def round(self) -> Timing:
        """Run the tokens through an empty context."""
        answer = self._ask()
        self.peak_rss_bytes = int(answer["peak_rss_bytes"])
        return Timing(answer["prefill_s"], tuple(answer["steps_s"]))

    def _ask(self, **request: Any) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise EdgeMoEError("llama.cpp's process has no pipes")
        try:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
        except BrokenPipeError:
            pass  # it ended; its last answer may say why
        line = stdout.readline()
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            raise EdgeMoEError(self._why()) from None
        if answer.get("missing"):
            raise UsageError(
                f"{shown(self._python)} cannot run llama.cpp: {answer['error']}; pip install "
                f"'edgemoe[llamacpp]', or let --llama-python or {PYTHON} name a Python that has it"
            )
        if "error" in answer:
            raise EdgeMoEError(shown(answer["error"], 400))
        return answer

    def _why(self) -> str:
        """What is known of a child that ended without an answer."""
        code = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "it said nothing")
        how = f"ended with code {code}"
        if code < 0:
            how = f"was ended by {signal.Signals(-code).name}"
            if code == -signal.SIGKILL:
                how += " (out of memory?)"
        return f"llama.cpp's process {how}: {shown(last, 300)}"
