"""Weights of a model for `model.forward`: nested from a store, or plain float32 from a checkpoint.

The float32 form is the oracle side: what the model computes when nothing is quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from functools import cache, partial
from itertools import accumulate
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from . import kernels
from .checkpoint import Checkpoint
from .layout import dense_layout
from .loader.arena import Arena
from .loader.resident import read_dense
from .model import Layer, Linears, Weights
from .reference import silu
from .store import Store
from .types import F32, I32, I64, ModelConfig

Bools = NDArray[np.bool_]

EMBED_ROWS = 4096
"""Rows of a float32 embedding read at a time."""

EXPERT_ROWS = 256
"""Rows that go through a float32 expert at a time."""


class NestedLinears:
    """Nested matrices that share their input, multiplied in one native call."""

    def __init__(self, pool: kernels.Pool, matrices: Sequence[kernels.NestedMatrix]) -> None:
        self._pool = pool
        self._matrices = list(matrices)

    def __call__(self, x: F32) -> list[F32]:
        return kernels.linear(self._pool, x, self._matrices)


class FloatSource(Protocol):
    """Where float32 weights come from: a Checkpoint, which reads them each time, or InMemory."""

    @property
    def config(self) -> ModelConfig: ...

    def tensor(self, name: str, *, rows: tuple[int, int] | None = None) -> F32: ...

    def expert(self, layer: int, expert: int, /) -> tuple[F32, F32, F32]: ...


class InMemory:
    """A checkpoint whose weights are read once and kept."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.config = checkpoint.config
        self._checkpoint = checkpoint
        self._tensors: dict[str, F32] = {}
        self._experts: dict[tuple[int, int], tuple[F32, F32, F32]] = {}

    def tensor(self, name: str, *, rows: tuple[int, int] | None = None) -> F32:
        """As Checkpoint.tensor."""
        if name not in self._tensors:
            self._tensors[name] = self._checkpoint.tensor(name)
        whole = self._tensors[name]
        return whole if rows is None else whole[slice(*rows)]

    def expert(self, layer: int, expert: int) -> tuple[F32, F32, F32]:
        """As Checkpoint.expert."""
        at = layer, expert
        if at not in self._experts:
            self._experts[at] = self._checkpoint.expert(layer, expert)
        return self._experts[at]


class RowBlocks:
    """How the rows of a batch are dealt out to float32 products, on `threads` threads.

    BLAS rounds by the shape of a product. Multiplied in blocks of their own, rows get the same bits
    whatever else is in the batch.

    sizes: rows of each block, in order; a batch of another number of rows is one block.
    step: called after each block, by the caller's thread.
    """

    def __init__(
        self,
        sizes: Sequence[int] = (),
        threads: Executor | None = None,
        step: Callable[[], None] = lambda: None,
    ) -> None:
        ends = list(accumulate(sizes))
        self._slices = [slice(end - n, end) for n, end in zip(sizes, ends, strict=True)]
        self._rows = ends[-1] if ends else 0
        self._threads = threads
        self._step = step

    def each(self, rows: int, work: Callable[[slice], None]) -> None:
        """Call `work` with the rows of every block."""
        blocks = self._slices if rows == self._rows else [slice(0, rows)]
        if self._threads is None or len(blocks) == 1:
            for block in blocks:
                work(block)
                self._step()
        else:
            for _ in self._threads.map(work, blocks):  # raises what the work raised
                self._step()


class FloatLinears:
    """float32 matrices that share their input, read anew from `source` for every product.

    Attributes:
        names: of the matrices.
    """

    def __init__(self, source: FloatSource, names: Sequence[str], blocks: RowBlocks) -> None:
        self.names = names
        self._source, self._blocks = source, blocks

    def __call__(self, x: F32) -> list[F32]:
        return [self._product(x, self._source.tensor(name)) for name in self.names]

    def _product(self, x: F32, w: F32) -> F32:
        out = np.empty((len(x), len(w)), np.float32)

        def multiply(block: slice) -> None:
            np.matmul(x[block], w.T, out=out[block])

        self._blocks.each(len(x), multiply)
        return out


class FloatHead:
    """The float32 output matrix, read at the first product and then kept."""

    def __init__(self, source: FloatSource, name: str) -> None:
        self._read = partial(source.tensor, name)
        self._matrix: F32 | None = None

    def __call__(self, x: F32) -> list[F32]:
        if self._matrix is None:
            self._matrix = self._read()
        return [x @ self._matrix.T]


