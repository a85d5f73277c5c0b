"""A layer up to its experts in one call, and a mixture in one call, are the separate kernels."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coded import random_record
from tiny import CONFIGS, make_tiny

import edgemoe
from edgemoe import kernels
from edgemoe.cpu_attn.kv_cache import KVCache, OnePass, rope_tables
from edgemoe.errors import KernelError, UsageError
from edgemoe.kernels.mixture import part_of
from edgemoe.kv_layout import KVLayout
from edgemoe.layout import RecordLayout, expert_layout
from edgemoe.loader.arena import Arena
from edgemoe.model import Span, dense_part
from edgemoe.opened import open_model
from edgemoe.types import QuantSpec
from edgemoe.weights import from_store

HIDDEN, INNER, EXPERTS = 96, 72, 11


@pytest.fixture(scope="module", params=CONFIGS)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("layer")
    make_tiny(directory, request.param)
    edgemoe.convert(directory, directory / "tiny.emoe")
    return directory / "tiny.emoe"


@pytest.mark.parametrize("threads", [1, 3])
def test_one_call_is_the_layer(store: Path, threads: int) -> None:
    """Every layer, on a batch of three sequences of which one is float32 and begins."""
    opened, rng = open_model(store), np.random.default_rng(1)
    cfg, pool = opened.config, kernels.new_pool(threads)
    weights = from_store(opened.store, pool, Arena(1 << 24), 3)
    caches = [
        [KVCache(cfg, 90), OnePass(cfg), KVCache(cfg, 70, "int8")] for _ in ("one call", "separate")
    ]
    for counts in ([40, 6, 1], [1, 3, 60]):
        n = sum(counts)
        both = [[Span(c, count) for c, count in zip(side, counts, strict=True)] for side in caches]
        rows = [(s.cache.length, s.count) for s in both[0]]
        positions = np.concatenate([np.arange(start, start + count) for start, count in rows])
        cos, sin = rope_tables(cfg, positions)
        x = np.empty((n, cfg.hidden_size), np.float32)
        batch = kernels.Batch(cfg, x, cos, sin, rows)
        for i, layer in enumerate(weights.layers):
            assert layer.fused is not None
            x[:] = rng.standard_normal(x.shape)
            add = None if i == 0 else rng.standard_normal(x.shape).astype(np.float32)
            apart = x.copy()
            got = layer.fused(pool, batch, add, [s.cache.place(i, s.count) for s in both[0]])
            want = dense_part(cfg, pool, layer, i, apart, add, cos, sin, both[1])
            assert np.array_equal(x, apart)
            for a, b in zip(got, want, strict=True):
                assert (a is None) == (b is None)
                assert a is None or b is None or np.array_equal(a, b)
        for side in both:
            for s in side:
                s.cache.advance(0 if isinstance(s.cache, OnePass) else s.count)
    opened.close()


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(config, pool, first layer) of a small model."""
    directory = tmp_path_factory.mktemp("one")
    make_tiny(directory, "qwen3_moe")
    edgemoe.convert(directory, directory / "tiny.emoe")
    opened, pool = open_model(directory / "tiny.emoe"), kernels.new_pool(2)
    layer = from_store(opened.store, pool, Arena(1 << 24), 3).layers[0].fused
    opened.close()
    return opened.config, pool, layer


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"x": np.zeros((2, 60), "f4")}, "x: expected shape"),
        ({"x": np.zeros((2, 64))}, "x: expected dtype float32"),
        ({"cos": np.zeros((2, 11), "f4")}, "cos: expected shape"),
        ({"rows": [(0, 1)]}, "expected 2 in all"),
        ({"rows": [(0, 0), (0, 2)]}, "a token or more"),
        ({"rows": []}, "a token or more"),
        ({"rows": [(-1, 2)]}, "positions of at least 0"),
        ({"add": np.zeros((1, 64), "f4")}, "add: expected shape"),
        ({"add": np.zeros((2, 64))}, "add: expected dtype"),
        ({"rows": [(7, 2)]}, "room for its rows"),
        ({"rows": [(0, 1), (0, 1)]}, "each of its sequences"),
        ({"place_head_dim": 16}, "place of this model"),
        ({"batch_head_dim": 16}, "batch of this model"),
        ({"batch_slots": 1}, "batch of this model"),
        ({"shape": (2, 1, 8)}, "data: expected shape"),
    ],
)
def test_wrong_arrays_are_refused(one: Any, change: dict[str, Any], match: str) -> None:
    config, pool, layer = one
    d, rows = change.get("batch_head_dim", config.head_dim), change.get("rows", [(0, 2)])
    slots = change.get("batch_slots", config.num_experts_per_tok)
    of_batch = replace(config, head_dim=d, num_experts_per_tok=slots)
    shape = KVLayout(
        "f16", config.num_key_value_heads, change.get("place_head_dim", config.head_dim), 8
    )
    table = np.zeros((2, d // 2), np.float32)
    x = change.get("x", np.zeros((2, config.hidden_size), np.float32))
    with pytest.raises(KernelError, match=match):
        place = kernels.KVPlace(shape, np.zeros(change.get("shape", shape.shape), np.uint8))
        batch = kernels.Batch(of_batch, x, change.get("cos", table), table, rows)
        layer(pool, batch, change.get("add"), [place])


def test_angles_do_not_depend_on_how_many_are_asked_for(one: Any) -> None:
    positions = np.arange(200)
    together = rope_tables(one[0], positions)
    for position in (0, 1, 63, 64, 130, 199):
        for a, b in zip(rope_tables(one[0], positions[[position]]), together, strict=True):
            assert np.array_equal(a, b[[position]])


def test_places_keep_to_the_context(one: Any) -> None:
    config = one[0]
    with pytest.raises(UsageError, match="--ctx-size"):
        KVCache(config, 8).place(0, 9)
    with pytest.raises(UsageError, match="one-pass"):
        used = OnePass(config)
        used.advance(1)
        used.place(0, 1)


def apart(mixture: kernels.Mixture) -> kernels.Mixture:
    """The same mixture, which uses no call of the backend's own."""
    out = copy(mixture)
    out.native = None
    return out


def mixture(
    layout: RecordLayout, table: Any, pool: Any, x: Any, ids: Any, levels: Any, gates: Any
) -> Any:
    """kernels.Mixture out of separate kernels."""
    pair_out = np.empty((ids.size, HIDDEN), np.float32)
    position = np.empty(ids.shape, np.int32)
    whole = x, ids, levels, range(table.size), 0, position, pair_out
    assert part_of(pool, layout, table, *whole) == ids.size
    return kernels.combine(pool, pair_out, position, gates)


@pytest.mark.parametrize("ahead", [0, 32, INNER])
@pytest.mark.parametrize("threads", [1, 3])
def test_one_call_is_the_mixture(ahead: int, threads: int) -> None:
    rng, pool = np.random.default_rng(ahead), kernels.new_pool(threads)
    layout = expert_layout(HIDDEN, INNER, QuantSpec(), ahead)
    records = [random_record(layout, rng)[0] for _ in range(EXPERTS)]
    table = np.array([[s.ctypes.data for s in record] for record in records], np.uint64)
    whole = kernels.Mixture(layout, table)
    jobs = EXPERTS * layout.depth
    for n, level in ((1, 0), (1, 4), (5, 2), (150, 1), (1, None), (70, None)):
        x = rng.standard_normal((n, HIDDEN)).astype(np.float32)
        gates = rng.random((n, 3)).astype(np.float32)
        ids = np.array([rng.permutation(EXPERTS)[:3] for _ in range(n)], np.int32)
        low, high = (0, layout.depth) if level is None else (level, level + 1)
        levels = rng.integers(low, high, ids.shape, np.int32)
        got = whole(pool, x, ids, levels, gates)
        want = mixture(layout, table, pool, x, ids, levels, gates)
        assert np.array_equal(got, want)
        for few in (whole, apart(whole)):
            parts = kernels.MixtureParts(few, x, ids, levels, gates)
            last = int(ids[0, 1] * layout.depth + levels[0, 1])
            rest = [j for j in rng.permutation(jobs).tolist() if j != last]
            for chosen in (rest[:1], [], rest[1:20], rest[20:]):
                parts.run(pool, chosen)
            with pytest.raises(KernelError, match="pairs are not computed"):
                parts.sum(pool)
            parts.run(pool, [last])
            assert np.array_equal(parts.sum(pool), want)
            with pytest.raises(KernelError, match="one was computed before"):
                parts.run(pool, range(jobs))


def test_each_pair_has_its_own_level() -> None:
    """A token's output is that of a batch in which all take its levels, on tokens that share
    experts."""
    rng, pool = np.random.default_rng(4), kernels.new_pool(2)
    layout = expert_layout(HIDDEN, INNER, QuantSpec(), 32)
    records = [random_record(layout, rng)[0] for _ in range(EXPERTS)]
    table = np.array([[s.ctypes.data for s in record] for record in records], np.uint64)
    whole = kernels.Mixture(layout, table)
    x = rng.standard_normal((layout.depth, HIDDEN)).astype(np.float32)
    gates = rng.random((layout.depth, 3)).astype(np.float32)
    ids = np.tile(np.array([[7, 0, 3]], np.int32), (layout.depth, 1))
    levels = np.array([[i, -i % layout.depth, 1] for i in range(layout.depth)], np.int32)
    got = whole(pool, x, ids, levels, gates)
    for i in range(layout.depth):
        row = slice(i, i + 1)
        one = whole(pool, x[row], ids[row], levels[row], gates[row])
        assert np.array_equal(got[row], one)
    flat = np.zeros_like(levels)
    assert not np.array_equal(got, whole(pool, x, ids, flat, gates))


def test_a_mixture_refuses_what_does_not_fit() -> None:
    rng, pool = np.random.default_rng(3), kernels.new_pool(2)
    layout = expert_layout(HIDDEN, INNER, QuantSpec(), 0)
    records = [random_record(layout, rng)[0] for _ in range(EXPERTS)]
    table = np.array([[s.ctypes.data for s in record] for record in records], np.uint64)
    whole, n = kernels.Mixture(layout, table), 150
    x = rng.standard_normal((n, HIDDEN)).astype(np.float32)
    gates = rng.random((n, 3)).astype(np.float32)
    ids = np.array([rng.permutation(EXPERTS)[:3] for _ in range(n)], np.int32)
    levels = np.zeros_like(ids)
    with pytest.raises(KernelError, match="pair_out: expected 450 rows"):
        kernels.MixtureParts(whole, x, ids, levels, gates, np.empty((449, HIDDEN), np.float32))
    for each in (whole, apart(whole)):
        for bad in (-1, EXPERTS):
            with pytest.raises(KernelError, match="rows of the 11 experts"):
                each(pool, x, np.full_like(ids, bad), levels, gates)
        for bad in (-1, layout.depth):
            with pytest.raises(KernelError, match="up to the level, of 5"):
                each(pool, x, ids, np.full_like(ids, bad), gates)
    table[4, 1] = 0  # not resident above level 0
    ids[:] = [[4, 5, 6]]
    whole(pool, x, ids, levels, gates)
    levels[n - 1, 0] = 1
    for each in (whole, apart(whole)):
        with pytest.raises(KernelError, match="address"):
            each(pool, x, ids, levels, gates)
    wrong: list[tuple[Any, Any, Any, Any, str]] = [
        (x[:, :-1].copy(), ids, levels, gates, "x: expected shape"),
        (x.astype(np.float64), ids, levels, gates, "x: expected dtype"),
        (x, ids[:-1], levels[:-1], gates[:-1], "ids: expected shape"),
        (x, ids.astype(np.int64), levels, gates, "ids: expected dtype"),
        (x, ids, levels[:, :-1].copy(), gates, "levels: expected shape"),
        (x, ids, levels.astype(np.int64), gates, "levels: expected dtype"),
        (x, ids, levels, gates[:, :-1].copy(), "weights: expected shape"),
        (x, ids, levels, gates[0], "weights: expected shape"),
    ]
    for bad_x, bad_ids, bad_levels, bad_gates, match in wrong:
        with pytest.raises(KernelError, match=match):
            whole(pool, bad_x, bad_ids, bad_levels, bad_gates)
