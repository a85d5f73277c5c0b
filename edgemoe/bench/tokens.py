"""The tokens that a benchmark feeds: the same to every engine, and never its own output."""

from __future__ import annotations

import numpy as np

from ..errors import UsageError
from ..types import I64

SEED = 0
_OFFSET = 2.7
"""Token i, counted from 0, comes with a probability in proportion to 1 / (i + 2.7): Zipf's law with
Mandelbrot's shift, which is how often words come in a text."""


def token_stream(vocab_size: int, count: int, steps: int | None = None) -> I64:
    """int64 [count]: tokens drawn from Zipf's law, or with `steps` 0, 1, 2, ... modulo `steps`.

    The second walks the trace of a model made to replay one. Random experts need no text: what
    decides is that frequent tokens, and so the experts they take, come often.

    Raises:
        UsageError: more steps than the vocabulary has tokens.
    """
    if steps is not None:
        if steps > vocab_size:
            raise UsageError(
                f"--steps {steps} is more than the {vocab_size} tokens of this model's vocabulary: "
                "give the length of the trace that the model was made with"
            )
        return np.arange(count, dtype=np.int64) % steps
    p = 1 / (np.arange(vocab_size) + _OFFSET)
    drawn = np.random.default_rng(SEED).choice(vocab_size, size=count, p=p / p.sum())
    return drawn.astype(np.int64)
