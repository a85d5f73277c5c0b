"""What a text tells of a checkpoint, and the stores made by it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from convert_samples import make_checkpoint
from test_nest import moment, output_error

from edgemoe import reference
from edgemoe.calibration import calibration, windows
from edgemoe.checkpoint import Checkpoint, open_checkpoint
from edgemoe.errors import UsageError
from edgemoe.mwq import convert as convert_module
from edgemoe.mwq.calibrate import (
    ENOUGH,
    CalibratedExperts,
    Chunk,
    ExpertInputs,
    ExpertMatrices,
    UnitSurvey,
    coupling,
)
from edgemoe.mwq.convert import convert
from edgemoe.mwq.packing import decode
from edgemoe.mwq.sensitivity import of_store
from edgemoe.store import Store
from edgemoe.types import F32, U8


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
            got = outputs(*decode(store.expert_layout(0), segments, level_index))
            total += float(np.square(got - outputs(*checkpoint.expert(0, e))).sum())
    return total


class Inputs(ExpertInputs):
    """Keeps what each matrix outside the experts reads."""

    def see(self, layer: int, expert: int, matrices: object, chunks: Iterator[Chunk]) -> None:
        for _ in chunks:
            pass

    def see_linears(self, names: Sequence[str], x: F32) -> None:
        self.found = {**getattr(self, "found", {}), **dict.fromkeys(names, x)}


def assert_dense_nearer(
    checkpoint: Checkpoint, text: list[np.ndarray], calibrated: Path, plain: Path
) -> None:
    """At 4 to 8 bits, on what they read; every nested tensor but an untied embedding is seen."""
    inputs = Inputs(checkpoint.expert, checkpoint.config.num_experts)
    calibration(checkpoint, text, 1)(inputs)
    lost = np.zeros((2, 5))
    with Store.open(calibrated) as a, Store.open(plain) as b:
        nested = {name for name, t in a.tensors.items() if t.kind == "nested"}
        assert set(inputs.found) == nested - {"embed"}
        for name, x in inputs.found.items():
            w, layout = checkpoint.tensor(name), a.tensors[name].layout
            assert layout is not None
            for side, store in enumerate((a, b)):
                segments = []
                for ref in store.tensor_segments(name):
                    segments.append(np.empty(ref.size, np.uint8))
                    store.read_into(ref, segments[-1])
                    (back,) = decode(layout, segments, len(segments) - 1)
                    lost[side, len(segments) - 1] += output_error(w, back, x)
    assert (lost[0, 2:] < lost[1, 2:]).all(), lost


def test_a_calibrated_store(tmp_path: Path) -> None:
    """Opens, verifies, and its experts are nearer on the inputs that they see."""
    rng = np.random.default_rng(0)
    text = [rng.integers(0, 70, 128) for _ in range(16)]
    checkpoint, out, starved = run(tmp_path, text)
    assert starved == 0
    convert(checkpoint, tmp_path / "plain.emoe")
    seen: list[F32] = []

    class Note(ExpertInputs):
        def __call__(self, layer: int, x: F32, ids: np.ndarray, weights: F32) -> F32:
            if layer == 0:
                seen.append(x)
            return np.zeros_like(x)

        def see(self, *args: object) -> None:
            raise AssertionError

    calibration(checkpoint, text, 1)(Note(checkpoint.expert, 3))
    for level_index in range(3):
        plain, nested = (
            expert_error(checkpoint, p, seen[0], level_index)
            for p in (tmp_path / "plain.emoe", out)
        )
        assert nested < plain
    assert_dense_nearer(checkpoint, text, out, tmp_path / "plain.emoe")
    with Store.open(out) as store:
        assert store.verify() == []
        assert store.metadata["quantizer"] == "affine8-nested"
        assert store.metadata["sensitivity"] == "measured"
        lost = of_store(store)
    assert lost is not None and lost.shape == (2, 3, 5)
    assert (lost[..., 0] > lost[..., 2]).all() and (lost[..., 2] > lost[..., 4]).all()
    assert (lost > 0).all()


def test_progress_counts_both_passes(tmp_path: Path) -> None:
    """From the first expert looked at, never falling, to the end."""
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "src").path)
    text = [np.random.default_rng(1).integers(0, 70, 128)]
    told: list[tuple[int, int, str]] = []
    convert(
        checkpoint,
        tmp_path / "out.emoe",
        progress=lambda *step: told.append(step),
        calibrate=calibration(checkpoint, text, 1),
    )
    done = [step[0] for step in told]
    assert done == sorted(done) and done[-1] == told[-1][1]
    experts = 3 * len(checkpoint.config.moe_layers)
    finished = [now for before, now in pairwise([(0, 0, ""), *told]) if now[0] > before[0]]
    assert [what.endswith(", first look") for _, _, what in finished[: experts + 1]] == [
        *[True] * experts,
        False,
    ]


def test_an_interrupt_is_heard_between_any_two_pieces_of_work(tmp_path: Path) -> None:
    """Of both passes: before the first expert is seen, between the chunks of one, and so on."""
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "src").path)
    text = [np.random.default_rng(1).integers(0, 70, 128) for _ in range(3)]
    told: list[int] = []
    last = 10**9

    def progress(done: int, total: int, what: str) -> None:
        told.append(done)
        if len(told) == last:
            raise KeyboardInterrupt

    def run() -> None:
        told.clear()
        calibrate = calibration(checkpoint, text, 2)
        convert(checkpoint, tmp_path / "out.emoe", progress=progress, calibrate=calibrate)

    run()
    (tmp_path / "out.emoe").unlink()
    # 2 blocks of rows and 3 windows in each matrix or attention of the first layer
    assert told.count(0) > 8
    calls = len(told)
    assert calls > 2 * len(set(told))
    for last in range(1, calls, calls // 16):
        with pytest.raises(KeyboardInterrupt):
            run()
        assert len(told) == last
        assert [p.name for p in tmp_path.iterdir()] == ["src"]


def test_rows_chosen_at_a_time_do_not_change_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = [np.random.default_rng(1).integers(0, 70, 128)]
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "src").path)
    stores = []
    for work in (1 << 31, 1):
        monkeypatch.setattr(convert_module, "_RUN_WORK", work)
        convert(checkpoint, tmp_path / "x.emoe", calibrate=calibration(checkpoint, text, 1))
        stores.append((tmp_path / "x.emoe").read_bytes())
    assert stores[0] == stores[1]


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


class Moments(ExpertInputs):
    """Keeps the second moments of what gate and up read."""

    def see(self, layer: int, expert: int, matrices: object, chunks: Iterator[Chunk]) -> None:
        parts = [c.inputs.T.astype(np.float64) @ (c.inputs * c.counts) for c in chunks]
        self.found = {**getattr(self, "found", {}), expert: sum(parts)}


@pytest.mark.parametrize("watched", [False, True])
def test_an_expert_sees_enough_tokens(watched: bool) -> None:
    """Its own with the square of their share over the residual's, others where those are few."""
    n = 2 * ENOUGH
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, 16)).astype(np.float32)
    weights = rng.random((n, 1)).astype(np.float32)
    ids = (np.arange(n) < 3).astype(np.int32)[:, None]
    matrices = tuple(rng.standard_normal((16, 16)).astype(np.float32) for _ in range(3))
    experts = Moments(lambda layer, e: matrices, 2)
    residual = rng.standard_normal((n, 16)).astype(np.float32) * np.linspace(0, 9, n)[:, None]
    if watched:
        experts.watch(0, residual.astype(np.float32))
    y = experts(0, x, ids, weights)
    assert experts.starved == 1
    own = np.arange(n) >= 3
    by = np.square(weights[own].astype(np.float64))
    if watched:
        by /= np.square(residual[own]).mean(axis=1, keepdims=True)
    np.testing.assert_allclose(experts.found[0], (x[own] * by).T @ x[own], rtol=1e-4, atol=1e-4)
    assert experts.found[1].any()
    gate, up, down = matrices
    want = reference.silu((x @ gate.T).astype(np.float64)) * (x @ up.T) @ down.T * weights
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-3)


