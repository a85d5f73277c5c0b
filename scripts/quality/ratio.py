"""What nesting costs: the divergence of nested levels over that of levels quantized alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgemoe.checkpoint import Checkpoint
from edgemoe.errors import UsageError
from edgemoe.evaluate import Comparison, compare
from edgemoe.terminal.evaluate_output import progress
from edgemoe.types import F64

from . import scores
from .float_scores import float_scores
from .quantizers import Experts, find, of_store, quantize
from .scored_text import ScoredText
from .work import Work, identity, say

RESAMPLES = 10_000
SEED = 0


def bootstrap(nested: Sequence[F64], dedicated: Sequence[F64]) -> dict[str, Any]:
    """Mean divergences of both, their ratio and its 95 % interval, from divergences a window.

    Whole windows are drawn, the same of both sides: tokens of a window depend on one another.

    Raises:
        UsageError: not the same windows, or no divergence at all in the second.
    """
    c: Comparison = compare(nested, dedicated, rounds=RESAMPLES, seed=SEED)
    if c.ratio is None:
        raise UsageError("the second set has draws without any divergence: there is no ratio")
    tokens = sum(map(len, nested))
    first, second = (float(sum(x.sum() for x in side)) / tokens for side in (nested, dedicated))
    out = {"nested": first, "dedicated": second, "ratio": c.ratio}
    return out | {"ratio_low": c.ratio_low, "ratio_high": c.ratio_high, "windows": len(nested)}


def of_files(nested: Path, dedicated: Path) -> dict[str, Any]:
    """The ratio of two saved sets of divergences.

    Raises:
        UsageError: they are of different texts.
    """
    a, b = scores.load(nested), scores.load(dedicated)
    if a.digest != b.digest:
        raise UsageError(f"{nested} and {dedicated} are not of the same windows")
    return bootstrap(a.kld, b.kld)


class Side:
    """One side of the comparison: a quantizer, or stores, "{level}" in whose name is filled in."""

    def __init__(self, checkpoint: Checkpoint, spec: str, levels: Sequence[int], alone: bool):
        self._checkpoint, self._spec, self._levels, self._alone = checkpoint, spec, levels, alone
        self._store = spec.endswith(".emoe")
        self._quantizer = None if self._store else find(spec)
        self._all: dict[int, Experts] = {}

    def key(self, level: int) -> dict[str, Any]:
        """What decides the experts at this level, but for a quantizer's code."""
        if self._store:
            return {"store": identity(self._path(level))}
        asked = [level] if self._alone else list(self._levels)
        return {"quantizer": self._spec, "levels": asked, "level": level}

    @property
    def fresh(self) -> bool:
        """Whether scores must be made again: a quantizer's code may have changed."""
        return not self._store

    def experts(self, level: int) -> Experts:
        """Every expert at this level."""
        if self._quantizer is None:
            return of_store(self._checkpoint, self._path(level), level)
        with progress(f"{self._spec}, {level} bits") as report:
            if self._alone:
                return quantize(self._checkpoint, self._quantizer, [level], report)[level]
            if not self._all:
                self._all = quantize(self._checkpoint, self._quantizer, self._levels, report)
        return self._all[level]

    def _path(self, level: int) -> Path:
        return Path(self._spec.replace("{level}", str(level)))


def measure(
    checkpoint: Checkpoint,
    nested: str,
    dedicated: str,
    levels: Sequence[int],
    text: ScoredText,
    work: Work,
) -> list[dict[str, Any]]:
    """The ratio at each level, both sides in float32 but for their experts; JSON-ready.

    nested, dedicated: quantizers or stores, see Side.
    """
    a = Side(checkpoint, nested, levels, alone=False)
    b = Side(checkpoint, dedicated, levels, alone=True)
    out = []
    with scores.references(checkpoint, text) as known:
        for level in levels:
            files = []
            for side, role in ((a, "nested"), (b, "dedicated")):
                key = side.key(level) | {"text": text.digest}

                def make(path: Path, side: Side = side, level: int = level) -> None:
                    what = f"{level} bits in float32"
                    found = float_scores(checkpoint, side.experts(level), text, known, what)
                    scores.save(path, found, text)

                name = f"{role}-{level}-{text.name}.npz"
                files.append(work.product(name, key, make, fresh=side.fresh).path)
            result = of_files(files[0], files[1])
            out.append({"level": level} | result)
            low, high = result["ratio_low"], result["ratio_high"]
            say(f"level {level}: ratio {result['ratio']:.4f} [{low:.4f}, {high:.4f}]")
    return out
