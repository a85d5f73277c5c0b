"""Every kernel against its NumPy twin, on every instruction set, over odd sizes and extremes."""

from __future__ import annotations

import numpy as np
import pytest
from coded import random_record

from edgemoe import kernels, reference
from edgemoe.errors import KernelError, UsageError
from edgemoe.kernels import NestedMatrix, dispatch
from edgemoe.layout import dense_layout, expert_layout
from edgemoe.types import LEVELS, QuantSpec

LEVEL_INDICES = range(len(LEVELS))
SHAPES = [(8, 32), (1, 1), (13, 37), (64, 704), (130, 256), (24, 160), (65, 2880), (9, 1408)]


@pytest.fixture(params=[1, 2, 3])
def pool(request: pytest.FixtureRequest) -> kernels.Pool:
    return kernels.new_pool(request.param)


def close(got: np.ndarray, want: np.ndarray) -> None:
    """Within 1e-5 of the row's largest magnitude of the float64 result."""
    limit = 1e-5 * np.abs(want).max(axis=-1, keepdims=True) + 1e-30
    assert (np.abs(got - want) <= limit).all()


def activations(rng: np.random.Generator, n: int, cols: int) -> np.ndarray:
    x = rng.standard_normal((n, cols)).astype(np.float32)
    x[0] = np.sign(x[0]) * 3.0  # every code is +-127: the largest integer sums there are
    if n > 1:
        x[1] = 0.0
    if n > 2:
        x[2] *= np.float32(1e-30)
    if n > 3:
        x[3, ::7] *= np.float32(1e4)
    if n > 5:
        x[4] = np.float32(1e-37)  # too small for a float32 reciprocal
        x[5] = np.float32(1e-42)
    return x


