"""scripts/train_default.py: what it trains, how it continues, what it writes."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgemoe
from edgemoe.model import Span

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
torch = pytest.importorskip("torch")
if not (SCRIPTS / "train_default.py").is_file():
    pytest.skip(f"{SCRIPTS} is not here", allow_module_level=True)
sys.path.insert(0, str(SCRIPTS))

import train_default  # noqa: E402
from training import data, evaluate, experts, export, loop, shape  # noqa: E402
from training.model import CausalLM, HeadLoss  # noqa: E402

TINY = shape.Shape(
    vocab_size=300,
    hidden=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    experts=4,
    top_k=2,
    moe_intermediate=16,
    context=32,
)
RECIPE = loop.Recipe(
    shape=TINY,
    seed=3,
    batch=8,
    tokens=30 * 8 * 32,
    minutes=None,
    learning_rate=1e-2,
    warmup_steps=3,
    weight_decay=0.1,
    beta2=0.98,
    clip=1.0,
    aux_coefficient=0.01,
    dropout=0.0,
    story_share=0.6,
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small lose more by waiting for a second thread than it computes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy text: 300 stories of a few words, every tenth as long as a book."""
    rng = np.random.default_rng(0)
    words = ["the", "a", "cat", "dog", "sees", "likes", "hat", "ball", "red", "and", "tree", "to"]
    stories = []
    for i in range(300):
        count = 600 if i % 10 == 0 else int(rng.integers(5, 40))
        stories.append(f"Story {i}: " + " ".join(rng.choice(words, count)) + ".")
    path = tmp_path_factory.mktemp("text") / "toy.txt"
    path.write_text("".join(f"{s}\n{data.END}\n" for s in stories))
    return path


@pytest.fixture(scope="module")
def corpus(text: Path) -> data.Corpus:
    return data.load_corpus(text, TINY.vocab_size, text.parent / "cache")


def make(corpus: data.Corpus, out: Path, recipe: loop.Recipe, **options: Any) -> loop.Trainer:
    held_out = evaluate.HeldOut(corpus.tokenizer, out / "none")
    cpu = torch.device("cpu")
    return loop.Trainer(recipe, corpus, held_out, out, device=cpu, threads=2, **options)


def weights(model: CausalLM) -> dict[str, np.ndarray]:
    return {name: t.numpy().copy() for name, t in model.state_dict().items()}


def test_loss_falls(corpus: data.Corpus, tmp_path: Path) -> None:
    lines: list[str] = []
    trainer = make(corpus, tmp_path, RECIPE, log=lines.append)
    trainer.run(log_seconds=0)
    losses = [float(line.split("loss ")[1].split()[0]) for line in lines]
    assert len(losses) == 30
    assert losses[0] == pytest.approx(np.log(300), abs=0.2)  # an untrained model knows nothing
    assert np.mean(losses[-3:]) < 0.6 * losses[0], losses
    rates = [float(line.split("lr ")[1].split()[0]) for line in lines]
    assert max(rates) == rates[2] and rates[-1] < 0.01 * max(rates), rates
    assert all("tokens/s" in line and "ETA" in line for line in lines)


def interrupt(at: int, number: int) -> Callable[[str], None]:
    def log(line: str) -> None:
        if line.startswith(f"step {at} "):
            os.kill(os.getpid(), number)

    return log


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_continues_bit_identically(corpus: data.Corpus, tmp_path: Path, dropout: float) -> None:
    recipe = replace(RECIPE, tokens=12 * 8 * 32, dropout=dropout)
    whole = make(corpus, tmp_path / "whole", recipe, log=str)
    whole.run(log_seconds=0)
    for at, number in ((4, signal.SIGTERM), (9, signal.SIGINT)):
        trainer = make(corpus, tmp_path / "parts", recipe, log=interrupt(at, number))
        with pytest.raises(loop.Stop) as stop:
            trainer.run(log_seconds=0)
        assert (stop.value.signal_number, trainer.progress.step) == (number, at)
    torch.manual_seed(99)  # what else the process drew must not matter
    parts = make(corpus, tmp_path / "parts", recipe, log=str)
    assert parts.progress.step == 9
    parts.run(log_seconds=0)
    want, got = weights(whole.model), weights(parts.model)
    assert all(np.array_equal(want[name], got[name]) for name in want)
    assert [p.name for p in (tmp_path / "parts").iterdir()] == [loop.STATE_FILE]
    other = make(corpus, tmp_path / "other", replace(recipe, seed=4), log=str)
    other.run(log_seconds=0)
    assert not np.array_equal(want["model.norm.weight"], weights(other.model)["model.norm.weight"])


