"""Evaluation: windows as llama.cpp's, figures against plain NumPy, the command end to end."""

from __future__ import annotations

import json
import math
import time
import tracemalloc
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_model import fails, make_checkpoint, run
from tiny import byte_tokenizer

import edgemoe
from edgemoe import evaluate
from edgemoe.errors import MemoryBudgetError, UsageError
from edgemoe.evaluate import (
    ReferenceRows,
    Summary,
    TokenScores,
    Window,
    compare,
    score,
    windows,
)
from edgemoe.model import Span
from edgemoe.reference_logits import TOP
from edgemoe.terminal.evaluate import EvalOptions, _encoder, read_text
from edgemoe.terminal.evaluate import run as run_eval
from edgemoe.terminal.evaluate_output import lines
from edgemoe.tokenizer import Tokenizer
from edgemoe.window_logits import window_logits


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


def with_bos(**settings: Any) -> Tokenizer:
    return Tokenizer(json.dumps(byte_tokenizer(160) | settings).encode())


def test_a_bos_comes_first_only_where_the_tokenizer_adds_one() -> None:
    """llama.cpp: common_tokenize(text, add_special), and the first token of a window replaced."""
    data = json.dumps(byte_tokenizer(160)).encode()
    plain = Tokenizer(data, bos_token_id=7)
    assert plain.first_special() is None
    assert _encoder(plain)("ab") == plain.encode("ab", add_special=False)
    added = Tokenizer(data, config={"add_bos_token": True}, bos_token_id=7)
    assert added.first_special() == 7
    assert _encoder(added)("ab") == [7, *plain.encode("ab")] == added.encode("ab")
    template = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": "</s>", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {
            "<s>": {"id": "<s>", "ids": [100], "tokens": ["<s>"]},
            "</s>": {"id": "</s>", "ids": [101], "tokens": ["</s>"]},
        },
    }
    both = with_bos(post_processor=template)
    assert both.encode("ab") == [100, *plain.encode("ab"), 101]
    assert both.first_special() == 100
    assert _encoder(both)("ab") == [100, *plain.encode("ab")]  # nothing is put after a text
    end = with_bos(post_processor=template | {"single": template["single"][1:]})
    assert end.first_special() is None


def test_special_tokens_spelled_in_a_text_are_text_unless_asked() -> None:
    """llama.cpp's perplexity tokenizes without parse_special."""
    added = {"id": 160, "content": "<|end|>", "special": True, "normalized": False}
    added |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    tok = with_bos(added_tokens=[added])
    assert _encoder(tok)("a<|end|>b") == [64, 160, 65]
    spelled = _encoder(tok, False)("a<|end|>b")
    assert len(spelled) == 9 and 160 not in spelled
    assert tok.decode(spelled) == "a<|end|>b"
    assert _encoder(tok)("a<|end|>b") == [64, 160, 65]  # the setting does not stick


def test_the_newline_that_ends_a_file_is_not_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("a\n\n")
    assert read_text(str(tmp_path / "t")) == "a\n"


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
        np.testing.assert_allclose(got.ref_rest, rest_p, rtol=1e-6)
    np.testing.assert_array_equal(got.same_top, p.argmax(axis=1) == q.argmax(axis=1))
    want = q[np.arange(n), targets] - p[np.arange(n), targets]
    np.testing.assert_allclose(got.delta_p, want, atol=1e-6)
    np.testing.assert_allclose(got.ref_nll, -np.log(p[np.arange(n), targets]), rtol=1e-6)
    itself = score(ref, targets, rows)
    assert itself.kld is not None and itself.same_top is not None
    assert itself.kld.max() < 2e-3
    assert abs(itself.kld.mean()) < 5e-4
    assert itself.same_top.all()


class OneWindow:
    """References of a single window, from all its logits."""

    def __init__(self, logits: np.ndarray, targets: np.ndarray, k: int) -> None:
        self._rows = ReferenceRows.of(logits, targets, k)

    def rows(self, window: int, first: int, stop: int) -> ReferenceRows:
        assert window == 0
        return self._rows.rows(first, stop)


