"""Everything resident: dense linears and experts read once, up to one level each."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..layout import RecordLayout, align_up
from ..store import Store
from ..types import U8, U64
from .arena import Arena

Progress = Callable[[int, int], None]
"""Called with (bytes read, bytes in all)."""


def dense_bytes(store: Store, level_index: int) -> int:
    """Arena bytes of all nested dense tensors at a level."""
    return sum(
        align_up(ref.size, 64)
        for name, entry in store.tensors.items()
        if entry.kind == "nested"
        for ref in store.tensor_segments(name)[: level_index + 1]
    )


def float_bytes(store: Store) -> int:
    """Bytes of all float32 tensors."""
    return sum(
        ref.size
        for name, entry in store.tensors.items()
        if entry.kind == "f32"
        for ref in store.tensor_segments(name)
    )


def expert_bytes(store: Store, level_index: int) -> int:
    """Arena bytes of all experts at a level."""
    return sum(
        align_up(size, 64) * store.config.num_experts
        for layer in store.config.moe_layers
        for size in store.expert_layout(layer).segment_sizes[: level_index + 1]
    )


class ResidentExperts:
    """All experts of a model up to a level, and the address of each of their segments.

    Attributes:
        bits: of each level, those that are not resident too.
    """

    def __init__(
        self, store: Store, arena: Arena, level_index: int, progress: Progress | None = None
    ) -> None:
        self.level_index = level_index
        self.bits = store.quant.expert_levels
        config = store.config
        self._layouts = {layer: store.expert_layout(layer) for layer in config.moe_layers}
        self._address: dict[int, U64] = {}
        self._arena = arena
        sizes = [sum(v.segment_sizes[: level_index + 1]) for v in self._layouts.values()]
        done, total = 0, sum(sizes) * config.num_experts
        for layer in config.moe_layers:
            depth = self._layouts[layer].depth
            table = np.zeros((config.num_experts, depth), np.uint64)
            for expert in range(config.num_experts):
                for i in range(level_index + 1):
                    ref = store.expert_segment(layer, expert, i)
                    slot = arena.take(ref.size)
                    store.read_into(ref, slot)
                    table[expert, i] = slot.ctypes.data
                    done += ref.size
            self._address[layer] = table
            if progress is not None:
                progress(done, total)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that have experts."""
        return tuple(self._layouts)

    def layout(self, layer: int) -> RecordLayout:
        """Of the layer's expert records."""
        return self._layouts[layer]

    def segments(self, layer: int) -> U64:
        """uint64 [experts, levels]: where each segment of the layer's experts lies, 0 if absent."""
        return self._address[layer]


def read_dense(store: Store, arena: Arena, name: str, level_index: int) -> list[U8]:
    """Segments 0 .. level_index of a nested dense tensor, read into the arena."""
    out = []
    for ref in store.tensor_segments(name)[: level_index + 1]:
        slot = arena.take(ref.size)
        store.read_into(ref, slot)
        out.append(slot)
    return out
