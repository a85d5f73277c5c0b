"""What the memory of a loader would hold if it did as `Residency` says."""

from __future__ import annotations

from edgemoe.loader.residency import Lease, Segment

LAYERS, EXPERTS, LEVELS, TOP_K = 3, 6, 3, 2
SIZES = [[100, 51, 49], [70, 40, 30], [100, 51, 49]]


def holds(lease: Lease, segment: Segment) -> bool:
    """Whether the lease wants the segment."""
    return any(
        (lease.layer, want.expert) == segment[:2] and want.depth > segment.level
        for want in lease.wants
    )


class Arena:
    """What a loader would hold if it did as it is told; complains where it could not."""

    def __init__(self, budget: int) -> None:
        self.there: dict[Segment, bool] = {}  # whether it has landed
        self.budget = budget

    def bytes(self) -> int:
        return sum(SIZES[s.layer][s.level] for s in self.there)

    def evict(self, gone: Segment, held: list[Lease]) -> None:
        assert self.there.pop(gone), "evicted while on its way"
        assert gone._replace(level=gone.level + 1) not in self.there, "not from the top"
        assert not any(holds(lease, gone) for lease in held), "evicted in use"

    def take(self, lease: Lease, held: list[Lease]) -> None:
        for gone in lease.evict:
            self.evict(gone, [*held, lease])
        for new in lease.load:
            assert new not in self.there
            assert not new.level or new._replace(level=new.level - 1) in self.there
            self.there[new] = False
            assert self.bytes() <= self.budget
        for want in lease.wants:
            assert all(
                Segment(lease.layer, want.expert, i) in self.there for i in range(want.depth)
            )
