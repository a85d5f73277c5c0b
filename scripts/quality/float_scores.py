"""A model in float32 throughout against its checkpoint: only what its weights lost shows."""

from __future__ import annotations

import numpy as np

from edgemoe import kernels
from edgemoe.checkpoint import Checkpoint
from edgemoe.evaluate import SCORED, TokenScores, rows_at_once, score
from edgemoe.loader import budget
from edgemoe.reference_cache import ReferenceFile
from edgemoe.reference_logits import float_logits, plan_float
from edgemoe.terminal.evaluate_output import progress
from edgemoe.types import F64

from .experts import Experts, Requantized
from .scored_text import ScoredText


def float_scores(
    checkpoint: Checkpoint, experts: Experts, text: ScoredText, known: ReferenceFile, what: str
) -> list[TokenScores]:
    """Scores of every window with these experts in place of the checkpoint's.

    known: the checkpoint's own distributions. what: for the line of progress.
    """
    model, todo = Requantized(checkpoint, experts), text.windows
    threads = kernels.default_threads()
    plan = plan_float(model, todo, threads, budget.resolve_ceiling("auto"), budget.rss_bytes())
    parts: list[list[TokenScores]] = [[] for _ in todo]
    step = rows_at_once(checkpoint.config.vocab_size, SCORED)
    with progress(what) as report:
        for i, at, block in float_logits(model, todo, plan, threads, report):
            for first in range(0, len(block), step):
                rows, start = block[first : first + step], at + first
                stop = start + len(rows)
                targets = todo[i].targets[start:stop]
                parts[i].append(score(rows, targets, known.rows(i, start, stop)))
    return [_joined(window) for window in parts]


def _joined(parts: list[TokenScores]) -> TokenScores:
    def join(name: str) -> F64:
        return np.concatenate([getattr(part, name) for part in parts])

    names = ("nll", "kld", "same_top", "delta_p", "ref_nll", "ref_rest")
    return TokenScores(*map(join, names))
