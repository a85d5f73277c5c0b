"""`edgemoe convert` at the terminal: what may be overwritten, progress, the closing line."""

from __future__ import annotations

import os
import shlex
from typing import Any

from ..chat import ChatTemplate
from ..checkpoint import Checkpoint, open_checkpoint
from ..checkpoint.files import parse_object
from ..errors import shown
from ..loader.budget import format_size
from ..mwq.convert import convert
from ..sampling import from_generation_config
from ..store.header import MAGIC
from ..tokenizer import Tokenizer
from .long_job import check_output, progress, stoppable
from .model_path import refuse_hub_name


def run(src: str, out: str, *, max_level: int | None = None, force: bool = False) -> int:
    """Convert `src` to `out` and say so; returns the exit code.

    Raises:
        UsageError: `out` must not be written. CheckpointError, OutputError: as `convert`.
    """
    refuse_hub_name(src)
    check_output(out, force=force, kind="a store", magic=MAGIC, example="model.emoe")
    checkpoint = open_checkpoint(src)
    check_text_files(checkpoint, shown(src))
    with progress(os.path.basename(out)) as bar, stoppable(bar) as watched:
        report = convert(checkpoint, out, progress=watched, max_level=max_level)
    bits = 8 * report.file_bytes / report.weights
    print(
        f"{shown(out)}: {report.weights / 1e6:.1f} M weights in {format_size(report.file_bytes)} "
        f"({bits:.2f} bits each, all levels up to {report.max_level} together), "
        f"{report.seconds:.1f} s; "
        f"try: edgemoe run {shlex.quote(out)}"
    )
    return 0


def check_text_files(checkpoint: Checkpoint, where: str) -> None:
    """Refuse a checkpoint whose text side could not be run, before hours are spent on its weights.

    Raises:
        CheckpointError: no tokenizer, or one of tokenizer, chat template and generation settings
            cannot be used.
    """
    checkpoint.require_tokenizer()
    files, config = checkpoint.files, checkpoint.config
    parsed: dict[str, dict[str, Any]] = {
        name: parse_object(files[name], f"{where}/{name}")
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