def test_refuses_the_state_of_another_recipe(corpus: data.Corpus, tmp_path: Path) -> None:
    make(corpus, tmp_path, RECIPE).save()
    with pytest.raises(ValueError, match=r"seed 3 -> 4.*another --out"):
        make(corpus, tmp_path, replace(RECIPE, seed=4))
    make(corpus, tmp_path, replace(RECIPE, tokens=10**6), log=str)  # the end may move


def test_damaged_state_is_refused(corpus: data.Corpus, tmp_path: Path) -> None:
    make(corpus, tmp_path, RECIPE).save()
    path = tmp_path / loop.STATE_FILE
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged"):
        make(corpus, tmp_path, RECIPE)


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), data.write_atomic(path) as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_data_order_depends_on_the_seed_only(corpus: data.Corpus) -> None:
    first = data.window_cycle(corpus, 32, 0.6, seed=1, cycle=0)
    np.random.seed(5)
    torch.manual_seed(5)
    assert np.array_equal(first, data.window_cycle(corpus, 32, 0.6, seed=1, cycle=0))
    for seed, cycle in ((2, 0), (1, 1)):
        assert not np.array_equal(first, data.window_cycle(corpus, 32, 0.6, seed, cycle))

    def take(batch: int, count: int, skip: int = 0) -> np.ndarray:
        stream = data.batches(corpus, window=32, batch=batch, story_share=0.6, seed=1, skip=skip)
        return np.concatenate([next(stream) for _ in range(count)])

    many = len(first) + 24  # into the second cycle
    count = many // 12
    order = take(12, count)
    assert np.array_equal(order[: len(first)], first)
    assert np.array_equal(order[: count * 10], take(5, 2 * count))
    skip = len(first) + 2
    assert np.array_equal(order[skip:], take(1, len(order) - skip, skip))


def test_windows_hold_whole_text(corpus: data.Corpus, text: Path) -> None:
    """Without repetition a cycle has every token once, but the few cut off at the ends."""
    windows = data.window_cycle(corpus, 32, None, seed=0, cycle=0)
    assert len(windows) == (len(corpus.ids) - 1) // 32
    kept = np.bincount(windows[:, :-1].ravel(), minlength=300)
    missing = np.bincount(corpus.ids, minlength=300) - kept
    assert missing.min() >= 0 and missing.sum() <= 32
    documents = data.split_documents(text.read_text())
    assert len(documents) == len(corpus.short) == (corpus.ids == data.END_ID).sum() == 300
    for i in (0, 7, 299):
        ids = corpus.ids[corpus.starts[i] : corpus.starts[i + 1]]
        assert ids[0] == data.END_ID
        assert corpus.tokenizer.decode(ids[1:]) == documents[i] and documents[i].endswith(".\n")


def test_story_share(corpus: data.Corpus) -> None:
    lengths = np.diff(corpus.starts)
    assert 0 < corpus.short.sum() < 300
    assert lengths[corpus.short].sum() / lengths.sum() < 0.55
    books = lengths[~corpus.short].sum()
    windows = data.window_cycle(corpus, 32, 0.6, seed=0, cycle=0)
    assert 1 - books / (windows.shape[0] * 32) == pytest.approx(0.6, abs=0.02)


def test_tokenizer_is_cached(text: Path, corpus: data.Corpus) -> None:
    cache = text.parent / "cache"
    before = {p: p.stat().st_mtime_ns for p in cache.iterdir()}
    again = data.load_corpus(text, TINY.vocab_size, cache)
    assert {p: p.stat().st_mtime_ns for p in cache.iterdir()} == before
    assert np.array_equal(again.ids, corpus.ids)
    assert corpus.tokenizer.token_to_id(data.END) == 0
    assert corpus.tokenizer.get_vocab_size() == 300
    with pytest.raises(ValueError, match="--vocab-size"):
        data.load_corpus(text, 50_000, cache)


def plain_mixture(block: experts.Mixture, x: Any) -> Any:
    """Every expert on every token, then the chosen ones: slow and obvious."""
    probs = (x @ block.gate.weight.t()).softmax(-1)
    weight, chosen = probs.topk(block.top_k, dim=-1)
    weight = weight / weight.sum(-1, keepdim=True)
    out = torch.zeros_like(x)
    for e, (gate_up, down) in enumerate(
        zip(block.experts.gate_up_proj, block.experts.down_proj, strict=True)
    ):
        gate, up = (x @ gate_up.t()).chunk(2, dim=-1)
        y = (torch.nn.functional.silu(gate) * up) @ down.t()
        out = out + y * (weight * (chosen == e)).sum(-1, keepdim=True)
    return out


