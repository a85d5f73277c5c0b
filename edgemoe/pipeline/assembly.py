"""Experts put together as settings say: what is streamed, how, and at which levels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .. import kernels
from ..hebf.loads import Order, hottest_bit_first, on_demand, shortest_makespan
from ..loader.guard import Guard
from ..loader.policies import ByProfile, ByWorth, LeastFrequentlyUsed, LeastRecentlyUsed
from ..loader.residency import Policy, Want
from ..loader.streaming import Span, StreamedExperts
from ..mwq import sensitivity
from ..store import Store
from ..types import I64, Streaming
from .ahead import Guess, LookAhead
from .bit_router import BitRouter, ExpertLevels, GateGains, OneLevel
from .early import EarlyReads, in_turn
from .edge_moe import levels_for_good, read_profile, reads_at_start
from .mean_bits import MeanBits
from .streamed import StreamedMixture

ORDERS: dict[str, Order] = {
    "shortest": shortest_makespan,
    "hebf": hottest_bit_first,
    "fifo": on_demand,
}


@dataclass(frozen=True)
class Choices:
    """Who decides: which level each demand gets, what leaves memory, and what is read at start."""

    router: BitRouter
    policy: Policy
    at_start: list[tuple[int, Want]]


def choices(
    store: Store, level: int, mean_bits: float | None, read_price: float, streaming: Streaming
) -> Choices:
    """For the experts of a store up to a level (its index), with settings as of engine.load.

    Raises:
        UsageError: the profile that a policy needs cannot be used.
    """
    config, bits = store.config, store.quant.expert_levels
    layers, experts = len(config.moe_layers), config.num_experts
    if streaming.profile is not None:
        profile = read_profile(streaming.profile, store)
        return _edge_moe(store, level, mean_bits, profile)
    router: BitRouter = OneLevel(level)
    if mean_bits is not None:
        gains = GateGains(
            config.moe_layers,
            bits,
            sensitivity.of_store(store),
            sensitivity.costs_of_store(store),
        )
        per_token = layers * config.num_experts_per_tok
        router = MeanBits(gains, bits, mean_bits, read_price, per_token)
    policy: Policy = LeastFrequentlyUsed(layers, experts)
    if streaming.policy == "worth":
        policy = ByWorth(layers, experts, len(bits), config.num_experts_per_tok)
    elif streaming.policy == "lru":
        policy = LeastRecentlyUsed(layers, experts)
    at_start = in_turn(config.moe_layers, experts, router.early_depth) if streaming.preload else []
    return Choices(router, policy, at_start)


def _edge_moe(store: Store, level: int, mean_bits: float | None, profile: I64) -> Choices:
    levels = np.full(profile.shape, level, np.int32)
    if mean_bits is not None:
        levels = levels_for_good(store, mean_bits)
    router = ExpertLevels(dict(zip(store.config.moe_layers, levels, strict=True)))
    return Choices(router, ByProfile(profile), reads_at_start(store, profile, levels))


def streamed_mixture(
    store: Store,
    pool: kernels.Pool,
    budget_bytes: int,
    level: int,
    chosen: Choices,
    streaming: Streaming,
    guess: Guess | None = None,
    guard: Guard | None = None,
    limit: float = 0.0,
    span: Span | None = None,
) -> StreamedMixture:
    """All layers' experts of a store up to a level (its index), streamed through so many bytes.

    guess: at what the next layer wants; None: nothing is read ahead. guard: asked between tokens;
    None: nothing is given back. limit: bytes a second to read at most; 0: no limit.

    Raises:
        MemoryBudgetError: the budget cannot hold the largest segment.
    """
    source = StreamedExperts(store, budget_bytes, chosen.policy, level, limit=limit, span=span)
    ahead = None if guess is None else LookAhead(guess)
    return StreamedMixture(
        pool,
        source,
        chosen.router,
        store.quant.expert_levels,
        ORDERS[streaming.order],
        overlap=streaming.overlap,
        early=EarlyReads(source, chosen.router.early_depth, ahead, chosen.at_start),
        guard=guard,
        span=span,
    )
