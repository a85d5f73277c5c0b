"""Our levels and llama.cpp's types at the same bits: who diverges less, and how surely.

Between two levels the logarithm of our divergence is taken as linear in the bits. The standard
error of a logarithm is SE / mean (delta method). That of an interpolated one adds the two levels'
with their weights, as if they moved together, which is an upper limit; that of the difference of
both sides adds squares, as if they were independent, an upper limit too: all are of the same
tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from edgemoe.errors import UsageError

CLEARLY = 2.0
"""Standard errors that tell "lower" from "not known to be lower"."""

DIRECT = {"Q8_0": 8}
"""Types that are compared with one level as it is: ours of 8 bits takes a few more than 8.5."""


@dataclass(frozen=True)
class Point:
    """Mean divergence in nats and its standard error, at bits a weight."""

    bits: float
    kld: float
    kld_se: float

    @classmethod
    def of(cls, figures: Mapping[str, Any]) -> Point:
        """From the figures of a level or a type.

        Raises:
            UsageError: the divergence is not above zero, so it has no logarithm.
        """
        if not figures["kld"] > 0:
            raise UsageError(f"a divergence of {figures['kld']} has no logarithm: nothing was lost")
        return cls(figures["bits"], figures["kld"], figures["kld_se"])

    @property
    def log_se(self) -> float:
        """Standard error of ln kld."""
        return self.kld_se / self.kld


@dataclass(frozen=True)
class Verdict:
    """ours at the bits of llama.cpp's type against theirs; lower is better.

    at: what ours is of, such as "2-3" between levels. errors: (ln theirs - ln ours) in standard
    errors; passed: above CLEARLY. ours, ratio, errors are None where we have nothing at these bits.
    """

    type: str
    bits: float
    theirs: float
    at: str
    ours: float | None = None
    ratio: float | None = None
    errors: float | None = None
    passed: bool = False


def interpolate(points: Sequence[Point], bits: float) -> tuple[Point, tuple[int, int]] | None:
    """The curve through points of ascending bits at `bits`, and between which two; None: off it."""
    for i, (low, high) in enumerate(pairwise(points)):
        if low.bits <= bits <= high.bits:
            t = (bits - low.bits) / (high.bits - low.bits)
            kld = math.exp((1 - t) * math.log(low.kld) + t * math.log(high.kld))
            return Point(bits, kld, kld * ((1 - t) * low.log_se + t * high.log_se)), (i, i + 1)
    return None


def compare(kind: str, ours: Point, theirs: Point, at: str) -> Verdict:
    """The verdict on two points, taken as of the same bits."""
    se = math.hypot(ours.log_se, theirs.log_se)
    gap = math.log(theirs.kld / ours.kld)
    errors = gap / se if se else math.copysign(math.inf, gap) if gap else 0.0
    ratio = ours.kld / theirs.kld
    return Verdict(kind, theirs.bits, theirs.kld, at, ours.kld, ratio, errors, errors > CLEARLY)


def verdicts(
    levels: Sequence[Mapping[str, Any]], types: Sequence[Mapping[str, Any]]
) -> list[Verdict]:
    """One for each of llama.cpp's types, in order.

    levels, types: figures as levels.measure and llamacpp.measure give them.
    """
    ordered = sorted(levels, key=lambda figures: float(figures["bits"]))
    points = [Point.of(figures) for figures in ordered]
    names = [int(figures["level"]) for figures in ordered]
    out = []
    for figures in types:
        kind, theirs = str(figures["type"]), Point.of(figures)
        direct = DIRECT.get(kind)
        if direct in names:
            at = f"level {direct}"
            out.append(compare(kind, points[names.index(direct)], theirs, at))
            continue
        found = interpolate(points, theirs.bits)
        if found is None:
            out.append(Verdict(kind, theirs.bits, theirs.kld, "outside our levels"))
        else:
            ours, (low, high) = found
            out.append(compare(kind, ours, theirs, f"{names[low]}-{names[high]}"))
    return out


def judge(levels: Mapping[str, Any], llamacpp: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Verdicts on the results of both measurements; JSON-ready.

    Raises:
        UsageError: they are not of the same windows of the same text.
    """
    if levels["text"]["digest"] != llamacpp["text"]["digest"]:
        raise UsageError(
            f"the levels were measured on {levels['text']['text']}, llama.cpp on "
            f"{llamacpp['text']['text']}: measure both on the same windows"
        )
    return [asdict(v) for v in verdicts(levels["levels"], llamacpp["types"])]
