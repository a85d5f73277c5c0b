"""Which levels fit under a memory ceiling when everything is resident."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .. import kernels
from ..errors import MemoryBudgetError
from ..types import Budget, ModelConfig

MIB = 1 << 20


@dataclass(frozen=True)
class Footprint:
    """Bytes of a model's parts, as they will lie in memory.

    weights(level index, dense level index) are all weights; kv_cache is that of a whole context.
    """

    weights: Callable[[int, int], int]
    kv_cache: int
    scratch: int
    process: int


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


def budget(footprint: Footprint, ceiling: int, level_index: int, dense_level_index: int) -> Budget:
    """How a run at these levels spends its ceiling."""
    return Budget(
        ceiling=ceiling,
        process=footprint.process,
        weights=footprint.weights(level_index, dense_level_index),
        kv_cache=footprint.kv_cache,
        scratch=footprint.scratch,
        margin=margin(ceiling),
    )


def smallest_ceiling(parts: Budget) -> int:
    """The smallest ceiling under which the same parts fit, whose margin grows with it."""
    bare = parts.needed - parts.margin
    return max(bare + 48 * MIB, -(-bare * 100 // 97) + 1)


def choose_level(
    footprint: Footprint,
    ceiling: int,
    ctx_size: int,
    levels: tuple[int, ...],
    dense_levels: tuple[int, ...],
    bits: int | None,
    dense_bits: int | None,
    describe: Callable[[int], str],
) -> tuple[int, int, Budget]:
    """(bits, dense bits, budget) of the highest level that fits, or of the one asked for.

    `levels` are those experts can be read at, `dense_levels` those of dense linears, which are read
    at 8 bits with experts at 8, else at 6, unless `dense_bits` says so.

    Raises:
        MemoryBudgetError: nothing fits; names the smallest ceiling that would do.
    """
    tried: list[tuple[int, int, Budget]] = []
    for level in (bits,) if bits is not None else tuple(reversed(levels)):
        dense = dense_bits if dense_bits is not None else max(dense_levels[-2], level)
        parts = budget(footprint, ceiling, levels.index(level), dense_levels.index(dense))
        if parts.needed <= ceiling:
            return level, dense, parts
        tried.append((level, dense, parts))
    level, dense, parts = tried[-1]
    needed = smallest_ceiling(parts)
    raise MemoryBudgetError(
        f"--mem {describe(ceiling)} is too little: {level}-bit experts with {dense}-bit dense "
        f"weights and a context of {ctx_size} tokens need {describe(needed)}; give --mem "
        f"{-(-needed // MIB)}M or more"
        + (", or fewer --bits" if bits is not None and bits > levels[0] else ""),
        needed_bytes=needed,
        budget_bytes=ceiling,
    )
