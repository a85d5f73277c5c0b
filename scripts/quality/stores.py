"""The stores that are measured, made of a checkpoint in the work directory."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgemoe import kernels, mwq
from edgemoe.calibration import calibration, most_tokens, windows
from edgemoe.checkpoint import Checkpoint
from edgemoe.errors import UsageError, shown
from edgemoe.mwq.convert import convert
from edgemoe.mwq.quantize import EXPERTS
from edgemoe.terminal.evaluate_output import progress

from .scored_text import tokenizer_of
from .work import Work, identity, say


@dataclass(frozen=True)
class CalibrationText:
    """The first `size` bytes of a file, whole characters; markers stay in."""

    path: Path
    size: int

    def read(self) -> str:
        """The text.

        Raises:
            UsageError: it cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                return file.read(self.size).decode("utf-8", errors="ignore")
        except OSError as exc:
            raise UsageError(f"{shown(self.path)}: cannot be read: {exc.strerror}") from None

    def key(self) -> dict[str, Any]:
        """What decides it."""
        return {"source": identity(self.path), "size": self.size}


def converted(
    checkpoint: Checkpoint, work: Work, text: CalibrationText | None, level: int | None = None
) -> Path:
    """A store of the checkpoint with all levels; it is made again when edgemoe.mwq changes.

    Of changes in native code it knows nothing.

    Args:
        text: to calibrate on; None: nearest codes.
        level: the only one that codes are chosen for; None: all of them.
    """

    def make(out: Path) -> None:
        calibrate = None
        if text is not None:
            tokenizer, threads = tokenizer_of(checkpoint), kernels.default_threads()
            ids = tokenizer.encode(text.read(), add_special=False)
            most, bos = most_tokens(checkpoint), tokenizer.first_special()
            context = checkpoint.config.max_position_embeddings
            chosen = windows(ids, context, most, bos, shown(text.path))
            say(f"calibration on {sum(map(len, chosen))} of {len(ids)} tokens")
            calibrate = calibration(checkpoint, chosen, threads)
        with progress("conversion") as report:
            convert(
                checkpoint,
                out,
                max_level=8,
                progress=lambda a, b, _: report(a, b),
                calibrate=calibrate,
                worth=EXPERTS if level is None else {level: 1.0},
            )

    name = "nearest" if text is None else "calibrated" if level is None else f"for-{level}"
    sources = sorted(Path(mwq.__file__).parent.glob("*.py"))
    method = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    files = [identity(f) for f in checkpoint.fingerprint_files()]
    key = {"checkpoint": files, "method": method, "text": text and text.key()}
    return work.product(f"{name}.emoe", key, make).path
