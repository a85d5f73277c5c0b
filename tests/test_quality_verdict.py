"""scripts/measure_quality.py llamacpp, verdict: llama.cpp's files and logs, and who is better.

Nothing of llama.cpp runs here.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from edgemoe.errors import UsageError
from edgemoe.evaluate import Window

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
if not (SCRIPTS / "measure_quality.py").is_file():
    pytest.skip(f"{SCRIPTS} is not here", allow_module_level=True)
sys.path.insert(0, str(SCRIPTS))

import measure_quality  # noqa: E402
from quality import llamacpp, plot, verdict  # noqa: E402
from quality.verdict import Point  # noqa: E402


def test_fallback_is_refused() -> None:
    sound = "[ 1/74] blk.0.ffn_up_exps.weight - converting to q3_K .. size\n"
    llamacpp.check_fallback(sound, "Q3_K_M")
    for bad in (
        "llama_model_quantize_impl: WARNING: 12 of 74 tensor(s) required fallback quantization",
        "warning: blk.0 - ncols 704 not divisible by 256 (required for type q3_K) "
        "-> falling back to iq4_nl",
    ):
        with pytest.raises(UsageError, match="leave Q3_K_M out"):
            llamacpp.check_fallback(sound + bad + "\n", "Q3_K_M")


def write_gguf(path: Path, other: gguf.GGMLQuantizationType) -> None:
    """Two experts' tensors, one of 8.5 and one of 4.5 bits, and an attention matrix of `other`."""
    writer = gguf.GGUFWriter(path, "qwen3moe")
    kinds = gguf.GGMLQuantizationType
    for name, kind, rows in (
        ("blk.0.ffn_up_exps.weight", kinds.Q8_0, 8),
        ("blk.0.ffn_down_exps.weight", kinds.Q4_0, 24),
        ("blk.0.attn_q.weight", other, 8),
        ("blk.0.attn_norm.weight", kinds.F32, 1),
    ):
        weights = np.zeros((rows, 64), np.float32)
        data = gguf.quants.quantize(weights, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_expert_bits_of_a_gguf(tmp_path: Path) -> None:
    kinds = gguf.GGMLQuantizationType
    write_gguf(tmp_path / "a.gguf", kinds.Q8_0)
    bits, held = llamacpp.expert_bits(tmp_path / "a.gguf")
    assert bits == (8 * 8.5 + 24 * 4.5) / 32
    assert held == {"Q8_0": 1, "Q4_0": 1}
    write_gguf(tmp_path / "b.gguf", kinds.Q4_0)
    with pytest.raises(UsageError, match=r"attn_q\.weight is Q4_0"):
        llamacpp.expert_bits(tmp_path / "b.gguf")
    write_gguf(tmp_path / "c.gguf", kinds.F16)
    assert llamacpp.matrices_besides_experts(tmp_path / "c.gguf") == ["attn_q.weight"]


def test_figures_of_a_log() -> None:
    log = (
        "Mean PPL(Q)                   :  10.731140 ±   0.158204\n"
        "Mean    KLD:   0.022029 ±   0.000200\n"
        "Same top p: 91.722 ± 0.152 %\n"
    )
    got = llamacpp.read_figures(log, Path("log"))
    assert got["kld"] == 0.022029 and got["kld_se"] == 0.0002 and got["ppl"] == 10.73114
    assert got["same_top"] == pytest.approx(0.91722)
    assert got["same_top_se"] == pytest.approx(0.00152)
    with pytest.raises(UsageError, match="has not said its kld"):
        llamacpp.read_figures(log.replace("0.022029", "nan"), Path("log"))
    assert llamacpp.base_perplexity("x\nFinal estimate: PPL = 10.4786 +/- 0.15553\n") == 10.4786
    with pytest.raises(UsageError, match="F16"):
        llamacpp.base_perplexity("")


def test_llamacpp_scored_our_tokens(tmp_path: Path) -> None:
    tokens = np.arange(16, dtype="<i4").reshape(2, 8)
    base = tmp_path / "base"
    base.write_bytes(b"_logits_" + np.array([8, 40, 2], "<i4").tobytes() + tokens.tobytes())
    todo = [Window(np.concatenate([[39], row[1:]]).astype(np.int64), 4) for row in tokens]
    llamacpp.check_tokens(base, todo)
    todo[1].tokens[5] += 1
    for wrong in (todo, todo[:1]):
        with pytest.raises(UsageError, match="2 windows of 8 other tokens"):
            llamacpp.check_tokens(base, wrong)


def test_programs_have_to_be_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="llama-imatrix"):
        llamacpp.Programs(tmp_path, 1).check()


