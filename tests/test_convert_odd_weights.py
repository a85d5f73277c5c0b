"""Weights that training seldom leaves, converted with and without a calibration text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from convert_samples import Key, make_checkpoint
from numpy.typing import NDArray

from edgemoe.arch import EXPERT_PARTS
from edgemoe.calibration import calibration
from edgemoe.checkpoint import open_checkpoint
from edgemoe.layout import RecordLayout
from edgemoe.mwq.calibrate import UnitSurvey
from edgemoe.mwq.convert import convert
from edgemoe.mwq.packing import affine, decode, read_scales
from edgemoe.mwq.quantize import REACH
from edgemoe.mwq.sensitivity import of_store
from edgemoe.store import Store
from edgemoe.types import F32, U8, PlaneRef

SHAPE = {"hidden_size": 192, "moe_intermediate_size": 160, "num_experts": 4}


def odd(key: Key, w: F32) -> F32:
    """A row of each kind in every matrix; a router that sends every token to experts 0 and 1."""
    if isinstance(key, str) and key.endswith("router"):
        return np.zeros_like(w)
    if w.ndim != 2 or len(w) < 8:
        return w
    w[0] = 0
    w[1] = 0.25
    w[2, 3] = 1e4
    w[3] *= np.float32(1e-38)
    w[4, :128] = 0
    w[5, :128] = -0.125
    w[6, 128:] *= np.float32(1e-41)
    return w


def bounds(layout: RecordLayout, segments: list[U8], whole: int, reach: int) -> F32:
    """Most that an error may be at the level of the last segment: float32 [rows, cols]."""
    level_index, out = len(segments) - 1, []
    for m in layout.wholes[whole]:
        matrix, step = layout.matrices[m], layout.matrix_level(m, level_index)
        bits = layout.quant.levels[step]
        cell, _ = affine(read_scales(layout, segments, level_index, m), bits, step)
        # A cell: half of it to its centre, which is moved by up to half of it.
        most = cell * np.float32(1 + reach / 2 ** (8 - bits))
        out.append(np.repeat(most, matrix.group_size, axis=1)[:, : matrix.cols])
    return np.concatenate(out, axis=1)


def check(
    layout: RecordLayout, store: Store, refs: list[PlaneRef], want: list[F32], reach: int
) -> None:
    """Every level of a record against its weights."""
    segments: list[U8] = []
    for level_index, ref in enumerate(refs):
        segments.append(np.empty(ref.size, np.uint8))
        store.read_into(ref, segments[-1])
        back = decode(layout, segments, level_index)
        for whole, (got, w) in enumerate(zip(back, want, strict=True)):
            most = bounds(layout, segments, whole, reach) + np.float32(1e-6) * np.abs(w)
            assert (np.abs(got - w) <= most).all(), (level_index, whole)


@pytest.mark.parametrize("calibrated", [False, True])
def test_every_level_is_as_near_as_its_steps(
    calibrated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zeros, equal weights, outliers and denormals; experts that no token is routed to."""
    order = UnitSurvey.order

    def as_they_came(self: UnitSurvey, layer: int, expert: int) -> NDArray[np.int64]:
        units = np.sort(order(self, layer, expert))
        np.testing.assert_array_equal(units, np.arange(len(units)))
        return units

    monkeypatch.setattr(UnitSurvey, "order", as_they_came)
    source = make_checkpoint(tmp_path / "src", "F32", change=odd, **SHAPE)
    checkpoint, out = open_checkpoint(source.path), tmp_path / "x.emoe"
    text = [np.random.default_rng(i).integers(0, 70, 128) for i in range(4)]
    calibrate = calibration(checkpoint, text, 2) if calibrated else None
    report = convert(checkpoint, out, calibrate=calibrate)
    dead = 2 * len(checkpoint.config.moe_layers)
    assert report.starved == (dead if calibrated else None)
    reach = REACH if calibrated else 0
    with Store.open(out) as store:
        assert store.verify() == []
        lost = of_store(store)
        assert lost is not None and np.isfinite(lost).all() and (lost >= 0).all()
        for name, tensor in store.tensors.items():
            if tensor.layout is not None:
                want = [source.weights[name]]
                check(tensor.layout, store, store.tensor_segments(name), want, reach)
        for layer in store.config.moe_layers:
            layout = store.expert_layout(layer)
            for e in range(store.config.num_experts):
                refs = [store.expert_segment(layer, e, i) for i in range(layout.depth)]
                want = [source.weights[layer, e, part] for part in EXPERT_PARTS]
                check(layout, store, refs, want, reach)
