"""What a text tells of an expert's inputs: how its columns make up for one another's errors, and
which of its units matter.

The output error of a matrix with weight errors e is e H e^T, H the second moment of its inputs.
GPTQ (arXiv 2210.17323) rounds column by column and lets the columns that are still to come make up
for what was rounded off; how much of it each takes follows from the inverse of H.

Few of an expert's units do most of its work. They are brought to the front, and the columns of down
that read them are kept one level ahead of the rest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from ..errors import UsageError
from ..layout import UNIT
from ..types import F32, F64, I32, I64

ExpertMatrices = tuple[F32, F32, F32]
"""gate, up [intermediate, hidden] and down [hidden, intermediate], float32."""

Read = Callable[[int, int], ExpertMatrices]
"""(layer, expert) -> its matrices."""

Step = Callable[[], None]
"""Called between pieces of work, some tenths of a second apart; may raise to end the work."""


def no_step() -> None:
    """Work that is not watched."""


class Chunk(NamedTuple):
    """Tokens of an expert, float32.

    inputs: what gate and up read [n, hidden]. middles: what down reads [n, intermediate]. gate2:
    square of their gate weight [n, 1]. quiet: one over the mean square of the residual [n, 1].
    """

    inputs: F32
    middles: F32
    gate2: F32
    quiet: F32

    @property
    def counts(self) -> F32:
        """How much each token counts for the expert: [n, 1]."""
        return self.gate2 * self.quiet


DAMPING = 0.03
"""Of the mean of H's diagonal, added to it. GPTQ takes 0.01; other texts differ from this one."""

ENOUGH = 256
"""Tokens an expert is calibrated on at least; one that the text reaches less gets others too."""

AHEAD_SHARE = 0.25
"""Of the columns of all down matrices: kept one level ahead."""

_LINEAR_TOKENS = 16384
"""Of the text, that matrices outside the experts are calibrated on at most."""

_SAMPLE = 128
"""Tokens that the sink gets of an expert."""

_STRANGER = 0.1
"""Weight of such a token next to one that was routed to the expert with an equal share."""

_SILENT = np.float32(1e-30)
"""Least mean square of a residual that counts; an embedding may be all zeros."""

_CHUNK = 2048
"""Tokens at a time: bounds what an expert that sees all of a text needs."""

_SMALL = 128
"""Columns that are inverted at once."""


class Coupling(NamedTuple):
    """How the errors of a matrix's columns add up in its outputs, float32 [cols, cols].

    moment: H, over the mean of its diagonal, and damped. feedback: [i, j], j > i, is what column j
    makes up of the error of column i, U_ij / U_ii with H^-1 = U^T U; zero elsewhere.
    """

    moment: F32
    feedback: F32


def coupling(moment: F64, step: Step = no_step) -> Coupling:
    """Of H, float64 [cols, cols], symmetric and not negative.

    If H is zero or not finite, columns stand alone: plain rounding.

    step: called now and then.
    """
    cols = len(moment)
    mean = float(np.trace(moment)) / cols
    if not (np.isfinite(moment).all() and mean > 0):
        return Coupling(np.eye(cols, dtype=np.float32), np.zeros((cols, cols), np.float32))
    damping = DAMPING
    while True:
        damped = moment / mean + damping * np.eye(cols)
        try:
            upper = _inverse_factor(damped, step)
        except np.linalg.LinAlgError:
            damping *= 10  # the identity at the end of it
            continue
        feedback: F64 = np.triu(upper / np.diag(upper)[:, None], 1)
        return Coupling(damped.astype(np.float32), feedback.astype(np.float32))


def _inverse_factor(h: F64, step: Step) -> F64:
    """The upper triangular U with h^-1 = U^T U, float64 as h.

    It is the inverse of the upper R with h = R R^T. Found from the end, by halves, both take little
    more than products: a quarter of the time of an inverse and its Cholesky factor.
    """
    if len(h) <= _SMALL:
        step()
        lower = np.linalg.cholesky(h[::-1, ::-1])
        return np.triu(np.linalg.inv(lower)[::-1, ::-1])
    half = len(h) // 2
    out = np.zeros_like(h)
    last = _inverse_factor(h[half:, half:], step)
    beside = h[:half, half:] @ last.T  # of R
    first = _inverse_factor(h[:half, :half] - beside @ beside.T, step)
    out[:half, :half], out[half:, half:] = first, last
    out[:half, half:] = -(first @ (beside @ last))
    return out


