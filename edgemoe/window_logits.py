"""A loaded model as what scores windows of text wants: tokens in, logits of the scored rows out."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from .cpu_attn.kv_cache import KVCache
from .engine import Model
from .evaluate import LOGITS, Runner, rows_at_once
from .model import Span
from .types import F32, I64


def window_logits(
    model: Model,
    cache: KVCache | None = None,
    watch: Callable[[int, F32], None] | None = None,
    chunk: int | None = None,
) -> Runner:
    """Windows one after the other; what one begins with just as the one before is not run again.

    cache: None: a new one of the model's. watch: see model.hidden. chunk: tokens that are fed at
    once; None: as a prompt's are, 1: as if each were decoded.
    """
    kept = model.new_cache() if cache is None else cache
    before = np.empty(0, np.int64)
    size = model.plan.prefill_chunk if chunk is None else chunk
    step = rows_at_once(model.config.vocab_size, LOGITS)

    def run(tokens: I64, first: int) -> Iterator[F32]:
        nonlocal before
        n = min(len(before), len(tokens), first, kept.length)
        differs = np.flatnonzero(before[:n] != tokens[:n])
        shared = int(differs[0]) if len(differs) else n
        kept.rewind(shared)
        before = tokens
        for at in range(shared, len(tokens), size):
            part = tokens[at : at + size]
            x = model.hidden(part, [Span(kept, len(part))], watch)
            for row in range(max(first - at, 0), len(part), step):
                yield model.logits(np.ascontiguousarray(x[row : row + step]))

    return run
