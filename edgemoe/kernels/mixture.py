"""The mixture part of a layer, at once or in parts: experts are computed as they come into memory.

Where the backend has no call for it (dispatch.fused) it is made of the kernels `experts` and
`combine`, with the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import KernelError, shown
from ..layout import RecordLayout
from ..types import F32, I32, U64
from . import dispatch
from .dispatch import Pool, check
from .products import ahead_columns, experts, group_units

ABSENT, TWICE = -3, -4
"""EM_NO_SUCH_EXPERT and EM_TWICE of native/edgemoe.h: no such job, more pairs than there are."""


def part_of(
    pool: Pool,
    layout: RecordLayout,
    segments: U64,
    x: F32,
    ids: I32,
    levels: I32,
    chosen: Sequence[int],
    done: int,
    position: I32,
    pair_out: F32,
) -> int:
    """The pairs of some jobs, out of the kernel `experts`: their number, ABSENT or TWICE.

    Their rows go to pair_out, float32 [pairs, hidden], from row `done` on, and position, int32
    [n, k], tells for each of them which.
    """
    experts_, depth = segments.shape
    flat, level = ids.reshape(-1), levels.reshape(-1)
    if not (_below(flat, experts_) and _below(level, depth)):
        return ABSENT
    jobs = flat * depth + level
    pairs = np.flatnonzero(np.isin(jobs, list(chosen)))
    pairs = pairs[np.argsort(jobs[pairs], kind="stable")]
    if done + pairs.size > ids.size:
        return TWICE
    owners, counts = np.unique(jobs[pairs], return_counts=True)
    out = experts(
        pool,
        layout,
        x,
        segments[owners // depth],
        (owners % depth).astype(np.int32),
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        (pairs // ids.shape[1]).astype(np.int32),
    )
    pair_out[done : done + pairs.size] = out
    position.reshape(-1)[pairs] = np.arange(done, done + pairs.size, dtype=np.int32)
    return int(pairs.size)


def _below(values: I32, end: int) -> bool:
    return not values.size or (int(values.min()) >= 0 and int(values.max()) < end)


class Mixture:
    """All experts of a layer, each read at the level that a pair wants it at.

    A job is an expert at a level; its number is expert * levels of the record + level index.

    layout: of their records. segments: uint64 [experts, levels], the addresses of each expert's
    segments, 0 where one is not in memory, which may change between calls. The addresses must stay
    valid and whole in a call: the caller pins them.

    Raises:
        KernelError: an array that does not fit.
    """

    def __init__(self, layout: RecordLayout, segments: U64) -> None:
        check("segments", segments, np.uint64, None, layout.depth)
        self.layout, self.segments = layout, segments
        gate = layout.matrices[0]
        self.hidden = gate.cols
        self.native = None
        if dispatch.fused():
            shape = gate.cols, gate.rows, ahead_columns(layout), group_units(layout)
            self.native = dispatch.native.Mixture(segments, layout.part_offsets, *shape)

    def __call__(self, pool: Pool, x: F32, ids: I32, levels: I32, weights: F32) -> F32:
        """Sum over slots of weight * expert(x).

        x: float32 [n, hidden]; ids and levels (indices) int32, weights float32 [n, k]. Returns
        float32 [n, hidden].

        Raises:
            KernelError: arrays that do not fit, an id of no expert, a level of none, or one whose
                segments are not all there.
        """
        if self.native is None:
            parts = MixtureParts(self, x, ids, levels, weights)
            parts.run(pool, range(self.segments.size))
            return parts.sum(pool)
        y = np.empty_like(x)
        try:
            done = self.native.run(pool, x, ids, levels, weights, y)
        except TypeError:  # arrays of another dtype or number of axes
            done = False
        if not done:  # only now is it worth the time to find out why
            self.check(x, ids, levels, weights)
            raise self.absent()
        return y

    def check(self, x: F32, ids: I32, levels: I32, weights: F32) -> None:
        """KernelError if these do not fit each other or the mixture."""
        check("x", x, np.float32, None, self.hidden)
        check("ids", ids, np.int32, len(x), None)
        check("levels", levels, np.int32, *ids.shape)
        check("weights", weights, np.float32, *ids.shape)

    def absent(self) -> KernelError:
        """The error of ids or levels that there are not, or that are not in memory."""
        return KernelError(
            f"ids: expected rows of the {len(self.segments)} experts, with an address for each of "
            f"their segments up to the level, of {self.layout.depth}"
        )


class MixtureParts:
    """One call of a mixture, computed job by job, in any order and any parts.

    x, ids, levels, weights: as for Mixture, not copied. pair_out: float32 [at least n * k, hidden],
    where the experts' outputs wait for the sum; None: a new one.

    Raises:
        KernelError: arrays that do not fit.
    """

    def __init__(
        self,
        mixture: Mixture,
        x: F32,
        ids: I32,
        levels: I32,
        weights: F32,
        pair_out: F32 | None = None,
    ) -> None:
        mixture.check(x, ids, levels, weights)
        if pair_out is None:
            pair_out = np.empty((ids.size, mixture.hidden), np.float32)
        check("pair_out", pair_out, np.float32, None, mixture.hidden)
        if len(pair_out) < ids.size:
            raise KernelError(f"pair_out: expected {ids.size} rows or more, got {len(pair_out)}")
        self._mixture, self._pair_out = mixture, pair_out
        self._x, self._ids, self._levels, self._weights = x, ids, levels, weights
        self._position: I32 = np.empty(ids.shape, np.int32)
        self._done = 0

    def run(self, pool: Pool, chosen: Sequence[int]) -> None:
        """Compute all pairs of these jobs, none of which was computed before.

        Raises:
            KernelError: one is not in memory, or was computed already.
        """
        m = self._mixture
        what = self._x, self._ids, self._levels, chosen
        place = self._done, self._position, self._pair_out
        if m.native is None:
            count = part_of(pool, m.layout, m.segments, *what, *place)
        else:
            count = m.native.part(pool, *what, *place)
        if count == TWICE:
            raise KernelError(f"of the jobs {shown(list(chosen))} one was computed before")
        if count < 0:
            raise m.absent()
        self._done += count

    def sum(self, pool: Pool) -> F32:
        """float32 [n, hidden], the bits of Mixture; KernelError if a pair is not yet computed."""
        if self._done != self._ids.size:
            raise KernelError(f"{self._ids.size - self._done} pairs are not computed yet")
        y = np.empty((len(self._x), self._mixture.hidden), np.float32)
        # `combine` would check what was checked in the beginning, or made here.
        dispatch.native.combine(pool, self._pair_out, self._position, self._weights, y)
        return y
