"""Attention and its cache against the twins: bits of the plain one, values of the float64 one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edgemoe import kernels, reference, reference_attention
from edgemoe.cpu_attn.kv_cache import KVCache, OnePass, cache_bytes
from edgemoe.errors import KernelError, UsageError
from edgemoe.kernels import dispatch
from edgemoe.kv_layout import BLOCK, KV_TYPES, KVLayout
from edgemoe.types import F32, U8, ModelConfig

TYPES = ["f32", *KV_TYPES]

CONFIG = ModelConfig(
    model_type="qwen3_moe",
    vocab_size=1,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=24,
    num_experts=1,
    num_experts_per_tok=1,
    moe_intermediate_size=8,
    norm_topk_prob=True,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)


@pytest.fixture(params=[1, 2, 3])
def pool(request: pytest.FixtureRequest) -> kernels.Pool:
    return kernels.new_pool(request.param)


def filled(pool: kernels.Pool, layout: KVLayout, k: F32, v: F32, step: int | None = None) -> U8:
    """A layer that holds k and v, written `step` positions at a time; the rest is NaN."""
    (data,) = layout.allocate(1)
    data[:] = 0xFF
    for at in range(0, len(k), step or len(k)):
        part = slice(at, at + (step or len(k)))
        kernels.kv_write(pool, layout, data, k[part].copy(), v[part].copy(), at)
    return data


def equal(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a.view(np.uint32), b.view(np.uint32))


def rows(rng: np.random.Generator, *shape: int) -> F32:
    return rng.standard_normal(shape).astype(np.float32)


SHAPES = [(16, 4, 4), (20, 6, 2), (64, 3, 1), (80, 4, 4), (128, 8, 1), (256, 4, 2)]


@pytest.mark.parametrize("kv_type", TYPES)
@pytest.mark.parametrize(("d", "heads", "kv_heads"), SHAPES)
@pytest.mark.parametrize("window", [None, 1, 5, 70, 300])
@pytest.mark.parametrize("sunk", [False, True])
def test_equals_the_plain_twin(
    isa: str, kv_type: str, d: int, heads: int, kv_heads: int, window: int | None, sunk: bool
) -> None:
    """Bit for bit, at once, in parts and token by token, for 1, 2 and 3 threads."""
    rng = np.random.default_rng(d + heads)
    n, positions = 9, 330
    k, v = rows(rng, positions, kv_heads, d), rows(rng, positions, kv_heads, d)
    q = rows(rng, n, heads, d) * np.float32(3)
    q[2] *= np.float32(1e4)  # all the weight goes to one position
    sinks = rows(rng, heads) if sunk else None
    start, scale = positions - n, d**-0.5
    want = reference_attention.attention(q, k, v, start, scale, window, sinks, kv_type)
    layout = KVLayout(kv_type, kv_heads, d, positions + 7)
    for threads in (1, 2, 3):
        pool = kernels.new_pool(threads)
        data = filled(pool, layout, k, v)
        for step in (n, 4, 1):
            got = [
                kernels.attention(
                    pool, q[i : i + step], layout, data, start + i, scale, window, sinks
                )
                for i in range(0, n, step)
            ]
            assert equal(np.concatenate(got), want), (threads, step)


@pytest.mark.parametrize("kv_type", TYPES)
def test_a_prefill_equals_its_rows(isa: str, kv_type: str, pool: kernels.Pool) -> None:
    """Many tiles and splits: rows of a prefill of 600, of its chunks, and of the twin."""
    rng = np.random.default_rng(6)
    d, heads, kv_heads, n = 64, 4, 2, 600
    k, v, q = rows(rng, n, kv_heads, d), rows(rng, n, kv_heads, d), rows(rng, n, heads, d)
    layout = KVLayout(kv_type, kv_heads, d, n)
    data = filled(pool, layout, k, v, step=77)
    assert np.array_equal(data, filled(pool, layout, k, v))
    whole = kernels.attention(pool, q, layout, data, 0, 0.125)
    chunks = [
        kernels.attention(pool, q[i : i + 129], layout, data, i, 0.125) for i in range(0, n, 129)
    ]
    assert equal(whole, np.concatenate(chunks))
    for i in (0, 1, 63, 64, 255, 256, 599):
        want = reference_attention.attention(
            q[i : i + 1], k[: i + 1], v[: i + 1], i, 0.125, kv_type=kv_type
        )
        assert equal(whole[i : i + 1], want)
        single = kernels.attention(pool, q[i : i + 1], layout, data, i, 0.125)
        assert equal(single, want)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("window", [None, 5, 300])
@pytest.mark.parametrize("sunk", [False, True])
def test_float32_is_near_float64(heads: int, kv_heads: int, window: int | None, sunk: bool) -> None:
    rng = np.random.default_rng(heads)
    pool = kernels.new_pool(2)
    k, v, q = (
        rows(rng, 700, kv_heads, 128),
        rows(rng, 700, kv_heads, 128),
        rows(rng, 40, heads, 128),
    )
    sinks = rows(rng, heads) + 4 if sunk else None
    layout = KVLayout("f32", kv_heads, 128, 700)
    got = kernels.attention(pool, q, layout, filled(pool, layout, k, v), 660, 0.2, window, sinks)
    want = reference.attention(q, k, v, 660, 0.2, window, sinks)
    assert (np.abs(got - want) <= 1e-5 * np.abs(want).max(axis=-1, keepdims=True)).all()


def test_what_rounding_costs() -> None:
    rng = np.random.default_rng(0)
    pool = kernels.new_pool(2)
    k, v, q = rows(rng, 500, 2, 128), rows(rng, 500, 2, 128), rows(rng, 20, 4, 128)
    want = reference.attention(q, k, v, 480, 128**-0.5)
    for kv_type, limit in (("f32", 1e-6), ("f16", 1e-3), ("int8", 2e-2)):
        layout = KVLayout(kv_type, 2, 128, 500)
        got = kernels.attention(pool, q, layout, filled(pool, layout, k, v), 480, 128**-0.5)
        assert np.linalg.norm(got - want) <= limit * np.linalg.norm(want)


def test_extreme_scores(isa: str) -> None:
    pool = kernels.new_pool(2)
    k = np.zeros((400, 1, 16), np.float32)
    k[3] = 1e4
    v = np.arange(400, dtype=np.float32).reshape(400, 1, 1).repeat(16, axis=2)
    q = np.ones((1, 1, 16), np.float32)
    for kv_type in TYPES:
        layout = KVLayout(kv_type, 1, 16, 400)
        data = filled(pool, layout, k, v)
        out = kernels.attention(pool, q, layout, data, 399, 1.0)
        assert np.allclose(out, 3.0)
        sunk = kernels.attention(pool, q, layout, data, 399, 1.0, sinks=np.array([1e9], np.float32))
        assert (np.abs(sunk) < 1e-30).all()
        same = kernels.attention(
            pool, q, layout, data, 399, 1.0, sinks=np.array([-1e9], np.float32)
        )
        assert np.allclose(same, out)


@pytest.mark.parametrize("kv_type", TYPES)
@pytest.mark.parametrize("d", [1, 8, 20, 64, 72])
def test_what_is_stored(isa: str, kv_type: str, d: int) -> None:
    """The bytes of a cache are those of kv_layout.py, rows of zeros and of extremes among them."""
    rng = np.random.default_rng(d)
    n, heads = 70, 3
    k, v = rows(rng, n, heads, d), rows(rng, n, heads, d) * 30
    k[0], v[0], k[1], v[1] = 0.0, 1e-44, 1e6, -7e4
    k[2] = np.resize(np.array([127, 0.5, 1.5, -2.5, 126.5], np.float32), (heads, d))
    layout = KVLayout(kv_type, heads, d, n)
    data = filled(kernels.new_pool(2), layout, k, v)
    assert layout.block_bytes == dispatch.native.kv_block_bytes(layout.kind, d)
    assert layout.blocks == 2
    dtype = {"f32": np.float32, "f16": np.float16, "int8": np.int8}[kv_type]
    size, padded = np.dtype(dtype).itemsize, -(-d // 16) * 16
    keys, values = (reference_attention.stored(a, kv_type) for a in (k, v))
    for h in range(heads):
        for i in range(n):
            block = data[h, i // BLOCK]
            got = block[: BLOCK * (d + padded) * size].view(dtype)
            panels = got[: BLOCK * d].reshape(4, d, 16)
            assert np.array_equal(panels[i % BLOCK // 16, :, i % 16], keys.elements[i, h])
            row = got[BLOCK * d :].reshape(padded // 16, BLOCK, 16)[:, i % BLOCK].reshape(-1)
            assert np.array_equal(row[:d], values.elements[i, h])
            assert not row[d:].any()
            if keys.scale is not None and values.scale is not None:
                scales = block[BLOCK * (d + padded) :].view(np.float32).reshape(2, BLOCK)
                assert scales[0, i % BLOCK] == keys.scale[i, h]
                assert scales[1, i % BLOCK] == values.scale[i, h]


def test_codes_by_hand() -> None:
    x = np.array([127, 0.5, 1.5, -2.5, 126.5, -0.4], np.float32)
    kept = reference_attention.stored(x[None], "int8")
    assert kept.scale is not None and kept.scale[0] == 1
    assert kept.elements.tolist() == [[127, 0, 2, -2, 126, 0]]


def test_a_cache_is_what_the_budget_counts() -> None:
    for kv_type, size in (("f32", 4), ("f16", 2), ("int8", 1)):
        for capacity in (1, 64, 65, 1000):
            blocks = -(-capacity // 64)
            block = 64 * (24 + 32) * size + (512 if kv_type == "int8" else 0)
            want = 2 * 2 * blocks * block + 64
            assert cache_bytes(CONFIG, capacity, kv_type) == want
            assert KVCache(CONFIG, capacity, kv_type)._data.nbytes == want - 64


@pytest.mark.parametrize("kv_type", TYPES)
def test_a_cache_can_be_rewound(kv_type: str) -> None:
    """What was stored beyond the end leaves no trace."""
    rng = np.random.default_rng(0)
    pool = kernels.new_pool(2)
    q, k, v = rows(rng, 90, 4, 24), rows(rng, 90, 2, 24), rows(rng, 90, 2, 24)
    fresh, used = KVCache(CONFIG, 90, kv_type), KVCache(CONFIG, 90, kv_type)
    used.attend(pool, 0, q[::-1].copy(), k[::-1].copy(), v[::-1].copy())
    used.advance(90)
    used.rewind(0)
    for at in (0, 40):
        part = slice(at, at + 40)
        a, b = (c.attend(pool, 0, q[part], k[part], v[part]) for c in (fresh, used))
        assert equal(a, b)
        fresh.advance(40)
        used.advance(40)
    with pytest.raises(UsageError, match="80 tokens and 11 more exceed the context of 90"):
        fresh.attend(pool, 0, q[:11], k[:11], v[:11])


def test_one_pass_is_a_float32_cache() -> None:
    rng = np.random.default_rng(0)
    pool = kernels.new_pool(2)
    config = replace(CONFIG, sliding_window=33)
    q, k, v = rows(rng, 90, 4, 24), rows(rng, 90, 2, 24), rows(rng, 90, 2, 24)
    once = OnePass(config).attend(pool, 1, q, k, v)
    assert equal(once, KVCache(config, 90, "f32").attend(pool, 1, q, k, v))
    want = reference.attention(q, k, v, 0, 24**-0.5, 33)
    assert np.abs(once - want).max() < 1e-5


def test_refusals() -> None:
    pool = kernels.new_pool(1)
    layout = KVLayout("f16", 2, 8, 10)
    (data,) = layout.allocate(1)
    q, k = np.zeros((2, 4, 8), np.float32), np.zeros((2, 2, 8), np.float32)
    kernels.kv_write(pool, layout, data, k, k, 0)
    kernels.attention(pool, q, layout, data, 0, 1.0)
    sinks = np.zeros(3, np.float32)
    for call in (
        lambda: kernels.attention(pool, q, layout, data, 9, 1.0),
        lambda: kernels.attention(pool, q, layout, data, -1, 1.0),
        lambda: kernels.attention(pool, q[:0], layout, data, 0, 1.0),
        lambda: kernels.attention(pool, q[:, :3].copy(), layout, data, 0, 1.0),
        lambda: kernels.attention(pool, q, layout, data, 0, 1.0, window=0),
        lambda: kernels.attention(pool, q, layout, data, 0, 1.0, sinks=sinks),
        lambda: kernels.attention(pool, q.astype(np.float64), layout, data, 0, 1.0),
        lambda: kernels.attention(pool, q, KVLayout("int8", 2, 8, 10), data, 0, 1.0),
        lambda: kernels.kv_write(pool, layout, data, k, k, 9),
        lambda: kernels.kv_write(pool, layout, data, k[:0], k[:0], 0),
        lambda: kernels.kv_write(pool, layout, data, k, k[:1], 0),
        lambda: kernels.kv_write(pool, layout, data[:1], k, k, 0),
        lambda: kernels.stream_read(pool, np.zeros(100, np.uint8)),
    ):
        with pytest.raises(KernelError):
            call()
    for wrong in ("f64", ""):
        with pytest.raises(UsageError, match="must be f16 or int8"):
            KVLayout(wrong, 2, 8, 10)
    with pytest.raises(UsageError, match="at least 1"):
        KVCache(CONFIG, 0)


def test_scratch_is_bounded() -> None:
    """What a forward pass is budgeted for is never exceeded."""
    rng = np.random.default_rng(0)
    for heads, kv_heads, d in ((16, 16, 64), (8, 1, 128), (32, 4, 32)):
        layout = KVLayout("f16", kv_heads, d, 3000)
        (data,) = layout.allocate(1)
        for threads in (1, 2, 7):
            bound = dispatch.native.attention_scratch(threads, 128, heads, kv_heads, d)
            pool = kernels.new_pool(threads)
            for n in (1, 2, 7, 64, 128):
                q = rows(rng, n, heads, d)
                kernels.attention(pool, q, layout, data, 3000 - n, 1.0)
            assert pool.scratch_bytes <= bound


def test_stream_read_sums(pool: kernels.Pool) -> None:
    layout = KVLayout("f32", 5, 64, 1000)
    data = layout.allocate(3).reshape(-1)
    data[:] = np.random.default_rng(0).integers(0, 256, data.size)
    want = int(data.view(np.uint64).sum(dtype=np.uint64))
    assert kernels.stream_read(pool, data) == want
