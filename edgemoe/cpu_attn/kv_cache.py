"""The KV cache of one sequence, and attention over it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache, lru_cache

import numpy as np

from .. import kernels
from ..errors import UsageError
from ..kv_layout import KVLayout
from ..types import F32, ModelConfig


def layout_of(config: ModelConfig, capacity: int, kv_type: str) -> KVLayout:
    """How a model's layers keep the keys and values of `capacity` positions."""
    return KVLayout(kv_type, config.num_key_value_heads, config.head_dim, capacity)


def cache_bytes(config: ModelConfig, capacity: int, kv_type: str) -> int:
    """Bytes of a KVCache that is full."""
    return layout_of(config, capacity, kv_type).nbytes(config.num_hidden_layers)


ROPE_BLOCK = 64
"""Positions whose angles are computed at once where they come one by one."""


class AttentionState(ABC):
    """What attention knows of one sequence; `length` counts the tokens already part of it."""

    def __init__(self, config: ModelConfig) -> None:
        multiplier = config.attention_multiplier
        self._config = config
        self._scale = config.head_dim**-0.5 if multiplier is None else multiplier
        self._windows = [
            None if i in config.full_attention_layers else config.sliding_window
            for i in range(config.num_hidden_layers)
        ]
        self.length = 0

    @abstractmethod
    def place(self, layer: int, n: int) -> kernels.KVPlace:
        """Where a layer's keys and values lie, with room for n tokens after the first `length`.

        Raises:
            UsageError: the tokens do not fit.
        """

    def attend(self, pool: kernels.Pool, layer: int, q: F32, k: F32, v: F32) -> F32:
        """Attend from the tokens that follow `length`, whose keys and values are k and v.

        q: float32 [n, heads, d]; k, v: float32 [n, kv_heads, d], which are stored. Returns float32
        [n, heads, d]. `length` itself moves with `advance`, once all layers have seen these tokens.

        Raises:
            UsageError: the tokens do not fit.
        """
        at, start = self.place(layer, len(q)), self.length
        kernels.kv_write(pool, at.layout, at.data, k, v, start)
        window = self._windows[layer]
        return kernels.attention(pool, q, at.layout, at.data, start, self._scale, window)

    def advance(self, n: int) -> None:
        """The n tokens just attended from are now part of the sequence."""
        self.length += n


class OnePass(AttentionState):
    """A sequence that comes in one piece, in float32: no layer's keys and values are kept."""

    def place(self, layer: int, n: int) -> kernels.KVPlace:
        """As AttentionState says, at the start of the sequence."""
        if self.length:
            raise UsageError("a one-pass sequence cannot be continued: use a KVCache")
        layout = layout_of(self._config, n, "f32")
        return kernels.KVPlace(layout, layout.allocate(1)[0])


class KVCache(AttentionState):
    """Keys and values of one sequence of up to `capacity` tokens, laid out as kv_layout.py says.

    kv_type: "f16", "int8", or "f32", which rounds nothing. Pages are touched as positions fill, so
    a long context costs memory only once it is used.

    Raises:
        UsageError: an unknown type, or no capacity.
    """

    def __init__(self, config: ModelConfig, capacity: int, kv_type: str = "f16") -> None:
        super().__init__(config)
        layout = layout_of(config, capacity, kv_type)
        self._data = layout.allocate(config.num_hidden_layers)
        self._places = [kernels.KVPlace(layout, data) for data in self._data]
        self.capacity = capacity

    def place(self, layer: int, n: int) -> kernels.KVPlace:
        """As AttentionState says.

        Raises:
            UsageError: the tokens do not fit.
        """
        if self.length + n > self.capacity:
            raise UsageError(
                f"{self.length} tokens and {n} more exceed the context of {self.capacity}: "
                "give a larger --ctx-size"
            )
        return self._places[layer]

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens.

        Raises:
            UsageError: there are fewer.
        """
        if not 0 <= length <= self.length:
            raise UsageError(f"cannot go back to {length} tokens from {self.length}")
        self.length = length


def rope_tables(config: ModelConfig, positions: np.ndarray) -> tuple[F32, F32]:
    """cos, sin float32 [n, head_dim / 2] of position * theta^(-2i / head_dim).

    Frequencies and angles are rounded to float32 as in the models' training code, so that long
    contexts turn by the same angles there and here.
    """
    head = config.head_dim, config.rope_theta
    if len(positions) == 1:
        block, row = divmod(int(positions[0]), ROPE_BLOCK)
        cos, sin = _rope_block(*head, block)
        return cos[row : row + 1], sin[row : row + 1]
    return _rope(*head, positions)


@lru_cache(maxsize=8)
def _rope_block(head_dim: int, theta: float, block: int) -> tuple[F32, F32]:
    """The tables of ROPE_BLOCK positions, of which decoding takes one after the other."""
    return _rope(head_dim, theta, np.arange(block * ROPE_BLOCK, (block + 1) * ROPE_BLOCK))


def _rope(head_dim: int, theta: float, positions: np.ndarray) -> tuple[F32, F32]:
    frequency = _frequencies(head_dim, theta)
    angle = (positions.astype(np.float32)[:, None] * frequency).astype(np.float64)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


@cache
def _frequencies(head_dim: int, theta: float) -> F32:
    exponent = np.arange(head_dim // 2, dtype=np.float32) * np.float32(2.0 / head_dim)
    out: F32 = (1.0 / theta ** exponent.astype(np.float64)).astype(np.float32)
    return out
