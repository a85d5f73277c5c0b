"""What an error costs by layer: measured, written into the store, and used."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from tiny import make_tiny

import edgemoe
from edgemoe import cli
from edgemoe.errors import StoreError
from edgemoe.evaluate import windows
from edgemoe.layer_costs import layer_costs
from edgemoe.mwq import sensitivity
from edgemoe.opened import bundled_path, open_model
from edgemoe.pipeline.bit_router import GateGains
from edgemoe.store import Store, replace_section

TEXT = (
    "Once upon a time there was a little girl who had a red ball. One day she went to the park "
    "with her mother and saw a big dog. The dog wanted to play, so she threw the ball. "
)


@pytest.fixture
def bundled(tmp_path: Path) -> Path:
    return Path(shutil.copy(bundled_path(), tmp_path / "model.emoe"))


def costs_of(path: Path) -> np.ndarray:
    with Store.open(path) as store:
        return sensitivity.costs_of_store(store)


def test_the_bundled_models(
    bundled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Early errors are mostly made up for, and nothing else of the store changes."""
    text = tmp_path / "text"
    text.write_text(TEXT * 60)
    with Store.open(bundled) as store:
        sections = {name: bytes(store.section(name)) for name in store.sections}
    asked = ["calibrate", str(bundled), "--text", str(text), "--tokens", "1024"]
    assert cli.main(asked) == 0
    assert "in layer 0 to" in capsys.readouterr().out
    whole = costs_of(bundled)
    assert whole.shape == (6,) and whole.mean() == pytest.approx(1, abs=1e-5)
    assert whole[0] < 0.5 < 1 < whole[-1]
    with Store.open(bundled) as store:
        assert store.verify() == []
        after = {name: bytes(store.section(name)) for name in store.sections}
    assert after.pop(sensitivity.COSTS) and sections.pop(sensitivity.COSTS, b"") is not None
    assert after == sections
    with edgemoe.load(bundled, mean_bits=3, ctx_size=64) as model:
        assert model.generate("Once", max_tokens=5).token_ids


def test_the_same_where_experts_are_streamed() -> None:

    def tell(told: list[tuple[int, int]], done: int, total: int) -> None:
        told.append((done, total))

    found = []
    for cache in (None, "3M"):
        told: list[tuple[int, int]] = []
        opened = open_model()
        with edgemoe.load(opened, bits=8, ctx_size=64, cache=cache) as model:
            todo = windows(model.tokenizer.encode(TEXT * 3), 64, 64, None)
            found.append(layer_costs(model, opened.store, todo, partial(tell, told)))
            assert model.plan.streamed == (cache is not None)
        assert told == [(i, 7) for i in range(1, 8)]
    assert found[0].tobytes() == found[1].tobytes()


def test_gains_grow_with_the_cost() -> None:
    rng = np.random.default_rng(1)
    loss = rng.uniform(0, 1, (2, 3, 3)).astype(np.float32)
    loss.sort(axis=2)
    loss = loss[..., ::-1].copy()
    x, ids = np.zeros((1, 4), np.float32), np.array([[0, 2]], np.int32)
    gates = np.array([[0.7, 0.2]], np.float32)
    plain = GateGains((3, 5), (2, 3, 4), loss)
    dear = GateGains((3, 5), (2, 3, 4), loss, np.array([1, 4], np.float32))
    assert np.array_equal(dear(3, x, ids, gates), plain(3, x, ids, gates))
    assert dear(5, x, ids, gates) == pytest.approx(4 * plain(5, x, ids, gates))


def test_a_store_without_costs_has_all_the_same(tmp_path: Path) -> None:
    make_tiny(tmp_path, "qwen2_moe")
    edgemoe.convert(tmp_path, tmp_path / "tiny.emoe")
    assert (costs_of(tmp_path / "tiny.emoe") == 1).all()


@pytest.mark.parametrize(
    "data", [b"", b"123", np.ones(7, "<f4").tobytes(), np.zeros(6, "<f4").tobytes(),
             np.full(6, np.nan, "<f4").tobytes(), np.full(6, -1, "<f4").tobytes()],
)  # fmt: skip
def test_damaged_costs_are_refused(bundled: Path, data: bytes) -> None:
    replace_section(bundled, sensitivity.COSTS, data)
    with pytest.raises(StoreError, match="layer_cost"):
        edgemoe.load(bundled, mean_bits=3, ctx_size=64)
    with edgemoe.load(bundled, bits=3, ctx_size=64) as model:
        assert model.generate("Once", max_tokens=2).token_ids


def test_bad_input(bundled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = bundled.read_bytes()
    (tmp_path / "short").write_text("Once upon")
    (tmp_path / "binary").write_bytes(b"\x00\xff" * 40)
    for name, said in (
        ("short", "less than one window"), ("binary", "not UTF-8"), ("missing", "cannot read"),
    ):  # fmt: skip
        assert cli.main(["calibrate", str(bundled), "--text", str(tmp_path / name)]) == 2
        assert said in capsys.readouterr().err
    assert bundled.read_bytes() == before