def test_scoring_in_pieces_changes_nothing_and_stays_small() -> None:
    """Scores do not depend on how a runner cuts its logits; memory stays within scratch_bytes."""
    vocab, n = 40_000, 30
    ours, ref = logits_of(n, vocab, 0), logits_of(n, vocab, 1)
    tokens = np.random.default_rng(2).integers(0, vocab, n + 4)
    window = Window(tokens, 3)
    references = OneWindow(ref, window.targets, 4096)

    def score_cut(*cuts: int) -> TokenScores:
        def run_window(got: np.ndarray, first: int) -> Any:
            assert got.tolist() == tokens[:-1].tolist() and first == 3
            yield from np.split(ours, cuts)

        return evaluate.score_windows(run_window, [window], references)[0]

    whole, pieces = score_cut(), score_cut(1, 2, 20)
    for name in ("nll", "kld", "same_top", "delta_p", "ref_nll", "ref_rest"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(pieces, name))
    tracemalloc.start()
    score_cut()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    block = 4 * vocab * evaluate.rows_at_once(vocab, evaluate.LOGITS)
    assert 0 < peak + block <= evaluate.scratch_bytes(vocab, 4096)


def test_summary() -> None:
    nll = [np.array([1.0, 2.0, 3.0]), np.array([2.0])]
    s = evaluate.summarize([TokenScores(x) for x in nll], scored_bytes=10)
    assert s.tokens == 4
    assert s.ppl == pytest.approx(math.exp(2.0))
    assert s.ppl_se == pytest.approx(math.exp(2.0) * math.sqrt(2 / 3 / 4))
    assert s.bits_per_byte == pytest.approx(8.0 / math.log(2) / 10)
    assert s.kld is None
    a, b = np.array([0.1, 0.3]), np.array([1.0, 0.0])
    against = TokenScores(np.array([1.0, 2.0]), a, b, np.array([0.3, -0.4]), b + 1, a / 10)
    s = evaluate.summarize([against], scored_bytes=4)
    assert (s.kld, s.same_top, s.ref_rest) == (pytest.approx(0.2), 0.5, pytest.approx(0.02))
    assert s.kld_se == pytest.approx(0.1)
    assert s.rms_delta_p == pytest.approx(math.sqrt(0.125))
    assert s.ref_ppl == pytest.approx(math.exp(1.5))
    assert s.ref_ppl_se == pytest.approx(math.exp(1.5) * 0.5)
    assert math.isfinite(evaluate.summarize([TokenScores(np.full(3, 1e4))], 4).ppl)


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
    assert c.ratio is not None and c.ratio < 1
    none = compare(base, [x * 0 for x in base])
    assert (none.ratio, none.ratio_low) == (None, None) and none.difference > 0
    with pytest.raises(UsageError):
        compare(base, base[:-1])


def test_a_bootstrap_over_many_windows_stays_small() -> None:
    x = list(np.random.default_rng(0).random((5000, 1)))
    tracemalloc.start()
    start = time.process_time()
    compare(x, x[::-1])
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()
    assert time.process_time() - start < 5


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


def test_a_shared_beginning_is_run_once_and_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    a = rng.integers(1, 4000, 60)
    b, c = np.append(a[:40], rng.integers(1, 4000, 25)), rng.integers(1, 4000, 30)
    with edgemoe.load(bits=2, ctx_size=96) as model:
        seen: list[int] = []
        hidden = model.hidden

        def counted(tokens: Any, *rest: Any) -> Any:
            seen.append(len(tokens))
            return hidden(tokens, *rest)

        model.hidden = counted  # type: ignore[method-assign]
        runner = window_logits(model)
        got = [np.concatenate(list(runner(x, first))) for x, first in ((a, 50), (b, 45), (c, 0))]
        got += [np.concatenate(list(runner(a, 10))), np.concatenate(list(runner(a, 59)))]
        assert sum(seen) == 60 + 25 + 30 + 60 + 1
        for logits, (tokens, first) in zip(
            got, ((a, 50), (b, 45), (c, 0), (a, 10), (a, 59)), strict=True
        ):
            want = range(first, len(tokens))
            alone = model.forward(tokens, [Span(model.new_cache(), len(tokens))], want)
            np.testing.assert_array_equal(logits, alone)
        # a run that was given up half-way leaves nothing wrong behind
        next(runner(b, 3))
        np.testing.assert_array_equal(np.concatenate(list(runner(b, 45))), got[1])


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
    assert figures["versus"]["bits"] == 3
    # every byte is a token of this vocabulary
    assert figures["bits_per_byte"] == pytest.approx(math.log2(figures["ppl"]), rel=1e-9)
    assert figures["versus"]["paired"]["kld"]["ratio_high"] < 1
    assert figures["peak_rss_bytes"] <= figures["mem_budget_bytes"] == 512 << 20
    kept = list(tmp_path.rglob("*.ref"))
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


