"""One readable forward pass. Experts are an injected callable; weights know how to multiply.

Works on a flat batch of tokens: spans say which rows belong to which sequence. Every row's result
depends on its own sequence only, bit for bit, so a batch may be cut and mixed in any way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from . import kernels
from .cpu_attn.kv_cache import AttentionState, rope_tables
from .errors import KernelError, UsageError
from .types import F32, I32, I64, ModelConfig, Pass

Linears = Callable[[F32], list[F32]]
"""float32 [n, cols] -> one float32 [n, rows_m] for each of the matrices that share this input."""


class Experts(Protocol):
    """The mixture part of a layer: sum over slots of weight * expert(x)."""

    def __call__(self, layer: int, x: F32, ids: I32, weights: F32, /) -> F32:
        """x: float32 [n, hidden]; ids int32, weights float32 [n, k] -> float32 [n, hidden].

        All three are the forward pass's own: what is to outlast the call has to be copied.
        """
        ...


@dataclass(frozen=True)
class Layer:
    """One decoder layer; vectors are float32.

    A dense layer has no `router` [experts, hidden]. `gate_up` and `down` are its MLP, or the
    expert that all tokens share, whose sigmoid gate is `shared_router` [1, hidden].
    `fused`: all of the layer but its experts in one call, if its matrices are nested and the
    backend can.
    """

    input_norm: F32
    post_norm: F32
    qkv: Linears
    out: Linears
    q_norm: F32 | None = None
    k_norm: F32 | None = None
    biases: dict[str, F32] = field(default_factory=dict)
    router: F32 | None = None
    shared_router: F32 | None = None
    gate_up: Linears | None = None
    down: Linears | None = None
    fused: kernels.DecoderLayer | None = None


@dataclass(frozen=True)
class Weights:
    """All of a model but its experts. embed: int64 [n] -> float32 [n, hidden]."""

    config: ModelConfig
    embed: Callable[[I64], F32]
    layers: Sequence[Layer]
    norm: F32
    head: Linears


@dataclass(frozen=True)
class Span:
    """The next `count` rows of a batch: tokens that continue the sequence of `cache`.

    mean_bits: that their experts are to have on average, for who chooses levels by token; None: as
    usual.
    """

    cache: AttentionState
    count: int
    mean_bits: float | None = None


def forward(
    weights: Weights,
    experts: Experts,
    pool: kernels.Pool,
    tokens: I64,
    spans: Sequence[Span],
    want: I64,
) -> F32:
    """Logits float32 [len(want), vocab] of the rows `want` of the batch.

    tokens: int64 [n], the rows of all spans one after the other. The caches grow by their spans.
    """
    return logits(weights, pool, hidden(weights, experts, pool, tokens, spans)[want])


def hidden(
    weights: Weights,
    experts: Experts,
    pool: kernels.Pool,
    tokens: I64,
    spans: Sequence[Span],
    watch: Callable[[int, F32], None] | None = None,
) -> F32:
    """What the last layer leaves of every row of the batch: float32 [n, hidden], not yet normed.

    watch: shown each layer's residual stream, float32 [n, hidden], before its feed-forward part.

    Raises:
        UsageError: no tokens, a span without any, or spans that do not add up to the tokens.
    """
    return drive(layers(weights, pool, tokens, spans, watch), experts)


def halves(tokens: I64, spans: Sequence[Span]) -> list[tuple[I64, Sequence[Span]]]:
    """A batch of several sequences as two, of about as many rows: (tokens, spans) of each."""
    ends = np.cumsum([span.count for span in spans])
    cut = int(np.abs(ends[:-1] - len(tokens) / 2).argmin()) + 1
    row = int(ends[cut - 1])
    return [(tokens[:row], spans[:cut]), (tokens[row:], spans[cut:])]


def drive(steps: Pass, experts: Experts) -> F32:
    """What a pass returns with these experts."""
    y: F32 | None = None
    while True:
        try:
            wanted = steps.send(y)
        except StopIteration as end:
            out: F32 = end.value
            return out
        y = experts(*wanted)


def layers(
    weights: Weights,
    pool: kernels.Pool,
    tokens: I64,
    spans: Sequence[Span],
    watch: Callable[[int, F32], None] | None = None,
) -> Pass:
    """`hidden`, step by step."""
    cfg = weights.config
    n = len(tokens)
    rows = [(s.cache.length, s.count) for s in spans]
    counts = [count for _, count in rows]
    if n == 0 or min(counts, default=1) < 1:
        raise UsageError("a batch of no tokens: give at least one, and one to each sequence")
    if sum(counts) != n:
        raise UsageError(f"the spans hold {sum(counts)} tokens, the batch {n}")
    positions = np.concatenate([np.arange(first, first + count) for first, count in rows])
    cos, sin = rope_tables(cfg, positions)
    x = weights.embed(tokens)
    if cfg.embedding_multiplier != 1.0:
        x *= cfg.embedding_multiplier
    fused = watch is None and any(layer.fused is not None for layer in weights.layers)
    batch = kernels.Batch(cfg, x, cos, sin, rows) if fused else None
    y: F32 | None = None
    for i, layer in enumerate(weights.layers):
        if layer.fused is not None and batch is not None:
            part = layer.fused(pool, batch, y, [s.cache.place(i, s.count) for s in spans])
        else:
            part = dense_part(cfg, pool, layer, i, x, y, cos, sin, spans, watch)
        if part.ids is None or part.gates is None:
            y = part.mlp
        else:
            y = yield i, part.h, part.ids, part.gates
        if y is None:
            raise KernelError(f"layer {i} has neither a router nor an MLP")
        if part.mlp is not None and part.mlp_gate is not None:
            kernels.gated_add(y, part.mlp_gate, part.mlp)
    if y is not None:
        if cfg.residual_multiplier != 1.0:
            y *= cfg.residual_multiplier
        x += y
    for s in spans:
        s.cache.advance(s.count)
    return x


def logits(weights: Weights, pool: kernels.Pool, x: F32) -> F32:
    """Logits float32 [n, vocab] of rows of `hidden`."""
    cfg = weights.config
    (out,) = weights.head(kernels.rmsnorm(pool, x, weights.norm, cfg.rms_norm_eps))
    if cfg.logits_scaling != 1.0:
        out /= cfg.logits_scaling
    return out


def dense_part(
    cfg: ModelConfig,
    pool: kernels.Pool,
    layer: Layer,
    index: int,
    x: F32,
    y: F32 | None,
    cos: F32,
    sin: F32,
    spans: Sequence[Span],
    watch: Callable[[int, F32], None] | None = None,
) -> kernels.Routed:
    """A layer up to its experts, in place on x, float32 [n, hidden], to which y, what the last
    layer's feed-forward part gave, is added first. kernels.DecoderLayer does the same at once."""
    n = len(x)
    if y is not None:
        y *= cfg.residual_multiplier
        x += y
    h = kernels.rmsnorm(pool, x, layer.input_norm, cfg.rms_norm_eps)
    q, k, v = _qkv(cfg, pool, layer, h, cos, sin)
    attended = np.empty_like(q)
    row = 0
    for s in spans:
        part = slice(row, row + s.count)
        attended[part] = s.cache.attend(pool, index, q[part], k[part], v[part])
        row += s.count
    (y,) = layer.out(attended.reshape(n, -1))
    y = _biased(layer, "o", y)
    y *= cfg.residual_multiplier
    x += y

    if watch is not None:
        watch(index, x)
    h = kernels.rmsnorm(pool, x, layer.post_norm, cfg.rms_norm_eps)
    ids = gates = mlp = mlp_gate = None
    if layer.gate_up is not None and layer.down is not None:
        (mlp,) = layer.down(kernels.silu_mul(*layer.gate_up(h)))
    if layer.router is not None:
        logits = kernels.linear_f32(pool, h, layer.router)
        ids, gates = kernels.route(logits, cfg.num_experts_per_tok, cfg.norm_topk_prob)
    if layer.shared_router is not None:
        mlp_gate = kernels.linear_f32(pool, h, layer.shared_router)
    return kernels.Routed(h, ids, gates, mlp, mlp_gate)


