"""Leases that overlap, are broken off in mid-read, and budgets that change under them."""

from __future__ import annotations

import numpy as np
import pytest
from plain_worth import PlainWorth
from residency_arena import EXPERTS, LAYERS, LEVELS, SIZES, TOP_K, Arena, holds

from edgemoe.errors import MemoryBudgetError, UsageError
from edgemoe.loader.policies import ByWorth, LeastRecentlyUsed
from edgemoe.loader.residency import Lease, Residency, Segment, Want


def one_layer(budget: int) -> Residency:
    return Residency([[100, 50, 50]], EXPERTS, budget, LeastRecentlyUsed(1, EXPERTS))


def taken(cache: Residency, *wants: tuple[int, int]) -> Lease:
    lease = cache.acquire(0, [Want(*want) for want in wants])
    assert lease is not None
    return lease


def segments(expert: int, *levels: int) -> tuple[Segment, ...]:
    return tuple(Segment(0, expert, level) for level in levels)


def test_two_leases_on_the_same_missing_expert() -> None:
    """Two microbatches: what one is loading is not loaded for the other, who can see it land."""
    cache = one_layer(400)
    first = taken(cache, (0, 2))
    second = taken(cache, (0, 3), (1, 1))
    assert first.load == segments(0, 0, 1)
    assert second.load == segments(0, 2) + segments(1, 0)
    assert (second.wanted_bytes, second.load_bytes) == (300, 150)
    for segment in second.load:
        cache.land(segment)
    assert (cache.ready(0, 0), cache.ready(0, 1)) == (0, 1)
    with pytest.raises(UsageError, match="still being read"):
        cache.release(second)
    cache.land(first.load[1])
    assert cache.ready(0, 0) == 0
    cache.land(first.load[0])
    assert cache.ready(0, 0) == 3
    cache.release(first)
    assert cache.acquire(0, [Want(2, 2)]) is None  # 300 of 400 bytes are still the second's
    cache.release(second)
    assert taken(cache, (2, 3), (3, 2)).evict == segments(0, 2, 1, 0) + segments(1, 0)


def test_a_lease_is_released_by_the_one_who_has_it() -> None:
    cache = one_layer(400)
    first = taken(cache, (0, 1))
    cache.land(first.load[0])
    second = taken(cache, (0, 1))
    cache.release(second)
    with pytest.raises(UsageError, match="is not held"):
        cache.release(second)
    assert cache.acquire(0, [Want(1, 3), Want(2, 2)]) is None  # the first still holds its own
    cache.release(first)
    assert taken(cache, (1, 3), (2, 2)).evict == segments(0, 0)


def test_what_was_broken_off_is_settled() -> None:
    cache = one_layer(1000)
    lease, other = taken(cache, (0, 3), (1, 3), (2, 1)), taken(cache, (0, 2), (3, 2))
    for segment in segments(0, 0, 1) + segments(2, 0):
        cache.land(segment)
    cache.settle([[2, 0, 1, 0, 0, 0]])
    assert cache.claimed(0) == [2, 0, 1, 0, 0, 0]
    assert [cache.ready(0, e) for e in range(4)] == [2, 0, 1, 0]
    assert cache.used_bytes == 250
    for gone in (lease, other):
        with pytest.raises(UsageError, match="is not held"):
            cache.release(gone)
    with pytest.raises(UsageError, match="is not being read"):
        cache.land(Segment(0, 3, 0))
    assert taken(cache, (0, 3), (1, 1)).load == segments(0, 2) + segments(1, 0)


def test_a_smaller_budget_evicts_what_the_policy_gives_up_first() -> None:
    cache = one_layer(600)
    for expert in (0, 1, 2):
        wants = [Want(expert, 3)]
        cache.observe(0, wants)
        lease = taken(cache, (expert, 3))
        for segment in lease.load:
            cache.land(segment)
        cache.release(lease)
    held = taken(cache, (0, 2))
    assert cache.resize(149) is None
    assert (cache.budget, cache.used_bytes) == (600, 600)
    assert cache.resize(350) == segments(0, 2) + segments(1, 2, 1, 0)
    assert (cache.budget, cache.used_bytes) == (350, 350)
    assert cache.resize(150) == segments(2, 2, 1, 0)
    assert cache.claimed(0) == [2, 0, 0, 0, 0, 0]
    with pytest.raises(MemoryBudgetError, match="room for 150"):
        cache.acquire(0, [Want(1, 3)])
    cache.release(held)
    assert cache.resize(900) == ()
    assert taken(cache, (1, 3), (2, 3), (3, 3), (4, 3)).evict == segments(0, 1, 0)
    with pytest.raises(UsageError, match="holds nothing"):
        cache.resize(0)


