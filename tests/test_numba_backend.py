"""The numba backend computes the bits of the native scalar body, whatever the number of threads."""

from __future__ import annotations

import ast
import inspect
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_golden as golden
from coded import random_record

import edgemoe
from edgemoe import kernels
from edgemoe.errors import KernelError
from edgemoe.kernels import NestedMatrix, Pool, dispatch
from edgemoe.kv_layout import KVLayout
from edgemoe.layout import dense_layout, expert_layout
from edgemoe.mwq.packing import affine
from edgemoe.types import LEVELS, QuantSpec

pytest.importorskip("numba", reason="numba is not installed: pip install 'edgemoe[numba]'")
native = pytest.importorskip("edgemoe._native", reason="the native extension is not built")

from edgemoe import numba_backend  # noqa: E402
from edgemoe.numba_backend import pool as pools  # noqa: E402

SHAPES = [(8, 32), (1, 1), (13, 37), (64, 704), (130, 256), (24, 160), (65, 2880), (9, 1408)]

Case = Callable[[Pool], list[np.ndarray]]
Same = Callable[[Case], None]


@pytest.fixture
def same(monkeypatch: pytest.MonkeyPatch) -> Same:
    """Runs a case on the native scalar body and on numba with 1, 2 and 3 threads: equal bytes."""
    before = native.isa()

    def check(case: Case) -> None:
        monkeypatch.setattr(dispatch, "native", native)
        native.set_isa("scalar")
        want = case(kernels.new_pool(2))
        monkeypatch.setattr(dispatch, "native", numba_backend)
        monkeypatch.setattr(pools, "SHARE", 1)  # let even tiny operations use every thread
        for threads in (1, 2, 3):
            got = case(kernels.new_pool(threads))
            assert len(got) == len(want)
            for i, (a, b) in enumerate(zip(got, want, strict=True)):
                assert (a.dtype, a.shape) == (b.dtype, b.shape)
                assert a.tobytes() == b.tobytes(), f"result {i} on {threads} threads"

    yield check
    native.set_isa(before)


@pytest.fixture
def numba_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "native", numba_backend)


def activations(rng: np.random.Generator, n: int, cols: int) -> np.ndarray:
    x = rng.standard_normal((n, cols)).astype(np.float32)
    x[0] = np.sign(x[0]) * 3.0  # every code is +-127: the largest integer sums there are
    x[1:2] = 0.0
    x[2:3] *= np.float32(1e-30)
    x[3:4, ::7] *= np.float32(1e4)
    # halfway between two codes, with a scale of 1: ties go to the even one
    x[4:5] = np.resize(np.arange(-126, 127, dtype=np.float32) + 0.5, cols)
    x[4:5, ::32] = 127.0
    return x


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group", [32, 128, 256])
def test_accumulators(same: Same, shape: tuple[int, int], group: int) -> None:
    rng = np.random.default_rng(group)
    layout = dense_layout(*shape, QuantSpec(group_size=group))
    for fill in ("random", "max", "edges"):
        segments, _ = random_record(layout, rng, fill)
        x = activations(rng, 5, shape[1])
        for level in range(len(LEVELS)):
            w = segments[: level + 1]
            same(
                lambda pool, x=x, w=w: list(kernels.accumulate(pool, x, NestedMatrix.of(layout, w)))
            )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group", [32, 128, 256])
def test_linear(same: Same, shape: tuple[int, int], group: int) -> None:
    rng = np.random.default_rng(group)
    layout = dense_layout(*shape, QuantSpec(group_size=group))
    segments, _ = random_record(layout, rng)
    for level, n in enumerate((1, 2, 7, 65, 130)):
        x = activations(rng, n, shape[1])
        w = segments[: level + 1]
        same(lambda pool, x=x, w=w: kernels.linear(pool, x, [NestedMatrix.of(layout, w)]))


def test_linear_of_every_batch_size(same: Same) -> None:
    rng = np.random.default_rng(0)
    layouts = [dense_layout(rows, 70, QuantSpec()) for rows in (3, 200, 65)]
    records = [random_record(layout, rng)[0] for layout in layouts]
    x = activations(rng, 130, 70)

    def case(pool: Pool) -> list[np.ndarray]:
        w = [
            NestedMatrix.of(layout, record[:depth])
            for layout, record, depth in zip(layouts, records, (1, 5, 3), strict=True)
        ]
        return [y for n in range(1, 131) for y in kernels.linear(pool, x[:n], w)]

    same(case)


