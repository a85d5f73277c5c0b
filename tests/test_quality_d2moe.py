"""scripts/quality/d2moe.py: the baseline does what its paper says, so that it is no straw man."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from edgemoe.types import F32

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
if not (SCRIPTS / "quality").is_dir():
    pytest.skip(f"{SCRIPTS} is not here", allow_module_level=True)
sys.path.insert(0, str(SCRIPTS))

from quality import d2moe  # noqa: E402


def weights(rows: int = 40, cols: int = 96, seed: int = 0) -> F32:
    return np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)


def moments(cols: int = 96, rank: int = 24, seed: int = 1) -> F32:
    """Second moments of inputs that lie mostly in a few directions."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((1000, rank)) @ rng.standard_normal((rank, cols))
    x += 0.3 * rng.standard_normal(x.shape)
    return (x.T @ x / len(x)).astype(np.float32)


def error(w: F32, decoded: F32, h: F32) -> float:
    return float(d2moe.weighted_error(w - decoded, h).sum())


@pytest.mark.parametrize("variant", [d2moe.V1, d2moe.V2], ids=lambda v: v.name)
def test_each_plane_lowers_the_weighted_error(variant: d2moe.Variant) -> None:
    w, h = weights(), moments()
    made = d2moe.quantize(w, h, variant.levels, group=32)
    errors = [error(w, made[level], h) for level in variant.levels]
    assert all(b < 0.8 * a for a, b in pairwise(errors)), errors


def test_the_base_is_plain_rounding_where_all_inputs_count_alike() -> None:
    w = weights()
    made = d2moe.quantize(w, np.eye(96, dtype=np.float32), (2,), group=32)[2]
    nothing_known = d2moe.quantize(w, np.zeros((96, 96), np.float32), (2,), group=32)[2]
    assert (made == nothing_known).all()
    for at in range(0, 96, 32):
        part, got = w[:, at : at + 32], made[:, at : at + 32]
        assert (got == d2moe.base(part, np.eye(32, dtype=np.float32), 2)).all()
        for row, decoded in zip(part, got, strict=True):
            points = np.unique(decoded)
            assert len(points) <= 4
            near = points[np.abs(row[:, None] - points).argmin(axis=1)]
            np.testing.assert_allclose(np.abs(row - decoded), np.abs(row - near), atol=1e-6)


def test_a_clip_of_one_alone_is_min_max_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(d2moe, "CLIPS", (1.0,))
    monkeypatch.setattr(d2moe, "ROUNDS", 0)
    w = weights(cols=32)
    got = d2moe.base(w, np.eye(32, dtype=np.float32), 4)
    step = (w.max(axis=1) - w.min(axis=1)) / 15
    # half a step, a float16 scale's rounding at the far end, and half a 255th of the range
    room = 0.5 * step + 15 * step * 2.0**-11 + 15 * step / 510
    assert (np.abs(got - w) <= room[:, None] * 1.001).all()


def test_compensation_between_blocks_lowers_the_weighted_error() -> None:
    w, h = weights(), moments()
    made = d2moe.quantize(w, h, (2,), group=32)[2]
    blocks = [slice(at, at + 32) for at in range(0, 96, 32)]
    apart = np.concatenate([d2moe.base(w[:, b], h[b, b], 2) for b in blocks], axis=1)
    assert error(w, made, h) < 0.8 * error(w, apart, h)


def test_a_plane_is_signs_times_the_best_scale() -> None:
    r, h = weights(8, 32), moments(32, 8)
    got = d2moe.plane(r, h)
    scale = np.abs(got[:, :1])
    assert (got == np.where(r < 0, -scale, scale)).all()
    least = error(r, got, h)
    for factor in (0.9, 1.1):
        assert least < error(r, factor * got, h)


def test_groups_may_be_narrower_at_the_end() -> None:
    w, h = weights(cols=80), moments(80)
    made = d2moe.quantize(w, h, d2moe.V1.levels, group=32)
    assert made[4].shape == w.shape and error(w, made[4], h) < error(w, made[2], h)


def test_zeros_stay_zeros() -> None:
    made = d2moe.quantize(np.zeros((4, 32), np.float32), moments(32), (2, 3), group=32)
    assert (made[2] == 0).all() and (made[3] == 0).all()


def test_bits_count_scales() -> None:
    assert [d2moe.V1.bits(level) for level in d2moe.V1.levels] == [2.1875, 3.3125, 4.4375]
    assert [d2moe.V2.bits(level) for level in d2moe.V2.levels] == [5.1875, 6.3125, 7.4375, 8.5625]
    assert d2moe.V1.bits(2, 64) == 2.375
