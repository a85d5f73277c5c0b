"""Hottest expert first (D2MoE, arXiv 2504.15299, section on HEBF)."""

from __future__ import annotations

import numpy as np

from ..types import I32, Demands


def hottest_first(ids: I32, level_index: I32) -> Demands:
    """Group the (token, slot) pairs of one layer by (expert, level), hottest expert first.

    ids, level_index: int32 [n, k], the expert and the level each token's slot wants. Experts come
    in falling order of the pairs they serve at any level (ties: lower id), and an expert's levels
    in rising order, the base before its refinements.
    """
    experts = ids.reshape(-1).astype(np.int64)
    levels = level_index.reshape(-1)
    heat = np.bincount(experts)[experts]
    order = np.lexsort((levels, experts, -heat))  # stable: pairs ascend within a job
    e, lv = experts[order], levels[order]
    starts = np.flatnonzero(np.r_[True, (e[1:] != e[:-1]) | (lv[1:] != lv[:-1])])
    return Demands(
        expert=e[starts].astype(np.int32),
        level_index=lv[starts].astype(np.int32),
        first_pair=np.r_[starts, len(order)].astype(np.int32),
        pair=order.astype(np.int32),
    )
