"""`edgemoe calibrate`: a text in, what an error costs in each layer into the store."""

from __future__ import annotations

import numpy as np

from ..engine import load
from ..errors import UsageError, shown
from ..layer_costs import layer_costs
from ..mwq.sensitivity import COSTS
from ..opened import open_model
from ..store import replace_section
from .convert import spread
from .evaluate import read_text
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
        config, bits = opened.config, opened.store.quant.max_level
        ctx = min(WINDOW, config.max_position_embeddings)
        pieces = spread(content, 16 * tokens)
        share, encode = -(-tokens // len(pieces)), opened.tokenizer.encode
        ids = [i for piece in pieces for i in encode(piece, add_special=False)[:share]][:tokens]
        if len(ids) < ctx:
            opened.close()
            raise UsageError(
                f"{shown(text)}: {len(ids)} tokens, and {ctx} are a window: give more text or "
                "--tokens"
            )
        with (
            load(opened, mem=mem, bits=bits, ctx_size=ctx, threads=threads) as model,
            progress("calibration") as report,
        ):
            costs = layer_costs(model, opened.store, ids, ctx, report)
    replace_section(store, COSTS, costs.astype("<f4").tobytes())
    cheap, dear = (config.moe_layers[int(at)] for at in (np.argmin(costs), np.argmax(costs)))
    print(
        f"{shown(store)}: an error costs {costs.min():.2f} in layer {cheap} to {costs.max():.2f} "
        f"in layer {dear}, 1 on average, over {len(ids)} tokens; --mean-bits goes by that now"
    )
    return 0
