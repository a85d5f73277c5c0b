"""Float32 operations on what products read and write."""

from __future__ import annotations

import numpy as np

from ..errors import KernelError
from ..types import F32, I32
from . import dispatch
from .dispatch import Pool, check


def rmsnorm(pool: Pool, x: F32, w: F32, eps: float) -> F32:
    """x / sqrt(mean(x^2) + eps) * w over the last axis; x float32 [n, d], w float32 [d]."""
    check("w", w, np.float32, None)
    check("x", x, np.float32, None, w.shape[0])
    y = np.empty_like(x)
    dispatch.native.rmsnorm(pool, x, w, eps, y)
    return y


def silu_mul(gate: F32, up: F32) -> F32:
    """gate * sigmoid(gate) * up, in place on gate, which is returned; float32 [n, d] both."""
    check("gate", gate, np.float32, None, None)
    check("up", up, np.float32, *gate.shape)
    dispatch.native.silu_mul(gate, up)
    return gate


def gated_add(y: F32, gate: F32, x: F32) -> None:
    """y += sigmoid(gate) * x in place; y, x float32 [n, d], gate float32 [n, 1]."""
    check("y", y, np.float32, None, None)
    check("x", x, np.float32, *y.shape)
    check("gate", gate, np.float32, y.shape[0], 1)
    dispatch.native.gated_add(y, gate, x)


def rope(pool: Pool, x: F32, cos: F32, sin: F32) -> None:
    """Rotate halves of every head in place; x [n, heads, d], cos and sin [n, d / 2]."""
    check("x", x, np.float32, None, None, None)
    if x.shape[2] % 2:
        raise KernelError(f"x: head_dim must be even, got {x.shape[2]}")
    check("cos", cos, np.float32, x.shape[0], x.shape[2] // 2)
    check("sin", sin, np.float32, x.shape[0], x.shape[2] // 2)
    dispatch.native.rope(pool, x, cos, sin)


def route(logits: F32, k: int, normalize: bool) -> tuple[I32, F32]:
    """Softmax over experts, then the k largest in falling order (ties: the lower index).

    logits: float32 [n, experts]. Returns (ids int32 [n, k], weights float32 [n, k]); `normalize`
    makes each row of weights sum to 1.
    """
    check("logits", logits, np.float32, None, None)
    n, experts = logits.shape
    if not 1 <= k <= experts:
        raise KernelError(f"k: expected 1 to {experts}, got {k}")
    ids = np.empty((n, k), np.int32)
    weights = np.empty((n, k), np.float32)
    dispatch.native.route(logits, normalize, ids, weights)
    return ids, weights
