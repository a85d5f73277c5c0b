"""How a run spends its ceiling: at which level experts are read, and whether all are kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from .. import kernels
from ..errors import MemoryBudgetError
from ..types import Budget, ModelConfig

MIB = 1 << 20


STREAMED_LEVEL = 4
"""Bits of experts that are streamed where nothing else is asked for: the fewest that most models
take without harm. Where all experts fit, more bits are taken, or fewer."""


_SLACK_MIB = 1
"""Added to the floor that a refusal names: what a process takes at start differs by run."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of a model's parts, as they will lie in memory.

    dense: of all but the experts, by level index of dense linears. experts: of all experts, by
    level index. least_cache, whole_cache: of streamed experts, the least a run can do with and the
    most it can use, by level index. streaming: what streaming needs beside. kv_cache: of whole
    contexts.
    """

    dense: Callable[[int], int]
    experts: Callable[[int], int]
    least_cache: Callable[[int], int]
    whole_cache: Callable[[int], int]
    streaming: int
    kv_cache: int
    scratch: int
    process: int


class Choice(NamedTuple):
    """Levels in bits, how memory is spent, and whether experts are streamed."""

    bits: int
    dense_bits: int
    budget: Budget
    streamed: bool


def activation_bytes(config: ModelConfig, tokens: int) -> int:
    """Bytes of the arrays that a forward pass of `tokens` tokens keeps at once, at most, beside the
    scratch of its pool; and of what follows it, sampling."""
    slots, hidden = config.num_experts_per_tok, config.hidden_size
    inter = max(config.intermediate_size, config.shared_expert_intermediate_size)
    # The residual stream and what is to be added to it; of this layer and the last one, the normed
    # stream, what an MLP gives, and ids and weights of experts; angles of positions.
    width = (6 if inter else 4) * hidden + 4 * slots + 4 * config.head_dim
    if not kernels.fused():
        heads = 3 * config.num_attention_heads + 4 * config.num_key_value_heads
        attention = heads * config.head_dim
        mixture = slots * (hidden + 32)  # pairs of tokens and experts, sorted
        width += hidden + max(attention, 3 * inter, mixture) + config.num_experts
    # Sampling sorts the vocabulary in float64 with its indices.
    return 4 * tokens * width + 64 * config.vocab_size


def margin(ceiling: int) -> int:
    """What stays unspent under a ceiling: 48 MiB or 3 %, whichever is more."""
    return max(48 * MIB, ceiling * 3 // 100)


def smallest_ceiling(parts: Budget) -> int:
    """The smallest ceiling under which the same parts fit, whose margin grows with it."""
    bare = parts.needed - parts.margin
    return max(bare + 48 * MIB, -(-bare * 100 // 97) + 1)


class Wish(NamedTuple):
    """What a user asked for; None leaves the choice to us.

    bits, dense_bits: levels. exact: no lower level than the highest there is, or `bits`, whatever
    the memory. cache: bytes for streamed experts. mean_bits: of demands, which get any level.
    """

    bits: int | None = None
    dense_bits: int | None = None
    exact: bool = False
    cache: int | None = None
    mean_bits: float | None = None


def choose(
    footprint: Footprint,
    ceiling: int,
    ctx_size: int,
    levels: tuple[int, ...],
    dense_levels: tuple[int, ...],
    wish: Wish,
    describe: Callable[[int], str],
) -> Choice:
    """The highest level at which all experts fit, or the one asked for, streamed if need be.

    `levels` are those experts can be read at, `dense_levels` those of dense linears, which are read
    at 8 bits with experts at 8, else at 6, unless `dense_bits` says so.

    Raises:
        MemoryBudgetError: nothing fits; names the smallest ceiling that would do.
    """

    def parts(level: int, experts: int, more: int = 0) -> tuple[int, Budget]:
        dense = wish.dense_bits if wish.dense_bits is not None else max(dense_levels[-2], level)
        return dense, Budget(
            ceiling=ceiling,
            process=footprint.process,
            weights=footprint.dense(dense_levels.index(dense)),
            experts=experts,
            kv_cache=footprint.kv_cache,
            scratch=footprint.scratch + more,
            margin=margin(ceiling),
        )

    fixed = wish.bits
    if fixed is None and (wish.exact or wish.mean_bits is not None):
        fixed = levels[-1]
    # What a token takes at least, where the memory decides which levels it gets.
    usual = next((b for b in levels if b >= (wish.mean_bits or levels[-1])), levels[-1])
    too_much: list[Choice] = []
    if wish.cache is None:
        for level in (fixed,) if fixed is not None else tuple(reversed(levels)):
            dense, spent = parts(level, footprint.experts(levels.index(level)))
            if spent.needed <= ceiling:
                return Choice(level, dense, spent, False)
            too_much.append(Choice(level, dense, spent, False))
    low = tuple(level for level in reversed(levels) if level <= STREAMED_LEVEL)
    for level in (fixed,) if fixed is not None else low:
        index = levels.index(level)
        least = footprint.least_cache(levels.index(min(level, usual)))
        least = least if wish.cache is None else wish.cache
        dense, spent = parts(level, least, footprint.streaming)
        room = ceiling - spent.needed
        if room >= 0:
            most = footprint.whole_cache(index) if wish.cache is None else wish.cache
            return Choice(
                level, dense, replace(spent, experts=max(least, min(least + room, most))), True
            )
        too_much.append(Choice(level, dense, spent, True))
    # Keeping all experts of a small model takes less than what streaming needs beside them.
    level, dense, spent, streamed = min(too_much, key=lambda each: each.budget.needed)
    needed = smallest_ceiling(spent)
    fewer = fixed is not None and fixed > levels[0]
    kept = f"{level}-bit experts that come and go" if streamed else f"all {level}-bit experts"
    raise MemoryBudgetError(
        f"--mem {describe(ceiling)} is too little: {dense}-bit dense weights, a context of "
        f"{ctx_size} tokens and {describe(spent.experts)} for {kept} need {describe(needed)}; give "
        f"--mem {-(-needed // MIB) + _SLACK_MIB}M or more"
        + (", or fewer --bits" if fewer else "")
        + (", or a smaller --cache" if wish.cache is not None else ""),
        needed_bytes=needed,
        budget_bytes=ceiling,
    )
