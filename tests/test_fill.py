"""Memory that nothing has taken yet is filled while the disk is idle, and nothing depends on it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import edgemoe
from edgemoe.model import Span
from edgemoe.pipeline.early import BUSY, in_turn
from edgemoe.pipeline.streamed import StreamedMixture
from edgemoe.types import Streaming


def opened(cache: str, *, fill: bool, **settings: Any) -> tuple[edgemoe.Model, StreamedMixture]:
    how = Streaming(look_ahead=False, fill=fill)
    settings = {"bits": 4, "ctx_size": 128, "threads": 2} | settings
    model = edgemoe.load(cache=cache, streaming=how, **settings)
    mixture = model._experts
    assert isinstance(mixture, StreamedMixture)
    return model, mixture


def decoded(model: edgemoe.Model, tokens: int) -> Iterator[bytes]:
    cache, token = model.new_cache(), 7
    for _ in range(tokens):
        logits = model.forward([token], [Span(cache, 1)], [0])
        token = int(logits[0].argmax())
        yield logits.tobytes()


def test_what_is_read_in_which_order() -> None:
    got = [(layer, *want) for layer, want in in_turn((3, 5), 2, (1, 4))]
    assert got == [
        (3, 0, 1), (5, 0, 1), (3, 1, 1), (5, 1, 1), (3, 0, 4), (5, 0, 4), (3, 1, 4), (5, 1, 4),
    ]  # fmt: skip


@pytest.mark.parametrize("cache", ["1M", "3M", "64M"])
def test_free_memory_is_filled_and_the_bits_are_the_same(cache: str) -> None:
    model, mixture = opened(cache, fill=False)
    with model:
        want = list(decoded(model, 100))
    model, mixture = opened(cache, fill=True)
    with model:
        mixture._early.busy = lambda share: None  # type: ignore[method-assign]
        assert list(decoded(model, 100)) == want
        books, config = mixture._source._residency, model.config
        if cache == "64M":  # all of them, long before they are asked for
            for layer in range(len(config.moe_layers)):
                assert books.claimed(layer) == [3] * config.num_experts
        else:
            deepest = max(books.prefix(i)[3] for i in range(len(config.moe_layers)))
            assert books.used_bytes > books.budget - 3 * deepest
        assert mixture._early._fill is None or cache == "64M"
        mixture._early.complete()
        assert not books._leases and books._held == 0
        assert mixture._source._slots.resident_bytes <= mixture._source.budget_bytes


def test_nothing_goes_for_it() -> None:
    """With room for all, nothing is evicted, and every segment is read once."""
    model, mixture = opened("64M", fill=True)
    with model:
        for _ in decoded(model, 120):
            pass
        mixture._early.complete()
        traffic = model.usage().traffic
        assert traffic.evictions == 0
        assert traffic.missed_bytes == mixture._source._residency.used_bytes


def test_a_busy_disk_is_left_alone() -> None:
    model, mixture = opened("64M", fill=True)
    with model:
        mixture._early.busy(BUSY + 0.01)
        mixture._look_ns = 1 << 62  # for good
        for _ in decoded(model, 20):
            pass
        books, config = mixture._source._residency, model.config
        whole = sum(books.prefix(i)[3] for i in range(len(config.moe_layers))) * config.num_experts
        assert books.used_bytes < 0.9 * whole
        mixture._early.busy(0.1)
        for _ in range(20):  # as many tokens as it takes: an expert a layer step, if its reads end
            for _ in decoded(model, 100):
                pass
            if books.used_bytes == whole:
                break
        assert books.used_bytes == whole


def test_levels_that_differ_are_filled_from_the_lowest() -> None:
    """Then from level to level, as far as there is room."""
    model, mixture = opened("16M", fill=True, bits=None, mean_bits=3)
    with model:
        mixture._early.busy = lambda share: None  # type: ignore[method-assign]
        for _ in decoded(model, 120):
            pass
        books = mixture._source._residency
        for layer in range(len(model.config.moe_layers)):
            assert min(books.claimed(layer)) >= 1
        assert model.usage().traffic.mean_bits == pytest.approx(3, abs=0.1)


def test_a_serial_loop_reads_nothing_early() -> None:
    how = Streaming(overlap=False)
    with edgemoe.load(bits=4, ctx_size=128, cache="64M", streaming=how) as model:
        for _ in decoded(model, 30):
            pass
        traffic = model.usage().traffic
    assert traffic.missed_bytes <= traffic.wanted_bytes
    assert isinstance(model, edgemoe.Model) and traffic.evictions == 0
