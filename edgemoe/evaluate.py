"""How good is a model at some settings: perplexity, bits per byte, distance from a reference.

Windows and scored tokens are llama.cpp's (tools/perplexity): the text is cut into windows of `ctx`
tokens that do not overlap, a BOS replaces the first token of each where the tokenizer adds one, and
the second half is scored. With a stride of ctx / 2 windows overlap and every token after the first
half window is scored once. Everything here is arithmetic on logits; running models is the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import UsageError
from .types import F32, F64, I64

LOGITS = 1 << 22
"""Logits that a runner gives at a time, at most: 16 MiB."""

SCORED = 1 << 19
"""Logits looked at together, at most: each of their float64 copies takes 4 MiB."""

Runner = Callable[[I64, int], Iterator[F32]]
"""(tokens, first row wanted) -> blocks of logits float32 [n, vocab], rows first .. len - 1."""


@dataclass(frozen=True)
class Window:
    """tokens: int64 [n]; rows first .. n - 2 are scored, row j predicts token j + 1."""

    tokens: I64
    first: int

    @property
    def inputs(self) -> I64:
        """What the model has to see: the last token is only predicted."""
        return self.tokens[:-1]

    @property
    def targets(self) -> I64:
        """The scored tokens."""
        return self.tokens[self.first + 1 :]


def windows(ids: Sequence[int], ctx: int, stride: int, bos: int | None) -> list[Window]:
    """The windows of one text.

    Raises:
        UsageError: the text is shorter than one window, or the stride is not from 1 to ctx.
    """
    if ctx < 4 or not 1 <= stride <= ctx:
        raise UsageError(
            f"ctx must be at least 4 and the stride from 1 to ctx, not {ctx}, {stride}"
        )
    if len(ids) < ctx:
        raise UsageError(
            f"the text has {len(ids)} tokens, less than one window of {ctx}: give more text or a "
            "smaller --ctx"
        )
    out = []
    for start in range(0, len(ids) - ctx + 1, stride):
        tokens = np.array(ids[start : start + ctx], np.int64)
        if bos is not None:
            tokens[0] = bos
        first = ctx // 2
        if stride < ctx:
            first = max(ctx - stride - 1, 0)  # the tokens no earlier window has scored
        out.append(Window(tokens, first))
    return out


def rows_at_once(vocab: int, logits: int) -> int:
    """How many rows of `vocab` logits make at most so many logits: 1 to 64."""
    return min(max(logits // vocab, 1), 64)


def scratch_bytes(vocab: int, kept: int = 0) -> int:
    """Bytes that a block of logits and its scoring against `kept` tokens a row take at most."""
    scored = rows_at_once(vocab, SCORED)
    return 4 * vocab * rows_at_once(vocab, LOGITS) + scored * (40 * vocab + 48 * kept)


def log_softmax(logits: F32) -> F64:
    """Natural log probabilities float64 [n, vocab]."""
    z = logits.astype(np.float64)
    z -= z.max(axis=-1, keepdims=True)
    z -= np.log(np.exp(z).sum(axis=-1, keepdims=True))
    return z


@dataclass(frozen=True)
class ReferenceRows:
    """What is kept of a reference's distribution for n scored rows.

    ids: uint16 or uint32 [n, k], the k likeliest tokens in falling order. logp: float16 [n, k].
    rest: float64 [n], probability of all others. true_logp: float32 [n], of the scored token.

    float16 errs by 2^-11 of a log probability, either way: moving a mean divergence by some 1e-6.
    """

    ids: NDArray[np.unsignedinteger[Any]]
    logp: NDArray[np.float16]
    rest: F64
    true_logp: F32

    @classmethod
    def of(cls, logits: F32, targets: I64, k: int) -> ReferenceRows:
        """From a reference's logits [n, vocab]."""
        logp = log_softmax(logits)
        k = min(k, logp.shape[1])
        top = np.argpartition(-logp, k - 1, axis=1)[:, :k]
        kept = np.take_along_axis(logp, top, axis=1)
        order = np.argsort(-kept, axis=1, kind="stable")
        ids, kept = np.take_along_axis(top, order, axis=1), np.take_along_axis(kept, order, axis=1)
        rest = np.maximum(1.0 - np.exp(kept).sum(axis=1), 0.0)
        if k == logp.shape[1]:
            rest[:] = 0.0
        true = np.take_along_axis(logp, targets[:, None], axis=1)[:, 0]
        small = np.uint16 if logp.shape[1] <= 1 << 16 else np.uint32
        return cls(ids.astype(small), kept.astype(np.float16), rest, true.astype(np.float32))

    def rows(self, first: int, stop: int) -> ReferenceRows:
        """A run of rows."""
        part = slice(first, stop)
        return ReferenceRows(self.ids[part], self.logp[part], self.rest[part], self.true_logp[part])


