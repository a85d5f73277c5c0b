"""`edgemoe export` at the terminal: what may be overwritten, progress, the closing lines."""

from __future__ import annotations

import os

from ..errors import shown
from ..export import WeightType, export
from ..export.file import MAGIC
from ..loader.budget import format_size
from .long_job import check_output, progress, stoppable
from .model_path import refuse_hub_name


def run(src: str, out: str, *, type: WeightType, bits: int | None, force: bool = False) -> int:
    """Export `src` to `out` and say so; returns the exit code.

    Raises:
        UsageError: `out` must not be written. Others as `export`.
    """
    refuse_hub_name(src)
    check_output(out, force=force, kind="a GGUF file", magic=MAGIC, example="model.gguf")
    with progress(os.path.basename(out)) as bar, stoppable(bar) as watched:
        report = export(src, out, type=type, bits=bits, progress=watched)
    print(
        f"{shown(out)}: {report.weights / 1e6:.1f} M weights in {format_size(report.file_bytes)} "
        f"({8 * report.file_bytes / report.weights:.2f} bits each), {report.seconds:.1f} s"
    )
    for note in report.notes:
        print(f"note: {note}")
    return 0