def test_windows_are_spread_over_the_text() -> None:
    got = windows(range(10_000), 100, 450, None, "x")
    assert [int(w[0]) for w in got] == [0, 3300, 6600, 9900]
    assert all(len(w) == 100 for w in got)
    with pytest.raises(UsageError, match=r"a\.txt: 99 tokens are too few .* at least 100"):
        windows(range(99), 100, 450, None, "a.txt")
    assert [w[:2].tolist() for w in windows(range(300), 100, 250, 7, "x")] == [[7, 1], [7, 201]]


def survey_of(costs: list[list[list[float]]], hidden: int = 8) -> UnitSurvey:
    """A survey that saw, by layer, expert and unit, activations of these mean squares."""

    def unread(layer: int, expert: int) -> ExpertMatrices:
        raise AssertionError

    survey = UnitSurvey(unread, len(costs[0]), lambda layer, e: None)
    down = np.ones((hidden, len(costs[0][0])), np.float32)
    one = np.ones((1, 1), np.float32)
    for layer, experts in enumerate(costs):
        for e, units in enumerate(experts):
            a = np.sqrt(np.array([units], np.float32))
            survey.see(layer, e, (down.T, down.T, down), iter([Chunk(a[:, :1], a, one, one)]))
    return survey


def test_the_dearest_units_come_first_and_get_the_columns_ahead() -> None:
    rng = np.random.default_rng(0)
    costs = rng.random((3, 2, 100))
    costs[1] *= 100
    costs[2, :, 37] = 1e4
    survey = survey_of(costs.tolist())
    for layer in range(3):
        for e in range(2):
            np.testing.assert_array_equal(survey.order(layer, e), np.argsort(-costs[layer, e]))
    # 4 blocks of units a layer, 12 in all
    assert survey.ahead(0.0) == [0, 0, 0]
    assert survey.ahead(1 / 12) == [0, 0, 32]
    assert survey.ahead(3 / 12) == [0, 64, 32]
    assert survey.ahead(5 / 12) == [32, 96, 32]  # the last block of a layer is a small one
    assert survey.ahead(1.0) == [100, 100, 100]