def figures(key: str, name: Any, bits: float, kld: float, se: float = 0.0) -> dict[str, Any]:
    return {key: name, "bits": bits, "kld": kld, "kld_se": se}


def test_the_curve_is_straight_in_the_logarithm() -> None:
    points = [Point(b, math.exp(1 - 2 * b), 0.1 * math.exp(1 - 2 * b)) for b in (2.2, 3.3, 4.4)]
    for bits in (2.2, 2.5, 3.3, 4.0, 4.4):
        found = verdict.interpolate(points, bits)
        assert found is not None
        assert found[0].kld == pytest.approx(math.exp(1 - 2 * bits))
        assert found[0].log_se == pytest.approx(0.1)
    assert verdict.interpolate(points, 2.1) is None and verdict.interpolate(points, 4.5) is None


def test_verdicts() -> None:
    ours = [
        figures("level", 4, 4.4, 0.01, 0.0002),
        figures("level", 2, 2.2, 0.04, 0.0008),
        figures("level", 8, 8.6, 0.001, 0.0001),
    ]
    theirs = [
        figures("type", "far", 2.0, 0.05),
        figures("type", "lost", 3.3, 0.019, 0.0004),
        figures("type", "won", 3.3, 0.022, 0.0004),
        figures("type", "even", 3.3, 0.0205, 0.0004),
        figures("type", "Q8_0", 8.5, 0.002, 0.0001),
    ]
    far, lost, won, even, q8 = verdict.verdicts(ours, theirs)
    assert far.ours is None and not far.passed and far.at == "outside our levels"
    assert won.ours == pytest.approx(0.02) and won.at == "2-4"
    se = math.hypot(0.02, 0.0004 / 0.022)
    assert won.errors == pytest.approx(math.log(1.1) / se) and won.passed
    assert lost.errors is not None and lost.errors < 0 and not lost.passed
    assert even.errors is not None and 0 < even.errors < 2 and not even.passed
    # directly: at 8.5 bits the curve would be above level 8
    assert q8.ours == 0.001 and q8.at == "level 8" and q8.ratio == 0.5 and q8.passed


def test_a_verdict_is_on_one_text() -> None:
    level = {"text": {"digest": "a", "text": "x"}, "levels": []}
    other = {"text": {"digest": "b", "text": "y"}, "types": []}
    with pytest.raises(UsageError, match="same windows"):
        verdict.judge(level, other)
    with pytest.raises(UsageError, match="no logarithm"):
        Point.of({"bits": 2, "kld": 0.0, "kld_se": 0.0})


def test_the_command_judges_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = {"digest": "a", "text": "held & out", "tokens": 100}
    rows = [figures("level", b, b + 0.2, 2.0**-b, 0.01 * 2.0**-b) for b in (2, 3, 4)]
    made = {"command": "levels", "text": about, "levels": rows}
    (tmp_path / "l.json").write_text(json.dumps(made))
    types = [figures("type", "Q2_K", 2.9, 0.9, 0.01), figures("type", "Q9", 9.0, 0.1, 0.01)]
    (tmp_path / "t.json").write_text(
        json.dumps({"command": "llamacpp", "text": about, "types": types})
    )
    arguments = ["verdict", str(tmp_path / "l.json"), str(tmp_path / "t.json")]
    assert measure_quality.main([*arguments, "--plot", str(tmp_path / "p.svg")]) == 0
    out = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert out["passed"] == 1 and [v["passed"] for v in out["verdicts"]] == [True, False]
    drawn = (tmp_path / "p.svg").read_text()
    assert drawn.count("<circle") == 5 + 2 and "held &amp; out" in drawn and "Q2_K" in drawn
    assert measure_quality.main([arguments[0], arguments[2], arguments[2]]) == 2
    assert "is not what `levels` made" in capsys.readouterr().err


def test_axes_are_logarithmic() -> None:
    axes = plot._Axes([Point(2, 0.1, 0), Point(8, 0.001, 0)])
    assert axes.x(4) - axes.x(2) == pytest.approx(axes.x(8) - axes.x(4))
    assert axes.y(0.01) - axes.y(0.1) == pytest.approx(axes.y(0.001) - axes.y(0.01))
    assert axes.y(0.1) < axes.y(0.001)