class FloatExperts:
    """Unquantized experts, one read from `source` at a time: the oracle of the quantized ones."""

    def __init__(self, source: FloatSource, blocks: RowBlocks | None = None) -> None:
        self._source, self._blocks = source, blocks or RowBlocks()

    def __call__(self, layer: int, x: F32, ids: I32, weights: F32) -> F32:
        y = np.zeros_like(x)
        for e in np.unique(ids):
            self._add(y, self._source.expert(layer, int(e)), x, ids == e, weights)
        return y

    def _add(
        self, y: F32, expert: tuple[F32, F32, F32], x: F32, chosen: Bools, weights: F32
    ) -> None:
        """y += weight * expert(x) for the (token, slot) pairs that chose this expert."""
        gate, up, down = expert

        def work(block: slice) -> None:
            tokens, slots = np.nonzero(chosen[block])
            for first in range(0, len(tokens), EXPERT_ROWS):
                token, slot = (a[first : first + EXPERT_ROWS] for a in (tokens, slots))
                h = x[block][token]
                mid = (silu((h @ gate.T).astype(np.float64)) * (h @ up.T)).astype(np.float32)
                # a token takes an expert once, so no row is added to twice
                y[block][token] += (mid @ down.T) * weights[block][token, slot][:, None]

        self._blocks.each(len(x), work)


def from_store(store: Store, pool: kernels.Pool, arena: Arena, level_index: int) -> Weights:
    """Dense weights of a store, nested linears read into `arena` at one level."""

    @cache
    def nested(name: str) -> kernels.NestedMatrix:
        rows, cols = store.tensors[name].shape
        segments = read_dense(store, arena, name, level_index)
        return kernels.NestedMatrix.of(dense_layout(rows, cols, store.quant), segments)

    def linears(*names: str) -> Linears:
        return NestedLinears(pool, [nested(name) for name in names])

    embed = nested("embed")
    head = embed if store.config.tie_word_embeddings else nested("lm_head")

    def lookup(ids: I64) -> F32:
        return kernels.decode_rows(embed, ids)

    layers = []
    for i in range(store.config.num_hidden_layers):
        layer = _layer(store.config, i, store.read_f32, linears)
        if kernels.fused():
            layer = replace(layer, fused=_fused(store.config, i, layer, nested))
        layers.append(layer)
    return Weights(
        store.config, lookup, layers, store.read_f32("norm"), NestedLinears(pool, [head])
    )


def _fused(
    config: ModelConfig, i: int, layer: Layer, nested: Callable[[str], kernels.NestedMatrix]
) -> kernels.DecoderLayer:
    """Layer i up to its experts, from the same vectors and matrices as `layer`."""
    p = f"layers.{i}."
    names = {m: p + m for m in ("q", "k", "v", "o")}
    if layer.gate_up is not None:
        mlp = p if layer.shared_router is None else p + "shared_"
        names |= {m: mlp + m for m in ("gate", "up", "down")}
    floats = {f"{name}_bias": bias for name, bias in layer.biases.items()}
    for name in ("input_norm", "post_norm", "q_norm", "k_norm", "router", "shared_router"):
        value = getattr(layer, name)
        if value is not None:
            floats[name] = value
    matrices = {m: nested(name) for m, name in names.items()}
    return kernels.DecoderLayer(config, i, floats, matrices)


def from_checkpoint(source: FloatSource, blocks: RowBlocks | None = None) -> Weights:
    """Dense weights in float32. Norms, biases and routers are read here and kept, matrices when
    they are used and, but for the head, each time again: see FloatSource."""
    config, blocks = source.config, blocks or RowBlocks()

    def linears(*names: str) -> Linears:
        return FloatLinears(source, names, blocks)

    def lookup(ids: I64) -> F32:
        out = np.empty((len(ids), config.hidden_size), np.float32)
        for first in range(0, config.vocab_size, EMBED_ROWS):
            rows = np.flatnonzero((ids >= first) & (ids < first + EMBED_ROWS))
            if len(rows):
                stop = min(first + EMBED_ROWS, config.vocab_size)
                out[rows] = source.tensor("embed", rows=(first, stop))[ids[rows] - first]
        return out

    layers = [_layer(config, i, source.tensor, linears) for i in range(config.num_hidden_layers)]
    head = FloatHead(source, "embed" if config.tie_word_embeddings else "lm_head")
    return Weights(config, lookup, layers, source.tensor("norm"), head)


def _layer(
    config: ModelConfig, i: int, floats: Callable[[str], F32], linears: Callable[..., Linears]
) -> Layer:
    """Layer i from readers of float32 tensors and of (groups of) linears by canonical name."""
    p = f"layers.{i}."
    qk = config.qk_norm != "none"
    dense = i in config.dense_layers
    shared = not dense and config.shared_expert_intermediate_size > 0
    mlp = p + "shared_" if shared else p
    return Layer(
        input_norm=floats(p + "input_norm"),
        post_norm=floats(p + "post_norm"),
        qkv=linears(p + "q", p + "k", p + "v"),
        out=linears(p + "o"),
        q_norm=floats(p + "q_norm") if qk else None,
        k_norm=floats(p + "k_norm") if qk else None,
        biases={b: floats(f"{p}{b}_bias") for b in config.biases},
        router=None if dense else floats(p + "router"),
        shared_router=floats(p + "shared_router") if shared else None,
        gate_up=linears(mlp + "gate", mlp + "up") if dense or shared else None,
        down=linears(mlp + "down") if dense or shared else None,
    )
