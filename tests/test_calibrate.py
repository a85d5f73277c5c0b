"""Codes chosen for all levels by what a text says of an expert's inputs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from convert_samples import make_checkpoint
from test_quantize import KINDS, sample

from edgemoe import kernels, reference
from edgemoe.calibration import calibration, windows
from edgemoe.checkpoint import Checkpoint, open_checkpoint
from edgemoe.errors import KernelError, UsageError
from edgemoe.layout import RecordLayout, dense_layout
from edgemoe.mwq.calibrate import ENOUGH, CalibratedExperts, feedback
from edgemoe.mwq.convert import convert
from edgemoe.mwq.packing import affine, decode, pack_record
from edgemoe.mwq.quantize import level_weights, quantize_matrix
from edgemoe.store import Store
from edgemoe.types import F32, U8, NestedScales, QuantSpec

QUANT = QuantSpec()


def inputs(n: int, cols: int, seed: int = 0) -> F32:
    """Vectors whose columns go together, as those of a model do: float32 [n, cols]."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((cols, cols)) * 0.9 ** np.arange(cols)[:, None]
    return (rng.standard_normal((n, cols)) @ mix + 0.1).astype(np.float32)


def moment(x: F32) -> np.ndarray:
    wide = x.astype(np.float64)
    return np.asarray(wide.T @ wide)


def levels_of(scales: NestedScales, quant: QuantSpec = QUANT) -> tuple[F32, F32]:
    pairs = [affine(scales, level, i) for i, level in enumerate(quant.levels)]
    s, o = (np.stack(parts) for parts in zip(*pairs, strict=True))
    return s, o


def decoded(w: F32, by: F32 | None, quant: QuantSpec = QUANT) -> list[F32]:
    layout = RecordLayout(dense_layout(*w.shape, quant).matrices, quant, 64)
    codes, scales = quantize_matrix(w, quant, None, by)
    segments = pack_record(layout, [codes], [scales])
    return [decode(layout, segments, i)[0] for i in range(len(quant.levels))]


def output_error(w: F32, back: F32, x: F32) -> float:
    return float(np.square((back.astype(np.float64) - w) @ x.T.astype(np.float64)).sum())


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(24, 704), (13, 31), (7, 130)])
def test_kernel_is_its_twin(kind: str, shape: tuple[int, int], threads: int) -> None:
    w, pool = sample(kind, shape, seed=3), kernels.new_pool(threads)
    w[0] *= np.float32(1e-40)
    w[1] *= np.float32(1e25)
    by = feedback(moment(inputs(900, shape[1])))
    codes, scales = kernels.quantize_rows(pool, w, QUANT)
    pair, weight = levels_of(scales), level_weights(QUANT)
    with np.errstate(over="ignore", invalid="ignore"):
        want = reference.nest_rows(w, codes, QUANT, pair, by, weight, 50)
    kernels.nest_rows(pool, w, codes, QUANT, pair, by, weight, 50)
    np.testing.assert_array_equal(codes, want)


def test_kernel_checks_its_arguments() -> None:
    pool, w = kernels.new_pool(1), sample("normal", (8, 64))
    codes, scales = kernels.quantize_rows(pool, w, QUANT)
    pair, weight = levels_of(scales), level_weights(QUANT)
    by = np.zeros((64, 64), np.float32)
    for args in (
        (w[:, :32].copy(), codes, QUANT, pair, by, weight, 9),
        (w, codes[:4].copy(), QUANT, pair, by, weight, 9),
        (w, codes, QUANT, (pair[0][:4].copy(), pair[1]), by, weight, 9),
        (w, codes, QUANT, pair, by[:32].copy(), weight, 9),
        (w, codes, QUANT, pair, by, weight[:4].copy(), 9),
        (w, codes, QUANT, pair, by, weight, 256),
        (w, codes, QUANT, pair, by, weight, -1),
    ):
        with pytest.raises(KernelError):
            kernels.nest_rows(pool, *args)
    six = QuantSpec((1, 2, 3, 4, 6, 8))
    one = np.ones((6, 8, 1), np.float32)
    with pytest.raises(KernelError, match="1 to 5"):
        kernels.nest_rows(pool, w, codes, six, (one, one), by, one[:, 0, 0].copy(), 9)


