"""Small models and stores for tests: random content, every tensor a real store has."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgemoe.kernels import crc32c
from edgemoe.layout import PART_ALIGN, align_up, dense_layout, expert_layout
from edgemoe.store import Store, StoreWriter, tensor_shapes
from edgemoe.types import F32, U8, ModelConfig, PlaneRef, QuantSpec

SUPERBLOCK = 4096

TINY = ModelConfig(
    model_type="qwen3_moe",
    vocab_size=40,
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_experts=3,
    num_experts_per_tok=2,
    moe_intermediate_size=36,
    norm_topk_prob=True,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    max_position_embeddings=256,
    tie_word_embeddings=False,
    qk_norm="head",
    intermediate_size=56,
    dense_layers=(1,),
    bos_token_id=1,
    eos_token_ids=(2, 3),
)
"""Layer 1 is dense, so that layer numbers and expert ordinals differ."""

WIDE = replace(TINY, hidden_size=1024, moe_intermediate_size=690, num_experts=2)
"""Experts whose segments are large enough for 4096-byte alignment."""


@dataclass
class Sample:
    """A store on disk and what was put into it."""

    path: Path
    config: ModelConfig
    quant: QuantSpec
    experts: dict[tuple[int, int], list[U8]] = field(default_factory=dict)
    nested: dict[str, list[U8]] = field(default_factory=dict)
    plain: dict[str, F32] = field(default_factory=dict)
    sections: dict[str, bytes] = field(default_factory=dict)


def make_store(path: Path, config: ModelConfig = TINY, seed: int = 0) -> Sample:
    """A store of random segments, with two sections."""
    rng = np.random.default_rng(seed)
    sample = Sample(path, config, QuantSpec())
    sizes = config.hidden_size, config.moe_intermediate_size
    ahead = [(0, 32, sizes[1])[i % 3] for i in range(len(config.moe_layers))]

    def segments(sizes: tuple[int, ...]) -> list[U8]:
        return [rng.integers(0, 256, n, np.uint8) for n in sizes]

    metadata = {"source": "random", "note": "ünï"}
    with StoreWriter(path, config, sample.quant, metadata, ahead) as writer:
        # any order will do
        for layer, columns in reversed(list(zip(config.moe_layers, ahead, strict=True))):
            layout = expert_layout(*sizes, sample.quant, columns)
            for expert in range(config.num_experts):
                sample.experts[layer, expert] = segments(layout.segment_sizes)
                writer.write_expert(layer, expert, sample.experts[layer, expert])
        for name, (kind, shape) in tensor_shapes(config).items():
            if kind == "nested":
                rows, cols = shape
                sizes = dense_layout(rows, cols, sample.quant).segment_sizes
                sample.nested[name] = segments(sizes)
                writer.write_nested(name, (rows, cols), sample.nested[name])
            else:
                sample.plain[name] = rng.standard_normal(shape, np.float32)
                writer.write_f32(name, sample.plain[name])
        sample.sections = {"tokenizer.json": b'{"a": 1}' * 20, "bit_router": rng.bytes(333)}
        for name, data in sample.sections.items():
            writer.add_section(name, data)
        writer.commit()
    return sample


def read(store: Store, ref: PlaneRef) -> bytes:
    """The bytes of one part, verified."""
    out = np.empty(ref.size, np.uint8)
    store.read_into(ref, out)
    return out.tobytes()


def checksum(data: bytes) -> int:
    return crc32c(np.frombuffer(data, np.uint8))


def superblock(
    raw: bytes, offset: int, *, generation: int = 1, length: int | None = None, version: int = 3
) -> bytes:
    """A superblock that points to header bytes `raw`; packed here by hand from docs/FORMAT.md."""
    total = offset + len(raw) if length is None else length
    body = struct.pack(
        "<8sIIQQQQ", b"EDGEMOE\0", version, checksum(raw), generation, offset, len(raw), total
    )
    body = body.ljust(SUPERBLOCK - 4, b"\0")
    return body + struct.pack("<I", checksum(body))


def header_of(data: bytes) -> tuple[int, bytes]:
    """(offset, bytes) of the header that superblock A of this file points to."""
    offset, length = struct.unpack_from("<QQ", data, 24)
    return offset, data[offset : offset + length]


def forge(path: Path, change: Callable[[Any], Any]) -> None:
    """Rewrite a store's header after `change` of its JSON object, with every checksum right.

    `change` edits the object in place, or returns the bytes that shall be the header.
    """
    data = path.read_bytes()
    offset, raw = header_of(data)
    parsed = json.loads(raw)
    changed = change(parsed)
    raw = changed if isinstance(changed, bytes) else json.dumps(parsed).encode()
    offset = align_up(offset, PART_ALIGN)
    path.write_bytes(superblock(raw, offset) * 2 + data[2 * SUPERBLOCK : offset] + raw)