def _qkv(
    cfg: ModelConfig, pool: kernels.Pool, layer: Layer, h: F32, cos: F32, sin: F32
) -> tuple[F32, F32, F32]:
    """Queries [n, heads, d], keys and values [n, kv_heads, d], normed and rotated."""
    n, d = len(h), cfg.head_dim
    q, k, v = layer.qkv(h)
    q, k, v = _biased(layer, "q", q), _biased(layer, "k", k), _biased(layer, "v", v)
    if layer.q_norm is not None and layer.k_norm is not None:
        # the norm's own width says whether it is over a head or over the whole projection
        q = kernels.rmsnorm(pool, q.reshape(-1, layer.q_norm.size), layer.q_norm, cfg.rms_norm_eps)
        k = kernels.rmsnorm(pool, k.reshape(-1, layer.k_norm.size), layer.k_norm, cfg.rms_norm_eps)
    if cfg.clip_qkv is not None:
        for a in (q, k, v):
            np.clip(a, -cfg.clip_qkv, cfg.clip_qkv, out=a)
    q, k, v = q.reshape(n, -1, d), k.reshape(n, -1, d), v.reshape(n, -1, d)
    kernels.rope(pool, q, cos, sin)
    kernels.rope(pool, k, cos, sin)
    return q, k, v


def _biased(layer: Layer, name: str, y: F32) -> F32:
    bias = layer.biases.get(name)
    return y if bias is None else y + bias
