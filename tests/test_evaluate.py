"""Evaluation: windows as llama.cpp's, figures against plain NumPy, the command end to end."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from cli_model import fails, make_checkpoint, run
from tiny import byte_tokenizer

import edgemoe
from edgemoe import evaluate
from edgemoe.errors import UsageError
from edgemoe.evaluate import ReferenceRows, TokenScores, compare, score, windows
from edgemoe.tokenizer import Tokenizer


def test_windows_do_not_overlap_and_score_the_second_half() -> None:
    got = windows(range(100, 127), 8, 8, bos=None)
    assert [w.tokens[0] for w in got] == [100, 108, 116]
    assert all(w.first == 4 and len(w.targets) == 3 for w in got)
    assert got[0].targets.tolist() == [105, 106, 107]
    with_bos = windows(range(100, 127), 8, 8, bos=1)
    assert [w.tokens[:2].tolist() for w in with_bos] == [[1, 101], [1, 109], [1, 117]]


def test_half_stride_scores_every_token_once() -> None:
    got = windows(range(40), 8, 4, bos=None)
    scored = np.concatenate([w.targets for w in got]).tolist()
    assert scored == list(range(4, 40))


@pytest.mark.parametrize(("n", "ctx", "stride"), [(7, 8, 8), (0, 8, 8), (100, 3, 3), (100, 8, 9)])
def test_bad_windows(n: int, ctx: int, stride: int) -> None:
    with pytest.raises(UsageError):
        windows(range(n), ctx, stride, None)


def logits_of(n: int, vocab: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, vocab)).astype(np.float32) * 3


def plain(z: np.ndarray) -> np.ndarray:
    e = np.exp(z.astype(np.float64))
    return np.asarray(e / e.sum(axis=1, keepdims=True))


@pytest.mark.parametrize("k", [5, 50, 300])
def test_scores_equal_plain_arithmetic(k: int) -> None:
    n, vocab = 70, 300
    ours, ref = logits_of(n, vocab, 0), logits_of(n, vocab, 1)
    targets = np.random.default_rng(2).integers(0, vocab, n)
    rows = ReferenceRows.of(ref, targets, k)
    got = score(ours, targets, rows)
    p, q = plain(ref), plain(ours)
    np.testing.assert_allclose(got.nll, -np.log(q[np.arange(n), targets]), rtol=1e-6)
    full = (p * np.log(p / q)).sum(axis=1)
    assert got.kld is not None
    if k == vocab:
        np.testing.assert_allclose(got.kld, full, rtol=1e-3, atol=1e-3)
    else:  # tokens lumped together can only hide divergence (log-sum inequality)
        assert (got.kld <= full + 2e-3).all()
        order = np.argsort(-p, axis=1)[:, :k]
        top_p = np.take_along_axis(p, order, axis=1)
        top_q = np.take_along_axis(q, order, axis=1)
        rest_p, rest_q = 1 - top_p.sum(axis=1), 1 - top_q.sum(axis=1)
        lumped = (top_p * np.log(top_p / top_q)).sum(axis=1) + rest_p * np.log(rest_p / rest_q)
        np.testing.assert_allclose(got.kld, lumped, rtol=2e-3, atol=2e-3)
    np.testing.assert_array_equal(got.same_top, p.argmax(axis=1) == q.argmax(axis=1))
    want = q[np.arange(n), targets] - p[np.arange(n), targets]
    np.testing.assert_allclose(got.delta_p, want, atol=1e-6)
    itself = score(ref, targets, rows)
    assert itself.kld is not None and itself.same_top is not None
    assert itself.kld.max() < 2e-3
    assert abs(itself.kld.mean()) < 5e-4
    assert itself.same_top.all()


def test_summary() -> None:
    nll = [np.array([1.0, 2.0, 3.0]), np.array([2.0])]
    s = evaluate.summarize([TokenScores(x) for x in nll], scored_bytes=10, references=None)
    assert s.tokens == 4
    assert s.ppl == pytest.approx(math.exp(2.0))
    assert s.ppl_se == pytest.approx(math.exp(2.0) * math.sqrt(2 / 3 / 4))
    assert s.bits_per_byte == pytest.approx(8.0 / math.log(2) / 10)
    assert s.kld is None


def test_quantile_and_its_error() -> None:
    x = np.random.default_rng(0).exponential(size=20_000)
    q, se = evaluate.quantile_se(x, 0.99)
    assert q == pytest.approx(-math.log(0.01), rel=0.05)
    # asymptotic: sqrt(p (1 - p) / n) / density
    assert se == pytest.approx(math.sqrt(0.99 * 0.01 / 20_000) / 0.01, rel=0.3)


def test_paired_bootstrap_finds_a_small_difference_and_no_other() -> None:
    rng = np.random.default_rng(0)
    base = [rng.exponential(size=100) + rng.normal(0, 1) for _ in range(60)]
    better = [x - 0.02 + 0.01 * rng.standard_normal(100) for x in base]
    c = compare(better, base)
    assert c.difference_low < -0.02 + 0.002 and c.difference_high < -0.015
    same = compare([x + 0.01 * rng.standard_normal(100) for x in base], base)
    assert same.difference_low < 0 < same.difference_high
    assert c.ratio < 1
    with pytest.raises(UsageError):
        compare(base, base[:-1])


def test_token_bytes_add_up_to_the_text() -> None:
    tokenizer = Tokenizer(json.dumps(byte_tokenizer(160)).encode())
    text = "Hello ~ world"
    joined = b"".join(tokenizer.token_bytes(i) for i in tokenizer.encode(text))
    assert joined == text.encode()
    assert tokenizer.token_bytes(10**6) == b""
    with edgemoe.load(bits=2, ctx_size=64) as model:
        text = "Once upon a time, they said \u201chello\u201d \U0001f600\n"
        ids = model.tokenizer.encode(text)
        assert b"".join(model.tokenizer.token_bytes(i) for i in ids) == text.encode()
        assert model.tokenizer.token_bytes(0) == b""  # <|endoftext|> is no text


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A tiny checkpoint, its store, and a text."""
    directory = tmp_path_factory.mktemp("eval")
    checkpoint = make_checkpoint(directory / "tiny")
    edgemoe.convert(checkpoint, directory / "tiny.emoe")
    rng = np.random.default_rng(0)
    text = directory / "text.txt"
    text.write_text("".join(rng.choice(list("abcdefgh \n"), 700)))
    return checkpoint, directory / "tiny.emoe", text