@pytest.mark.parametrize("level", LEVEL_INDICES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group", [32, 128, 256])
def test_integer_accumulators_are_exact(
    isa: str, level: int, shape: tuple[int, int], group: int
) -> None:
    rng = np.random.default_rng(hash((level, shape, group)) & 0xFFFF)
    layout = dense_layout(*shape, QuantSpec(group_size=group))
    pool = kernels.new_pool(1)
    for fill in ("random", "max", "edges"):
        segments, coded = random_record(layout, rng, fill)
        x = activations(rng, 6, shape[1])
        q, scale, dots = kernels.accumulate(pool, x, NestedMatrix.of(layout, segments[: level + 1]))
        want_q, want_scale, want = reference.accumulate(x, coded[level][0])
        assert np.array_equal(q, want_q)
        assert np.array_equal(scale, want_scale)
        assert np.array_equal(dots[:, : shape[0]], want)
        assert not dots[:, shape[0] :].any()


@pytest.mark.parametrize("level", LEVEL_INDICES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [1, 2, 65, 130])
def test_linear(isa: str, level: int, shape: tuple[int, int], n: int, pool: kernels.Pool) -> None:
    rng = np.random.default_rng(n)
    layout = dense_layout(*shape, QuantSpec())
    segments, coded = random_record(layout, rng)
    x = activations(rng, n, shape[1])
    w = NestedMatrix.of(layout, segments[: level + 1])
    (got,) = kernels.linear(pool, x, [w])
    close(got, reference.linear(x, coded[level][0]))
    one_by_one = np.concatenate([kernels.linear(pool, x[i : i + 1], [w])[0] for i in range(n)])
    assert np.array_equal(got.view(np.uint32), one_by_one.view(np.uint32))


def test_linear_shares_one_input(isa: str, pool: kernels.Pool) -> None:
    rng = np.random.default_rng(5)
    mats, want = [], []
    x = activations(rng, 70, 96)
    for rows, level in ((3, 0), (200, 4), (65, 2)):
        layout = dense_layout(rows, 96, QuantSpec())
        segments, coded = random_record(layout, rng)
        mats.append(NestedMatrix.of(layout, segments[: level + 1]))
        want.append(reference.linear(x, coded[level][0]))
    for got, ref in zip(kernels.linear(pool, x, mats), want, strict=True):
        close(got, ref)


@pytest.mark.parametrize(
    ("hidden", "inter", "ahead"), [(64, 48, 32), (256, 704, 0), (256, 704, 160), (40, 33, 33)]
)
@pytest.mark.parametrize("n", [1, 5, 150])
def test_experts_and_combine(
    isa: str, hidden: int, inter: int, ahead: int, n: int, pool: kernels.Pool
) -> None:
    rng = np.random.default_rng(hidden + n)
    layout = expert_layout(hidden, inter, QuantSpec(), ahead)
    k, n_experts = 3, 6
    records = [random_record(layout, rng) for _ in range(n_experts)]
    ids = np.stack([rng.permutation(n_experts)[:k] for _ in range(n)])
    weights = rng.uniform(0, 1, (n, k)).astype(np.float32)
    x = rng.standard_normal((n, hidden)).astype(np.float32)
    jobs, levels, first, tokens = [], [], [0], []
    position = np.empty((n, k), np.int32)
    addresses = []
    for e in range(n_experts):
        for level in {e % 5, (e + 2) % 5}:  # one expert at two levels in the same call
            where = np.argwhere((ids == e) & ((np.arange(n) % 2 == 0) == (level == e % 5))[:, None])
            if not len(where):
                continue
            position[where[:, 0], where[:, 1]] = first[-1] + np.arange(len(where))
            tokens.extend(where[:, 0])
            first.append(len(tokens))
            levels.append(level)
            jobs.append(records[e][1][level])
            row = [s.ctypes.data for s in records[e][0][: level + 1]]
            addresses.append(row + [0] * (5 - len(row)))
    first_pair, pair_token = np.array(first, np.int32), np.array(tokens, np.int32)
    args = (np.array(addresses, np.uint64), np.array(levels, np.int32))
    got = kernels.experts(pool, layout, x, *args, first_pair, pair_token)
    want = reference.experts(x, [tuple(j) for j in jobs], first_pair, pair_token)
    # The middle is rounded to int8 and may fall either way where float32 and float64 differ in the
    # last bit, so the strict bound is held against the parts, which have their own twins.
    step = np.abs(want).max(axis=-1, keepdims=True)
    assert np.median(np.abs(got - want) / step) < 1e-5
    assert (np.abs(got - want) <= 2e-3 * step).mean() > 0.999
    for j, level in enumerate(levels):
        part = slice(first_pair[j], first_pair[j + 1])
        segments = next(r[0] for r in records if r[0][0].ctypes.data == addresses[j][0])
        gate, up, *downs = (
            NestedMatrix.of(layout, segments[: level + 1], m) for m in range(len(layout.matrices))
        )
        mid = kernels.silu_mul(*kernels.linear(pool, x[pair_token[part]], [gate, up]))
        sums = []
        for down in downs:
            first_col = down.layout.first_col
            columns = mid[:, first_col : first_col + down.layout.cols]
            sums += kernels.linear(pool, np.ascontiguousarray(columns), [down])
        total = sums[0] if len(sums) == 1 else sums[0] + sums[1]
        assert np.array_equal(got[part].view(np.uint32), total.view(np.uint32))
    close(kernels.combine(pool, got, position, weights), reference.combine(got, position, weights))


@pytest.mark.parametrize("cols", [1, 15, 16, 17, 64, 2880])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_linear_f32(isa: str, rows: int, cols: int, pool: kernels.Pool) -> None:
    rng = np.random.default_rng(cols)
    x = rng.standard_normal((3, cols)).astype(np.float32)
    w = rng.standard_normal((rows, cols)).astype(np.float32)
    got, want = kernels.linear_f32(pool, x, w), reference.linear_f32(x, w)
    scale = np.abs(x).astype(np.float64) @ np.abs(w).T  # sums that cancel have no meaningful max
    assert (np.abs(got - want) <= 1e-6 * scale).all()
    if rows > 1:
        close(got, want)


@pytest.mark.parametrize("level", LEVEL_INDICES)
def test_decode_rows(level: int) -> None:
    rng = np.random.default_rng(level)
    layout = dense_layout(21, 300, QuantSpec())
    segments, coded = random_record(layout, rng)
    ids = np.array([0, 20, 7, 7, 8], np.int64)
    got = kernels.decode_rows(NestedMatrix.of(layout, segments[: level + 1]), ids)
    close(got, reference.decode_rows(coded[level][0], ids))


@pytest.mark.parametrize("d", [1, 17, 64, 2048])
@pytest.mark.parametrize("n", [1, 40])
def test_rmsnorm(isa: str, d: int, n: int, pool: kernels.Pool) -> None:
    rng = np.random.default_rng(d)
    x = rng.standard_normal((n, d)).astype(np.float32) * 10
    w = rng.standard_normal(d).astype(np.float32)
    close(kernels.rmsnorm(pool, x, w, 1e-6), reference.rmsnorm(x, w, 1e-6))


@pytest.mark.parametrize("d", [1, 8, 37])
def test_silu_mul(isa: str, d: int) -> None:
    rng = np.random.default_rng(d)
    gate = rng.standard_normal((9, d)).astype(np.float32) * 20
    gate[0] = [-1e4, 1e4, 0.0][d % 3]
    up = rng.standard_normal((9, d)).astype(np.float32)
    want = reference.silu_mul(gate, up)
    got = kernels.silu_mul(gate, up)
    assert got is gate
    assert (np.abs(got - want) <= 1e-6 * np.abs(want) + 1e-35).all()


def test_gated_add() -> None:
    rng = np.random.default_rng(1)
    y, x = rng.standard_normal((2, 30, 33)).astype(np.float32)
    gate = (rng.standard_normal((30, 1)) * 30).astype(np.float32)
    want = reference.gated_add(y, gate, x)
    kernels.gated_add(y, gate, x)
    close(y, want)


@pytest.mark.parametrize("d", [2, 64, 128])
@pytest.mark.parametrize("n", [1, 300])
def test_rope(d: int, n: int, pool: kernels.Pool) -> None:
    rng = np.random.default_rng(d)
    x = rng.standard_normal((n, 5, d)).astype(np.float32)
    angle = rng.uniform(0, 6.3, (n, d // 2))
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    want = reference.rope(x, cos, sin)
    kernels.rope(pool, x, cos, sin)
    close(x, want)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("experts", "k"), [(1, 1), (16, 2), (64, 8), (128, 128)])
def test_route(experts: int, k: int, normalize: bool) -> None:
    rng = np.random.default_rng(experts)
    logits = rng.standard_normal((50, experts)).astype(np.float32) * 4
    logits[0] = 1.0  # all tied: the lowest indices win, in order
    logits[1, ::2] = logits[1].max()
    ids, weights = kernels.route(logits, k, normalize)
    want_ids, want = reference.route(logits, k, normalize)
    assert np.array_equal(ids, want_ids)
    close(weights, want)


def _outputs(threads: int) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    pool = kernels.new_pool(threads)
    layout = expert_layout(96, 130, QuantSpec(), 64)
    segments, _ = random_record(layout, rng)
    x = rng.standard_normal((67, 96)).astype(np.float32)
    out = []
    for level in LEVEL_INDICES:
        addresses = np.array([[s.ctypes.data for s in segments]], np.uint64)
        out.append(
            kernels.experts(
                pool,
                layout,
                x,
                addresses,
                np.array([level], np.int32),
                np.array([0, 67], np.int32),
                np.arange(67, dtype=np.int32),
            )
        )
    out.append(kernels.rmsnorm(pool, x, x[0].copy(), 1e-5))
    out.append(kernels.linear_f32(pool, x, x))
    return out


def test_bits_do_not_depend_on_isa_or_threads() -> None:
    before, base = kernels.isa(), None
    for name in kernels.isa_names():
        kernels.set_isa(name)
        for threads in (1, 2, 5):
            got = [a.view(np.uint32) for a in _outputs(threads)]
            base = got if base is None else base
            assert all(np.array_equal(a, b) for a, b in zip(base, got, strict=True)), (
                name,
                threads,
            )
    kernels.set_isa(before)


def test_crc32c_vectors() -> None:
    assert kernels.crc32c(np.frombuffer(b"123456789", np.uint8)) == 0xE3069283
    assert kernels.crc32c(np.zeros(32, np.uint8)) == 0x8A9136AA
    data = np.random.default_rng(0).integers(0, 256, 1001).astype(np.uint8)
    split = kernels.crc32c(data[13:].copy(), kernels.crc32c(data[:13].copy()))
    assert split == kernels.crc32c(data)


def test_wrong_arrays_raise_and_are_never_copied() -> None:
    pool = kernels.new_pool(1)
    layout = dense_layout(16, 64, QuantSpec())
    segments, _ = random_record(layout, np.random.default_rng(0))
    w = NestedMatrix.of(layout, segments)
    x = np.zeros((4, 64), np.float32)
    for bad in (
        x.astype(np.float64),
        x.astype(np.float16),
        np.zeros((4, 63), np.float32),
        np.zeros(64, np.float32),
        np.zeros((64, 4), np.float32).T,
        np.zeros((8, 64), np.float32)[::2],
        x.tolist(),
    ):
        with pytest.raises(KernelError):
            kernels.linear(pool, bad, [w])
    with pytest.raises(KernelError):
        kernels.NestedMatrix.of(layout, [segments[0][:-1].copy()])
    with pytest.raises(KernelError):
        kernels.decode_rows(w, np.array([16], np.int64))
    with pytest.raises(KernelError):
        kernels.route(np.zeros((1, 4), np.float32), 5, True)
    with pytest.raises(KernelError):
        kernels.combine(pool, x, np.array([[4]], np.int32), np.ones((1, 1), np.float32))


def test_native_module_itself_refuses_conversion() -> None:
    native = dispatch.native
    pool = kernels.new_pool(1)
    y = np.zeros((1, 4), np.float32)
    w = np.zeros((4, 8), np.float32)
    for bad in (np.zeros((1, 8)), np.zeros((8, 2), np.float32).T):
        with pytest.raises(TypeError):
            native.linear_f32(pool, bad, w, y)


def test_threads_are_checked() -> None:
    for n in (0, -1, 10_000):
        with pytest.raises(UsageError, match="threads"):
            kernels.new_pool(n)
    with pytest.raises(UsageError, match="nosuch"):
        kernels.set_isa("nosuch")