class References(Protocol):
    """A reference's distributions for every scored row of some windows."""

    def rows(self, window: int, first: int, stop: int) -> ReferenceRows:
        """Scored rows [first, stop) of a window."""
        ...


@dataclass(frozen=True)
class TokenScores:
    """Per scored token, float64 [tokens]; all but nll only against a reference.

    nll: -ln p(token). kld: KL(reference || model) in nats. same_top: 1 where both put the same
    token first. delta_p: p(token) minus the reference's. ref_nll: the reference's nll. ref_rest:
    probability of the tokens that were not kept of the reference one by one.
    """

    nll: F64
    kld: F64 | None = None
    same_top: F64 | None = None
    delta_p: F64 | None = None
    ref_nll: F64 | None = None
    ref_rest: F64 | None = None


def score(logits: F32, targets: I64, reference: ReferenceRows | None = None) -> TokenScores:
    """Scores of a block of rows."""
    logq = log_softmax(logits)
    true = np.take_along_axis(logq, targets[:, None], axis=1)[:, 0]
    if reference is None:
        return TokenScores(-true)
    logp = reference.logp.astype(np.float64)
    q = np.take_along_axis(logq, reference.ids.astype(np.int64), axis=1)
    kld = (np.exp(logp) * (logp - q)).sum(axis=1)
    rest_q = np.maximum(1.0 - np.exp(q).sum(axis=1), 1e-30)
    rest = reference.rest
    with np.errstate(divide="ignore", invalid="ignore"):
        kld += np.where(rest > 0, rest * (np.log(rest) - np.log(rest_q)), 0.0)
    same = (logq.argmax(axis=1) == reference.ids[:, 0]).astype(np.float64)
    true_p = reference.true_logp.astype(np.float64)
    delta = np.exp(true) - np.exp(true_p)
    return TokenScores(-true, np.maximum(kld, 0.0), same, delta, -true_p, rest)


def target_logits(run: Runner, window: Window) -> Iterator[tuple[int, F32, I64]]:
    """Pieces of a window: (first scored row, logits float32 [n, vocab], targets int64 [n])."""
    targets, at = window.targets, 0
    for block in run(window.inputs, window.first):
        step = rows_at_once(block.shape[1], SCORED)
        for first in range(0, len(block), step):
            rows = block[first : first + step]
            yield at, rows, targets[at : at + len(rows)]
            at += len(rows)


