"""Weights of a model for `model.forward`: nested from a store, or plain float32 from a checkpoint.

The float32 form is the oracle side: what the model computes when nothing is quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from . import kernels
from .checkpoint import Checkpoint
from .layout import dense_layout
from .loader.arena import Arena
from .loader.resident import read_dense
from .model import Layer, Linears, Weights
from .reference import silu
from .store import Store
from .types import F32, I32, I64, ModelConfig


class NestedLinears:
    """Nested matrices that share their input, multiplied in one native call."""

    def __init__(self, pool: kernels.Pool, matrices: Sequence[kernels.NestedMatrix]) -> None:
        self._pool = pool
        self._matrices = list(matrices)

    def __call__(self, x: F32) -> list[F32]:
        return kernels.linear(self._pool, x, self._matrices)


class FloatLinears:
    """float32 matrices that share their input."""

    def __init__(self, matrices: Sequence[F32]) -> None:
        self._matrices = list(matrices)

    def __call__(self, x: F32) -> list[F32]:
        return [x @ w.T for w in self._matrices]


class FloatExperts:
    """Unquantized experts of a checkpoint, all in memory: the oracle of the quantized ones."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        config = checkpoint.config
        self._experts = {
            (layer, e): checkpoint.expert(layer, e)
            for layer in config.moe_layers
            for e in range(config.num_experts)
        }

    def __call__(self, layer: int, x: F32, ids: I32, weights: F32) -> F32:
        y = np.zeros_like(x)
        for e in np.unique(ids):
            gate, up, down = self._experts[layer, int(e)]
            token, slot = np.nonzero(ids == e)
            h = x[token]
            mid = (silu((h @ gate.T).astype(np.float64)) * (h @ up.T)).astype(np.float32)
            np.add.at(y, token, (mid @ down.T) * weights[token, slot][:, None])
        return y


def from_store(store: Store, pool: kernels.Pool, arena: Arena, level_index: int) -> Weights:
    """Dense weights of a store, nested linears read into `arena` at one level."""

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

    layers = [
        _layer(store.config, i, store.read_f32, linears)
        for i in range(store.config.num_hidden_layers)
    ]
    return Weights(
        store.config, lookup, layers, store.read_f32("norm"), NestedLinears(pool, [head])
    )


def from_checkpoint(checkpoint: Checkpoint) -> Weights:
    """Dense weights of a checkpoint in float32, all in memory."""

    def linears(*names: str) -> Linears:
        return FloatLinears([checkpoint.tensor(name) for name in names])

    config = checkpoint.config
    embed = checkpoint.tensor("embed")
    head = embed if config.tie_word_embeddings else checkpoint.tensor("lm_head")

    def lookup(ids: I64) -> F32:
        return embed[ids]

    layers = [
        _layer(config, i, checkpoint.tensor, linears) for i in range(config.num_hidden_layers)
    ]
    return Weights(config, lookup, layers, checkpoint.tensor("norm"), FloatLinears([head]))


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