def test_without_reach_codes_stay() -> None:
    pool, w = kernels.new_pool(1), sample("heavy", (16, 256))
    codes, scales = kernels.quantize_rows(pool, w, QUANT)
    before, by = codes.copy(), feedback(moment(inputs(500, 256)))
    kernels.nest_rows(pool, w, codes, QUANT, levels_of(scales), by, level_weights(QUANT), 0)
    np.testing.assert_array_equal(codes, before)


def test_feedback_is_gptqs() -> None:
    """[i, j] = U_ij / U_ii of the Cholesky factor U of the damped inverse."""
    h = moment(inputs(300, 24))
    damped = h / (np.trace(h) / 24) + 0.03 * np.eye(24)
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    got = feedback(h)
    np.testing.assert_allclose(got, np.triu(upper / np.diag(upper)[:, None], 1), atol=1e-6)
    assert not feedback(np.eye(24) * 7.0).any()


@pytest.mark.parametrize("fill", [0.0, np.nan, np.inf])
def test_feedback_of_nothing_known_is_none(fill: float) -> None:
    assert not feedback(np.full((8, 8), fill)).any()


def test_feedback_of_columns_that_never_fire() -> None:
    x = inputs(200, 64)
    x[:, 5:20] = 0
    x[:, 30] *= 1e4
    assert np.isfinite(feedback(moment(x))).all()


@pytest.mark.parametrize("kind", KINDS)
def test_calibrated_outputs_are_nearer_at_low_levels(kind: str) -> None:
    """And hardly farther at the high ones; on inputs that were not calibrated on."""
    w = sample(kind, (64, 256), seed=4)
    x = inputs(6000, 256)
    seen, unseen = x[:4000], x[4000:]
    plain, nested = decoded(w, None), decoded(w, feedback(moment(seen)))
    ratio = [
        output_error(w, b, unseen) / output_error(w, a, unseen)
        for a, b in zip(plain, nested, strict=True)
    ]
    print(kind, [round(r, 3) for r in ratio])
    if kind not in ("outliers", "shifted"):  # whose weights share one cell of 2 bits
        assert max(ratio[:3]) < 0.9, ratio
    assert max(ratio[:3]) < 1.01, ratio
    # What 8 bits give away is little next to what 6 still have.
    assert output_error(w, nested[4], unseen) < output_error(w, plain[3], unseen)


def test_levels_that_are_not_stored_do_not_count() -> None:
    w, x = sample("normal", (32, 256)), inputs(3000, 256)
    by = feedback(moment(x))
    all_levels = output_error(w, decoded(w, by)[0], x)
    low_only = output_error(w, decoded(w, by, dataclasses.replace(QUANT, max_level=4))[0], x)
    assert low_only < all_levels


def test_constant_and_empty_groups_stay_exact() -> None:
    w = sample("normal", (16, 256))
    w[:, :128] = 0
    w[3, 128:] = 0.25
    for back in decoded(w, feedback(moment(inputs(900, 256)))):
        assert np.abs(back[:, :128]).max() < 1e-6 * np.abs(w).max()
        np.testing.assert_allclose(back[3, 128:], 0.25, rtol=0.01)


def run(
    tmp_path: Path, text: list[np.ndarray], **overrides: object
) -> tuple[Checkpoint, Path, int]:
    source = make_checkpoint(tmp_path / "src", **overrides)
    checkpoint = open_checkpoint(source.path)
    out = tmp_path / "calibrated.emoe"
    report = convert(checkpoint, out, calibrate=calibration(checkpoint, text, 2))
    assert report.starved is not None
    return checkpoint, out, report.starved