def test_a_survey_of_unusable_activations() -> None:
    """Infinite or absent ones leave the order as it is and nothing fails."""
    survey = survey_of([[[0.0] * 40, [np.inf] * 40]])
    np.testing.assert_array_equal(survey.order(0, 0), np.arange(40))
    np.testing.assert_array_equal(survey.order(0, 1), np.arange(40))
    assert survey.ahead(0.5) == [32]


def test_units_in_another_order_are_the_same_expert() -> None:
    """What the sink gets computes what the expert computes, and its sample says of which tokens."""
    rng = np.random.default_rng(2)
    matrices: ExpertMatrices = (
        rng.standard_normal((40, 16)).astype(np.float32),
        rng.standard_normal((40, 16)).astype(np.float32),
        rng.standard_normal((16, 40)).astype(np.float32),
    )
    x = rng.standard_normal((300, 16)).astype(np.float32)
    route = np.zeros((300, 1), np.int32), np.full((300, 1), 0.5, np.float32)
    survey = UnitSurvey(lambda layer, e: matrices, 1, lambda layer, e: None)
    want = survey(0, x, *route)
    got: list[tuple[Any, ...]] = []

    class Kept:
        def expert(self, *args: Any) -> None:
            got.append(args)

        def linears(self, *args: Any) -> None:
            got.append(args)

    experts = CalibratedExperts(lambda *_: matrices, 1, survey, Kept())
    np.testing.assert_array_equal(experts(0, x, *route), want)
    layer, expert, (gate, up, down), shares, chunk = got[0]
    assert (layer, expert) == (0, 0) and [len(s.moment) for s in shares] == [16, 16, 40]
    a = reference.silu((x @ gate.T).astype(np.float64)) * (x @ up.T)
    np.testing.assert_allclose(a @ down.T * 0.5, want, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(chunk.middles, a[: len(chunk.middles)], rtol=1e-3, atol=1e-4)
    cost = np.square(a).sum(axis=0)
    assert (np.diff(cost) <= 1e-5 * cost[:-1]).all()
    experts.see_linears(["q", "k"], x)
    names, by = got[1]
    assert names == ["q", "k"]
    for a, b in zip(by, coupling(moment(x)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
