"""The books of the arena: exact to the byte at every moment, and what they evict."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from residency_arena import EXPERTS, LAYERS, LEVELS, SIZES, TOP_K, Arena

from edgemoe.errors import MemoryBudgetError, UsageError
from edgemoe.loader import policies
from edgemoe.loader.policies import (
    ByProfile,
    ByWorth,
    LeastFrequentlyUsed,
    LeastRecentlyUsed,
    hottest,
    static_levels,
    worth_of,
)
from edgemoe.loader.residency import Lease, Policy, Residency, Segment, Want

BITS = (2, 3, 4)

MAKERS: dict[str, Callable[[], Policy]] = {
    "worth": lambda: ByWorth(LAYERS, EXPERTS, LEVELS, TOP_K),
    "quality": lambda: ByWorth(LAYERS, EXPERTS, LEVELS, TOP_K, worth_of(BITS, SIZES)),
    "lru": lambda: LeastRecentlyUsed(LAYERS, EXPERTS),
    "lfu": lambda: LeastFrequentlyUsed(LAYERS, EXPERTS),
    "edgemoe": lambda: ByProfile(np.arange(18).reshape(LAYERS, EXPERTS)),
}


def step(cache: Residency, layer: int, *wants: tuple[int, int]) -> Lease:
    """A layer step with everything landed and released."""
    asked = [Want(*w) for w in wants]
    cache.observe(layer, asked)
    lease = cache.acquire(layer, asked)
    assert lease is not None
    for segment in lease.load:
        cache.land(segment)
    cache.release(lease)
    return lease


def one_layer(budget: int, policy: Policy | None = None) -> Residency:
    return Residency([[100, 50, 50]], EXPERTS, budget, policy or LeastRecentlyUsed(1, EXPERTS))


@pytest.mark.parametrize("name", MAKERS)
def test_books_against_an_arena(name: str) -> None:
    """Random steps, two leases at a time, reads that land in any order."""
    rng = np.random.default_rng(3)
    evicted = blocked = partial = 0
    for budget in (400, 555, 1000, 4000):
        cache, arena = Residency(SIZES, EXPERTS, budget, MAKERS[name]()), Arena(budget)
        held: list[Lease] = []
        for turn in range(300):
            layer = turn % LAYERS
            experts = rng.permutation(EXPERTS)[:TOP_K].tolist()
            wants = [Want(e, int(rng.integers(1, LEVELS + 1))) for e in experts]
            before, used = cache.claimed(layer), cache.used_bytes
            cache.observe(layer, wants)
            lease = cache.acquire(layer, wants)
            if lease is None:
                blocked += 1
                assert held and cache.used_bytes == used
                assert cache.claimed(layer) == before
            else:
                arena.take(lease, held)
                held.append(lease)
                missing = [(w.expert, i) for w in wants for i in range(before[w.expert], w.depth)]
                assert [(s.expert, s.level) for s in lease.load] == missing
                assert lease.load_bytes == sum(SIZES[layer][i] for _, i in missing)
                assert lease.wanted_bytes == sum(sum(SIZES[layer][: w.depth]) for w in wants)
                evicted += len(lease.evict)
                partial += any(s.level for s in lease.load) and any(before)
                for at in rng.permutation(len(lease.load)):
                    segment = lease.load[at]
                    assert cache.ready(layer, segment.expert) <= segment.level
                    cache.land(segment)
                    arena.there[segment] = True
                assert all(cache.ready(layer, w.expert) >= w.depth for w in wants)
            assert cache.used_bytes == arena.bytes() <= budget
            if lease is None or len(held) == 2:
                cache.release(held.pop(int(rng.integers(len(held)))))
    assert evicted > 100 and blocked > 10 and partial > 50


def expected_steps(layer: int, owner: int, chance: float) -> float:
    """Layer steps from a step of `layer` until one of `owner` wants it."""
    distance = 1
    while (layer + distance) % LAYERS != owner:
        distance += 1
    return distance + LAYERS * (1 - chance) / chance


@pytest.mark.parametrize("weighted", [False, True])
def test_by_worth_against_its_definition(weighted: bool) -> None:
    rng = np.random.default_rng(5)
    worth = rng.uniform(0.5, 2, (LAYERS, EXPERTS, LEVELS))
    policy = ByWorth(LAYERS, EXPERTS, LEVELS, TOP_K, worth if weighted else None)
    past: list[list[dict[int, int]]] = [[] for _ in range(LAYERS)]
    depths = rng.integers(0, LEVELS + 1, LAYERS * EXPERTS)
    for at, depth in enumerate(depths.tolist()):
        policy.claim(at, depth)
    for turn in range(40):
        layer = turn % LAYERS
        wants = [
            Want(e, int(rng.integers(1, 4))) for e in rng.permutation(EXPERTS)[:TOP_K].tolist()
        ]
        policy.observe(layer, wants)
        past[layer].append(dict(wants))
        rating = policy.drop(layer)
        for at, depth in enumerate(depths.tolist()):
            owner, expert = divmod(at, EXPERTS)
            if not depth:
                assert rating[at] == -np.inf
                continue
            chance = 0.0
            for decay in (policies.FAST, policies.SLOW):
                ages = range(len(past[owner]))
                hits = [s.get(expert, 0) >= depth for s in reversed(past[owner])]
                got = sum(decay**a * hit for a, hit in zip(ages, hits, strict=True))
                prior = policies.PRIOR_STEPS
                of = sum(decay**a for a in ages) + prior
                chance += (got + prior * TOP_K / EXPERTS) / of / 2
            want = expected_steps(layer, owner, chance)
            if weighted:
                want *= worth.mean() / worth[owner, expert, depth - 1]
            assert rating[at] == pytest.approx(want, rel=1e-4)
            assert policy.drop_each(layer, at, depth)[depth] == pytest.approx(rating[at])


def test_a_cycle_larger_than_the_cache() -> None:
    """Every token wants the same, and the cache holds half of it: LRU finds nothing, ever."""
    layers, wants = 8, [(0, 1), (1, 1)]
    found = {}
    for name, policy in (
        ("lru", LeastRecentlyUsed(layers, EXPERTS)),
        ("worth", ByWorth(layers, EXPERTS, 1, TOP_K)),
    ):
        cache = Residency([[100]] * layers, EXPERTS, 100 * layers, policy)
        leases = [step(cache, layer, *wants) for _ in range(30) for layer in range(layers)]
        wanted = sum(v.wanted_bytes for v in leases)
        found[name] = 1 - sum(v.load_bytes for v in leases) / wanted
    assert found["lru"] == 0
    assert found["worth"] > 0.35  # all but the two that the step itself needs could be kept: 7/16


def test_raising_reads_what_is_missing_and_lowering_drops_the_top() -> None:
    cache = one_layer(300, ByWorth(1, EXPERTS, 3, 1))
    assert step(cache, 0, (0, 1)).load == (Segment(0, 0, 0),)
    assert step(cache, 0, (0, 3)).load == (Segment(0, 0, 1), Segment(0, 0, 2))
    lease = step(cache, 0, (1, 2))
    assert lease.evict == (Segment(0, 0, 2),)
    assert cache.claimed(0) == [2, 2, 0, 0, 0, 0]


def test_rivals_drop_whole_experts() -> None:
    cache = one_layer(400)
    for expert in (0, 1, 0, 2):
        last = step(cache, 0, (expert, 3))
    assert last.evict == tuple(Segment(0, 1, i) for i in (2, 1, 0))
    cache = one_layer(400, LeastFrequentlyUsed(1, EXPERTS))
    for expert in (0, 0, 1, 2):
        last = step(cache, 0, (expert, 3))
    assert {s.expert for s in last.evict} == {1}
    cache = one_layer(400, ByProfile([[1, 9, 5, 2, 2, 2]]))
    for expert in (0, 1, 2):
        last = step(cache, 0, (expert, 3))
    assert {s.expert for s in last.evict} == {0}


def test_refuses_what_never_fits() -> None:
    cache = one_layer(399)
    with pytest.raises(MemoryBudgetError, match=r"needs 400 .* for 399: give") as info:
        cache.acquire(0, [Want(0, 3), Want(1, 3)])
    assert (info.value.needed_bytes, info.value.budget_bytes) == (400, 399)
    assert cache.used_bytes == 0 and cache.acquire(0, [Want(0, 3)]) is not None
    with pytest.raises(UsageError, match="holds nothing"):
        one_layer(0)


def test_waits_for_what_others_hold() -> None:
    cache = one_layer(400)
    first = cache.acquire(0, [Want(0, 3)])
    assert first is not None
    assert cache.acquire(0, [Want(1, 3), Want(2, 1)]) is None
    shared = cache.acquire(0, [Want(0, 2), Want(1, 3)])
    assert shared is not None and not shared.evict
    for segment in first.load + shared.load:
        cache.land(segment)
    cache.release(first)
    again = cache.acquire(0, [Want(2, 1)])
    assert again is None  # expert 0 is still held at 150 bytes, 1 at 200
    cache.release(shared)
    assert cache.acquire(0, [Want(2, 1)]) is not None


def test_misuse_is_an_error() -> None:
    cache = one_layer(400)
    with pytest.raises(UsageError, match="wanted twice"):
        cache.acquire(0, [Want(0, 2), Want(0, 1)])
    with pytest.raises(UsageError, match="nothing of an expert is wanted"):
        cache.acquire(0, [Want(0, 2), Want(1, 0)])
    assert cache.used_bytes == 0
    for worth in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(UsageError, match="worth: give finite"):
            ByWorth(1, EXPERTS, 3, 1, worth)
    lease = cache.acquire(0, [Want(0, 2)])
    assert lease is not None
    with pytest.raises(UsageError, match="still being read"):
        cache.release(lease)
    with pytest.raises(UsageError, match="is not being read"):
        cache.land(Segment(0, 0, 2))
    for segment in lease.load:
        cache.land(segment)
    with pytest.raises(UsageError, match="is not being read"):
        cache.land(lease.load[0])
    cache.release(lease)
    with pytest.raises(UsageError, match="is not held"):
        cache.release(lease)


def test_worth_falls_with_the_level() -> None:
    found = worth_of(BITS, SIZES)
    assert found.shape == (LAYERS, 1, LEVELS)
    assert found[0, 0].tolist() == pytest.approx(
        [(1 - 4.0**-2) / 100, (4.0**-2 - 4.0**-3) / 51, (4.0**-3 - 4.0**-4) / 49]
    )
    loss = np.tile([0.4, 0.1, 0.2], (LAYERS, EXPERTS, 1))  # the top level may be worse by chance
    assert worth_of(BITS, SIZES, loss)[1, 2].tolist() == pytest.approx([6.0 / 70, 0.3 / 40, 0])


def test_weights_decide_what_is_dropped() -> None:
    """Refinements of one expert before the base of another that is wanted as often."""
    cache = one_layer(350, ByWorth(1, EXPERTS, 3, 1, worth_of(BITS, [[100, 50, 50]])))
    step(cache, 0, (0, 3), (1, 1))
    assert step(cache, 0, (2, 1)).evict == (Segment(0, 0, 2),)


def test_hottest() -> None:
    assert hottest([[1, 5], [5, 9]]) == [(1, 1), (0, 1), (1, 0), (0, 0)]


def test_static_levels_take_the_best_raises_that_fit() -> None:
    loss = np.array([[[1.0, 0.5, 0.4], [9.0, 1.0, 0.1]]])
    sizes = [[10, 10, 10]]
    found = {t: static_levels(loss, sizes, t).tolist() for t in (20, 29, 30, 40, 50, 60)}
    assert found[20] == found[29] == [[0, 0]]
    assert found[30] == [[0, 1]]
    assert found[40] == [[0, 2]]
    assert found[50] == [[1, 2]]
    assert found[60] == [[2, 2]]
    assert static_levels(loss[:, :, :1], [[10]], 20).tolist() == [[0, 0]]
    with pytest.raises(UsageError, match="19 bytes do not hold"):
        static_levels(loss, sizes, 19)


def test_room_is_made_ahead_of_need() -> None:
    """Two experts, which are a 64th of the budget and not more; nothing that a lease holds."""
    cache = Residency([[1, 1]], 300, 256, LeastRecentlyUsed(1, 300))
    for expert in range(128):
        step(cache, 0, (expert, 2))
    assert cache.used_bytes == 256
    gone = cache.spare(0, 2)
    assert gone == (Segment(0, 0, 1), Segment(0, 0, 0), Segment(0, 1, 1), Segment(0, 1, 0))
    assert cache.used_bytes == 252 and cache.spare(0, 2) == ()
    lease = cache.acquire(0, [Want(200, 2), Want(201, 2)])
    assert lease is not None and lease.evict == ()
    cache.resize(255)
    before = cache.used_bytes
    assert cache.spare(0, 2) == () and cache.used_bytes == before

    cache = Residency([[1, 1]], 300, 256, LeastRecentlyUsed(1, 300))
    all_of_it = cache.acquire(0, [Want(expert, 2) for expert in range(127)])
    assert all_of_it is not None and cache.spare(0, 2) == () and cache.used_bytes == 254
