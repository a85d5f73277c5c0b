"""What a text tells of an expert's inputs: how its columns make up for one another's errors.

The output error of a matrix with weight errors e is e H e^T, H the second moment of its inputs.
GPTQ (arXiv 2210.17323) rounds column by column and lets the columns that are still to come make up
for what was rounded off; how much of it each takes follows from the inverse of H.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..types import F32, F64, I32, I64

ExpertMatrices = tuple[F32, F32, F32]
"""gate, up [intermediate, hidden] and down [hidden, intermediate], float32."""

Sink = Callable[[int, int, ExpertMatrices, tuple[F32, F32, F32]], None]
"""Takes (layer, expert, its matrices, the feedback [cols, cols] of each)."""

DAMPING = 0.03
"""Of the mean of H's diagonal, added to it. GPTQ takes 0.01; other texts differ from this one."""

ENOUGH = 256
"""Tokens an expert is calibrated on at least; one that the text reaches less gets others too."""

_STRANGER = 0.1
"""Weight of such a token next to one that was routed to the expert with an equal share."""

_CHUNK = 2048
"""Tokens at a time: bounds what an expert that sees all of a text needs."""


def feedback(moment: F64) -> F32:
    """What each column makes up of the errors of earlier ones: float32 [cols, cols].

    [i, j], j > i, is U_ij / U_ii with H^-1 = U^T U; zero elsewhere, and everywhere if H is zero or
    not finite: columns then stand alone, which is plain rounding.

    Args:
        moment: H, float64 [cols, cols], symmetric and not negative.
    """
    cols = len(moment)
    mean = float(np.trace(moment)) / cols
    if not (np.isfinite(moment).all() and mean > 0):
        return np.zeros((cols, cols), np.float32)
    damping = DAMPING
    while True:
        try:
            inverse = np.linalg.inv(moment / mean + damping * np.eye(cols))
            upper = np.linalg.cholesky((inverse + inverse.T) / 2).T
        except np.linalg.LinAlgError:
            damping *= 10  # the identity at the end of it
            continue
        shares: F64 = np.triu(upper / np.diag(upper)[:, None], 1)
        return shares.astype(np.float32)


class CalibratedExperts:
    """Unquantized experts of a forward pass that hands each to `sink` with what its inputs tell.

    All of the calibration text must come as one batch: an expert is seen once.

    Attributes:
        starved: experts that the text reached with fewer than ENOUGH tokens.
    """

    def __init__(
        self, read: Callable[[int, int], ExpertMatrices], num_experts: int, sink: Sink
    ) -> None:
        self._read, self._num_experts, self._sink = read, num_experts, sink
        self.starved = 0

    def __call__(self, layer: int, x: F32, ids: I32, weights: F32) -> F32:
        """x: float32 [n, hidden]; ids int32, weights float32 [n, k] -> float32 [n, hidden]."""
        y = np.zeros_like(x)
        for e in range(self._num_experts):
            tokens, slots = np.nonzero(ids == e)
            share = weights[tokens, slots]
            matrices = self._read(layer, e)
            others = self._others(tokens, len(x))
            importance = np.concatenate(
                [np.square(share), np.full(len(others), _STRANGER / ids.shape[1] ** 2, np.float32)]
            )
            rows = np.concatenate([tokens, others])
            inputs, middles = _moments(x, rows, importance, matrices, y, share)
            self._sink(layer, e, matrices, (feedback(inputs),) * 2 + (feedback(middles),))
        return y

    def _others(self, tokens: I64, n: int) -> I64:
        """Tokens of the text to add to those of an expert: evenly spaced ones."""
        missing = min(ENOUGH, n) - len(tokens)
        if missing <= 0:
            return np.empty(0, np.int64)
        self.starved += 1
        rest = np.setdiff1d(np.arange(n), tokens)
        return rest[np.linspace(0, len(rest) - 1, missing).astype(np.int64)]


def _moments(
    x: F32, rows: I64, importance: F32, matrices: ExpertMatrices, y: F32, share: F32
) -> tuple[F64, F64]:
    """Second moments of what gate and up read, and of what down reads.

    Adds the expert's outputs, times `share`, to the rows of y that come first in `rows`.
    """
    gate, up, down = matrices
    inputs = np.zeros((x.shape[1],) * 2)
    middles = np.zeros((len(gate),) * 2)
    for first in range(0, len(rows), _CHUNK):
        part = rows[first : first + _CHUNK]
        h, by = x[part], importance[first : first + _CHUNK, None]
        g = h @ gate.T
        with np.errstate(over="ignore"):  # exp of a large gate's negative: the quotient is 0
            a = g / (1 + np.exp(-g)) * (h @ up.T)
        inputs += h.T @ (h * by)
        middles += a.T @ (a * by)
        own = share[first : first + _CHUNK]
        y[part[: len(own)]] += (a[: len(own)] @ down.T) * own[:, None]
    return inputs, middles
