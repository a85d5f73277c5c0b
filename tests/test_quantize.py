"""Properties of the quantizer, against float64 least squares."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from edgemoe import kernels, reference
from edgemoe.errors import UsageError
from edgemoe.layout import dense_layout
from edgemoe.mwq.packing import decode, pack_record
from edgemoe.mwq.quantize import quantize_matrix
from edgemoe.types import F32, LEVELS, QuantSpec

QUANT = QuantSpec()


def sample(kind: str, shape: tuple[int, int], seed: int = 0) -> F32:
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(shape)
    if kind == "uniform":
        w = rng.uniform(-1, 1, shape)
    if kind == "heavy":
        w = rng.standard_t(3, shape)
    if kind == "shifted":
        w = w * 0.01 + 5
    if kind == "outliers":
        w[rng.random(shape) < 0.01] = 1e4
    if kind == "sparse":
        w[rng.random(shape) < 0.9] = 0
    return (w * 0.02).astype(np.float32)


KINDS = ["normal", "uniform", "heavy", "shifted", "outliers", "sparse"]


def restore(w: F32, level_index: int) -> F32:
    """The weights that a store of this matrix gives back at one level."""
    layout = dense_layout(w.shape[0], w.shape[1], QUANT)
    codes, fits = quantize_matrix(w, QUANT)
    return decode(layout, pack_record(layout, [codes], [fits]), level_index)[0]


@pytest.mark.parametrize("shape", [(64, 512), (7, 129), (5, 31), (1, 1), (24, 704), (3, 2880)])
@pytest.mark.parametrize("kind", KINDS)
def test_error_falls_with_every_level(kind: str, shape: tuple[int, int]) -> None:
    w = sample(kind, shape)
    errors = [float(np.square(restore(w, i).astype(np.float64) - w).sum()) for i in range(5)]
    # what rounding s and o to 11 bits may cost: matters only where outliers rule the error
    padded = np.pad(w, ((0, 0), (0, -shape[1] % 128)))
    peaks = np.abs(padded.astype(np.float64)).reshape(shape[0], -1, 128).max(-1)
    slack = float(np.square(peaks * 2.0**-11).sum())
    for coarse, fine in itertools.pairwise(errors):
        assert fine <= coarse * 1.0001 + slack, errors


def test_error_of_gaussian_weights() -> None:
    """Relative RMS error of N(0, 1) in groups of 128; a regression shows here first."""
    w = sample("normal", (512, 1024))
    got = [float(np.sqrt(np.square(restore(w, i) - w).mean()) / w.std()) for i in range(5)]
    for value, bound in zip(got, (0.37, 0.195, 0.098, 0.0245, 0.0062), strict=True):
        assert 0.5 * bound < value < bound, got


@pytest.mark.parametrize("kind", KINDS)
def test_each_level_is_the_least_squares_fit_of_its_codes(kind: str) -> None:
    w = sample(kind, (40, 300), seed=1)
    codes, fits = quantize_matrix(w, QUANT)
    for level, (s, o) in zip(LEVELS, fits, strict=True):
        for g in range(3):
            part = slice(128 * g, 128 * (g + 1))
            x = w[:, part].astype(np.float64)
            c = (codes[:, part] >> (8 - level)).astype(np.float64)
            for row in range(len(w)):
                basis = np.stack([c[row], np.ones_like(c[row])], axis=1)
                best, *_ = np.linalg.lstsq(basis, x[row], rcond=None)
                least = np.square(basis @ best - x[row]).sum()
                got = np.square(s[row, g] * c[row] + o[row, g] - x[row]).sum()
                # s keeps 11 bits: that may cost s**2 * var(c) * 2**-22, and o is float32
                spread = best[0] ** 2 * np.square(c[row] - c[row].mean()).sum()
                slack = 2.0**-21 * spread + c[row].size * (2.0**-23 * abs(best[1])) ** 2
                assert got <= least * (1 + 1e-6) + slack


def test_codes_are_the_rounded_positions_between_the_extremes() -> None:
    w = sample("normal", (20, 256), seed=2)
    codes, _ = quantize_matrix(w, QUANT)
    groups = w.reshape(20, 2, 128).astype(np.float64)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    want = 255 * (groups - low) / (high - low)
    assert np.abs(codes.reshape(20, 2, 128) - want).max() <= 0.5001
    assert codes.reshape(-1, 128).min(-1).max() == 0
    assert codes.reshape(-1, 128).max(-1).min() == 255


def test_flat_groups_come_back_as_they_are() -> None:
    w = np.zeros((9, 300), np.float32)
    w[1] = 0.75
    w[2, 128:256] = -3.0
    codes, fits = quantize_matrix(w, QUANT)
    assert not codes[:2].any()
    assert all(not s[:2].any() for s, _ in fits)
    for i in range(5):
        np.testing.assert_array_equal(restore(w, i)[:2], w[:2])
        np.testing.assert_array_equal(restore(w, i)[2, 128:256], w[2, 128:256])


def test_an_outlier_spoils_its_own_group_only() -> None:
    w = sample("normal", (8, 512), seed=3)
    clean = restore(w, 4)
    w[3, 200] = 1e4
    got = restore(w, 4)
    assert np.isfinite(got).all()
    assert got[3, 200] == pytest.approx(1e4, rel=1e-3)
    untouched = np.ones(w.shape, bool)
    untouched[3, 128:256] = False
    # the other groups share the matrix's multiplier, and float16 has the range for both
    np.testing.assert_array_equal(got[untouched], clean[untouched])


@pytest.mark.parametrize("scale", [1e-45, 1e-42, 1e-38, 1e-30, 1e30, 8e37])
def test_any_finite_magnitude_is_sound(scale: float) -> None:
    unit = np.clip(sample("normal", (16, 200), seed=4) / 0.05, -1, 1).astype(np.float64)
    w = (unit * scale).astype(np.float32)
    errors = []
    for i in range(5):
        got = restore(w, i)
        assert np.isfinite(got).all()
        errors.append(float(np.square((got.astype(np.float64) - w) / scale).mean()) ** 0.5)
    step = 255 * 2.0**-150 / scale  # float32 has steps of 2**-149 down there, times the code
    assert errors[4] < 0.004 + step, errors
    assert errors[4] <= errors[0] + step


def test_one_extreme_group_does_not_change_the_others() -> None:
    w = sample("normal", (4, 256), seed=5)
    codes, fits = quantize_matrix(w, QUANT)
    w2 = w.copy()
    w2[0, :128] *= np.float32(1e-38)
    codes2, fits2 = quantize_matrix(w2, QUANT)
    assert np.abs(codes2[1:].astype(int) - codes[1:]).max() <= 1  # ties may fall either way
    np.testing.assert_allclose(fits2[4][0][1:], fits[4][0][1:], rtol=1e-3)


def test_rows_do_not_influence_one_another() -> None:
    w = sample("heavy", (50, 300), seed=6)
    codes, fits = quantize_matrix(w, QUANT)
    for first in (0, 17, 49):
        part_codes, part_fits = quantize_matrix(w[first : first + 1], QUANT)
        np.testing.assert_array_equal(part_codes[0], codes[first])
        for (s, o), (part_s, part_o) in zip(fits, part_fits, strict=True):
            np.testing.assert_array_equal(part_s[0], s[first])
            np.testing.assert_array_equal(part_o[0], o[first])


def test_a_view_is_quantized_like_its_copy() -> None:
    w = sample("normal", (40, 600), seed=7)
    view = w[::2, 100:500]
    a, b = quantize_matrix(view, QUANT), quantize_matrix(np.ascontiguousarray(view), QUANT)
    np.testing.assert_array_equal(a[0], b[0])
    np.testing.assert_array_equal(a[1], b[1])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_non_finite_weights_are_refused(bad: float) -> None:
    w = sample("normal", (8, 200))
    w[5, 150] = bad
    with pytest.raises(UsageError, match="NaN, infinity or values beyond"):
        quantize_matrix(w, QUANT)


@pytest.mark.parametrize("shape", [(1, 1), (5, 31), (40, 300), (16, 2880)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "quant", [QUANT, QuantSpec((1, 2, 4, 6, 7, 8), 32), QuantSpec(LEVELS, 256)]
)
def test_native_quantizer_equals_its_twin(
    shape: tuple[int, int], kind: str, quant: QuantSpec
) -> None:
    w = sample(kind, shape, seed=8)
    w[-1] *= np.float32(1e-42)
    w[0, : shape[1] // 2] = 0.25
    want_codes, want = reference.quantize_rows(w, quant)
    for threads in (1, 3):
        codes, fits = kernels.quantize_rows(kernels.new_pool(threads), w, quant)
        np.testing.assert_array_equal(codes, want_codes)
        np.testing.assert_array_equal(fits.view(np.uint32), want.view(np.uint32))


def test_other_arrays_are_refused() -> None:
    with pytest.raises(UsageError, match="float32 matrix"):
        quantize_matrix(np.zeros((8, 8)), QUANT)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="float32 matrix"):
        quantize_matrix(np.zeros(8, np.float32), QUANT)
    with pytest.raises(UsageError, match="float32 matrix"):
        quantize_matrix(np.zeros((0, 8), np.float32), QUANT)
