"""What nesting costs: the divergence of nested levels over that of levels quantized alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgemoe.checkpoint import Checkpoint
from edgemoe.errors import UsageError
from edgemoe.evaluate import Comparison, compare
from edgemoe.types import F64

from . import scores
from .experts import of_store
from .float_scores import float_scores
from .scored_text import ScoredText
from .stores import CalibrationText, converted
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


def measure(
    checkpoint: Checkpoint,
    calibration: CalibrationText,
    levels: Sequence[int],
    text: ScoredText,
    work: Work,
) -> list[dict[str, Any]]:
    """The ratio at each level, both sides in float32 but for their experts; JSON-ready.

    Nested is a store calibrated for all levels; dedicated, level by level, the same conversion with
    codes chosen for that one alone. Both have the same steps, zero points and columns ahead, so the
    same bits.
    """
    nested, out = converted(checkpoint, work, calibration), []
    with scores.references(checkpoint, text) as known:
        for level in levels:
            alone = converted(checkpoint, work, calibration, level)
            files = []
            for store, role in ((nested, "nested"), (alone, "dedicated")):
                key = {"store": identity(store), "level": level, "text": text.digest}

                def make(path: Path, store: Path = store, level: int = level) -> None:
                    experts = of_store(checkpoint, store, level)
                    found = float_scores(checkpoint, experts, text, known, f"{level} bits")
                    scores.save(path, found, text)

                files.append(work.product(f"{role}-{level}-{text.name}.npz", key, make).path)
            result = of_files(files[0], files[1])
            out.append({"level": level} | result)
            low, high = result["ratio_low"], result["ratio_high"]
            say(f"level {level}: ratio {result['ratio']:.4f} [{low:.4f}, {high:.4f}]")
    return out
