"""Records one decoder layer's inputs and outputs for native/tests/test_layer.c.

`python tests/record_layer.py` writes tests/golden/layer.bin: blobs of u32 name length, name, u64
size, bytes. The C test replays the layer on every instruction set, under emulation too, and
compares bits. Record anew only when the documented arithmetic or the record layout changes.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from coded import random_record

from edgemoe import kernels
from edgemoe.cpu_attn.kv_cache import KVCache, rope_tables
from edgemoe.kernels import NestedMatrix
from edgemoe.layout import dense_layout, expert_layout
from edgemoe.types import ModelConfig, QuantSpec

RECORDING = Path(__file__).parent / "golden" / "layer.bin"
TOKENS = 7
CONFIG = ModelConfig(
    model_type="qwen3_moe",
    vocab_size=1,
    hidden_size=72,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=20,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=96,
    norm_topk_prob=True,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)
LEVEL_OF_EXPERT = (0, 2, 3, 4)
DENSE_LEVEL = 4
AHEAD = 32


def record() -> dict[str, np.ndarray]:
    """All blobs, inputs first, each stage's output after them."""
    rng = np.random.default_rng(2026)
    pool, cfg, quant = kernels.new_pool(1), CONFIG, QuantSpec(group_size=64)
    h, heads, kv, d = 72, 4, 2, 20
    blobs: dict[str, np.ndarray] = {
        "dims": np.array(
            [
                TOKENS,
                h,
                heads,
                kv,
                d,
                cfg.num_experts,
                2,
                cfg.moe_intermediate_size,
                2,
                DENSE_LEVEL,
                AHEAD,
            ],
            np.int32,
        ),
        "x": rng.standard_normal((TOKENS, h)).astype(np.float32),
        "norm": rng.uniform(0.5, 1.5, h).astype(np.float32),
        "router": rng.standard_normal((cfg.num_experts, h)).astype(np.float32),
        "expert_levels": np.array(LEVEL_OF_EXPERT, np.int32),
    }
    cos, sin = rope_tables(cfg, np.arange(TOKENS))
    blobs |= {"cos": cos, "sin": sin}
    mats = {}
    for name, rows, cols in [
        ("q", heads * d, h),
        ("k", kv * d, h),
        ("v", kv * d, h),
        ("o", h, heads * d),
    ]:
        layout = dense_layout(rows, cols, quant)
        segments, _ = random_record(layout, rng)
        mats[name] = NestedMatrix.of(layout, segments[: DENSE_LEVEL + 1])
        blobs[f"{name}.offsets"] = layout.part_offsets
        blobs |= {f"{name}.{i}": s for i, s in enumerate(segments)}
    layout = expert_layout(h, cfg.moe_intermediate_size, quant, AHEAD)
    records = [random_record(layout, rng)[0] for _ in range(cfg.num_experts)]
    blobs["expert.offsets"] = layout.part_offsets
    for e, segments in enumerate(records):
        blobs |= {f"expert{e}.{i}": s for i, s in enumerate(segments)}

    x = blobs["x"].copy()
    normed = kernels.rmsnorm(pool, x, blobs["norm"], cfg.rms_norm_eps)
    q, k, v = kernels.linear(pool, normed, [mats["q"], mats["k"], mats["v"]])
    q, k, v = q.reshape(TOKENS, -1, d), k.reshape(TOKENS, -1, d), v.reshape(TOKENS, -1, d)
    kernels.rope(pool, q, cos, sin)
    kernels.rope(pool, k, cos, sin)
    attended = KVCache(cfg, TOKENS).attend(pool, 0, q, k, v)
    x += kernels.linear(pool, attended.reshape(TOKENS, -1), [mats["o"]])[0]
    blobs |= {"out.q": q, "out.attended": attended, "out.middle": x.copy()}
    normed = kernels.rmsnorm(pool, x, blobs["norm"], cfg.rms_norm_eps)
    logits = kernels.linear_f32(pool, normed, blobs["router"])
    ids, weights = kernels.route(logits, 2, True)
    blobs |= {"out.ids": ids, "out.weights": weights}
    pairs = [np.flatnonzero(ids.reshape(-1) == e).astype(np.int32) for e in range(4)]
    used = [e for e in range(4) if len(pairs[e])]
    addresses = np.array([[s.ctypes.data for s in records[e]] for e in used], np.uint64)
    pair = np.concatenate([pairs[e] for e in used])
    pair_out = kernels.experts(
        pool,
        layout,
        normed,
        addresses,
        np.array([LEVEL_OF_EXPERT[e] for e in used], np.int32),
        np.cumsum([0] + [len(pairs[e]) for e in used]).astype(np.int32),
        pair // np.int32(2),
    )
    position = np.empty(TOKENS * 2, np.int32)
    position[pair] = np.arange(TOKENS * 2, dtype=np.int32)
    x += kernels.combine(pool, pair_out, position.reshape(TOKENS, 2), weights)
    return blobs | {"out.pairs": pair_out, "out.x": x}


def encode(blobs: dict[str, np.ndarray]) -> bytes:
    """The file's bytes."""
    parts = []
    for name, array in blobs.items():
        data = np.ascontiguousarray(array).tobytes()
        parts.append(struct.pack("<I", len(name)) + name.encode() + struct.pack("<Q", len(data)))
        parts.append(data)
    return b"".join(parts)


if __name__ == "__main__":
    RECORDING.write_bytes(encode(record()))