def expert_error(checkpoint: Checkpoint, path: Path, x: F32, level_index: int) -> float:
    """Sum of squared errors of what all experts of layer 0 make of x."""

    def outputs(gate: F32, up: F32, down: F32) -> np.ndarray:
        g = (x @ gate.T).astype(np.float64)
        return np.asarray(reference.silu(g) * (x @ up.T) @ down.T)

    total = 0.0
    with Store.open(path) as store:
        for e in range(store.config.num_experts):
            segments: list[U8] = []
            for i in range(level_index + 1):
                ref = store.expert_segment(0, e, i)
                segments.append(np.empty(ref.size, np.uint8))
                store.read_into(ref, segments[-1])
            got = outputs(*decode(store.expert_layout, segments, level_index))
            total += float(np.square(got - outputs(*checkpoint.expert(0, e))).sum())
    return total


def test_a_calibrated_store(tmp_path: Path) -> None:
    """Opens, verifies, and its experts are nearer on the inputs that they see."""
    rng = np.random.default_rng(0)
    text = [rng.integers(0, 70, 128) for _ in range(16)]
    checkpoint, out, starved = run(tmp_path, text)
    assert starved == 0
    convert(checkpoint, tmp_path / "plain.emoe")
    seen: list[F32] = []

    def note(layer: int, x: F32, ids: np.ndarray, weights: F32) -> F32:
        if layer == 0:
            seen.append(x)
        return np.zeros_like(x)

    calibration(checkpoint, text, 1)(note)
    for level_index in range(3):
        plain, nested = (
            expert_error(checkpoint, p, seen[0], level_index)
            for p in (tmp_path / "plain.emoe", out)
        )
        assert nested < plain
    with Store.open(out) as store:
        assert store.verify() == []
        assert store.metadata["quantizer"] == "affine8-nested"


def test_threads_do_not_change_the_store(tmp_path: Path) -> None:
    text = [np.random.default_rng(1).integers(0, 70, 128) for _ in range(5)]
    source = make_checkpoint(tmp_path / "src")
    checkpoint = open_checkpoint(source.path)
    stores = []
    for threads in (1, 2):
        out = tmp_path / f"{threads}.emoe"
        convert(checkpoint, out, threads=threads, calibrate=calibration(checkpoint, text, threads))
        stores.append(out.read_bytes())
    assert stores[0] == stores[1]


def test_experts_that_the_text_never_reaches(tmp_path: Path) -> None:
    """They are calibrated on what other experts see, and counted."""
    text = [np.full(64, 9, np.int64) for _ in range(8)]  # one token: two experts of each layer
    checkpoint, out, starved = run(tmp_path, text, num_experts=8)
    assert starved >= 2 * 5
    with Store.open(out) as store:
        assert store.verify() == []
    x = np.random.default_rng(0).standard_normal((50, 72)).astype(np.float32)
    assert np.isfinite(expert_error(checkpoint, out, x, 0))


def test_an_expert_sees_enough_tokens() -> None:
    """Its own with the square of their share, others where those are few."""
    n = 2 * ENOUGH
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, 16)).astype(np.float32)
    weights = rng.random((n, 1)).astype(np.float32)
    ids = (np.arange(n) < 3).astype(np.int32)[:, None]
    matrices = tuple(rng.standard_normal((16, 16)).astype(np.float32) for _ in range(3))
    got = {}
    experts = CalibratedExperts(
        lambda layer, e: matrices, 2, lambda layer, e, m, by: got.update({e: by})
    )
    y = experts(0, x, ids, weights)
    assert experts.starved == 1
    own = np.arange(n) >= 3
    by = np.square(weights[own])
    np.testing.assert_allclose(
        got[0][0], feedback((x[own] * by).T.astype(np.float64) @ x[own]), rtol=1e-3, atol=1e-4
    )
    assert got[1][0].any()
    gate, up, down = matrices
    want = reference.silu((x @ gate.T).astype(np.float64)) * (x @ up.T) @ down.T * weights
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-3)


def test_windows_are_spread_over_the_text() -> None:
    got = windows(range(10_000), 100, 450, "x")
    assert [int(w[0]) for w in got] == [0, 3300, 6600, 9900]
    assert all(len(w) == 100 for w in got)
    with pytest.raises(UsageError, match=r"a\.txt: 99 tokens are too few .* at least 100"):
        windows(range(99), 100, 450, "a.txt")