def test_command(sample: tuple[Path, Path, Path], tmp_path: Path) -> None:
    checkpoint, store, text = sample
    arguments = ["eval", store, "--text", text, "--ctx", "64", "--bits", "8", "--json"]
    arguments += ["--ref", checkpoint, "--versus", "3", "--mem", "512M"]
    env = {"XDG_CACHE_HOME": str(tmp_path)}
    code, out, err = run(*arguments, env=env)
    assert code == 0, err
    figures = json.loads(out)
    assert figures["tokens"] == (700 // 64) * 31
    assert (figures["bits"], figures["dense_bits"], figures["ctx"]) == (8, 8, 64)
    for key in ("ppl", "ppl_se", "ref_ppl", "kld", "kld_se", "kld_p99", "same_top"):
        assert math.isfinite(figures[key])
    assert figures["kld"] < 0.2 * figures["versus"]["kld"]
    # every byte is a token of this vocabulary
    assert figures["bits_per_byte"] == pytest.approx(math.log2(figures["ppl"]), rel=1e-9)
    assert figures["versus"]["paired"]["kld"]["ratio_high"] < 1
    kept = list(tmp_path.rglob("*.npz"))
    assert len(kept) == 1
    stamp = kept[0].stat().st_mtime_ns
    again = json.loads(run(*arguments, env=env)[1])
    assert (again["ppl"], again["kld"]) == (figures["ppl"], figures["kld"])
    assert kept[0].stat().st_mtime_ns == stamp, "the reference was run once"
    kept[0].write_bytes(b"broken")
    assert json.loads(run(*arguments, env=env)[1])["kld"] == figures["kld"]
    code, out, _ = run(*[a for a in arguments if a != "--json"], env=env)
    assert code == 0
    assert "KL divergence" in out and "8 against 3 bits" in out


def test_command_refuses(sample: tuple[Path, Path, Path], tmp_path: Path) -> None:
    checkpoint, store, text = sample
    bad = tmp_path / "bad.txt"
    for data, says in [
        (b"", "empty"),
        (b" \n ", "empty"),
        (b"\xff\xfe\x00abc", "not UTF-8"),
        (b"abc\0def", "binary"),
        (b"short", "less than one window"),
    ]:
        bad.write_bytes(data)
        fails("eval", store, "--text", bad, says=says, code=2)
    fails("eval", store, "--text", tmp_path / "none.txt", says="cannot read", code=2)
    fails("eval", store, "--text", text, "--ctx", "10000000", says="--ctx", code=2)
    fails("eval", store, "--text", text, "--ctx", "8", "--stride", "9", says="stride", code=2)
    fails("eval", store, says="--text", code=2)
    fails("eval", checkpoint, "--text", text, says="edgemoe convert")
    fails("eval", store, "--text", text, "--ctx", "8", "--ref", tmp_path, says="config.json")
