"""Passes of parts of a batch in turn: one's attention and router run while another's experts are
read. A pass stops wherever it wants experts (types.Pass)."""

from __future__ import annotations

import time
from collections.abc import Sequence

from ..loader.streaming import Span
from ..types import F32, Pass
from .streamed import StreamedMixture


def alternate(
    parts: Sequence[Pass],
    experts: StreamedMixture,
    means: Sequence[Sequence[float] | None],
) -> list[F32]:
    """What several passes return; each begins its next step before another's is finished.

    means: of each pass, as StreamedMixture takes them.
    """
    out: dict[int, F32] = {}
    waiting = {i: experts.begin(*next(part), means[i]) for i, part in enumerate(parts)}
    while waiting:
        for i, step in list(waiting.items()):
            try:
                wanted = parts[i].send(experts.finish(step))
            except StopIteration as end:
                out[i] = end.value
                del waiting[i]
            else:
                waiting[i] = experts.begin(*wanted, means[i])
    return [out[i] for i in range(len(parts))]


def traced(part: Pass, span: Span) -> Pass:
    """The same pass; `span` is told of the time up to each call of experts, as "dense"."""
    y: F32 | None = None
    while True:
        begun = time.monotonic_ns()
        try:
            wanted = part.send(y)
        except StopIteration as end:
            out: F32 = end.value
            return out
        span("dense", begun, time.monotonic_ns(), layer=wanted[0])
        y = yield wanted
