"""Parts of a batch in turn: one's attention and router run while another's experts are read."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

from ..types import F32
from .streamed import Step, StreamedMixture


def alternate(
    parts: Sequence[Generator[tuple[Any, ...], F32 | None, F32]], experts: StreamedMixture
) -> list[F32]:
    """Drive several forward passes at once; what each returns.

    parts: passes that stop wherever they want experts (model.layers).
    """
    out: list[F32 | None] = [None] * len(parts)
    waiting: dict[int, Step] = {}
    for i, part in enumerate(parts):
        waiting[i] = experts.begin(*next(part))
    while waiting:
        for i, step in list(waiting.items()):
            del waiting[i]
            try:
                waiting[i] = experts.begin(*parts[i].send(experts.finish(step)))
            except StopIteration as end:
                out[i] = end.value
    return [each for each in out if each is not None]