def test_several_texts_and_a_stride(sample: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Texts are cut up one by one; a stride of half a window scores every token but the first."""
    _, store, text = sample
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[:200] + "\n")
    both = ["eval", store, "--text", text, "--text", other, "--ctx", "64", "--json"]
    figures = json.loads(run(*both)[1])
    assert figures["windows"] == 700 // 64 + 200 // 64
    halves = json.loads(run(*both, "--stride", "32")[1])
    assert halves["stride"] == 32
    # 700 is cut at 696 = 64 + 32 * 19, 200 at 192; the first half window of each is only seen
    assert halves["tokens"] == (32 + 32 * 19) + (32 + 32 * 4)
    assert json.loads(run(*both, "--chunks", "2")[1])["windows"] == 2


def test_what_is_not_kept_of_the_reference_is_said() -> None:
    names = [f.name for f in fields(Summary)] + ["windows", "ctx", "bits", "dense_bits", "seconds"]
    names += [
        "bytes_read",
        "hit_rate",
        "unhidden_wait_s",
        "mean_bits",
        "gate_weighted_bits",
        "wished_mean_bits",
    ]
    out = dict.fromkeys(names, 1.0)
    assert not [line for line in lines(out | {"ref_rest": 0.0}) if "kept" in line]
    (note,) = [line for line in lines(out | {"ref_rest": 0.00123}) if "kept" in line]
    assert f"{TOP} likeliest" in note and "0.1230 %" in note


def test_command_refuses(sample: tuple[Path, Path, Path], tmp_path: Path) -> None:
    checkpoint, store, text = sample
    fails("eval", store, says="nothing to measure: give --text FILE", code=2)
    fails("eval", checkpoint, "--text", text, says="edgemoe convert")
    fails("eval", store, "--text", text, "--ctx", "8", "--ref", tmp_path, says="config.json")
    (tmp_path / "bad.txt").write_bytes(b"abc\0def")
    fails("eval", store, "--text", tmp_path / "bad.txt", says="bad.txt: a binary file", code=2)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (b" \n ", "empty"),
        (b"\xff\xfe\x00abc", "not UTF-8 text at byte 0"),
        ("na\u00efve".encode("latin-1"), "not UTF-8 text at byte 2"),
        (b"abc\0def", "binary"),
        (b"short", "5 tokens, less than one window of 512"),
    ],
)
def test_bad_texts(sample: tuple[Path, Path, Path], tmp_path: Path, data: bytes, says: str) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_bytes(data)
    with pytest.raises(UsageError, match=f"bad.txt: .*{says}"):
        run_eval(EvalOptions(str(sample[1]), [str(bad)]))


def test_bad_settings(sample: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, store, text = map(str, sample)
    for name in ("none.txt", "."):
        with pytest.raises(UsageError, match="cannot read"):
            run_eval(EvalOptions(store, [str(tmp_path / name)]))
    with pytest.raises(UsageError, match="--ctx"):
        run_eval(EvalOptions(store, [text], ctx=10_000_000))
    with pytest.raises(UsageError, match="stride"):
        run_eval(EvalOptions(store, [text], ctx=8, stride=9))
    for setting in ({"stride": 8}, {"chunks": 1}, {"parse_special": True}):
        with pytest.raises(UsageError, match="is about texts"):
            run_eval(EvalOptions(store, lambada="l.jsonl", **setting))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="--limit counts questions"):
        run_eval(EvalOptions(store, [text], limit=3))
    long = tmp_path / "long.txt"
    long.write_bytes(b"some words \n" * 1_000_000)
    with pytest.raises(MemoryBudgetError, match=r"tokenizing .* give --mem \d+M or more"):
        run_eval(EvalOptions(store, [str(long)], mem="1G"))