def test_books_against_an_arena_where_reads_fail_and_budgets_change() -> None:
    rng = np.random.default_rng(11)
    cache = Residency(SIZES, EXPERTS, 700, ByWorth(LAYERS, EXPERTS, LEVELS, TOP_K))
    arena = Arena(700)
    held: list[Lease] = []
    lost = shrunk = refused = 0
    for turn in range(3000):
        layer = turn // 3 % LAYERS
        wants = [
            Want(int(e), int(rng.integers(1, LEVELS + 1))) for e in rng.permutation(EXPERTS)[:TOP_K]
        ]
        cache.observe(layer, wants)
        lease = cache.acquire(layer, wants)
        if lease is not None:
            arena.take(lease, held)
            held.append(lease)
        on_their_way = [s for s, landed in arena.there.items() if not landed]
        for at in rng.permutation(len(on_their_way))[: rng.integers(8)]:
            cache.land(on_their_way[at])
            arena.there[on_their_way[at]] = True
        if rng.random() < 0.2:
            budget = int(rng.integers(600, 1500))
            before = cache.claimed(0), cache.used_bytes, cache.budget
            gone = cache.resize(budget)
            if gone is None:
                refused += 1
                assert before == (cache.claimed(0), cache.used_bytes, cache.budget)
            else:
                shrunk += bool(gone)
                arena.budget = budget
                for segment in gone:
                    arena.evict(segment, held)
        if held and (lease is None or len(held) > 3):
            done = held.pop(int(rng.integers(len(held))))
            low = [s for s, landed in arena.there.items() if not landed and holds(done, s)]
            if not low:
                cache.release(done)
                continue
            held.clear()
            depths = np.zeros((LAYERS, EXPERTS), int)
            for segment in sorted(s for s, landed in arena.there.items() if landed):
                depths[segment[:2]] += segment.level == depths[segment[:2]]
            cache.settle(depths.tolist())
            left = {s for s in arena.there if s.level < depths[s[:2]]}
            lost += len(arena.there) - len(left)
            arena.there = dict.fromkeys(left, True)
        assert cache.used_bytes == arena.bytes() <= cache.budget
        for owner in range(LAYERS):
            have = [sum(s[:2] == (owner, e) for s in arena.there) for e in range(EXPERTS)]
            assert cache.claimed(owner) == have
    assert min(lost, shrunk, refused) > 20


@pytest.mark.parametrize("weighted", [False, True])
def test_decisions_are_those_of_the_plain_policy(weighted: bool) -> None:
    """Over runs of layers, steps out of order, and rounds that evict nothing."""
    rng = np.random.default_rng(weighted)
    layers, experts, levels = 5, 12, 4
    sizes = rng.integers(30, 90, (layers, levels)).tolist()
    worth = rng.uniform(0.5, 2, (layers, experts, levels)) if weighted else None
    pair = [
        Residency(sizes, experts, 6000, policy(layers, experts, levels, 3, worth))
        for policy in (ByWorth, PlainWorth)
    ]
    evicted = 0
    for turn in range(1500):
        layer = turn % layers if rng.random() < 0.9 else int(rng.integers(layers))
        hot = turn // 300  # now and then other experts, so that some rounds find everything
        picked = (hot + rng.permutation(4 if turn % 300 < 100 else experts)[:3]) % experts
        wants = [Want(int(e), int(rng.integers(1, levels + 1))) for e in picked]
        found = []
        for cache in pair:
            cache.observe(layer, wants)
            lease = cache.acquire(layer, wants)
            assert lease is not None
            for segment in lease.load:
                cache.land(segment)
            cache.release(lease)
            found.append(lease)
        assert found[0] == found[1]
        evicted += len(found[0].evict)
    assert evicted > 1000
