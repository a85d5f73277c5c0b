"""LAMBADA and PIQA by log-likelihood, as lm-evaluation-harness scores them.

LAMBADA (lambada_openai): the last word, with the space before it, is the target; acc counts the
texts whose target is what greedy decoding gives, perplexity is exp(mean -ln p(target)), a target
counting once however many tokens it has. PIQA: "Question: {goal}\\nAnswer:" and the two solutions;
acc takes the one with the higher log-likelihood, acc_norm the higher one per UTF-8 byte (the
harness counts characters, which is the same for ASCII).

Prompts are encoded as the harness does by default: context and continuation together, with what the
tokenizer adds before a text; the continuation is what follows the tokens of the context alone. What
exceeds the model's context is cut from the left. Everything here is reading, tokens and arithmetic;
running models is the caller's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import UsageError, shown
from .evaluate import (
    References,
    Runner,
    Window,
    compare,
    log_softmax,
    mean_se,
    perplexity,
    target_logits,
)
from .types import F64, I64

Z95 = 1.959963984540054
"""Standard deviations on either side of a mean that hold 95 % of a normal distribution."""


@dataclass(frozen=True)
class Question:
    """A context and what may follow it; `answer` is the index of what does.

    where: file and line, for messages.
    """

    context: str
    choices: tuple[str, ...]
    answer: int
    where: str


@dataclass(frozen=True)
class Likelihood:
    """logp: ln p(continuation | context). greedy: each of its tokens was the likeliest."""

    logp: float
    greedy: bool


@dataclass(frozen=True)
class Task:
    """A file of questions of one kind. name: "lambada" or "piqa"."""

    name: str
    file: str
    questions: Sequence[Question]

    def windows(self, encode: Callable[[str], list[int]], longest: int) -> list[Window]:
        """A window for every choice of every question; its scored rows predict the choice.

        encode: ids of a text, with what the tokenizer puts before it. longest: tokens of the
        model's context.

        Raises:
            UsageError: a choice adds no token, or does not fit the context.
        """
        out = []
        for q in self.questions:
            for choice in q.choices:
                context, continuation = encode_pair(encode, q.context, choice)
                if not continuation or not context:
                    raise UsageError(f"{q.where}: {shown(choice)} gives no tokens of its own")
                if len(continuation) > longest:
                    raise UsageError(
                        f"{q.where}: a choice has {len(continuation)} tokens, more than the "
                        f"model's context of {longest}"
                    )
                # the last token is predicted, not seen
                tokens = np.array((context + continuation)[-(longest + 1) :], np.int64)
                out.append(Window(tokens, len(tokens) - len(continuation) - 1))
        return out

    def scores(self, likelihoods: Sequence[Likelihood]) -> dict[str, F64]:
        """Figures of each question, float64 [questions]; likelihoods as `windows` orders them.

        "acc" (and "acc_norm" of PIQA) is 1 where the answer is right, "nll" (of LAMBADA) is -ln p
        of the target.
        """
        if self.name == "lambada":
            return {
                "acc": np.array([float(x.greedy) for x in likelihoods]),
                "nll": np.array([-x.logp for x in likelihoods]),
            }
        acc, normed, at = [], [], 0
        for q in self.questions:
            logp = np.array([x.logp for x in likelihoods[at : at + len(q.choices)]])
            at += len(q.choices)
            # the space that every choice starts with is not its own
            size = np.array([len(c[1:].encode()) for c in q.choices])
            acc.append(float(logp.argmax() == q.answer))
            normed.append(float((logp / size).argmax() == q.answer))
        return {"acc": np.array(acc), "acc_norm": np.array(normed)}


def read_lambada(name: str, limit: int | None = None) -> Task:
    """The first `limit` questions of a LAMBADA file: lines of {"text": ...}.

    Raises:
        UsageError: the file cannot be read, or a line is not such an object; says which.
    """
    questions = []
    for where, row in _rows(name, ("text",), limit):
        context, _, last = row["text"].rpartition(" ")
        if not context.strip() or not last:
            raise UsageError(f"{where}: the text has no last word after a space to be predicted")
        questions.append(Question(context, (f" {last}",), 0, where))
    return Task("lambada", name, questions)


def read_piqa(name: str, limit: int | None = None) -> Task:
    """The first `limit` questions of a PIQA file: lines of {"goal", "sol1", "sol2"}.

    The right solutions, 0 or 1 a line, are in NAME-labels.lst beside NAME.jsonl.

    Raises:
        UsageError: a file cannot be read, a line is not what it should be, or there are not as
            many labels as questions.
    """
    path = Path(name)
    labels_name = str(path.with_name(f"{path.stem}-labels.lst"))
    rows = list(_rows(name, ("goal", "sol1", "sol2"), None))
    labels = _lines(labels_name)
    if len(labels) != len(rows):
        raise UsageError(
            f"{shown(labels_name)} has {len(labels)} labels for the {len(rows)} questions of "
            f"{shown(name)}: they do not belong together"
        )
    questions = []
    for i, ((where, row), label) in enumerate(zip(rows, labels, strict=True)):
        if label.strip() not in (b"0", b"1"):
            raise UsageError(
                f"{shown(labels_name)} line {i + 1}: a label must be 0 or 1, not "
                f"{shown(label.decode(errors='replace'), 40)}"
            )
        if not row["sol1"] or not row["sol2"]:
            raise UsageError(f"{where}: a solution is empty")
        choices = (f" {row['sol1']}", f" {row['sol2']}")
        questions.append(
            Question(f"Question: {row['goal']}\nAnswer:", choices, int(label.strip()), where)
        )
    return Task("piqa", name, questions[:limit])


def _rows(
    name: str, keys: Sequence[str], limit: int | None
) -> Iterator[tuple[str, dict[str, str]]]:
    """(place, object) of every line of a JSON lines file; each object has these keys as text."""
    for i, line in enumerate(_lines(name)[:limit]):
        where = f"{shown(name)} line {i + 1}"
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            raise UsageError(f"{where}: not UTF-8 text") from None
        except (ValueError, RecursionError):
            raise UsageError(f"{where}: not JSON") from None
        if not isinstance(row, dict):
            raise UsageError(f"{where}: not a JSON object")
        for key in keys:
            if not isinstance(row.get(key), str):
                raise UsageError(f'{where}: has no text "{key}"')
            try:
                row[key].encode("utf-8")
            except UnicodeEncodeError:
                raise UsageError(f'{where}: "{key}" holds half of a surrogate pair') from None
        yield where, row


def _lines(name: str) -> list[bytes]:
    """Lines of a file, the end of the last one optional."""
    try:
        data = Path(name).read_bytes()
    except OSError as exc:
        raise UsageError(f"{shown(name)}: cannot read it: {exc.strerror}") from None
    lines = data.removesuffix(b"\n").split(b"\n")
    if lines == [b""]:
        raise UsageError(f"{shown(name)}: the file is empty")
    return lines


def encode_pair(
    encode: Callable[[str], list[int]], context: str, continuation: str
) -> tuple[list[int], list[int]]:
    """Ids of a context and of what follows it; spaces that end the context go to the latter."""
    bare = context.rstrip()
    whole = encode(context + continuation)
    first = encode(bare)
    return first, whole[len(first) :]


def likelihoods(
    run: Runner, todo: Sequence[Window], progress: Callable[[int, int], None] | None = None
) -> list[Likelihood]:
    """Likelihood of each window's scored tokens. progress: (windows done, windows in all)."""
    out = []
    for i, window in enumerate(todo):
        logp, greedy = 0.0, True
        for _, logits, targets in target_logits(run, window):
            true = np.take_along_axis(log_softmax(logits), targets[:, None], axis=1)
            logp += float(true.sum())
            greedy &= bool((logits.argmax(axis=1) == targets).all())
        out.append(Likelihood(logp, greedy))
        if progress is not None:
            progress(i + 1, len(todo))
    return out


