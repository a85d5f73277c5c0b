"""Codes chosen for all levels of a matrix together, and what they are chosen by."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from test_quantize import KINDS, sample

from edgemoe import kernels, reference
from edgemoe.errors import KernelError
from edgemoe.layout import MatrixLayout, record_layout
from edgemoe.mwq.calibrate import (
    coupling,
)
from edgemoe.mwq.packing import affine, decode, pack_record
from edgemoe.mwq.quantize import EXPERTS, level_weights, quantize_matrix
from edgemoe.types import F32, LEVELS, U8, QuantSpec

QUANT = QuantSpec()


def inputs(n: int, cols: int, seed: int = 0) -> F32:
    """Vectors whose columns go together, as those of a model do: float32 [n, cols]."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((cols, cols)) * 0.9 ** np.arange(cols)[:, None]
    return (rng.standard_normal((n, cols)) @ mix + 0.1).astype(np.float32)


def moment(x: F32) -> np.ndarray:
    wide = x.astype(np.float64)
    return np.asarray(wide.T @ wide)


def decoded(w: F32, by: F32 | None, depth: int = 5, ahead: int = 0) -> list[F32]:
    """One matrix at each level of a record of `depth` segments."""
    rows, cols = w.shape
    parts = [MatrixLayout(rows, ahead, 128, 0, 1)] if ahead else []
    layout = record_layout([*parts, MatrixLayout(rows, cols - ahead, 128, ahead)], QUANT, depth)
    codes, scales = zip(*quantize_matrix(w, layout, 0, None, by), strict=True)
    segments = pack_record(layout, codes, scales)
    return [decode(layout, segments, i)[0] for i in range(depth)]


def problem(
    w: F32, ahead: int, pool: kernels.Pool
) -> tuple[U8, NDArray[np.int32], NDArray[np.int32], tuple[F32, F32]]:
    """Nearest codes, group starts, bits, (s, o) of a matrix with columns ahead."""
    starts, parts = [], []
    for first, stop in ((0, ahead), (ahead, w.shape[1])):
        if first < stop:
            codes, scales = kernels.quantize_rows(pool, w[:, first:stop].copy(), QUANT)
            steps = [min(i + (first < ahead), 4) for i in range(5)]
            pairs = [affine(scales, LEVELS[k], k) for k in steps]
            starts += list(range(first, stop, 128))
            bits = np.tile(np.array(LEVELS, np.int32)[steps, None], (1, pairs[0][0].shape[1]))
            parts.append((codes, bits, *(np.stack(v) for v in zip(*pairs, strict=True))))
    codes, bits, s, o = (np.concatenate(v, axis=-1) for v in zip(*parts, strict=True))
    return codes, np.array([*starts, w.shape[1]], np.int32), bits, (s, o)


def output_error(w: F32, back: F32, x: F32) -> float:
    return float(np.square((back.astype(np.float64) - w) @ x.T.astype(np.float64)).sum())


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("shape", "ahead", "sweeps"), [((24, 704), 160, 2), ((13, 31), 31, 0), ((7, 130), 0, 9)]
)
def test_kernel_is_its_twin(
    kind: str, shape: tuple[int, int], ahead: int, sweeps: int, threads: int
) -> None:
    w, pool = sample(kind, shape, seed=3), kernels.new_pool(threads)
    w[0] *= np.float32(1e-40)
    w[1] *= np.float32(1e25)
    by = coupling(moment(inputs(900, shape[1])))
    codes, *groups = problem(w, ahead, pool)
    weight = level_weights(LEVELS, EXPERTS)
    with np.errstate(over="ignore", invalid="ignore"):
        want = reference.nest_rows(w, codes, *groups, by, weight, 50, sweeps)
    kernels.nest_rows(pool, w, codes, *groups, by, weight, 50, sweeps)
    np.testing.assert_array_equal(codes, want)


def test_kernel_checks_its_arguments() -> None:
    pool, w = kernels.new_pool(1), sample("normal", (8, 64))
    codes, starts, bits, pair = problem(w, 32, pool)
    weight, by = level_weights(LEVELS, EXPERTS), np.eye(64, dtype=np.float32)
    sound: dict[str, Any] = {
        "w": w,
        "codes": codes,
        "starts": starts,
        "bits": bits,
        "affine": pair,
        "coupling": (by, by),
        "weight": weight,
        "reach": 9,
        "sweeps": 1,
    }
    six = np.ones((6, 8, 2), np.float32)
    many = {"bits": np.ones((6, 2), np.int32), "affine": (six, six), "weight": six[:, 0, 0].copy()}
    for wrong in (
        {"w": w[:, :32].copy()},
        {"codes": codes[:4].copy()},
        {"affine": (pair[0][:4].copy(), pair[1])},
        {"coupling": (by, by[:32].copy())},
        {"coupling": (by[:32].copy(), by)},
        {"coupling": (by * 0, by)},
        {"weight": weight[:4].copy()},
        {"reach": 256},
        {"reach": -1},
        {"starts": np.array([0, 64, 64], np.int32)},
        {"starts": np.array([1, 32, 64], np.int32)},
        {"starts": np.array([0, 32, 65], np.int32)},
        {"bits": bits - 3},
        {"bits": bits + 1},
        many,
    ):
        with pytest.raises(KernelError):
            kernels.nest_rows(pool, **sound | wrong)
    kernels.nest_rows(pool, **sound)


