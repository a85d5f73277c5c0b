"""How fast compiled loops multiply integers, in the form of products.py."""

from __future__ import annotations

import time

import numpy as np
from numba import types

from ..types import I8, I64, U8
from .jit import array_in, array_out, kernel
from .pool import Pool

LANES = 64
ROUNDS = 4096
PRODUCTS = 4 * LANES
"""Multiply-adds of a round."""


@kernel(
    *(types.int64, types.int64),
    *(array_in(types.uint8, 2), array_in(types.int8, 2), array_out(types.int64, 1)),
)
def _peak(first: int, last: int, code: U8, q: I8, totals: I64) -> None:
    """Tasks of ROUNDS rounds, each the sum of code[f, i] * q[f, i + shift] with another shift."""
    for task in range(first, last):
        total = 0
        for r in range(ROUNDS):
            shift = (task + r) % LANES
            part = np.int32(0)
            for f in range(4):
                for i in range(LANES):
                    part += np.int32(code[f, i]) * np.int32(q[f, i + shift])
            total += part
        totals[task] = total


def products(pool: Pool, tasks: int, code: U8, q: I8) -> I64:
    """int64 [tasks]: the sums of tasks of ROUNDS * PRODUCTS products."""
    totals = np.empty(tasks, np.int64)
    with pool.lock:
        pool.run(_peak, tasks, tasks * ROUNDS * PRODUCTS, code, q, totals)
    return totals


def int8_peak(pool: Pool, seconds: float) -> float:
    """Multiply-adds a second on all threads, in a run of at least `seconds`."""
    code = np.full((4, LANES), 15, np.uint8)
    q = np.full((4, 2 * LANES), 127, np.int8)
    tasks, took = pool.threads, 0.0
    products(pool, tasks, code, q)  # compiles
    while took < seconds:
        tasks *= 2
        start = time.perf_counter()
        products(pool, tasks, code, q)
        took = time.perf_counter() - start
    return tasks * ROUNDS * PRODUCTS / took