@pytest.mark.parametrize(
    ("hidden", "inter", "ahead"), [(64, 48, 32), (256, 704, 0), (256, 704, 160), (40, 33, 33)]
)
@pytest.mark.parametrize("n", [1, 5, 150])
def test_experts_and_combine(same: Same, hidden: int, inter: int, ahead: int, n: int) -> None:
    rng = np.random.default_rng(n)
    layout = expert_layout(hidden, inter, QuantSpec(), ahead)
    records = [random_record(layout, rng)[0] for _ in range(6)]
    x = rng.standard_normal((n, hidden)).astype(np.float32)
    first, tokens, levels, addresses = [0], [], [], []
    for job in range(11):  # one expert at two levels in the same call; jobs of 1 to n pairs
        tokens += sorted(rng.permutation(n)[: 1 + n * job // 11].tolist())
        first.append(len(tokens))
        levels.append(job % 5)
        row = [s.ctypes.data for s in records[job % 6][: job % 5 + 1]]
        addresses.append(row + [0] * (5 - len(row)))
    jobs = (
        np.array(addresses, np.uint64),
        np.array(levels, np.int32),
        np.array(first, np.int32),
        np.array(tokens, np.int32),
    )
    position = rng.integers(0, len(tokens), (n, 4)).astype(np.int32)
    weights = rng.uniform(-1, 1, (n, 4)).astype(np.float32)

    def case(pool: Pool) -> list[np.ndarray]:
        pairs = kernels.experts(pool, layout, x, *jobs)
        return [pairs, kernels.combine(pool, pairs, position, weights)]

    same(case)


@pytest.mark.parametrize("cols", [1, 15, 16, 17, 64, 2880])
def test_float_products_and_norms(same: Same, cols: int) -> None:
    rng = np.random.default_rng(cols)
    x = (rng.standard_normal((40, cols)) * 10).astype(np.float32)
    w = rng.standard_normal((33, cols)).astype(np.float32)
    x[3], x[4] = 0.0, 1e-25
    same(lambda pool: [kernels.linear_f32(pool, x[:n], w) for n in (1, 3, 40)])
    same(lambda pool: [kernels.rmsnorm(pool, x[:n], w[0].copy(), 1e-6) for n in (1, 3, 40)])


def test_exponentials(same: Same) -> None:
    rng = np.random.default_rng(1)
    gate = np.linspace(-120, 120, 300_000, dtype=np.float32).reshape(-1, 100)
    gate[0, :8] = [0.0, -0.0, np.inf, -np.inf, 1e-40, 3e38, -3e38, 88.0]
    up = rng.standard_normal(gate.shape).astype(np.float32)
    column = np.ascontiguousarray(gate[:, :1])

    def gated(pool: Pool) -> list[np.ndarray]:
        y = up.copy()
        kernels.gated_add(y, column, up)
        return [kernels.silu_mul(gate[:, :37].copy(), up[:, :37].copy()), y]

    same(gated)
    same(lambda pool: [kernels.silu_mul(gate.copy(), up)])


@pytest.mark.parametrize("d", [2, 64, 128])
def test_rope(same: Same, d: int) -> None:
    rng = np.random.default_rng(d)
    x = rng.standard_normal((70, 5, d)).astype(np.float32)
    cos, sin = rng.uniform(-1, 1, (2, 70, d // 2)).astype(np.float32)

    def case(pool: Pool) -> list[np.ndarray]:
        y = x.copy()
        kernels.rope(pool, y, cos, sin)
        return [y]

    same(case)


@pytest.mark.parametrize(("experts", "k"), [(1, 1), (16, 2), (64, 8), (128, 128)])
def test_route(same: Same, experts: int, k: int) -> None:
    rng = np.random.default_rng(experts)
    logits = rng.standard_normal((50, experts)).astype(np.float32) * 40
    logits[0] = 1.0  # all tied: the lowest indices win, in order
    logits[1, ::2] = logits[1].max()
    for normalize in (True, False):
        same(lambda pool, normalize=normalize: list(kernels.route(logits, k, normalize)))


@pytest.mark.parametrize("kv_type", ["f32", "f16", "int8"])
@pytest.mark.parametrize(
    ("d", "heads", "kv_heads"), [(1, 4, 4), (20, 6, 2), (64, 3, 1), (128, 8, 1), (80, 4, 2)]
)
def test_attention(same: Same, d: int, heads: int, kv_heads: int, kv_type: str) -> None:
    rng = np.random.default_rng(d)
    k, v = rng.standard_normal((2, 330, kv_heads, d)).astype(np.float32)
    k[5], k[6], v[7], v[9, :, 0] = 0.0, 1e-43, 1e-38, 1e6  # no scale, subnormals, beyond float16
    q = rng.standard_normal((20, heads, d)).astype(np.float32) * 3
    q[3] *= 1e4  # all the weight goes to one position
    sinks = rng.standard_normal(heads).astype(np.float32)
    layout = KVLayout(kv_type, kv_heads, d, 333)

    def case(pool: Pool) -> list[np.ndarray]:
        (data,) = layout.allocate(1)
        data[:] = 0xFF  # NaN, but for codes: what was never stored must not be seen
        kernels.kv_write(pool, layout, data, k[:313].copy(), v[:313].copy(), 0)
        kernels.kv_write(pool, layout, data, k[313:].copy(), v[313:].copy(), 313)
        return [data] + [
            kernels.attention(pool, q[:n], layout, data, 330 - n, d**-0.5, window, given)
            for n in (1, 20)
            for window in (None, 1, 5, 64, 100, 330)
            for given in (None, sinks)
        ]

    same(case)


def test_float16_and_codes_of_any_value(same: Same) -> None:
    """Every sign, exponent and way to round, stored and read again."""
    bits = np.arange(0, 1 << 32, 257 * 13, dtype=np.uint64).astype(np.uint32)
    x = bits[: bits.size // 256 * 256].view(np.float32).reshape(-1, 4, 64)
    x = np.where(np.isfinite(x), x, np.float32(1))
    for kv_type in ("f16", "int8"):
        layout = KVLayout(kv_type, 4, 64, len(x))

        def case(pool: Pool, layout: KVLayout = layout) -> list[np.ndarray]:
            (data,) = layout.allocate(1)
            kernels.kv_write(pool, layout, data, x, x[::-1].copy(), 0)
            return [data]

        same(case)


def test_stream_read(same: Same) -> None:
    data = np.random.default_rng(0).integers(0, 256, 1 << 20).astype(np.uint8)
    room = np.empty(data.size + 64, np.uint8)
    aligned = room[-room.ctypes.data % 64 :][: data.size]
    aligned[:] = data
    same(lambda pool: [np.array([kernels.stream_read(pool, aligned)], np.uint64)])


@pytest.mark.parametrize("group", [32, 128])
def test_decode_rows(same: Same, group: int) -> None:
    layout = dense_layout(21, 300, QuantSpec(group_size=group))
    segments, _ = random_record(layout, np.random.default_rng(group))
    ids = np.array([0, 20, 7, 7, 8], np.int64)
    every = [segments[: i + 1] for i in range(len(LEVELS))]
    same(lambda _: [kernels.decode_rows(NestedMatrix.of(layout, s), ids) for s in every])


def test_every_exponent_and_step(same: Same) -> None:
    """As the native core decodes them."""
    layout = dense_layout(1 << 16, 32, QuantSpec(group_size=32))
    segments, _ = random_record(layout, np.random.default_rng(0))
    at = int(layout.part_offsets[0, 0, 0])
    segments[0][at : at + (1 << 16)] = np.resize(np.arange(1, 240, dtype=np.uint8), 1 << 16)
    at += layout.matrices[0].exponent_bytes
    segments[0][at : at + (1 << 17)] = np.resize(np.arange(256, dtype=np.uint8), 1 << 17)
    every = np.arange(1 << 16)
    same(lambda _: [kernels.decode_rows(NestedMatrix.of(layout, segments[:1]), every)])


def test_conversion(same: Same) -> None:
    rng = np.random.default_rng(0)
    for shape, group in (((64, 512), 128), ((13, 300), 128), ((9, 70), 32), ((8, 4096), 256)):
        quant = QuantSpec(group_size=group)
        w = (rng.standard_normal(shape) * 0.02).astype(np.float32)
        w[0], w[3] = 0.5, 0.0
        w[1] *= 1e-42
        w[2, ::9] *= 1e4
        w[4] *= 1e25

        def case(pool: Pool, w: np.ndarray = w, quant: QuantSpec = quant) -> list[np.ndarray]:
            codes, scales = kernels.quantize_rows(pool, w, quant)
            parts = [scales.exponent, scales.step, scales.zero, scales.shift]
            pairs = [affine(scales, level, i) for i, level in enumerate(quant.levels)]
            s, o = (np.stack(values) for values in zip(*pairs, strict=True))
            moment = np.full((w.shape[1],) * 2, 0.1, np.float32)
            by = moment + np.eye(len(moment), dtype=np.float32), np.triu(moment, 1)
            starts = np.array([*range(0, w.shape[1], quant.group_size), w.shape[1]], np.int32)
            bits = np.repeat(np.array(quant.levels, np.int32)[:, None], len(starts) - 1, axis=1)
            one, better = np.ones(5, np.float32), codes.copy()
            kernels.nest_rows(pool, w, better, starts, bits, (s, o), by, one, 40, 2)
            return [codes, *parts, better, *kernels.pack_rows(pool, codes, quant.levels)]

        same(case)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -3e38])
def test_conversion_refuses(numba_only: None, bad: float) -> None:
    w = np.full((9, 64), 3e38, np.float32)
    w[8, 63] = bad
    with pytest.raises(KernelError):
        kernels.quantize_rows(kernels.new_pool(2), w, QuantSpec())


def test_crc32c(same: Same) -> None:
    data = np.random.default_rng(0).integers(0, 256, 5000).astype(np.uint8)
    data.setflags(write=False)
    parts = [
        (data[i : i + n], seed) for i in range(9) for n in range(40) for seed in (0, 2**32 - 1)
    ]
    parts.append((data, 12345))
    same(lambda _: [np.array([kernels.crc32c(part, seed) for part, seed in parts])])


def test_wrong_arrays_raise_and_read_only_ones_do_not(numba_only: None) -> None:
    pool = kernels.new_pool(1)
    x, w, y = (np.ones(s, np.float32) for s in ((1, 8), (4, 8), (1, 4)))
    for bad in (np.zeros((1, 8)), np.zeros((8, 2), np.float32).T, np.zeros(8, np.float32)):
        with pytest.raises(TypeError):
            numba_backend.linear_f32(pool, bad, w, y)
    x.setflags(write=False)
    numba_backend.linear_f32(pool, x, w, y)
    assert (y == 8).all()
    y.setflags(write=False)
    with pytest.raises(TypeError):
        numba_backend.linear_f32(pool, x, w, y)


def test_segments_must_be_aligned(numba_only: None) -> None:
    layout = dense_layout(16, 64, QuantSpec())
    segments, _ = random_record(layout, np.random.default_rng(0))
    room = np.empty(segments[0].size + 8, np.uint8)
    odd = room[1 if room.ctypes.data % 8 != 7 else 2 :][: segments[0].size]
    odd[:] = segments[0]
    with pytest.raises(KernelError, match="multiples of 8"):
        NestedMatrix.of(layout, [odd])


def test_it_offers_what_the_native_module_does(numba_only: None) -> None:
    layout = dense_layout(16, 64, QuantSpec())
    segments, _ = random_record(layout, np.random.default_rng(0))
    matrix = NestedMatrix.of(layout, segments).native
    made = {"Pool": kernels.new_pool(1), "Matrix": matrix}
    fused = {"Batch", "KV", "Layer", "layer_scratch", "Mixture", "mixture_scratch"}
    assert not kernels.fused() and not fused & set(numba_backend.__all__)
    made |= {"Reader": numba_backend.Reader}
    stub = ast.parse((Path(edgemoe.__file__).parent / "_native.pyi").read_text())
    for node in stub.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name in fused:
            continue
        if isinstance(node, ast.ClassDef):
            for member in node.body:
                assert hasattr(made[node.name], member.name), f"{node.name}.{member.name}"
        elif isinstance(node, ast.FunctionDef):
            got = list(inspect.signature(getattr(numba_backend, node.name)).parameters)
            assert got == [a.arg for a in node.args.args], node.name
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            assert node.name in numba_backend.__all__


def test_one_pool_serves_many_callers(same: Same) -> None:
    rng = np.random.default_rng(4)
    layout = expert_layout(96, 64, QuantSpec())
    segments, _ = random_record(layout, rng)
    inputs = rng.standard_normal((6, 50, 96)).astype(np.float32)

    def case(pool: Pool) -> list[np.ndarray]:
        out: list[Any] = [None] * len(inputs)

        def call(i: int) -> None:
            for _ in range(5):
                m = [NestedMatrix.of(layout, segments, part) for part in (0, 1)]
                out[i] = np.concatenate(kernels.linear(pool, inputs[i], m))

        callers = [threading.Thread(target=call, args=(i,)) for i in range(len(inputs))]
        for c in callers:
            c.start()
        for c in callers:
            c.join()
        return out

    same(case)


@pytest.mark.parametrize("threads", [1, 2])
def test_greedy_tokens(numba_only: None, threads: int) -> None:
    recorded = json.loads(golden.GOLDEN.read_text())
    prompts = list(zip(recorded["prompts"], recorded["tokens"], strict=True))
    with edgemoe.load(bits=8, ctx_size=256, threads=threads) as model:
        for prompt, want in prompts if threads == 1 else prompts[:3]:
            assert golden.greedy(model, prompt) == want, prompt


@pytest.mark.parametrize("bits", LEVELS)
def test_logits(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    monkeypatch.setattr(dispatch, "native", native)
    want = golden.run_hash(2, bits, 64)
    monkeypatch.setattr(dispatch, "native", numba_backend)
    assert golden.run_hash(2, bits, 150) == want
    assert golden.run_hash(3, bits, 40) == want
