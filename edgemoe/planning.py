"""How a store is run under a ceiling: its levels, its prefill chunk, and where the memory goes."""

from __future__ import annotations

from dataclasses import replace

from . import kernels
from .cpu_attn.kv_cache import cache_bytes
from .errors import KernelError, StoreError
from .loader import budget as memory
from .loader.resident import dense_bytes, expert_bytes, float_bytes
from .loader.slots import budget_for
from .loader.streaming import books_bytes
from .perfmodel import fit
from .store import Store
from .types import RunPlan

PREFILL_CHUNKS = (128, 256, 512)
"""Tokens a prefill step takes at once. More share each expert's weights, but need more memory: the
level is chosen with the fewest, then the most that still fit under the ceiling are taken."""

_CHUNK_SHARE = 16
"""One part in so many of the memory of streamed experts may go to a larger chunk."""


def plan(
    store: Store,
    wish: fit.Wish,
    ceiling: int,
    ctx_size: int,
    threads: int,
    kv_type: str,
    *,
    sequences: int = 1,
    reserve: int = 0,
) -> RunPlan:
    """The best way to run a store that fits.

    sequences: contexts kept at once. reserve: bytes under the ceiling that the caller will use.

    Raises:
        MemoryBudgetError: nothing fits. StoreError: groups that the kernels cannot read.
    """
    cfg, quant = store.config, store.quant
    dense = {t.layout for t in store.tensors.values() if t.layout is not None}
    experts = set(map(store.expert_layout, cfg.moe_layers))

    def scratch(chunk: int, streamed: bool) -> int:
        pool = kernels.scratch_bytes(cfg, experts, dense, threads, chunk, in_parts=streamed)
        if streamed:  # what experts gave, and where, until all have
            pool += 4 * chunk * cfg.num_experts_per_tok * (cfg.hidden_size + 1)
        return pool + fit.activation_bytes(cfg, chunk) + reserve

    first, *larger = (min(chunk, ctx_size) for chunk in PREFILL_CHUNKS)
    try:
        least = scratch(first, False)
    except KernelError as exc:
        raise StoreError(f"{store.path}: {exc}; convert its checkpoint again") from None
    footprint = fit.Footprint(
        dense=lambda level: dense_bytes(store, level) + float_bytes(store),
        experts=lambda level: expert_bytes(store, level),
        least_cache=lambda level: budget_for(store, level, cfg.num_experts_per_tok),
        whole_cache=lambda level: budget_for(store, level),
        streaming=books_bytes(store) + scratch(first, True) - least,
        kv_cache=sequences * cache_bytes(cfg, ctx_size, kv_type),
        scratch=least,
        process=memory.rss_bytes(),
    )
    bits, dense_bits, parts, streamed = fit.choose(
        footprint, ceiling, ctx_size, quant.expert_levels, quant.levels, wish, memory.format_size
    )
    spare = max(ceiling - parts.needed, 0)
    if streamed and wish.cache is None:
        least_cache = footprint.least_cache(quant.expert_levels.index(bits))
        spare += max(min(parts.experts // _CHUNK_SHARE, parts.experts - least_cache), 0)
    chunk, spent = first, parts
    for size in larger:
        more = scratch(size, streamed) - scratch(first, streamed)
        if more <= spare:
            taken = max(more - max(ceiling - parts.needed, 0), 0)
            chunk = size
            spent = replace(parts, scratch=parts.scratch + more, experts=parts.experts - taken)
    return RunPlan(
        bits, dense_bits, ctx_size, chunk, threads, kv_type, streamed, spent, wish.mean_bits
    )
