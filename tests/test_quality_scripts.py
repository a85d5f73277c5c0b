"""scripts/measure_quality.py: texts, products, levels, experts, and the ratio of two of them."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgemoe.arch import EXPERT_PARTS
from edgemoe.checkpoint import open_checkpoint
from edgemoe.errors import CheckpointError, UsageError
from edgemoe.evaluate import TokenScores, Window
from edgemoe.store import Store

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
if not (SCRIPTS / "measure_quality.py").is_file():
    pytest.skip(f"{SCRIPTS} is not here", allow_module_level=True)
sys.path.insert(0, str(SCRIPTS))

import measure_quality  # noqa: E402
from quality import (  # noqa: E402
    experts,
    hessians,
    levels,
    ratio,
    scored_text,
    scores,
    work,
)
from quality.stores import converted  # noqa: E402
from tiny_checkpoints import QWEN3, write_checkpoint  # noqa: E402

MODEL = QWEN3 | {"mlp_only_layers": [], "vocab_size": 160, "max_position_embeddings": 64}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model whose tokenizer has one marker, <end>."""
    from tiny import byte_tokenizer

    directory = write_checkpoint(tmp_path_factory.mktemp("model"), MODEL, tokenizer=False)
    tokenizer = byte_tokenizer(160)
    marker = {"id": 159, "content": "<end>", "special": True, "single_word": False}
    marker |= {"lstrip": False, "rstrip": False, "normalized": False}
    tokenizer["model"]["vocab"]["<end>"] = 159
    tokenizer["added_tokens"] = [marker]
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    return directory


