"""What a token costs, counted from the layouts: bytes of weights read, multiply-adds done."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from ..arch.gguf_names import gguf_name
from ..checkpoint.gguf_file import read_parts
from ..errors import UnsupportedError
from ..layout import RecordLayout
from ..store import Store
from ..types import ModelConfig

_EXPERTS = re.compile(r"blk\.\d+\.ffn_(gate|up|down)(_exps|\.\d+)\.weight")
"""Tensors of all experts of a layer or, in old files, of one."""


@dataclass(frozen=True)
class TokenBytes:
    """Bytes of weights that decoding one token reads.

    experts: those a token takes, in all layers. dense: all other matrices but the last. head: the
    output matrix. embedding: one row. float32: routers, norms and biases.
    """

    experts: int
    dense: int
    head: int
    embedding: int
    float32: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.experts + self.dense + self.head + self.embedding + self.float32


@dataclass(frozen=True)
class Products:
    """Integer multiply-adds: `body` for every token, `head` where logits are wanted."""

    body: int
    head: int


def bytes_read(layout: RecordLayout, level_index: int) -> int:
    """Bytes of a record that computing with it at a level reads: the planes up to it with their
    scales, but not the shifts of lower levels."""
    total = sum(layout.segment_sizes[: level_index + 1])
    for m in range(len(layout.matrices)):
        for step in range(layout.matrix_level(m, level_index)):
            at = layout.scale_parts(m, step)
            total -= at["end"] - at.get("shift", at["end"])
    return total


def traffic(store: Store, level_index: int, dense_level_index: int) -> TokenBytes:
    """Of a store with experts and all other matrices at these levels."""
    config = store.config
    nested = {name: t.layout for name, t in store.tensors.items() if t.layout is not None}
    read = {name: bytes_read(layout, dense_level_index) for name, layout in nested.items()}
    head = _head(config)
    return TokenBytes(
        experts=config.num_experts_per_tok
        * sum(bytes_read(store.expert_layout(i), level_index) for i in config.moe_layers),
        dense=sum(size for name, size in read.items() if name not in ("embed", head)),
        head=read[head],
        embedding=read["embed"] // config.vocab_size,
        float32=sum(t.size for t in store.tensors.values() if t.layout is None),
    )


def mean_traffic(store: Store, mean_bits: float, dense_level_index: int) -> TokenBytes:
    """The same with experts of so many bits on average, between the levels on either side."""
    levels = store.quant.expert_levels
    high = next(i for i, bits in enumerate(levels) if bits >= mean_bits)
    above = traffic(store, high, dense_level_index)
    if levels[high] == mean_bits:
        return above
    below = traffic(store, high - 1, dense_level_index)
    part = (mean_bits - levels[high - 1]) / (levels[high] - levels[high - 1])
    return replace(above, experts=round(below.experts + part * (above.experts - below.experts)))


def products(store: Store) -> Products:
    """Of a store, whatever the levels; the routers' float32 products are not counted."""
    config = store.config
    dense = {name: t.layout.weights() for name, t in store.tensors.items() if t.layout is not None}
    head = _head(config)
    experts = config.num_experts_per_tok * sum(
        store.expert_layout(i).weights() for i in config.moe_layers
    )
    others = sum(weights for name, weights in dense.items() if name not in ("embed", head))
    return Products(experts + others, dense[head])


def _head(config: ModelConfig) -> str:
    return "embed" if config.tie_word_embeddings else "lm_head"


def gguf_traffic(path: Path, config: ModelConfig) -> tuple[int, int | None]:
    """Bytes of a GGUF, all parts, and those of weights that a token of this model reads.

    The second is None where a type of tensor is not known here.

    Raises:
        CheckpointError: it is no GGUF, or damaged.
    """
    try:
        headers = read_parts(path)
    except UnsupportedError:
        return path.stat().st_size, None
    file_bytes = sum(h.path.stat().st_size for h in headers)
    sizes = {name: t.nbytes for h in headers for name, t in h.tensors.items()}
    experts = sum(size for name, size in sizes.items() if _EXPERTS.fullmatch(name))
    embed, head = sizes.get(gguf_name("embed"), 0), gguf_name("lm_head")
    others = sum(sizes.values()) - experts - embed
    if head not in sizes:
        others += embed  # llama.cpp multiplies with the embedding then
    used = experts * config.num_experts_per_tok // config.num_experts
    return file_bytes, used + others + embed // config.vocab_size
