"""Windows of random tokens, for the tests of what evaluates them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgemoe.evaluate import Window


def some_windows(vocab: int, lengths: Sequence[int], seed: int = 0) -> list[Window]:
    """One window of each of these lengths, scored from somewhere on."""
    rng = np.random.default_rng(seed)
    return [Window(rng.integers(0, vocab, n), int(rng.integers(0, n - 1))) for n in lengths]
