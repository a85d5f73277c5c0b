"""The KV cache of one layer, and attention over it."""

from __future__ import annotations

import numpy as np

from ..errors import KernelError
from ..kv_layout import KVLayout
from ..types import F32, U8
from . import dispatch
from .dispatch import Pool, check


class KVPlace:
    """Where a sequence's keys and values of one layer lie, made once and used for every step.

    data: uint8 [kv_heads, blocks, block bytes] as `layout` says. Where the backend runs layers in
    one call (dispatch.fused), `native` is the same for them.

    Raises:
        KernelError: an array of another shape or dtype.
    """

    def __init__(self, layout: KVLayout, data: U8) -> None:
        check("data", data, np.uint8, *layout.shape)
        self.layout, self.data = layout, data
        if dispatch.fused():
            size = layout.head_dim, layout.capacity
            self.native = dispatch.native.KV(data, layout.kind, *size)


def _check_kv(layout: KVLayout, data: U8, start: int, n: int) -> None:
    check("data", data, np.uint8, *layout.shape)
    if n < 1:
        raise KernelError("a batch of no tokens: expected at least one")
    if start < 0 or start + n > layout.capacity:
        raise KernelError(f"start: positions {start}..{start + n} exceed {layout.capacity}")


def kv_write(pool: Pool, layout: KVLayout, data: U8, k: F32, v: F32, start: int) -> None:
    """Store keys and values of positions start, start + 1, ...; k, v float32 [n, kv_heads, d].

    data: uint8 [kv_heads, blocks, block bytes], one layer's (kv_layout.py says how it lies there).
    """
    check("k", k, np.float32, None, layout.kv_heads, layout.head_dim)
    check("v", v, np.float32, *k.shape)
    _check_kv(layout, data, start, len(k))
    dispatch.native.kv_write(pool, data, layout.kind, k, v, start)


_NO_SINKS = np.empty(0, np.float32)


def attention(
    pool: Pool,
    q: F32,
    layout: KVLayout,
    data: U8,
    start: int,
    scale: float,
    window: int | None = None,
    sinks: F32 | None = None,
) -> F32:
    """Causal softmax(q k^T * scale) v of new tokens at positions start, start + 1, ...

    q: float32 [n, heads, d]; data: uint8 [kv_heads, blocks, block bytes], which holds positions
    0 .. start + n - 1; each position sees itself and the `window - 1` before it (None: all).
    sinks: float32 [heads], a score of each head that joins its softmax without a value. Returns
    float32 [n, heads, d], computed as em_attention in native/edgemoe.h says.
    """
    check("q", q, np.float32, None, None, layout.head_dim)
    n, heads = q.shape[:2]
    if layout.kv_heads == 0 or heads % layout.kv_heads:
        raise KernelError(f"q: {layout.kv_heads} KV heads do not divide {heads} heads")
    _check_kv(layout, data, start, n)
    if window is not None and window < 1:
        raise KernelError(f"window: expected at least 1, got {window}")
    if sinks is not None:
        check("sinks", sinks, np.float32, heads)
    out = np.empty_like(q)
    args = (layout.kind, start, window or 0, scale, _NO_SINKS if sinks is None else sinks, out)
    dispatch.native.attention(pool, q, data, *args)
    return out


def stream_read(pool: Pool, data: U8) -> int:
    """Sum modulo 2^64 of the 64-bit words of data: what reading memory alone takes."""
    check("data", data, np.uint8, None)
    if data.nbytes % 64 or data.ctypes.data % 64:
        raise KernelError("data: expected whole cache lines")
    return dispatch.native.stream_read(pool, data)
