"""Scores of every token of every window on disk, and what is said of them."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from edgemoe import kernels
from edgemoe.checkpoint import Checkpoint
from edgemoe.errors import UsageError, shown
from edgemoe.evaluate import TokenScores, summarize
from edgemoe.loader import budget
from edgemoe.reference_cache import ReferenceFile
from edgemoe.reference_logits import reference
from edgemoe.terminal.evaluate_output import progress
from edgemoe.types import F64

from .scored_text import ScoredText

_PARTS = tuple(field.name for field in fields(TokenScores))


def save(path: Path, scores: Sequence[TokenScores], text: ScoredText) -> None:
    """Write scores against a reference, one a window."""
    arrays: dict[str, Any] = {
        name: np.concatenate([getattr(s, name) for s in scores]) for name in _PARTS
    }
    lengths = np.array([len(s.nll) for s in scores])
    with path.open("wb") as file:
        np.savez_compressed(file, lengths=lengths, digest=np.array(text.digest), **arrays)


@dataclass(frozen=True)
class SavedScores:
    """windows: scores of each. digest: of the text, see ScoredText."""

    windows: list[TokenScores]
    digest: str

    @property
    def kld(self) -> list[F64]:
        """Divergences in nats, an array a window."""
        return [s.kld for s in self.windows if s.kld is not None]


def load(path: Path) -> SavedScores:
    """Read what `save` wrote.

    Raises:
        UsageError: it is no such file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            ends = np.cumsum(file["lengths"])[:-1]
            pieces = [np.split(file[name], ends) for name in _PARTS]
            digest = str(file["digest"])
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as exc:
        raise UsageError(f"{shown(path)}: not a file of scores: {exc}") from None
    return SavedScores([TokenScores(*window) for window in zip(*pieces, strict=True)], digest)


def references(checkpoint: Checkpoint, text: ScoredText) -> ReferenceFile:
    """The checkpoint's distributions in float32, in the user's cache as of `edgemoe eval`."""
    with progress("reference in float32") as report:
        return reference(
            checkpoint,
            text.windows,
            threads=kernels.default_threads(),
            ceiling=budget.resolve_ceiling("auto"),
            used=budget.rss_bytes(),
            progress=report,
        )


def figures(scores: Sequence[TokenScores], text: ScoredText) -> dict[str, Any]:
    """Means with standard errors (tokens taken as independent, as llama.cpp does); JSON-ready.

    kld in nats; same_top, dppl as shares (0.01 is 1 %): dppl the change of perplexity against the
    reference on the same windows.
    """
    s = summarize(scores, text.scored_bytes)
    if s.kld is None or s.ref_ppl is None:
        raise UsageError("scores without a reference say nothing of its loss")
    return {
        "kld": s.kld,
        "kld_se": s.kld_se,
        "kld_p99": s.kld_p99,
        "ppl": s.ppl,
        "dppl": s.ppl / s.ref_ppl - 1,
        "same_top": s.same_top,
        "same_top_se": s.same_top_se,
    }