def reference_likelihoods(references: References, todo: Sequence[Window]) -> list[Likelihood]:
    """The same of a reference whose likeliest token, at least, was kept."""
    out = []
    for i, window in enumerate(todo):
        targets: I64 = window.targets
        rows = references.rows(i, 0, len(targets))
        logp = float(rows.true_logp.astype(np.float64).sum())
        out.append(Likelihood(logp, bool((rows.ids[:, 0] == targets).all())))
    return out


def figures(scores: Mapping[str, F64]) -> dict[str, Any]:
    """Means with 95 % intervals (NAME, NAME_low, NAME_high): Wilson's for shares, for "nll" the
    perplexity's ("ppl") from the standard error of its logarithm."""
    out: dict[str, Any] = {"questions": len(next(iter(scores.values())))}
    for name, x in scores.items():
        if name == "nll":
            mean, se = mean_se(x)
            values = (mean, mean - Z95 * se, mean + Z95 * se)
            named = zip(("ppl", "ppl_low", "ppl_high"), map(perplexity, values), strict=True)
        else:
            low, high = wilson(int(x.sum()), len(x))
            named = zip((name, f"{name}_low", f"{name}_high"), (x.mean(), low, high), strict=True)
        out |= {key: float(value) for key, value in named}
    return out


def paired(a: Mapping[str, F64], b: Mapping[str, F64]) -> dict[str, Any]:
    """Comparison of two settings on the same questions: bootstrap intervals of the mean difference,
    and for shares the probability "p" of so uneven a split of the changed answers (McNemar)."""
    out: dict[str, Any] = {}
    for name, x in a.items():
        y = b[name]
        compared = asdict(compare(np.split(x, len(x)), np.split(y, len(y))))
        out[name] = {key: value for key, value in compared.items() if not key.startswith("ratio")}
        if name != "nll":
            out[name]["p"] = mcnemar(int((x > y).sum()), int((x < y).sum()))
    return out


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    share, z2 = hits / n, Z95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact probability that so many of gained + lost fair coins fall to one side."""
    n, k = gained + lost, min(gained, lost)
    if n == 0:
        return 1.0
    logs = [
        math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2)
        for i in range(k + 1)
    ]
    return min(2 * math.fsum(map(math.exp, logs)), 1.0)