@pytest.fixture
def text(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    lines = ["".join(rng.choice(list("abcdefgh "), 40)) for _ in range(12)]
    path = tmp_path / "held-out.txt"
    path.write_text("\n<end>\n".join(lines) + "\n")
    return path


def some_scores(kld: list[np.ndarray[Any, np.dtype[np.float64]]]) -> list[TokenScores]:
    return [TokenScores(k, k, np.ones_like(k), k, k, k) for k in kld]


def prepared(digest: str = "d", ctx: int = 8) -> scored_text.ScoredText:
    windows = [Window(np.zeros(ctx, np.int64), ctx // 2)]
    return scored_text.ScoredText("t", Path("t"), digest, windows, 10)


def test_lines_with_markers_are_dropped() -> None:
    got = scored_text.without_markers("a\n<end>\nb <end>\nc\n", ["<end>"])
    assert got == ("a\nc\n", 2)
    assert scored_text.head("aé", 2) == "a"


def test_a_text_is_prepared_once_and_says_what_it_dropped(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, here = open_checkpoint(checkpoint), work.Work(tmp_path / "w")
    one = scored_text.prepare(model, text, here, size=300, ctx=32)
    assert "11 lines dropped that hold one of <end>" in capsys.readouterr().err
    kept = one.path.read_text()
    assert "<end>" not in kept and len(kept) == 300
    two = scored_text.prepare(model, text, here, size=300, ctx=32)
    assert "there already" in capsys.readouterr().err
    assert one.digest == two.digest and len(one.windows) == 300 // 32
    with pytest.raises(UsageError, match="less than one window"):
        scored_text.prepare(model, text, here, size=20, ctx=32)


def test_a_product_is_made_again_only_when_its_key_changes(tmp_path: Path) -> None:
    here, made = work.Work(tmp_path / "w"), []

    def make(out: Path) -> None:
        made.append(out.name)
        out.write_text(str(len(made)))

    first = here.product("x", {"a": 1}, make)
    assert here.product("x", {"a": 1}, make) == first and len(made) == 1
    assert here.product("x", {"a": 2}, make).digest != first.digest and len(made) == 2
    here.product("x", {"a": 2}, make, fresh=True)
    assert first.path.read_text() == "3"

    def fail(out: Path) -> None:
        out.write_text("half")
        raise UsageError("no")

    with pytest.raises(UsageError):
        here.product("x", {"a": 3}, fail)
    # neither the half product nor the old one counts as the new one
    assert not list(here.directory.glob("part-*"))
    here.product("x", {"a": 3}, make)
    assert len(made) == 4


def test_a_program_that_fails_says_how(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(UsageError, match="status 3: oh no"):
        work.run([sys.executable, "-c", "print('oh no'); raise SystemExit(3)"], log)
    with pytest.raises(UsageError, match="cannot be started"):
        work.run([tmp_path / "nothing"], log)


def test_the_bootstrap_finds_a_known_ratio() -> None:
    rng = np.random.default_rng(1)
    # windows differ far more than the two sides do: only pairing tells 1.25 from 1
    level = rng.gamma(2.0, 0.02, 60)
    base = [rng.gamma(1.0, m, 200) for m in level]
    other = [1.25 * b * rng.uniform(0.9, 1.1, 200) for b in base]
    got = ratio.bootstrap(other, base)
    assert got["ratio"] == pytest.approx(1.25, rel=0.01)
    assert got["ratio_low"] < 1.25 < got["ratio_high"]
    assert got["ratio_high"] - got["ratio_low"] < 0.02
    assert got["ratio"] == pytest.approx(got["nested"] / got["dedicated"])
    assert got == ratio.bootstrap(other, base)
    same = ratio.bootstrap(base, base)
    assert same["ratio"] == same["ratio_low"] == same["ratio_high"] == 1.0


def test_windows_are_drawn_whole() -> None:
    """Tokens of a window agree here: counted one by one they would look four times as sure."""
    rng = np.random.default_rng(2)
    base = [np.ones(16) for _ in range(40)]
    other = [np.full(16, x) for x in rng.normal(1.0, 0.2, 40)]
    got = ratio.bootstrap(other, base)
    expected = 2 * 1.96 * float(np.std([o[0] for o in other])) / math.sqrt(40)
    assert got["ratio_high"] - got["ratio_low"] == pytest.approx(expected, rel=0.1)


def test_ratio_of_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    klds = [np.full(4, 0.1), np.full(4, 0.3)]
    scores.save(tmp_path / "a.npz", some_scores([2 * k for k in klds]), prepared())
    scores.save(tmp_path / "b.npz", some_scores(klds), prepared())
    scores.save(tmp_path / "c.npz", some_scores(klds), prepared("other"))
    a, b, c = (str(tmp_path / f"{name}.npz") for name in "abc")
    assert measure_quality.main(["ratio", a, b]) == 0
    assert json.loads(capsys.readouterr().out)["ratio"] == pytest.approx(2.0)
    assert measure_quality.main(["ratio", a, c]) == 2
    assert "not of the same windows" in capsys.readouterr().err
    (tmp_path / "d.npz").write_text("no")
    assert measure_quality.main(["ratio", a, str(tmp_path / "d.npz")]) == 2
    assert "not a file of scores" in capsys.readouterr().err


def test_experts_of_a_store_are_near_the_checkpoints(checkpoint: Path, tmp_path: Path) -> None:
    model = open_checkpoint(checkpoint)
    store = converted(model, work.Work(tmp_path), None)
    for level, most in ((2, 0.3), (8, 1e-4)):
        for place, w in experts.of_store(model, store, level).items():
            want = model.expert_matrix(place.layer, place.expert, place.part)
            lost = np.square(w - want).sum() / np.square(want).sum()
            assert most / 30 < lost < most


def test_bits_of_a_store(checkpoint: Path, tmp_path: Path) -> None:
    with Store.open(converted(open_checkpoint(checkpoint), work.Work(tmp_path), None)) as store:
        got = levels.expert_bits(store)
        said = store.size_report()["experts"]["bits_per_weight"]
    assert {str(level): bits for level, bits in got.items()} == said


def test_another_models_store_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    store = converted(open_checkpoint(checkpoint), work.Work(tmp_path), None)
    other = write_checkpoint(tmp_path / "other", MODEL | {"rms_norm_eps": 1e-3})
    with pytest.raises(UsageError, match="was not made of"):
        experts.of_store(open_checkpoint(other), store, 8)


def test_levels_and_nested_end_to_end(
    checkpoint: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    common = [str(checkpoint), "--text", str(text), "--ctx", "32", "--work", str(tmp_path / "w")]
    assert measure_quality.main(["levels", *common, "--levels", "2,8"]) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    two, eight = first["levels"]
    assert (two["level"], eight["level"]) == (2, 8) and two["bits"] < eight["bits"]
    assert two["kld"] > 10 * eight["kld"] > 0
    assert measure_quality.main(["levels", *common, "--levels", "2,8"]) == 0
    again = capsys.readouterr()
    assert json.loads(again.out.splitlines()[-1]) == first and "being made" not in again.err

    calibration = ["--calibration", str(text)]
    assert measure_quality.main(["levels", *common, *calibration]) == 0
    nested = json.loads(capsys.readouterr().out.splitlines()[-1])["levels"]
    assert [row["level"] for row in nested] == [2, 3, 4, 6, 8]
    assert nested[0]["kld"] != two["kld"]
    assert measure_quality.main(["nested", *common, *calibration, "--levels", "2,4"]) == 0
    for row in json.loads(capsys.readouterr().out.splitlines()[-1])["levels"]:
        # in float32 the store loses about what it does in the engine
        kld = next(r["kld"] for r in nested if r["level"] == row["level"])
        assert row["nested"] == pytest.approx(kld, rel=0.2)
        assert row["nested"] != row["dedicated"] > 0
    assert measure_quality.main(["levels", *common, "--levels", "5"]) == 2
    assert "has no level 5" in capsys.readouterr().err


def test_hessians_are_moments_of_what_experts_see(checkpoint: Path, tmp_path: Path) -> None:
    model = open_checkpoint(checkpoint)
    ids = np.random.default_rng(0).integers(0, 150, 200).tolist()
    found = hessians.collect(model, ids, 32)
    top_k, moe = model.config.num_experts_per_tok, len(model.config.moe_layers)
    assert found.counts.sum() == 192 * top_k * moe
    for part in EXPERT_PARTS:
        h = found.of(experts.Place(1, 2, part))
        assert (h == h.T).all() and np.linalg.eigvalsh(h).min() > -1e-4 * np.trace(h)
    found.save(tmp_path / "h.npz")
    back = hessians.Hessians.load(tmp_path / "h.npz")
    assert (back.inputs == found.inputs).all() and back.layers == found.layers
    with pytest.raises(UsageError, match="less than a window"):
        hessians.collect(model, ids[:10], 32)


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = ["levels", str(tmp_path / "no"), "--text", "x", "--work", str(tmp_path / "w")]
    assert measure_quality.main(missing) == CheckpointError.exit_code
    assert capsys.readouterr().err.startswith("measure_quality: error: ")
    with pytest.raises(SystemExit):
        measure_quality.main([*missing, "--levels", "9"])
