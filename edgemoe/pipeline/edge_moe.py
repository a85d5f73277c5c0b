"""EdgeMoE's choices on our engine, to compare with (arXiv 2308.14352): bits of each expert for good
by its sensitivity, what a profile says is used most read first and kept, and nothing learnt."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

import numpy as np

from ..errors import UsageError, shown
from ..loader.policies import hottest, static_levels
from ..loader.residency import Want
from ..mwq import sensitivity
from ..store import Store
from ..types import I32, I64


def read_profile(path: Path, store: Store) -> I64:
    """How often each expert was used before: int64 [layers with experts, experts], a .npy file.

    Raises:
        UsageError: it cannot be read, or is not a profile of this store's experts.
    """
    shape = len(store.config.moe_layers), store.config.num_experts
    try:
        with path.open("rb") as file:
            found = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as exc:
        raise UsageError(f"{shown(path)}: not a .npy file of counts: {exc}") from None
    if found.shape != shape or found.dtype.kind not in "iu" or (found < 0).any():
        raise UsageError(
            f"{shown(path)}: expected counts of {shape[0]} layers and {shape[1]} experts, whole "
            f"numbers of at least 0, not {found.dtype} of shape {found.shape}"
        )
    out: I64 = found.astype(np.int64)
    return out


def levels_for_good(store: Store, mean_bits: float) -> I32:
    """Level index of each expert, int32 [layers with experts, experts]: all together take what they
    would at `mean_bits`, between the levels on either side."""
    bits, config = store.quant.expert_levels, store.config
    sizes = [store.expert_layout(layer).segment_sizes for layer in config.moe_layers]
    loss = sensitivity.of_store(store)
    if loss is None:
        each = 4.0 ** -np.asarray(bits, np.float64)
        loss = np.broadcast_to(each, (len(sizes), config.num_experts, len(bits)))
    target = sum(
        float(np.interp(mean_bits, bits, list(accumulate(row)))) * config.num_experts
        for row in sizes
    )
    return static_levels(loss, sizes, int(target))


def reads_at_start(store: Store, profile: I64, levels: I32) -> list[tuple[int, Want]]:
    """Layers and experts to read before anything is asked for: the most used first."""
    layers = store.config.moe_layers
    return [
        (layers[at], Want(expert, int(levels[at, expert]) + 1)) for at, expert in hottest(profile)
    ]
