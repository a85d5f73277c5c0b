"""What is one call natively and here a sequence of others: a layer up to its experts, a mixture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .. import numba_backend as ops
from ..types import F32, I32, I64, U8, U64
from .pool import Pool

if TYPE_CHECKING:
    from . import Matrix

_NO_SINKS = np.empty(0, np.float32)


class Layer:
    """A decoder layer without its experts; what it lacks is left out of floats and matrices."""

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        d: int,
        window: int,
        scale: float,
        eps: float,
        clip: float,
        residual: float,
        slots: int,
        normalize: bool,
        floats: dict[str, F32],
        matrices: dict[str, Matrix],
    ) -> None:
        self._heads = {"q": heads, "k": kv_heads, "v": kv_heads}
        self._d, self._window, self._scale = d, window, scale
        self._eps, self._clip, self._residual = eps, clip, residual
        self._normalize = normalize
        self._floats, self._matrices = floats, matrices

    def run(
        self,
        pool: Pool,
        x: F32,
        add: F32,
        cos: F32,
        sin: F32,
        places: Sequence[tuple[U8, int, int, int]],
        h: F32,
        ids: I32,
        weights: F32,
        mlp: F32,
        mlp_gate: F32,
    ) -> None:
        """As em_layer_run in native/edgemoe.h."""
        floats, residual = self._floats, np.float32(self._residual)
        if add.size:
            x += add * residual
        ops.rmsnorm(pool, x, floats["input_norm"], self._eps, h)
        q, k, v = self._project(pool, h, cos, sin)
        attended, row = np.empty_like(q), 0
        for data, kind, start, count in places:
            part = slice(row, row + count)
            ops.kv_write(pool, data, kind, k[part], v[part], start)
            where = (data, kind, start, self._window, self._scale, _NO_SINKS)
            ops.attention(pool, q[part], *where, attended[part])
            row += count
        (y,) = self._linear(pool, attended.reshape(len(x), -1), "o")
        x += y * residual
        ops.rmsnorm(pool, x, floats["post_norm"], self._eps, h)
        if mlp.size:
            gate, up = self._linear(pool, h, "gate", "up")
            ops.silu_mul(gate, up)
            ops.linear(pool, gate, [self._matrices["down"]], [mlp])
        if "router" in floats:
            logits = np.empty((len(x), len(floats["router"])), np.float32)
            ops.linear_f32(pool, h, floats["router"], logits)
            ops.route(logits, self._normalize, ids, weights)
        if mlp_gate.size:
            ops.linear_f32(pool, h, floats["shared_router"], mlp_gate)

    def _project(self, pool: Pool, h: F32, cos: F32, sin: F32) -> list[F32]:
        out = []
        for name, y in zip("qkv", self._linear(pool, h, "q", "k", "v"), strict=True):
            norm = self._floats.get(f"{name}_norm")
            if norm is not None:
                rows = y.reshape(-1, norm.size)
                ops.rmsnorm(pool, rows.copy(), norm, self._eps, rows)
            if self._clip:
                np.clip(y, -self._clip, self._clip, out=y)
            y = y.reshape(len(h), self._heads[name], self._d)
            if name != "v":
                ops.rope(pool, y, cos, sin)
            out.append(y)
        return out

    def _linear(self, pool: Pool, x: F32, *names: str) -> list[F32]:
        """Products with these matrices, biases added."""
        matrices = [self._matrices[name] for name in names]
        out = [np.empty((len(x), m.rows), np.float32) for m in matrices]
        ops.linear(pool, x, matrices, out)
        for name, y in zip(names, out, strict=True):
            if f"{name}_bias" in self._floats:
                y += self._floats[f"{name}_bias"]
        return out


def layer_scratch(
    threads: int,
    n: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    d: int,
    mlp: int,
    experts: int,
    group_units: int,
) -> int:
    """Bytes that the operations of Layer.run need; its own arrays are not of the pool."""
    inputs = (hidden, heads * d, mlp)
    products = [ops.linear_scratch(n, cols, group_units) for cols in inputs if cols]
    return max(*products, ops.attention_scratch(threads, n, heads, kv_heads, d))


def mixture(
    pool: Pool,
    x: F32,
    segments: U64,
    offsets: I64,
    level: int,
    ids: I32,
    weights: F32,
    intermediate: int,
    ahead: int,
    group_units: int,
    y: F32,
) -> bool:
    """As em_mixture in native/edgemoe.h; False: an id has no row, or a row no address."""
    (n, k), pairs = ids.shape, ids.size
    if pairs and not (ids.min() >= 0 and ids.max() < len(segments)):
        return False
    order = np.argsort(ids, axis=None, kind="stable").astype(np.int32)
    used, first = np.unique(ids.reshape(-1)[order], return_index=True)
    if not segments[used, : level + 1].all():
        return False
    levels = np.full(len(used), level, np.int32)
    first_pair = np.append(first, pairs).astype(np.int32)
    pair_out = np.empty((pairs, x.shape[1]), np.float32)
    jobs = (segments[used], offsets, levels, first_pair, order // np.int32(k))
    ops.experts(pool, x, *jobs, intermediate, ahead, group_units, pair_out)
    position = np.empty(pairs, np.int32)
    position[order] = np.arange(pairs, dtype=np.int32)
    ops.combine(pool, pair_out, position.reshape(n, k), weights, y)
    return True


def mixture_scratch(
    threads: int,
    n: int,
    k: int,
    experts: int,
    hidden: int,
    intermediate: int,
    ahead: int,
    group_units: int,
) -> int:
    """Bytes that `mixture` needs of the pool."""
    return ops.experts_scratch(threads, n, n * k, hidden, intermediate, ahead, group_units)
