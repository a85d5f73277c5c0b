"""A layer step whose experts come into memory while it is computed.

Its unit is the job, an expert at a level for all tokens that want it there; a job's number is
expert * levels + level index, as kernels.Mixture has it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from .. import kernels
from ..loader.residency import Lease, Want
from ..types import F32, I32


def jobs_of(ids: I32, levels: I32, width: int) -> dict[int, int]:
    """How many tokens want each job, lowest first. width: levels of a record."""
    return dict(sorted(Counter((ids * width + levels).ravel().tolist()).items()))


def wants_of(jobs: dict[int, int], width: int) -> dict[int, int]:
    """Segments that are wanted of each expert, lowest expert first. jobs: ascending."""
    return {job // width: job % width + 1 for job in jobs}


@dataclass
class Step:
    """A layer step under way.

    counts: tokens of each job. wants: segments wanted of each expert. todo: jobs not yet computed.
    missing: experts not yet claimed, in the order of their reads. spare_due: nothing was evicted
    for the next step yet. leases: with the jobs of each that are not yet computed.
    """

    layer: int
    width: int
    counts: dict[int, int]
    wants: dict[int, int]
    todo: list[int]
    missing: list[int]
    spare_due: bool
    leases: list[tuple[Lease, set[int]]] = field(default_factory=list)
    pair_out: F32 = field(init=False)
    parts: kernels.MixtureParts = field(init=False)

    def wanted(self, experts: list[int]) -> list[Want]:
        """Of these experts."""
        return [Want(e, self.wants[e]) for e in experts]

    def jobs(self, experts: list[int]) -> set[int]:
        """Those of these experts that are not yet computed."""
        of = set(experts)
        return {job for job in self.todo if job // self.width in of}

    def computed(self, jobs: list[int]) -> list[Lease]:
        """These jobs are done; what may be released now."""
        done = set(jobs)
        self.todo = [job for job in self.todo if job not in done]
        # What another step has brought in is computed without being claimed.
        left = {job // self.width for job in self.todo}
        self.missing = [e for e in self.missing if e in left]
        released, held = [], []
        for lease, open_ in self.leases:
            open_ -= done
            if open_:
                held.append((lease, open_))
            else:
                released.append(lease)
        self.leases = held
        return released
