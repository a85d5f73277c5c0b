"""Forward passes that stop wherever they want experts, and who gives them: one pass, or parts of a
batch in turn, so that one part's attention and router run while another's experts are read."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from typing import Any, Protocol, TypeVar

from ..loader.streaming import Span
from ..types import F32, I32

Pass = Generator[tuple[int, F32, I32, F32], F32 | None, F32]
"""Yields the layer, x, ids and gates of a call of experts, goes on with what they give, and returns
the end of the pass (model.layers)."""

_S = TypeVar("_S")


class Halved(Protocol[_S]):
    """Experts whose call has two halves."""

    def begin(self, layer: int, x: F32, ids: I32, weights: F32, /) -> _S:
        """Ask for what the layer wants."""
        ...

    def finish(self, step: _S, /) -> F32:
        """What its experts give."""
        ...


def alone(part: Pass, experts: Any, span: Span | None = None) -> F32:
    """What a pass returns. span: told of the time between calls of experts, as "dense"."""
    y: F32 | None = None
    while True:
        try:
            wanted = _next(part, y, span)
        except StopIteration as end:
            out: F32 = end.value
            return out
        y = experts(*wanted)


def alternate(parts: Sequence[Pass], experts: Halved[Any], span: Span | None = None) -> list[F32]:
    """What several passes return; each begins its next step before another's is finished."""
    out: dict[int, F32] = {}
    waiting = {i: experts.begin(*_next(part, None, span)) for i, part in enumerate(parts)}
    while waiting:
        for i, step in list(waiting.items()):
            try:
                wanted = _next(parts[i], experts.finish(step), span)
            except StopIteration as end:
                out[i] = end.value
                del waiting[i]
            else:
                waiting[i] = experts.begin(*wanted)
    return [out[i] for i in range(len(parts))]


def _next(part: Pass, y: F32 | None, span: Span | None) -> tuple[int, F32, I32, F32]:
    if span is None:
        return part.send(y)
    begun = time.monotonic_ns()
    wanted = part.send(y)
    span("dense", begun, time.monotonic_ns(), layer=wanted[0])
    return wanted