def test_without_reach_codes_stay() -> None:
    pool, w = kernels.new_pool(1), sample("heavy", (16, 256))
    codes, *groups = problem(w, 0, pool)
    before, by = codes.copy(), coupling(moment(inputs(500, 256)))
    kernels.nest_rows(pool, w, codes, *groups, by, level_weights(LEVELS, EXPERTS), 0, 3)
    np.testing.assert_array_equal(codes, before)


@pytest.mark.parametrize("cols", [1, 24, 129, 700])
def test_feedback_is_gptqs(cols: int) -> None:
    """[i, j] = U_ij / U_ii of the Cholesky factor U of the damped inverse."""
    h = moment(inputs(300, cols))
    damped = h / (np.trace(h) / cols) + 0.03 * np.eye(cols)
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    got = coupling(h)
    want = np.triu(upper / np.diag(upper)[:, None], 1)
    np.testing.assert_allclose(got.feedback, want, atol=1e-6)
    np.testing.assert_allclose(got.moment, damped, atol=1e-6)
    assert not coupling(np.eye(cols) * 7.0).feedback.any()


@pytest.mark.parametrize("fill", [0.0, np.nan, np.inf])
def test_columns_of_which_nothing_is_known_stand_alone(fill: float) -> None:
    got = coupling(np.full((8, 8), fill))
    assert not got.feedback.any()
    np.testing.assert_array_equal(got.moment, np.eye(8))


def test_columns_that_never_fire() -> None:
    x = inputs(200, 64)
    x[:, 5:20] = 0
    x[:, 30] *= 1e4
    got = coupling(moment(x))
    assert np.isfinite(got.feedback).all() and (np.diag(got.moment) > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_calibrated_outputs_are_nearer_at_low_levels(kind: str) -> None:
    """And hardly farther at the high ones; on inputs that were not calibrated on."""
    w = sample(kind, (64, 256), seed=4)
    x = inputs(6000, 256)
    seen, unseen = x[:4000], x[4000:]
    plain, nested = decoded(w, None), decoded(w, coupling(moment(seen)))
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


def test_descents_bring_outputs_nearer() -> None:
    """Each more than the one before, of all levels together, as the damped moment counts."""
    w, x, pool = sample("normal", (64, 256), seed=4), inputs(4000, 256), kernels.new_pool(2)
    by, weight = coupling(moment(x)), level_weights(LEVELS, EXPERTS)
    codes, starts, bits, (s, o) = problem(w, 32, pool)
    of = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    cost = []
    for sweeps in range(5):
        got = codes.copy()
        kernels.nest_rows(pool, w, got, starts, bits, (s, o), by, weight, 64, sweeps)
        errors = s[..., of] * (got >> (8 - bits[:, None, of])) + o[..., of] - w
        each = np.einsum("lri,ij,lrj->l", errors.astype(np.float64), by.moment, errors)
        cost.append(float(each @ weight))
    assert all(b < a for a, b in pairwise(cost)) and cost[-1] < 0.8 * cost[0], cost


def test_columns_ahead_are_nearer_and_help_the_rest() -> None:
    """At every level but the highest, where all columns have 8 bits."""
    w, x = sample("normal", (64, 256), seed=4), inputs(4000, 256)
    by = coupling(moment(x))
    plain, ahead = (
        [output_error(w, back, x) for back in decoded(w, by, ahead=n)] for n in (0, 160)
    )
    assert all(a < 0.8 * b for a, b in zip(ahead[:4], plain[:4], strict=True)), (ahead, plain)


def test_levels_that_are_not_stored_do_not_count() -> None:
    w, x = sample("normal", (32, 256)), inputs(3000, 256)
    by = coupling(moment(x))
    all_levels = output_error(w, decoded(w, by)[0], x)
    low_only = output_error(w, decoded(w, by, 3)[0], x)
    assert low_only < all_levels


def test_constant_and_empty_groups_stay_exact() -> None:
    w = sample("normal", (16, 256))
    w[:, :128] = 0
    w[3, 128:] = 0.25
    for back in decoded(w, coupling(moment(inputs(900, 256)))):
        assert np.abs(back[:, :128]).max() < 1e-4 * np.abs(w).max()
        np.testing.assert_allclose(back[3, 128:], 0.25, rtol=0.01)
