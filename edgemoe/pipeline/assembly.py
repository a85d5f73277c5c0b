"""Experts put together as settings say: what is streamed, how, and at which levels."""

from __future__ import annotations

from .. import kernels
from ..hebf.loads import Order, hottest_bit_first, on_demand, shortest_makespan
from ..loader.guard import Guard
from ..loader.policies import ByWorth, LeastFrequentlyUsed, LeastRecentlyUsed
from ..loader.residency import Policy
from ..loader.streaming import Span, StreamedExperts
from ..mwq import sensitivity
from ..store import Store
from ..types import Streaming
from .ahead import Guess, LookAhead
from .bit_router import BitRouter, GateGains, OneLevel
from .early import EarlyReads
from .mean_bits import MeanBits
from .streamed import StreamedMixture

ORDERS: dict[str, Order] = {
    "shortest": shortest_makespan,
    "hebf": hottest_bit_first,
    "fifo": on_demand,
}


def policy_named(name: str, store: Store) -> Policy:
    """What to evict, one of types.POLICIES, for the experts of a store."""
    config = store.config
    layers, experts = len(config.moe_layers), config.num_experts
    if name == "worth":
        levels = len(store.quant.expert_levels)
        return ByWorth(layers, experts, levels, config.num_experts_per_tok)
    if name == "lru":
        return LeastRecentlyUsed(layers, experts)
    return LeastFrequentlyUsed(layers, experts)


def bit_router(store: Store, level: int, mean_bits: float | None, read_price: float) -> BitRouter:
    """Which level each demand gets: `level` (an index) all, or as many bits as it gains from."""
    if mean_bits is None:
        return OneLevel(level)
    config, bits = store.config, store.quant.expert_levels
    gains = GateGains(config.moe_layers, bits, sensitivity.of_store(store))
    per_token = len(config.moe_layers) * config.num_experts_per_tok
    return MeanBits(gains, bits, mean_bits, read_price, per_token)


def streamed_mixture(
    store: Store,
    pool: kernels.Pool,
    budget_bytes: int,
    level: int,
    router: BitRouter,
    streaming: Streaming,
    guess: Guess | None = None,
    guard: Guard | None = None,
    limit: float = 0.0,
    span: Span | None = None,
) -> StreamedMixture:
    """All layers' experts of a store up to a level (its index), streamed through so many bytes.

    router: which level each demand gets. guess: at what the next layer wants; None: nothing is read
    ahead. guard: asked between tokens; None: nothing is given back. limit: bytes a second to read
    at most; 0: no limit.

    Raises:
        MemoryBudgetError: the budget cannot hold the largest segment.
    """
    policy = policy_named(streaming.policy, store)
    source = StreamedExperts(store, budget_bytes, policy, level, limit=limit, span=span)
    ahead = None if guess is None else LookAhead(guess)
    return StreamedMixture(
        pool,
        source,
        router,
        store.quant.expert_levels,
        ORDERS[streaming.order],
        overlap=streaming.overlap,
        early=EarlyReads(source, router.early_depth, ahead),
        guard=guard,
        span=span,
    )
