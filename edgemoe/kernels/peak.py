"""How fast this machine multiplies integers: the limit of a prefill."""

from __future__ import annotations

from ..errors import KernelError
from . import dispatch
from .dispatch import Pool

LONGEST_MS = 10_000


def int8_peak(pool: Pool, ms: float = 20.0) -> float:
    """Multiply-adds a second of weight codes and int8 activations on all threads, from registers.

    The instructions are those of the instruction set in use, in the fastest order they allow; on
    AVX2 that is codes of 4 bits. ms: how long to measure, at least; at most three times as long.

    Raises:
        KernelError: `ms` out of range.
    """
    if not 0 < ms <= LONGEST_MS:
        raise KernelError(f"ms: expected a time above 0 and up to {LONGEST_MS}, got {ms}")
    return dispatch.native.int8_peak(pool, ms / 1e3)
