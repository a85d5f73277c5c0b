"""EdgeMoE's choices, to compare with: levels for good, a profile, the most used read at start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import make_tiny

import edgemoe
from edgemoe.errors import UsageError
from edgemoe.pipeline.edge_moe import levels_for_good, read_profile, reads_at_start
from edgemoe.pipeline.streamed import StreamedMixture
from edgemoe.store import Store
from edgemoe.types import Streaming


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("edge")
    make_tiny(directory, "qwen2_moe")
    edgemoe.convert(directory, directory / "tiny.emoe")
    return directory / "tiny.emoe"


def a_profile(store: Path, out: Path) -> Path:
    with Store.open(store) as opened:
        shape = len(opened.config.moe_layers), opened.config.num_experts
    with out.open("wb") as file:
        np.save(file, np.random.default_rng(1).integers(0, 1000, shape))
    return out


def test_levels_take_what_their_mean_does(store: Path) -> None:
    with Store.open(store) as opened:
        bits = np.array(opened.quant.expert_levels)
        layout = opened.expert_layout(opened.config.moe_layers[0])
        for mean in (2.0, 3.0, 3.4, 6.0, 8.0):
            levels = levels_for_good(opened, mean)
            assert levels.shape == (len(opened.config.moe_layers), opened.config.num_experts)
            taken = sum(layout.prefix_bytes(int(i)) for i in levels.ravel())
            sizes = [layout.prefix_bytes(i) for i in range(len(bits))]
            most = np.interp(mean, bits, sizes) * levels.size
            largest = max(np.diff(sizes))
            assert most - largest <= taken <= most + 1
        assert (levels == len(bits) - 1).all()


def test_the_most_used_come_first(store: Path, tmp_path: Path) -> None:
    with Store.open(store) as opened:
        profile = read_profile(a_profile(store, tmp_path / "p.npy"), opened)
        levels = levels_for_good(opened, 3)
        reads = reads_at_start(opened, profile, levels)
        layers = opened.config.moe_layers
        uses = [int(profile[layers.index(layer), want.expert]) for layer, want in reads]
        assert uses == sorted(uses, reverse=True) and len(reads) == profile.size
        for layer, want in reads:
            assert want.depth == levels[layers.index(layer), want.expert] + 1


@pytest.mark.parametrize("levels", [{"bits": 3}, {"mean_bits": 3.5}])
def test_a_run(store: Path, tmp_path: Path, levels: dict[str, Any]) -> None:
    """The bits of a run in which all is resident; the most used experts there from the start."""
    path = a_profile(store, tmp_path / "p.npy")
    how = Streaming(profile=path, look_ahead=False)
    outputs = []
    for cache in (None, "150K"):
        with edgemoe.load(store, ctx_size=64, cache=cache, streaming=how, **levels) as model:
            mixture = model._experts
            if isinstance(mixture, StreamedMixture):
                books = mixture._source._residency
                assert books.used_bytes > 0.5 * books.budget
                top = np.unravel_index(np.load(path).argmax(), np.load(path).shape)
                assert books.claimed(int(top[0]))[int(top[1])] >= 2
            caches, out = [model.new_cache()], []
            for token in range(30):
                out.append(model.step([token], caches).tobytes())
            outputs.append(out)
            mean = model.usage().traffic.mean_bits
            assert mean == pytest.approx(levels.get("bits") or 3.5, abs=0.8)
    assert outputs[0] == outputs[1]


def test_profiles_that_cannot_be_used(store: Path, tmp_path: Path) -> None:
    with Store.open(store) as opened:
        shape = len(opened.config.moe_layers), opened.config.num_experts
        (tmp_path / "text.npy").write_text("not counts")
        for name, found in {
            "other": np.zeros((shape[0], shape[1] + 1), np.int64),
            "floats": np.zeros(shape, np.float32),
            "negative": np.full(shape, -1),
            "objects": np.full(shape, None),
        }.items():
            np.save(tmp_path / f"{name}.npy", found, allow_pickle=True)
        for name in ("text", "other", "floats", "negative", "objects", "missing"):
            with pytest.raises(UsageError, match=f"{name}.npy"):
                read_profile(tmp_path / f"{name}.npy", opened)
    for name in ("other", "missing"):
        with pytest.raises(UsageError, match=f"{name}.npy"):
            edgemoe.load(store, ctx_size=64, streaming=Streaming(profile=tmp_path / f"{name}.npy"))
