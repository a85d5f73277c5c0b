"""How the keys and values of a sequence lie in memory: one array a layer, no room but this counts.

A layer is uint8 [kv_heads, blocks, block bytes]; a block holds the 64 positions from a multiple of
64 on:

    keys     [4, d, 16]                 panels of 16 positions
    values   [ceil(d / 16), 64, 16]     panels of 16 columns, zeros beyond d
    scales   float32 [2, 64]            int8 only: of the keys, then of the values

so that attention reads a head's blocks in one sweep, sixteen columns side by side. The elements:

    f32      as they are
    f16      float16, to nearest, ties to even; beyond +-65504 that value
    int8     x / scale to nearest, ties to even, scale = max|x| / 127 of a head and position
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .errors import UsageError
from .types import U8

BLOCK = 64
"""Positions of a block."""

PANEL = 16
"""Columns of a panel."""

SPLIT = 256
"""Positions whose attention is computed by itself and then merged."""

KV_TYPES = ("f16", "int8")
"""What a model's cache can be stored as; float32 is for references."""

_SIZES = {"f32": 4, "f16": 2, "int8": 1}
_ALIGN = 64


@dataclass(frozen=True)
class KVLayout:
    """Keys and values of one layer: `kv_heads` heads of `head_dim`, for `capacity` positions.

    Raises:
        UsageError: an unknown type, or no positions.
    """

    kv_type: str
    kv_heads: int
    head_dim: int
    capacity: int

    def __post_init__(self) -> None:
        if self.kv_type not in _SIZES:
            raise UsageError(f"the KV type must be {' or '.join(KV_TYPES)}, not {self.kv_type}")
        if self.capacity < 1:
            raise UsageError(f"context size must be at least 1, got {self.capacity}")

    @cached_property
    def kind(self) -> int:
        """The type as the kernels number it (em_kv_type)."""
        return list(_SIZES).index(self.kv_type)

    @property
    def blocks(self) -> int:
        """Blocks of a head."""
        return -(-self.capacity // BLOCK)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of one head."""
        padded = -(-self.head_dim // PANEL) * PANEL
        scales = 2 * BLOCK * 4 if self.kv_type == "int8" else 0
        return BLOCK * (self.head_dim + padded) * _SIZES[self.kv_type] + scales

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """Shape of a layer's uint8 array."""
        return self.kv_heads, self.blocks, self.block_bytes

    def nbytes(self, layers: int) -> int:
        """Bytes of so many layers, as `allocate` takes them."""
        return layers * self.kv_heads * self.blocks * self.block_bytes + _ALIGN

    def allocate(self, layers: int) -> U8:
        """Zeros uint8 [layers, kv_heads, blocks, block bytes], aligned to a cache line.

        Pages are touched when blocks fill: a long context costs memory only once it is used.
        """
        room = np.zeros(self.nbytes(layers), np.uint8)
        start = -room.ctypes.data % _ALIGN
        data = room[start : start + room.nbytes - _ALIGN]
        return data.reshape(layers, *self.shape)