class ExpertInputs(ABC):
    """Unquantized experts of a forward pass that look at what each of them reads.

    All of the text must come as one batch: an expert is seen once. A token counts for an expert by
    the square of its gate weight and, if the pass shows the residual stream to `watch`, by one over
    that one's mean square: what an error of the expert's output adds to it.

    Args:
        enough: tokens that an expert is shown at least; where it serves fewer, evenly spaced others
            of the text count a little too.

    Attributes:
        step: called now and then; whoever runs the pass calls it too.
        starved: experts that served fewer.
    """

    def __init__(
        self, read: Read, num_experts: int, enough: int = ENOUGH, step: Step = no_step
    ) -> None:
        self._read, self._num_experts, self._enough = read, num_experts, enough
        self.step = step
        self._quiet: F32 | None = None
        self.starved = 0

    @abstractmethod
    def see(
        self, layer: int, expert: int, matrices: ExpertMatrices, chunks: Iterator[Chunk]
    ) -> None:
        """One expert and its tokens, all of which must be taken."""

    def see_linears(self, names: Sequence[str], x: F32) -> None:
        """Matrices outside the experts, and what they read: x float32 [n, cols]. Not looked at."""
        return

    def watch(self, layer: int, residual: F32) -> None:
        """The residual stream that the layer's experts add to: float32 [n, hidden]."""
        power = np.square(residual, dtype=np.float32).mean(axis=1)
        self._quiet = 1 / np.maximum(power, _SILENT)

    def __call__(self, layer: int, x: F32, ids: I32, weights: F32) -> F32:
        """x: float32 [n, hidden]; ids int32, weights float32 [n, k] -> float32 [n, hidden]."""
        y = np.zeros_like(x)
        quiet = np.ones(len(x), np.float32) if self._quiet is None else self._quiet
        for e in range(self._num_experts):
            tokens, slots = np.nonzero(ids == e)
            others = self._others(tokens, len(x))
            strange = np.full(len(others), _STRANGER / ids.shape[1] ** 2, np.float32)
            gate2 = np.concatenate([np.square(weights[tokens, slots]), strange])
            matrices, rows = self._read(layer, e), np.concatenate([tokens, others])
            chunks = _chunks(x, rows, gate2, quiet, matrices, y, weights[tokens, slots])
            self.see(layer, e, matrices, self._stepping(chunks))
        self._quiet = None
        return y

    def _others(self, tokens: I64, n: int) -> I64:
        """Tokens of the text to add to those of an expert: evenly spaced ones."""
        missing = min(self._enough, n) - len(tokens)
        if missing <= 0:
            return np.empty(0, np.int64)
        self.starved += 1
        rest = np.setdiff1d(np.arange(n), tokens)
        return rest[np.linspace(0, len(rest) - 1, missing).astype(np.int64)]

    def _stepping(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        for chunk in chunks:
            self.step()
            yield chunk
            self.step()


def _chunks(
    x: F32, rows: I64, gate2: F32, quiet: F32, matrices: ExpertMatrices, y: F32, share: F32
) -> Iterator[Chunk]:
    """Adds the expert's outputs, times `share`, to the rows of y that come first in `rows`."""
    gate, up, down = matrices
    for first in range(0, len(rows), _CHUNK):
        part = rows[first : first + _CHUNK]
        h = x[part]
        g = h @ gate.T
        with np.errstate(over="ignore"):  # exp of a large gate's negative: the quotient is 0
            a = g / (1 + np.exp(-g)) * (h @ up.T)
        own = share[first : first + _CHUNK]
        y[part[: len(own)]] += (a[: len(own)] @ down.T) * own[:, None]
        yield Chunk(h, a, gate2[first : first + _CHUNK, None], quiet[part, None])


class UnitSurvey(ExpertInputs):
    """Finds out how much the error of each column of down would cost.

    seen: called with (layer, expert) after each.
    """

    def __init__(
        self,
        read: Read,
        num_experts: int,
        seen: Callable[[int, int], None],
        step: Step = no_step,
    ) -> None:
        super().__init__(read, num_experts, step=step)
        self._cost: dict[int, list[F32]] = {}
        self._seen = seen

    def see(
        self, layer: int, expert: int, matrices: ExpertMatrices, chunks: Iterator[Chunk]
    ) -> None:
        down = matrices[2]
        cost = np.zeros(down.shape[1], np.float32)
        for chunk in chunks:
            cost += (np.square(chunk.middles) * chunk.counts).sum(axis=0)
        cost *= np.square(down).mean()  # what its codes' steps are in proportion to
        self._cost.setdefault(layer, []).append(np.nan_to_num(cost, posinf=0))
        self._seen(layer, expert)

    def order(self, layer: int, expert: int) -> I64:
        """Units of an expert, the most important first: int64 [intermediate]."""
        return np.argsort(-self._cost[layer][expert], kind="stable")

    def ahead(self, share: float = AHEAD_SHARE) -> list[int]:
        """Columns of down to keep a level ahead in each layer, most costly units of 32 first.

        share: of all columns, over all layers.
        """
        ranked = [
            np.sort(np.stack(experts), axis=1)[:, ::-1].sum(axis=0)
            for _, experts in sorted(self._cost.items())
        ]
        width = len(ranked[0]) if ranked else 0
        starts = range(0, width, UNIT)
        blocks = sorted(
            (-float(costs[at : at + UNIT].sum()), layer, at)
            for layer, costs in enumerate(ranked)
            for at in starts
        )
        taken = blocks[: int(share * len(blocks))]
        return [
            min(UNIT * sum(layer == i for _, layer, _ in taken), width) for i in range(len(ranked))
        ]


class Sink(Protocol):
    """Takes what a calibrated pass makes of a model's matrices."""

    def expert(
        self,
        layer: int,
        expert: int,
        matrices: ExpertMatrices,
        couplings: tuple[Coupling, Coupling, Coupling],
        sample: Chunk,
    ) -> None:
        """An expert, how the columns of each of its matrices go together, some of its tokens."""
        ...

    def linears(self, names: Sequence[str], columns: Coupling) -> None:
        """Matrices outside the experts that share their input, and how its columns go together."""
        ...


class CalibratedExperts(ExpertInputs):
    """Hands each expert, its units in a survey's order, to `sink` with what its inputs tell.

    All other matrices too.
    """

    def __init__(
        self,
        read: Read,
        num_experts: int,
        survey: UnitSurvey,
        sink: Sink,
        step: Step = no_step,
    ) -> None:
        super().__init__(read, num_experts, step=step)
        self._survey, self._sink = survey, sink

    def see_linears(self, names: Sequence[str], x: F32) -> None:
        moment = np.zeros((x.shape[1],) * 2)
        rows = x[np.linspace(0, len(x) - 1, min(len(x), _LINEAR_TOKENS)).astype(np.int64)]
        for first in range(0, len(rows), _CHUNK):
            part = rows[first : first + _CHUNK]
            moment += part.T @ part
            self.step()
        self._sink.linears(names, coupling(moment, self.step))

    def see(
        self, layer: int, expert: int, matrices: ExpertMatrices, chunks: Iterator[Chunk]
    ) -> None:
        gate, up, down = matrices
        inputs, middles = np.zeros((gate.shape[1],) * 2), np.zeros((len(gate),) * 2)
        sample: Chunk | None = None
        for chunk in chunks:
            h, a, counts = chunk.inputs, chunk.middles, chunk.counts
            inputs += h.T @ (h * counts)
            middles += a.T @ (a * counts)
            if sample is None:
                sample = Chunk(*(part[:_SAMPLE] for part in chunk))
        if sample is None:
            raise UsageError("a text of no tokens cannot calibrate")
        order, read = self._survey.order(layer, expert), coupling(inputs, self.step)
        self._sink.expert(
            layer,
            expert,
            (gate[order], up[order], np.ascontiguousarray(down[:, order])),
            (read, read, coupling(middles[np.ix_(order, order)], self.step)),
            sample._replace(middles=sample.middles[:, order]),
        )
