"""Calibration text in, a float32 pass over it out: what `mwq.convert` quantizes experts by.

The pass goes layer by layer with every token of the text in it; a matrix is read when its turn
comes, and an expert is quantized as soon as its inputs are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np

from . import evaluate, kernels
from .checkpoint import Checkpoint
from .cpu_attn.kv_cache import OnePass
from .errors import UsageError
from .model import Layer, Linears, Span, hidden
from .mwq.calibrate import ExpertInputs, Step
from .mwq.convert import Calibrate
from .reference_logits import bytes_per_token
from .types import F32, I64, ModelConfig
from .weights import FloatLinears, RowBlocks, from_checkpoint

WINDOW = 512
"""Tokens of context; shorter where the model's own is."""

MOST_TOKENS = 128 * 1024

_MEMORY = 1 << 30
"""Bytes that the tokens of the pass may take; a conversion stays below 2 GB with its weights."""

_GROUP = 2
"""Windows that are multiplied together."""


def windows(ids: Sequence[int], context: int, most: int, bos: int | None, where: str) -> list[I64]:
    """Runs of WINDOW tokens, evenly spaced over the text, at most `most` tokens in all.

    bos: takes the place of each one's first token, as in evaluation.

    Raises:
        UsageError: the text is shorter than one window.
    """
    size = min(WINDOW, context)
    if len(ids) < size:
        raise UsageError(
            f"{where}: {len(ids)} tokens are too few to calibrate on: give text of at least "
            f"{size}, better {most}"
        )
    found = evaluate.windows(ids, size, size, bos)
    take = max(min(len(found), most // size), 1)
    return [found[i].tokens for i in np.linspace(0, len(found) - 1, take).astype(np.int64)]


def most_tokens(checkpoint: Checkpoint) -> int:
    """Tokens that a pass over this checkpoint takes at most, by memory."""
    return min(MOST_TOKENS, max(_MEMORY // bytes_per_token(checkpoint.config), WINDOW))


def calibration(checkpoint: Checkpoint, text: Sequence[I64], threads: int) -> Calibrate:
    """A pass over `text`, windows of token ids, for `mwq.convert`."""

    def run(experts: ExpertInputs) -> None:
        config = checkpoint.config
        pool = kernels.new_pool(threads)
        sizes = [
            sum(map(len, text[first : first + _GROUP])) for first in range(0, len(text), _GROUP)
        ]
        with ExitStack() as stack:
            workers = stack.enter_context(ThreadPoolExecutor(threads)) if threads > 1 else None
            weights = from_checkpoint(checkpoint, RowBlocks(sizes, workers, experts.step))
            layers = [_watched(layer, experts) for layer in weights.layers]
            spans = [Span(_Watched(config, experts.step), len(window)) for window in text]
            tokens = np.fromiter(chain.from_iterable(text), np.int64)
            seen = replace(weights, layers=layers)
            x = hidden(seen, experts, pool, tokens, spans, experts.watch)
            head = "embed" if config.tie_word_embeddings else "lm_head"
            experts.see_linears([head], kernels.rmsnorm(pool, x, seen.norm, config.rms_norm_eps))

    return run


class _Watched(OnePass):
    """A window of the text, which calls `step` before each layer's attention."""

    def __init__(self, config: ModelConfig, step: Step) -> None:
        super().__init__(config)
        self._step = step

    def place(self, layer: int, n: int) -> kernels.KVPlace:
        """As OnePass says."""
        self._step()
        return super().place(layer, n)


def _watched(layer: Layer, experts: ExpertInputs) -> Layer:
    """The same layer, which shows what its matrices outside the experts read."""

    def seen(linears: Linears | None) -> Any:
        if not isinstance(linears, FloatLinears):
            return linears

        def run(x: F32) -> list[F32]:
            experts.see_linears(linears.names, x)
            return linears(x)

        return run

    return replace(
        layer,
        qkv=seen(layer.qkv),
        out=seen(layer.out),
        gate_up=seen(layer.gate_up),
        down=seen(layer.down),
    )
