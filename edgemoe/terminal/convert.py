"""`edgemoe convert` at the terminal: what may be overwritten, progress, the closing line."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from typing import Any

from .. import kernels
from ..calibration import calibration, most_tokens, windows
from ..chat import ChatTemplate
from ..checkpoint import Checkpoint, open_checkpoint
from ..checkpoint.files import parse_object
from ..errors import shown
from ..loader.budget import format_size
from ..mwq.convert import Calibrate, convert
from ..sampling import from_generation_config
from ..store.header import MAGIC
from ..tokenizer import Tokenizer
from .evaluate import read_text
from .long_job import check_output, progress, stoppable
from .model_path import refuse_hub_name


def run(
    src: str,
    out: str,
    *,
    max_level: int | None = None,
    force: bool = False,
    calib: Sequence[str] = (),
) -> int:
    """Convert `src` to `out` and say so; returns the exit code.

    Raises:
        UsageError: `out` must not be written, or `calib` names what is no text or too short.
        CheckpointError, OutputError: as `convert`.
    """
    refuse_hub_name(src)
    check_output(out, force=force, kind="a store", magic=MAGIC, example="model.emoe")
    checkpoint = open_checkpoint(src)
    tokenizer = check_text_files(checkpoint, shown(src))
    calibrate = _calibrate(checkpoint, tokenizer, calib) if calib else None
    with progress(os.path.basename(out)) as bar, stoppable(bar) as watched:
        report = convert(
            checkpoint, out, progress=watched, max_level=max_level, calibrate=calibrate
        )
    bits = 8 * report.file_bytes / report.weights
    print(
        f"{shown(out)}: {report.weights / 1e6:.1f} M weights in {format_size(report.file_bytes)} "
        f"({bits:.2f} bits each, all levels up to {report.max_level} together), "
        f"{report.seconds:.1f} s; "
        f"try: edgemoe run {shlex.quote(out)}"
    )
    if report.starved:
        print(
            f"{report.starved} of {report.experts} experts saw few tokens of the calibration text: "
            "more, or more varied, text would serve them better"
        )
    return 0


def _calibrate(checkpoint: Checkpoint, tokenizer: Tokenizer, names: Sequence[str]) -> Calibrate:
    """Of each text an equal share of the tokens that a pass can take.

    Raises:
        UsageError: a file cannot be read, is no UTF-8 text or too short.
    """
    context = checkpoint.config.max_position_embeddings
    share = most_tokens(checkpoint) // len(names)
    chosen = []
    for name in names:
        text = read_text(name)
        # Tokens are two bytes or more, but in scripts that the tokenizer hardly knows.
        pieces = spread(text, 16 * share)
        ids = [i for piece in pieces for i in tokenizer.encode(piece, add_special=False)]
        chosen += windows(ids, context, share, tokenizer.first_special(), shown(name))
    return calibration(checkpoint, chosen, kernels.default_threads())


def spread(text: str, most: int) -> list[str]:
    """The text, or 64 evenly spaced pieces of it, together `most` characters."""
    if len(text) <= most:
        return [text]
    size, count = most // 64, 64
    return [text[at : at + size] for at in range(0, len(text) - size, (len(text) - size) // count)]


def check_text_files(checkpoint: Checkpoint, where: str) -> Tokenizer:
    """The tokenizer of a checkpoint whose text side can be run; others are refused here, before
    hours are spent on their weights.

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
    tokenizer = Tokenizer(
        files["tokenizer.json"],
        config=settings,
        bos_token_id=config.bos_token_id,
        eos_token_ids=config.eos_token_ids,
    )
    ChatTemplate.from_files(files.get("chat_template.jinja"), settings)
    from_generation_config(parsed.get("generation_config.json", {}))
    return tokenizer
