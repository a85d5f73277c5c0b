"""LAMBADA and PIQA: figures by hand, log-likelihoods against transformers, the command."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_model import fails, make_checkpoint, run
from tiny import make_tiny
from tokenizers import models, pre_tokenizers

import edgemoe
from edgemoe import multiple_choice as mc
from edgemoe.checkpoint import open_checkpoint
from edgemoe.errors import UsageError
from edgemoe.evaluate import ReferenceRows, Window
from edgemoe.multiple_choice import Likelihood, Task, encode_pair, read_lambada, read_piqa
from edgemoe.reference_logits import FloatPlan, float_logits
from edgemoe.terminal.evaluate import _encoder
from edgemoe.tokenizer import Tokenizer
from edgemoe.window_logits import window_logits

LAMBADA = [
    {"text": "He took the box and opened the box"},
    {"text": "They said  hello"},
    {"text": "one two\nthree\n\nfour"},
]
PIQA = [
    {"goal": "open a jar", "sol1": "twist the lid", "sol2": "eat it"},
    {"goal": "boil water", "sol1": "use ice ", "sol2": "heat it in a pot until it bubbles"},
    {"goal": "caf\u00e9", "sol1": "\u00e9\u00e9", "sol2": "ab"},
]


def write(path: Path, rows: Sequence[Any], labels: str | None = None) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    if labels is not None:
        path.with_name(f"{path.stem}-labels.lst").write_text(labels)
    return str(path)


def test_questions_as_lm_eval_words_them(tmp_path: Path) -> None:
    task = read_lambada(write(tmp_path / "l.jsonl", LAMBADA))
    assert [(q.context, q.choices) for q in task.questions] == [
        ("He took the box and opened the", (" box",)),
        ("They said ", (" hello",)),
        ("one", (" two\nthree\n\nfour",)),  # only a space ends a word
    ]
    assert len(read_lambada(task.file, 2).questions) == 2
    task = read_piqa(write(tmp_path / "p.jsonl", PIQA, "0\n1\n0"))
    assert task.questions[1].context == "Question: boil water\nAnswer:"
    assert task.questions[1].choices == (" use ice ", " heat it in a pot until it bubbles")
    assert [q.answer for q in task.questions] == [0, 1, 0]
    assert len(read_piqa(task.file, 2).questions) == 2


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{", "line 2: not JSON"),
        (b"", "line 2: not JSON"),
        (b"[1]", "line 2: not a JSON object"),
        (b"[" * 100_000, "line 2: not JSON"),
        (b"{}", 'line 2: has no text "text"'),
        (b'{"text": 3}', 'line 2: has no text "text"'),
        (b'{"text": "caf\xe9 x"}', "line 2: not UTF-8"),
        (b'{"text": "a \\ud800"}', 'line 2: "text" holds half of a surrogate pair'),
        (b'{"text": "word"}', "line 2: the text has no last word"),
        (b'{"text": " word"}', "line 2: the text has no last word"),
        (b'{"text": "two words "}', "line 2: the text has no last word"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: bytes, says: str) -> None:
    path = tmp_path / "l.jsonl"
    path.write_bytes(b'{"text": "a b"}\n' + line + b'\n{"text": "a b"}\n')
    with pytest.raises(UsageError, match=f"l.jsonl {re.escape(says)}") as caught:
        read_lambada(str(path))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert len(read_lambada(str(path), 1).questions) == 1


def test_bad_piqa_files(tmp_path: Path) -> None:
    name = write(tmp_path / "p.jsonl", PIQA)
    with pytest.raises(UsageError, match=r"p-labels.lst: cannot read it"):
        read_piqa(name)
    write(tmp_path / "p.jsonl", PIQA, "0\n1\n")
    with pytest.raises(UsageError, match=r"p-labels.lst has 2 labels for the 3 questions of"):
        read_piqa(name, 1)
    for label in ("2", "", "yes"):
        write(tmp_path / "p.jsonl", PIQA, f"0\n{label}\n1\n")
        with pytest.raises(UsageError, match=r"p-labels.lst line 2: a label must be 0 or 1"):
            read_piqa(name)
    write(tmp_path / "p.jsonl", [PIQA[0], {"goal": "x", "sol1": "y"}], "0\n1\n")
    with pytest.raises(UsageError, match=r'p.jsonl line 2: has no text "sol2"'):
        read_piqa(name)
    write(tmp_path / "p.jsonl", [PIQA[0] | {"sol2": ""}], "0\n")
    with pytest.raises(UsageError, match=r"p.jsonl line 1: a solution is empty"):
        read_piqa(name)
    (tmp_path / "p.jsonl").write_text("")
    for reader in (read_piqa, read_lambada):
        with pytest.raises(UsageError, match=r"p.jsonl: the file is empty"):
            reader(name)
    with pytest.raises(UsageError, match="cannot read it"):
        read_lambada(str(tmp_path))


def merging_tokenizer() -> Tokenizer:
    """Bytes, and merges across a space: " t" and "e t"."""
    import tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate([*alphabet, "\u0120t", "e\u0120t"])}
    tok = tokenizers.Tokenizer(models.BPE(vocab, [("\u0120", "t"), ("e", "\u0120t")]))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return Tokenizer(tok.to_str().encode())


def test_a_continuation_is_what_follows_the_tokens_of_the_context() -> None:
    tok = merging_tokenizer()
    ids = tok.encode
    t, et = tok.token_id("\u0120t"), tok.token_id("e\u0120t")
    assert encode_pair(ids, "ab", " t") == (ids("ab"), [t])
    # spaces at the end of a context go to what follows
    assert encode_pair(ids, "ab ", "t") == (ids("ab"), [t])
    # "be" + " to" is b, "e t", o: the context keeps its two tokens, one is left
    assert ids("be to") == [*ids("b"), et, *ids("o")]
    assert encode_pair(ids, "be", " to") == (ids("be"), ids("o"))
    # and where nothing is left it is said
    task = Task("lambada", "f", [mc.Question("be", (" t",), 0, "f line 7")])
    with pytest.raises(UsageError, match=r"f line 7: .* no tokens of its own"):
        task.windows(ids, 100)


def test_long_prompts_are_cut_from_the_left() -> None:
    def ids(text: str) -> list[int]:
        return [ord(c) for c in text]

    task = Task("lambada", "f", [mc.Question("abcdef", (" xy",), 0, "f line 1")])
    for longest, seen in ((20, "abcdef x"), (8, "abcdef x"), (7, "bcdef x"), (3, "f x")):
        (window,) = task.windows(ids, longest)
        assert "".join(map(chr, window.inputs)) == seen
        assert "".join(map(chr, window.targets)) == " xy"
    with pytest.raises(UsageError, match=r"f line 1: a choice has 3 tokens, .* context of 2"):
        task.windows(ids, 2)


def fake_runner(logits: dict[tuple[int, ...], list[list[float]]]) -> Any:
    def run_window(tokens: np.ndarray, first: int) -> Iterator[np.ndarray]:
        for row in logits[tuple(tokens)][first:]:
            yield np.array([row], np.float32)

    return run_window


def test_likelihoods_by_hand() -> None:
    """Two tokens of probability 1/2 and 1/4, the second not the likeliest."""
    half, quarter = [math.log(2), 0.0, 0.0], [0.0, math.log(2), 0.0]
    runner = fake_runner({(2, 0): [half, quarter]})
    both, one = Window(np.array([2, 0, 2]), 0), Window(np.array([2, 0, 1]), 1)
    got = mc.likelihoods(runner, [both, one])
    assert got[0].logp == pytest.approx(math.log(1 / 2) + math.log(1 / 4), abs=1e-6)
    assert not got[0].greedy
    assert got[1] == Likelihood(pytest.approx(math.log(1 / 2), abs=1e-6), True)  # type: ignore[arg-type]

    class Kept:
        def rows(self, window: int, first: int, stop: int) -> ReferenceRows:
            logits = np.array([half, quarter], np.float32)
            todo = (both, one)[window]
            return ReferenceRows.of(logits[todo.first :], todo.targets, 1).rows(first, stop)

    for a, b in zip(mc.reference_likelihoods(Kept(), [both, one]), got, strict=True):
        assert (a.logp, a.greedy) == (pytest.approx(b.logp, abs=1e-6), b.greedy)


def test_figures_by_hand(tmp_path: Path) -> None:
    lambada = read_lambada(write(tmp_path / "l.jsonl", LAMBADA))
    scores = lambada.scores([Likelihood(-1, True), Likelihood(-3, False), Likelihood(-2, True)])
    figures = mc.figures(scores)
    assert figures["questions"] == 3
    assert figures["acc"] == pytest.approx(2 / 3)
    assert figures["ppl"] == pytest.approx(math.exp(2))
    se = math.sqrt(1 / 3)
    assert figures["ppl_low"] == pytest.approx(math.exp(2 - 1.95996 * se), rel=1e-4)
    assert figures["ppl_high"] == pytest.approx(math.exp(2 + 1.95996 * se), rel=1e-4)
    piqa = read_piqa(write(tmp_path / "p.jsonl", PIQA, "0\n1\n0\n"))
    # by the sum: 1 (wrong), 1 (right), 1 (wrong); by bytes 13 and 6, 8 and 33, 4 and 2: 0, 1, 0
    logp = [-10.0, -9.0, -20.0, -19.0, -3.0, -2.0]
    scores = piqa.scores([Likelihood(x, False) for x in logp])
    assert scores["acc"].tolist() == [0, 1, 0]
    assert scores["acc_norm"].tolist() == [1, 1, 1]
    # equal likelihoods: the first
    scores = piqa.scores([Likelihood(-1.0, False)] * 6)
    assert scores["acc"].tolist() == [1, 0, 1]


def test_intervals_and_tests_by_hand() -> None:
    assert mc.wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert mc.wilson(0, 20) == pytest.approx((0.0, 0.1611252), abs=1e-6)
    assert mc.wilson(5, 5)[1] == 1.0
    assert mc.mcnemar(0, 0) == mc.mcnemar(4, 4) == 1.0
    assert mc.mcnemar(1, 9) == mc.mcnemar(9, 1) == pytest.approx(22 / 1024)
    assert mc.mcnemar(3000, 100) < 1e-300
    a, b = np.array([1.0, 1, 0, 1, 0, 1]), np.array([0.0, 1, 0, 0, 0, 0])
    got = mc.paired({"acc": a, "nll": a + 1}, {"acc": b, "nll": b + 1})
    assert got["acc"]["difference"] == pytest.approx(0.5)
    assert got["acc"]["p"] == pytest.approx(2 / 8)
    assert 0 < got["acc"]["difference_low"] < 0.5 < got["acc"]["difference_high"]
    assert "p" not in got["nll"] and "ratio" not in got["acc"]
    got = mc.paired({"acc": a * 0}, {"acc": a * 0})
    assert json.loads(json.dumps(got, allow_nan=False))["acc"]["p"] == 1.0


TEXT = {
    "lambada": [{"text": "the cat sat on the mat"}, {"text": "one, two, three, four"}],
    "piqa": [{"goal": "cut bread", "sol1": "use a knife", "sol2": "use a spoon made of wood"}] * 2,
}


@pytest.mark.parametrize("name", ["qwen3_moe-options", "olmoe"])
def test_log_likelihoods_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    oracle = make_tiny(tmp_path / "hf", name)
    edgemoe.convert(tmp_path / "hf", tmp_path / "m.emoe")
    tasks = [
        read_lambada(write(tmp_path / "l.jsonl", TEXT["lambada"])),
        read_piqa(write(tmp_path / "p.jsonl", TEXT["piqa"], "0\n1\n")),
    ]
    checkpoint = open_checkpoint(tmp_path / "hf")
    for task in tasks:
        with edgemoe.load(tmp_path / "m.emoe", bits=8, ctx_size=128) as model:
            tokenizer = model.tokenizer
            todo = task.windows(_encoder(tokenizer), 256)
            stored = mc.likelihoods(window_logits(model), todo)
        blocks: dict[int, list[np.ndarray]] = {}
        for i, _, block in float_logits(checkpoint, todo, FloatPlan(False, 1000), 2):
            blocks.setdefault(i, []).append(block)
        of_window = iter(blocks.values())
        exact = mc.likelihoods(lambda w, f, of_window=of_window: iter(next(of_window)), todo)
        wanted = []
        for q in task.questions:
            for choice in q.choices:
                context, whole = tokenizer.encode(q.context), tokenizer.encode(q.context + choice)
                with torch.no_grad():
                    z = oracle(torch.tensor([whole])).logits[0].double().log_softmax(-1)
                target = torch.tensor(whole[len(context) :])
                z = z[len(context) - 1 : -1]
                logp = float(z.gather(1, target[:, None]).sum())
                wanted.append(Likelihood(logp, bool((z.argmax(-1) == target).all())))
        for ours, want in zip(exact, wanted, strict=True):
            assert ours.logp == pytest.approx(want.logp, rel=1e-4)
            assert ours.greedy == want.greedy
        for ours, want in zip(stored, wanted, strict=True):
            assert ours.logp == pytest.approx(want.logp, rel=0.1)
        got, want_scores = task.scores(exact), task.scores(wanted)
        for key in ("acc", "acc_norm"):
            if key in got:
                assert got[key].tolist() == want_scores[key].tolist()


def test_command(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "tiny")
    store = tmp_path / "tiny.emoe"
    edgemoe.convert(checkpoint, store)
    lambada = write(tmp_path / "l.jsonl", LAMBADA)
    piqa = write(tmp_path / "p.jsonl", PIQA, "0\n1\n0\n")
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = ["eval", store, "--lambada", lambada, "--piqa", piqa, "--bits", "8"]
    full = [*command, "--ref", checkpoint, "--versus", "2"]
    code, out, err = run(*full, "--json", env=env)
    assert code == 0, err
    figures = json.loads(out)
    assert (figures["bits"], figures["versus"]["bits"]) == (8, 2)
    assert "ppl" not in figures and "ctx" not in figures
    for got in (figures, figures["versus"]):
        assert got["lambada"]["questions"] == got["piqa"]["questions"] == 3
        for key in ("acc", "acc_norm"):
            task = got["piqa"]
            assert 0 <= task[f"{key}_low"] <= task[key] <= task[f"{key}_high"] <= 1
            assert 0 <= task["ref"][key] <= 1
        assert got["lambada"]["ppl_low"] < got["lambada"]["ppl"] < got["lambada"]["ppl_high"]
        ratio = got["lambada"]["ppl"] / got["lambada"]["ref"]["ppl"]
        difference = got["lambada"]["against_ref"]["nll"]["difference"]
        assert difference == pytest.approx(math.log(ratio), rel=1e-6, abs=1e-9)
    paired = figures["versus"]["paired"]
    assert set(paired["lambada"]) == {"acc", "nll"} and set(paired["piqa"]) == {"acc", "acc_norm"}
    kept = sorted((tmp_path / "cache").rglob("*.ref"))
    assert len(kept) == 2
    stamps = [p.stat().st_mtime_ns for p in kept]
    code, out, err = run(*full, env=env)
    assert code == 0, err
    assert [p.stat().st_mtime_ns for p in kept] == stamps
    for words in ("lambada: 3 questions", "accuracy per byte", "McNemar p", "8 against 2 bits"):
        assert words in out
    code, out, err = run(*command, "--limit", "1", "--json", env=env)
    assert json.loads(out)["piqa"]["questions"] == 1
    (tmp_path / "p-labels.lst").write_text("0\n")
    fails(*command, says="p-labels.lst has 1 labels for the 3 questions", code=2)


def test_the_real_files(shared: Path) -> None:
    corpus = shared / "corpus" / "eval"
    lambada = read_lambada(str(corpus / "lambada_test.jsonl"))
    piqa = read_piqa(str(corpus / "piqa_valid.jsonl"))
    assert (len(lambada.questions), len(piqa.questions)) == (5153, 1838)
    with edgemoe.load(bits=2, ctx_size=8) as model:
        encode = _encoder(model.tokenizer)
        for task in (lambada, piqa):
            part = Task(task.name, task.file, task.questions[:300])
            todo = part.windows(encode, model.config.max_position_embeddings)
            assert len(todo) == sum(len(q.choices) for q in part.questions)
            for window, choice in zip(
                todo, (c for q in part.questions for c in q.choices), strict=True
            ):
                text = b"".join(model.tokenizer.token_bytes(int(i)) for i in window.targets)
                assert text.decode() == choice


def test_the_trained_model_scores_as_in_transformers(shared: Path) -> None:
    """Real questions, tokenized and run by transformers."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    path, corpus = shared / "models" / "stories-moe", shared / "corpus" / "eval"
    oracle = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    checkpoint = open_checkpoint(path)
    tokenizer = Tokenizer(checkpoint.files["tokenizer.json"])
    for task in (
        read_lambada(str(corpus / "lambada_test.jsonl"), 10),
        read_piqa(str(corpus / "piqa_valid.jsonl"), 6),
    ):
        todo = task.windows(_encoder(tokenizer), checkpoint.config.max_position_embeddings)
        blocks: dict[int, list[np.ndarray]] = {}
        for i, _, block in float_logits(checkpoint, todo, FloatPlan(True, 4096), 1):
            blocks.setdefault(i, []).append(block)
        of_window = iter(blocks.values())
        ours = mc.likelihoods(lambda w, f, of_window=of_window: iter(next(of_window)), todo)
        pairs = ((q.context, choice) for q in task.questions for choice in q.choices)
        for got, (context, choice) in zip(ours, pairs, strict=True):
            whole = theirs(context + choice)["input_ids"]
            first = len(theirs(context.rstrip())["input_ids"])
            with torch.no_grad():
                z = oracle(torch.tensor([whole])).logits[0].double().log_softmax(-1)
            z, target = z[first - 1 : -1], torch.tensor(whole[first:])
            assert got.logp == pytest.approx(float(z.gather(1, target[:, None]).sum()), rel=1e-4)
            assert got.greedy == bool((z.argmax(-1) == target).all())