def test_mixture_and_its_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    block = experts.Mixture(replace(TINY, experts=6, top_k=3)).double()
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=generator)
    with torch.no_grad():
        block.gate.weight[2] = -block.gate.weight[1]  # an expert may get few tokens or none
    x = torch.randn(7, 32, generator=generator, dtype=torch.float64, requires_grad=True)
    block.gate.float()  # the router works in float32
    target = torch.randn(7, 32, generator=generator, dtype=torch.float64)
    over = (x, block.experts.gate_up_proj, block.experts.down_proj)
    got, _ = block(x)
    block_grads = torch.autograd.grad((got * target).sum(), over)
    block.gate.double()
    want = plain_mixture(block, x)
    want_grads = torch.autograd.grad((want * target).sum(), over)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    for a, b in zip(block_grads, want_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_grouped_products_equal_the_loop() -> None:
    if not hasattr(torch, "_grouped_mm"):
        pytest.skip("this torch has no _grouped_mm")
    generator = torch.Generator().manual_seed(0)
    shapes = ((20, 32), (4, 32, 32), (4, 32, 16))
    args = [torch.randn(s, generator=generator) * 0.3 for s in shapes]
    for a in args:
        a.requires_grad_()
    counts = torch.tensor([5, 0, 9, 6])
    results = []
    for out in (
        experts.grouped_experts(*args, counts).float(),
        experts.LoopedExperts.apply(*args, tuple(counts.tolist())),
    ):
        results.append([out, *torch.autograd.grad(out.square().sum(), args)])
    for grouped, looped in zip(*results, strict=True):
        error = (grouped - looped).abs().max() / looped.abs().max()
        assert 0 < error < 0.02  # bfloat16 against float32


def test_head_loss_and_its_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1100, 16, generator=generator, requires_grad=True)  # more than two chunks
    weight = torch.randn(40, 16, generator=generator, requires_grad=True)
    target = torch.randint(0, 40, (1100,), generator=generator)
    got = HeadLoss.apply(hidden, weight, target)
    want = torch.nn.functional.cross_entropy(hidden @ weight.t(), target)
    torch.testing.assert_close(got, want)
    over = (hidden, weight)
    for a, b in zip(
        torch.autograd.grad(2 * got, over), torch.autograd.grad(2 * want, over), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_balance_loss_equals_transformers() -> None:
    qwen3 = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    probs = logits.softmax(-1)
    counts = torch.bincount(probs.topk(2).indices.flatten(), minlength=6)
    want = qwen3.load_balancing_loss_func((logits,), 6, 2)
    torch.testing.assert_close(experts.balance_loss(probs, counts), want)


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory made by the command line, interrupted once on the way."""
    out = tmp_path_factory.mktemp("trained")
    sizes = {k: v for k, v in asdict(TINY).items() if isinstance(v, int)}
    command = [f"--{k.replace('_', '-')}={v}" for k, v in sizes.items()]
    command += [f"--text={text}", f"--cache={text.parent / 'cache'}"]
    command += ["--device=cpu", "--threads=1", "--learning-rate=1e-2", "--warmup-steps=3"]
    command += [f"--out={out}", f"--heldout={text.parent}", "--seed=3", "--log-seconds=0"]
    say = train_default.say
    with pytest.MonkeyPatch.context() as patch:
        stop = interrupt(10, signal.SIGTERM)
        patch.setattr(train_default, "say", lambda line: (stop(line), say(line)))
        assert train_default.main([*command, "--tokens=8e3"]) == 128 + signal.SIGTERM
    assert not (out / "model.safetensors").exists()
    assert train_default.main([*command, "--tokens=8e3"]) == 0
    return out


def test_transformers_computes_the_same_logits(trained: Path) -> None:
    transformers = pytest.importorskip("transformers")
    oracle = transformers.Qwen3MoeForCausalLM.from_pretrained(trained, dtype=torch.float32)
    model, tokenizer = export.read_checkpoint(trained)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 300, (2, 32)))
    with torch.no_grad():
        want, got = oracle.eval()(ids).logits, model.logits(ids)
        loss, _ = model(ids[:, :-1], ids[:, 1:])
    assert float((got - want).abs().max() / want.abs().max()) <= 1e-4
    nats = torch.nn.functional.cross_entropy(want[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss, nats, rtol=1e-4, atol=0)
    hf = transformers.AutoTokenizer.from_pretrained(trained)
    assert hf.decode(tokenizer.encode("the cat\n").ids) == "the cat\n"
    generation = json.loads((trained / "generation_config.json").read_text())
    assert generation["do_sample"] and generation["eos_token_id"] == 0


def test_edgemoe_runs_it(trained: Path, tmp_path: Path) -> None:
    edgemoe.convert(trained, tmp_path / "m.emoe")
    model, tokenizer = export.read_checkpoint(trained)
    with edgemoe.load(tmp_path / "m.emoe", ctx_size=32) as m:
        ids = np.array(m.tokenizer.encode("the cat sees the red ball and then"))
        assert ids[0] == data.END_ID and m.generation_defaults.temperature == 0.7
        assert ids[1:].tolist() == tokenizer.encode("the cat sees the red ball and then").ids
        got = m.forward(ids, [Span(m.new_cache(), len(ids))], range(len(ids)))
        with torch.no_grad():
            want = model.logits(torch.from_numpy(ids)[None])[0].numpy()
        error = np.sqrt(((got - want) ** 2).mean() / (want**2).mean())
        assert error < 0.05
        assert m.generate("the cat", max_tokens=8).token_ids


def test_score_equals_transformers(shared: Path) -> None:
    """The measurement of shared/models/README.md on the first windows of a held-out text."""
    transformers = pytest.importorskip("transformers")
    path = shared / "models" / "stories-moe"
    model, tokenizer = export.read_checkpoint(path)
    source = shared / "corpus" / "heldout" / evaluate.HELD_OUT[0]
    ids = evaluate.held_out_ids(tokenizer, source, 4200)
    got = evaluate.score(model, ids, evaluate.token_bytes(tokenizer))
    oracle = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    bits, scored = 0.0, []
    for start in range(0, len(ids) - 511, 256):
        window = ids[start : start + 512]
        with torch.no_grad():
            log_probs = oracle(window[None]).logits[0].log_softmax(-1)
        bits -= float(log_probs[255:511].gather(1, window[256:, None]).sum()) / np.log(2)
        scored += window[256:].tolist()
    assert len(scored) >= 3 * 256
    text = tokenizer.decode(scored, skip_special_tokens=False)
    assert got.bits_per_byte == pytest.approx(bits / len(text.encode()), rel=1e-4)
    assert got.perplexity == pytest.approx(2 ** (bits / len(scored)), rel=1e-3)


def test_schedule() -> None:
    assert loop.learning_rate(RECIPE, 0, 0.0) == pytest.approx(RECIPE.learning_rate / 3)
    assert loop.learning_rate(RECIPE, 50, 0.5) == pytest.approx(RECIPE.learning_rate / 2)
    assert loop.learning_rate(RECIPE, 99, 1.0) == pytest.approx(0, abs=1e-12)


def test_time_budget_ends_the_run(corpus: data.Corpus, tmp_path: Path) -> None:
    trainer = make(corpus, tmp_path, replace(RECIPE, minutes=1.0), log=str)
    trainer.progress.seconds = 45.0
    assert trainer.spent() == 0.75
    trainer.progress.seconds = 60.0
    trainer.run()
    assert trainer.progress.step == 0


@pytest.mark.parametrize("name", shape.PRESETS)
def test_presets(name: str) -> None:
    preset = shape.PRESETS[name]
    small = replace(preset, layers=1, experts=4, vocab_size=64)
    assert small.parameters == sum(p.numel() for p in CausalLM(small).parameters())
    assert all(n % 256 == 0 for n in (preset.hidden, preset.moe_intermediate, preset.vocab_size))
    assert shape.shape_from_config(preset.hf_config(0.01)) == preset
    if name == "default":
        assert preset.store_bytes <= shape.STORE_LIMIT
    else:
        assert (preset.hidden, preset.moe_intermediate, preset.top_k) == (512, 256, 4)
        assert preset.experts >= 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens=1", "--hidden=0"], "hidden must be positive"),
        (["--tokens=1", "--top-k=99"], "top_k 99 is more than the 16 experts"),
        (["--tokens=1", "--experts=64"], "at most 32 may ship"),
        (["--tokens=1", "--text=nowhere.txt"], "nowhere.txt"),
        (["--tokens=1", "--story-share=1"], "story_share must be at least 0 and below 1"),
        (["--minutes=-1"], "minutes must be positive"),
        (["--tokens=1", "--vocab-size=70000"], "at most 65536"),
        (["--eval=nowhere"], "nowhere"),
    ],
)
def test_bad_input(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [f"--out={tmp_path}", "--device=cpu", "--threads=1"]
    assert train_default.main([*arguments, *common]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_budget_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_default.main([])
    assert "--minutes" in capsys.readouterr().err
