"""How much an error of each layer's experts costs in the end: what the untrained bit router lacks.

Sensitivities tell an expert's error relative to the residual stream it is added to. What becomes of
it differs by layer: of an early one later layers make up for much. So every layer in turn is read
at the lowest level while all others are at the highest, and the divergence from all at the highest
is put in relation to the errors, gate squared times sensitivity, that this made. Nothing but the
store and a text is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from . import evaluate
from .engine import Model
from .errors import UsageError
from .evaluate import ReferenceRows, Runner, Window, score, target_logits
from .mwq import sensitivity
from .pipeline.bit_router import BitRouter, Grant
from .store import Store
from .types import F32, F64, I32
from .window_logits import window_logits

KEPT = 256
"""Likeliest tokens of each position that a divergence knows one by one."""

LEAST = 0.02
"""Costs below this part of their mean count as this: what a short text shows of them is noise."""

Progress = Callable[[int, int], None]
"""Called with (passes over the text done, passes in all)."""


class OneLayerLow:
    """A router that gives one layer the lowest level, all others the highest.

    layer: None: none. top: index of the highest level. loss: by layer, of each expert at the
    lowest level, [experts].

    Attributes:
        error: sum over the low layer's demands of gate ** 2 * loss. tokens: that it saw.
    """

    def __init__(self, layer: int | None, top: int, loss: F32) -> None:
        self._layer, self._top, self._loss = layer, top, loss
        self.early_depth = top + 1
        self.error, self.tokens = 0.0, 0

    def __call__(
        self,
        layer: int,
        x: F32,
        ids: I32,
        gates: F32,
        held: Sequence[int] | None,
        means: Sequence[float] | None = None,
    ) -> Grant:
        levels = np.full(ids.shape, 0 if layer == self._layer else self._top, np.int32)
        if layer == self._layer:
            self.error += float((np.square(gates, dtype=np.float64) * self._loss[ids]).sum())
            self.tokens += len(ids)
        return Grant(levels, levels)


def layer_costs(
    model: Model, store: Store, todo: Sequence[Window], progress: Progress | None = None
) -> F64:
    """Cost of an error in each layer with experts, [layers], 1 on average.

    model: of the store, its experts loaded up to the highest level.

    Raises:
        UsageError: the text shows no difference between the levels.
    """
    config, top = store.config, len(store.quant.expert_levels) - 1
    known = sensitivity.of_store(store)
    loss = np.ones((len(config.moe_layers), config.num_experts), np.float32)
    if known is not None:
        loss = known[..., 0]
    passes = len(config.moe_layers) + 1
    high: list[list[ReferenceRows]] = []
    with _routed(model, OneLayerLow(None, top, loss[0])):
        run = window_logits(model)
        for window in todo:
            pieces = target_logits(run, window)
            high.append([ReferenceRows.of(rows, targets, KEPT) for _, rows, targets in pieces])
    if progress is not None:
        progress(1, passes)
    out = np.empty(passes - 1)
    for i, layer in enumerate(config.moe_layers):
        router = OneLayerLow(layer, top, loss[i])
        with _routed(model, router):
            run = window_logits(model)
            lost = [_divergence(run, *each) for each in zip(todo, high, strict=True)]
        out[i] = np.concatenate(lost).mean() * router.tokens / max(router.error, 1e-300)
        if progress is not None:
            progress(i + 2, passes)
    if not (np.isfinite(out).all() and out.max() > 0):
        raise UsageError("the lowest level of no layer makes a difference to this text")
    out = np.maximum(out, LEAST * out.mean())
    costs: F64 = out / out.mean()
    return costs


def scratch_bytes(vocab: int, scored: int) -> int:
    """Bytes that measuring takes beside the model: a block of logits and what is kept of `scored`
    rows, of each some tokens with their probabilities."""
    return evaluate.scratch_bytes(vocab, KEPT) + scored * (6 * KEPT + 64)


def _divergence(run: Runner, window: Window, high: Sequence[ReferenceRows]) -> F64:
    """KL divergence of each scored position, nats."""
    found = []
    for (_, rows, targets), known in zip(target_logits(run, window), high, strict=True):
        kld = score(rows, targets, known).kld
        if kld is not None:
            found.append(kld)
    return np.concatenate(found)


@contextmanager
def _routed(model: Model, router: BitRouter) -> Iterator[None]:
    before = model.route_with(router)
    try:
        yield
    finally:
        model.route_with(before)