def score_windows(
    run: Runner,
    todo: Sequence[Window],
    references: References | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[TokenScores]:
    """Scores of every window, in order. progress: called with (windows done, windows in all)."""
    out = []
    for i, window in enumerate(todo):
        parts = []
        for at, logits, targets in target_logits(run, window):
            known = None if references is None else references.rows(i, at, at + len(targets))
            parts.append(score(logits, targets, known))
        out.append(_joined(parts))
        if progress is not None:
            progress(i + 1, len(todo))
    return out


def _joined(parts: Sequence[TokenScores]) -> TokenScores:
    def join(name: str) -> F64 | None:
        arrays = [getattr(p, name) for p in parts]
        return None if arrays[0] is None else np.concatenate(arrays)

    nll = join("nll")
    return TokenScores(np.empty(0) if nll is None else nll, *map(join, _AGAINST))


_AGAINST = ("kld", "same_top", "delta_p", "ref_nll", "ref_rest")


@dataclass(frozen=True)
class Summary:
    """Means over scored tokens with standard errors (tokens taken as independent, as llama.cpp).

    bits_per_byte counts the UTF-8 bytes of the scored tokens. rms_delta_p is the root mean square
    change of the true token's probability. ref_rest is the mean probability of all tokens that were
    not kept of the reference one by one.
    """

    tokens: int
    ppl: float
    ppl_se: float
    bits_per_byte: float
    bits_per_byte_se: float
    ref_ppl: float | None = None
    ref_ppl_se: float | None = None
    ref_rest: float | None = None
    kld: float | None = None
    kld_se: float | None = None
    kld_p99: float | None = None
    kld_p99_se: float | None = None
    same_top: float | None = None
    same_top_se: float | None = None
    rms_delta_p: float | None = None
    rms_delta_p_se: float | None = None


def summarize(scores: Sequence[TokenScores], scored_bytes: int) -> Summary:
    """Figures over all windows."""
    s = _joined(scores)
    n = len(s.nll)
    mean, se = mean_se(s.nll)
    to_bits = n / math.log(2) / max(scored_bytes, 1)
    ppl = perplexity(mean)
    plain = Summary(n, ppl, ppl * se, mean * to_bits, se * to_bits)
    if s.kld is None or s.same_top is None or s.delta_p is None:
        return plain
    if s.ref_nll is None or s.ref_rest is None:
        return plain
    kld, kld_se = mean_se(s.kld)
    same, same_se = mean_se(s.same_top)
    square, square_se = mean_se(s.delta_p**2)
    rms = math.sqrt(square)
    ref, ref_se = mean_se(s.ref_nll)
    p99, p99_se = quantile_se(s.kld, 0.99)
    return Summary(
        **{
            **plain.__dict__,
            "ref_ppl": perplexity(ref),
            "ref_ppl_se": perplexity(ref) * ref_se,
            "ref_rest": float(s.ref_rest.mean()),
            "kld": kld,
            "kld_se": kld_se,
            "kld_p99": p99,
            "kld_p99_se": p99_se,
            "same_top": same,
            "same_top_se": same_se,
            "rms_delta_p": rms,
            "rms_delta_p_se": square_se / (2 * rms) if rms else 0.0,
        }
    )


def perplexity(nll: float) -> float:
    """exp, of what has an exponential at all: beyond e^700 a model is not telling anything."""
    return math.exp(min(nll, 700.0))


def mean_se(x: F64) -> tuple[float, float]:
    """Mean and its standard error."""
    if len(x) < 2:
        return float(x.mean()), 0.0
    return float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x)))


def quantile_se(x: F64, share: float) -> tuple[float, float]:
    """A quantile and its standard error, from the order statistics a standard deviation away."""
    ordered = np.sort(x)
    spread = math.sqrt(len(x) * share * (1 - share))
    low, high = (
        ordered[int(np.clip(round(len(x) * share + d), 0, len(x) - 1))] for d in (-spread, spread)
    )
    return float(np.quantile(ordered, share)), float(high - low) / 2


@dataclass(frozen=True)
class Comparison:
    """Paired bootstrap over windows of mean(a) - mean(b) and mean(a) / mean(b), 95 % intervals.

    The ratio is None where mean(b) is not above zero in every draw.
    """

    difference: float
    difference_low: float
    difference_high: float
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None


def compare(a: Sequence[F64], b: Sequence[F64], rounds: int = 2000, seed: int = 0) -> Comparison:
    """Compare two settings on the same windows: a[i], b[i] are window i's per-token figures.

    Whole windows are drawn with replacement, because tokens of one window depend on one another.

    Raises:
        UsageError: the windows do not match.
    """
    if [len(x) for x in a] != [len(x) for x in b] or not a:
        raise UsageError("two settings can only be compared on the same windows")
    sums = np.array([[x.sum(), y.sum(), len(x)] for x, y in zip(a, b, strict=True)])
    rng = np.random.default_rng(seed)
    n = len(sums)
    drawn = np.array([sums[rng.integers(0, n, n)].sum(axis=0) for _ in range(rounds)])
    differences = (drawn[:, 0] - drawn[:, 1]) / drawn[:, 2]
    low, high = np.quantile(differences, [0.025, 0.975])
    total = sums.sum(axis=0)
    ratio = ratio_low = ratio_high = None
    if (drawn[:, 1] > 0).all():  # else some draws have none
        ratio = float(total[0] / total[1])
        ratio_low, ratio_high = map(float, np.quantile(drawn[:, 0] / drawn[:, 1], [0.025, 0.975]))
    difference = float((total[0] - total[1]) / total[2])
    return Comparison(difference, float(low), float(high), ratio, ratio_low, ratio_high)
