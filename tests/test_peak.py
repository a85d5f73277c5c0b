"""The integer peak: a rate that is one, on every instruction set and on both backends."""

from __future__ import annotations

import numpy as np
import pytest

from edgemoe import kernels
from edgemoe.errors import KernelError


def test_threads_add_up(isa: str) -> None:
    """Two threads are no slower than one; how much faster depends on who else is at work."""
    one, two = (
        max(kernels.int8_peak(kernels.new_pool(threads), 2.0) for _ in range(5))
        for threads in (1, 2)
    )
    assert 1e7 < one < 1e13
    assert two > 0.8 * one


def test_time_is_checked() -> None:
    pool = kernels.new_pool(1)
    for ms in (0.0, -1.0, float("nan"), 1e9):
        with pytest.raises(KernelError, match="ms: expected a time above 0"):
            kernels.int8_peak(pool, ms)


def test_numba_leaves_no_product_out() -> None:
    pytest.importorskip("numba", reason="numba is not installed")
    from edgemoe.numba_backend import Pool, int8_peak, peak

    rng = np.random.default_rng(0)
    code = rng.integers(0, 16, (4, peak.LANES)).astype(np.uint8)
    q = rng.integers(-127, 128, (4, 2 * peak.LANES)).astype(np.int8)
    got = peak.products(Pool(2), 3, code, q)
    each = [int((code.astype(int) * q[:, s : s + peak.LANES]).sum()) for s in range(peak.LANES)]
    want = [sum(each[(task + r) % peak.LANES] for r in range(peak.ROUNDS)) for task in range(3)]
    assert got.tolist() == want
    assert 1e6 < int8_peak(Pool(1), 0.001) < 1e13
