"""`edgemoe calibrate`: a text in, what an error costs in each layer into the store."""

from __future__ import annotations

import numpy as np

from ..engine import load
from ..errors import UsageError, shown
from ..evaluate import Window, windows
from ..layer_costs import layer_costs, scratch_bytes
from ..loader import budget
from ..mwq.sensitivity import COSTS
from ..opened import OpenedModel, open_model
from ..store import replace_section
from .convert import spread
from .evaluate import check_room, read_text
from .evaluate_output import progress, terminable

WINDOW = 512


def run(store: str, text: str, *, tokens: int, mem: str, threads: int | None) -> int:
    """Measure, write, and say what was found; returns the exit code.

    Raises:
        UsageError: the text cannot be read, or is shorter than a window.
        StoreError, OutputError, MemoryBudgetError: as loading and writing a store.
    """
    content = read_text(text)
    with terminable():
        opened = open_model(store)
        try:
            todo = _windows(opened, text, content, tokens, budget.resolve_ceiling(mem))
        except BaseException:
            opened.close()
            raise
        del content
        budget.release_heap()
        config, ctx = opened.config, len(todo[0].tokens)
        scored = sum(len(window.targets) for window in todo)
        with (
            load(
                opened,
                mem=mem,
                bits=opened.store.quant.max_level,
                ctx_size=ctx,
                threads=threads,
                reserve=scratch_bytes(config.vocab_size, scored),
            ) as model,
            progress("calibration") as report,
        ):
            costs = layer_costs(model, opened.store, todo, report)
    replace_section(store, COSTS, costs.astype("<f4").tobytes())
    cheap, dear = (config.moe_layers[int(at)] for at in (np.argmin(costs), np.argmax(costs)))
    print(
        f"{shown(store)}: an error costs {costs.min():.2f} in layer {cheap} to {costs.max():.2f} "
        f"in layer {dear}, 1 on average, over {scored} scored tokens; --mean-bits goes by that now"
    )
    return 0


def _windows(
    opened: OpenedModel, name: str, content: str, tokens: int, ceiling: int
) -> list[Window]:
    """Of pieces from all over the text, together so many tokens."""
    ctx = min(WINDOW, opened.config.max_position_embeddings)
    pieces = spread(content, 16 * tokens)
    check_room(name, max(map(len, pieces)), ceiling)
    share, encode = -(-tokens // len(pieces)), opened.tokenizer.encode
    ids = [i for piece in pieces for i in encode(piece, add_special=False)[:share]][:tokens]
    try:
        return windows(ids, ctx, ctx, opened.tokenizer.first_special())
    except UsageError as exc:
        raise UsageError(f"{shown(name)}: {exc}") from None
