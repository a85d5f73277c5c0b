"""Threads of the numba backend: as many as asked for, gone with their pool, stopped together."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from edgemoe.kernels import dispatch

pytest.importorskip("numba", reason="numba is not installed: pip install 'edgemoe[numba]'")

from edgemoe import numba_backend
from edgemoe.numba_backend import pool as pools


@pytest.fixture
def numba_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "native", numba_backend)


def workers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("edgemoe")]


def test_threads_are_those_asked_for_and_end_with_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()
    x = np.ones((64, 2048), np.float32)
    before = len(workers())
    small = numba_backend.Pool(4)
    numba_backend.rmsnorm(small, x[:1], x[0], 1e-6, np.empty_like(x[:1]))
    assert len(workers()) == before  # too little work to wake anyone for
    monkeypatch.setattr(pools, "SHARE", 1)
    for threads in (1, 2, 5):
        pool = numba_backend.Pool(threads)
        assert pool.threads == threads
        numba_backend.linear_f32(pool, x, x, np.empty((64, 64), np.float32))
        assert before <= len(workers()) <= before + threads - 1
        assert (len(workers()) > before) == (threads > 1)
        del pool
        gc.collect()
        deadline = time.monotonic() + 10
        while len(workers()) > before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(workers()) == before


def test_an_interrupt_waits_for_the_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "SHARE", 1)
    ended = []

    class Slow:
        def compiled(self) -> Callable[[int, int], None]:
            return self.part

        def part(self, first: int, last: int) -> None:
            if first == 0:
                raise KeyboardInterrupt
            time.sleep(0.2)
            ended.append(first)

    with pytest.raises(KeyboardInterrupt):
        numba_backend.Pool(3).run(Slow(), 3, 3)
    assert sorted(ended) == [1, 2]
