"""Properties of the quantizer, and its twin."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from edgemoe import kernels, reference
from edgemoe.errors import UsageError
from edgemoe.layout import dense_layout
from edgemoe.mwq.packing import decode, pack_record
from edgemoe.mwq.quantize import quantize_matrix
from edgemoe.types import F32, LEVELS, U8, NestedScales, QuantSpec

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
    codes, scales = plain(w)
    return decode(layout, pack_record(layout, [codes], [scales]), level_index)[0]


def plain(w: F32) -> tuple[U8, NestedScales]:
    """Codes and scales of a matrix on its own."""
    ((codes, scales),) = quantize_matrix(w, dense_layout(len(w), w.shape[1], QUANT))
    return codes, scales


def assert_same_scales(a: NestedScales, b: NestedScales) -> None:
    for name in ("exponent", "step", "zero", "shift"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def steps(scales: NestedScales) -> NDArray[np.float64]:
    """float64 [rows, groups]."""
    octave = scales.exponent[:, None].astype(np.float64) - 127 + scales.step // 16
    return np.asarray(2.0**octave * (1 + scales.step % 16 / 16))


@pytest.mark.parametrize("shape", [(64, 512), (7, 129), (5, 31), (24, 704), (3, 2880)])
@pytest.mark.parametrize("kind", KINDS)
def test_error_falls_with_every_level(kind: str, shape: tuple[int, int]) -> None:
    w = sample(kind, shape)
    errors = [float(np.square(restore(w, i).astype(np.float64) - w).sum()) for i in range(5)]
    for coarse, fine in itertools.pairwise(errors):
        assert fine <= coarse * 1.0001, errors


def test_error_of_gaussian_weights() -> None:
    """Relative RMS error of N(0, 1) in groups of 128; a regression shows here first."""
    w = sample("normal", (512, 1024))
    got = [float(np.sqrt(np.square(restore(w, i) - w).mean()) / w.std()) for i in range(5)]
    for value, bound in zip(got, (0.395, 0.197, 0.098, 0.0245, 0.0062), strict=True):
        assert 0.9 * bound < value < bound, got


def test_no_level_shrinks_weights() -> None:
    """Regression of decoded on true weights: well below 1, outputs would fade layer by layer."""
    w = sample("normal", (512, 1024))
    for i, slack in enumerate((0.04, 0.015, 0.005, 0.001, 0.001)):
        slope = float((restore(w, i).astype(np.float64) * w).sum() / np.square(w).sum())
        assert abs(slope - 1) < slack, (LEVELS[i], slope)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_nearest_and_steps_the_smallest_that_reach(kind: str) -> None:
    w = sample(kind, (40, 300), seed=1)
    codes, scales = plain(w)
    step = steps(scales)
    largest = step.max(axis=1)
    for g in range(3):
        x = w[:, 128 * g : 128 * (g + 1)].astype(np.float64)
        code = codes[:, 128 * g : 128 * (g + 1)].astype(np.float64)
        s, z = step[:, g, None], scales.zero[:, g, None].astype(np.float64)
        assert (np.abs(s * (code - z) - x) <= 0.5000001 * s).all()
        span = np.maximum(x.max(axis=1), 0) - np.minimum(x.min(axis=1), 0)
        need = span / 255
        assert (step[:, g] >= need * (1 - 1e-12)).all()
        floor = np.maximum(largest * 2.0**-17, 2.0**-126)
        assert (step[:, g] <= np.maximum(need * (1 + 1 / 16), floor)).all()


def test_levels_are_the_centres_of_their_cells_moved_by_the_mean_error() -> None:
    w = sample("normal", (16, 256), seed=2)
    w[3, 7] = 3.0  # all others of its group in one cell
    codes, scales = plain(w)
    step = np.repeat(steps(scales), 128, axis=1)
    zero = np.repeat(scales.zero.astype(np.float64), 128, axis=1)
    for i, level in enumerate(LEVELS):
        width = 2 ** (8 - level)
        centre = (codes >> (8 - level)).astype(np.float64) * width + (width - 1) / 2
        moved = np.repeat((scales.shift[i].astype(np.float64) - 8) * width / 16, 128, axis=1)
        got = restore(w, i)
        np.testing.assert_allclose(got, step * (centre + moved - zero), rtol=1e-5, atol=1e-9)
        left = ((got - w) / step).reshape(16, 2, 128).mean(axis=-1)
        assert np.abs(left).max() <= (0.5 if level == 8 else width / 32 * 1.01)
    assert not (scales.shift[4] - 8).any()


def test_flat_groups() -> None:
    w = np.zeros((9, 300), np.float32)
    w[1] = 0.75
    w[2, 128:256] = -3.0
    for i, level in enumerate(LEVELS):
        got = restore(w, i)
        assert np.abs(got[0]).max() < 1e-35
        assert np.abs(got[2, :128]).max() < 1e-4
        # half a step of the top level, or a thirty-second of a cell
        bound = max(0.5, 2.0 ** (8 - level) / 32) * 1.07 / 255
        np.testing.assert_allclose(got[1], 0.75, rtol=bound)
        np.testing.assert_allclose(got[2, 128:256], -3, rtol=bound)


def test_an_outlier_spoils_its_own_group_only() -> None:
    w = sample("normal", (8, 512), seed=3)
    clean = restore(w, 4)
    w[3, 200] = 100.0
    got = restore(w, 4)
    assert got[3, 200] == pytest.approx(100, rel=0.5 / 255)
    untouched = np.ones(w.shape, bool)
    untouched[3, 128:256] = False
    np.testing.assert_array_equal(got[untouched], clean[untouched])


def test_an_extreme_outlier_coarsens_its_row_only() -> None:
    """Steps of a row span 15 octaves: 1e4 among weights of 0.02 takes a little of their 8 bits."""
    w = sample("normal", (8, 512), seed=3)
    clean = restore(w, 4)
    w[3, 200] = 1e4
    got = restore(w, 4)
    others = np.arange(8) != 3
    np.testing.assert_array_equal(got[others], clean[others])
    far = np.r_[0:128, 256:512]
    assert np.abs(got[3, far] - w[3, far]).max() <= 0.5 * 2 * 1e4 / 255 * 2.0**-15


@pytest.mark.parametrize("scale", [1e-45, 1e-42, 1e-38, 1e-35, 1e-30, 1e30, 8e37])
def test_any_finite_magnitude_is_sound(scale: float) -> None:
    unit = np.clip(sample("normal", (16, 200), seed=4) / 0.05, -1, 1).astype(np.float64)
    w = (unit * scale).astype(np.float32)
    errors = []
    for i in range(5):
        got = restore(w, i)
        assert np.isfinite(got).all()
        errors.append(float(np.square(got.astype(np.float64) - w).mean()) ** 0.5)
    assert errors[4] < 0.004 * scale + 2.0**-126, errors  # the smallest step
    assert errors[4] <= errors[0] * 1.0001


def test_rows_do_not_influence_one_another() -> None:
    w = sample("heavy", (50, 300), seed=6)
    codes, scales = plain(w)
    for first in (0, 17, 49):
        part_codes, part = plain(w[first : first + 1])
        np.testing.assert_array_equal(part_codes[0], codes[first])
        for name in ("exponent", "step", "zero"):
            np.testing.assert_array_equal(getattr(part, name)[0], getattr(scales, name)[first])


def test_a_view_is_quantized_like_its_copy() -> None:
    w = sample("normal", (40, 600), seed=7)
    view = w[::2, 100:500]
    a, b = plain(view), plain(np.ascontiguousarray(view))
    np.testing.assert_array_equal(a[0], b[0])
    assert_same_scales(a[1], b[1])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_non_finite_weights_are_refused(bad: float) -> None:
    w = sample("normal", (8, 200))
    w[5, 150] = bad
    with pytest.raises(UsageError, match="NaN, infinity or values beyond"):
        plain(w)


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
        codes, scales = kernels.quantize_rows(kernels.new_pool(threads), w, quant)
        np.testing.assert_array_equal(codes, want_codes)
        assert_same_scales(scales, want)


def test_other_arrays_are_refused() -> None:
    layout = dense_layout(8, 8, QUANT)
    for wrong in (
        np.zeros((8, 8)),
        np.zeros(8, np.float32),
        np.zeros((0, 8), np.float32),
        np.zeros((8, 9), np.float32),
    ):
        with pytest.raises(UsageError, match="float32 matrix of 8 columns"):
            quantize_matrix(wrong, layout)
