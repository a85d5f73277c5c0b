"""`edgemoe eval`: texts and questions in, figures out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import kernels, multiple_choice
from ..checkpoint import Checkpoint, open_checkpoint
from ..engine import load
from ..errors import MemoryBudgetError, UsageError, shown
from ..evaluate import (
    TokenScores,
    Window,
    compare,
    score_windows,
    scratch_bytes,
    summarize,
    windows,
)
from ..loader import budget
from ..multiple_choice import Task, read_lambada, read_piqa
from ..opened import OpenedModel, open_model
from ..reference_cache import ReferenceFile
from ..reference_logits import TOP, reference
from ..tokenizer import Tokenizer
from ..types import F64, I64, LEVELS
from ..window_logits import window_logits
from .evaluate_output import lines, progress, terminable

TOKENIZING = 200
"""Bytes that tokenizing takes for each byte of text; 165 were measured on a vocabulary of 4,096."""


@dataclass(frozen=True)
class EvalOptions:
    """What `edgemoe eval` was asked for; None leaves a choice to the machine.

    io_limit: bytes a second.
    """

    store: str
    texts: Sequence[str] = ()
    lambada: str | None = None
    piqa: str | None = None
    limit: int | None = None
    bits: int | None = None
    mean_bits: float | None = None
    prefill_mean_bits: float | None = None
    read_price: float | None = None
    dense_bits: int | None = None
    versus: int | None = None
    ref: str | None = None
    ctx: int = 512
    stride: int | None = None
    chunks: int | None = None
    parse_special: bool = False
    mem: str = "auto"
    cache: str | None = None
    exact: bool = False
    io_limit: float | None = None
    threads: int | None = None
    kv_type: str = "f16"
    as_json: bool = False


def run(options: EvalOptions) -> int:
    """Evaluate and print; returns the exit code."""
    if not (options.texts or options.lambada or options.piqa):
        raise UsageError("nothing to measure: give --text FILE, --lambada FILE or --piqa FILE")
    _check_belonging(options)
    with ExitStack() as stack, terminable():
        work = _prepare(options, stack)
        settings = [options]
        if options.versus is not None:
            settings.append(
                replace(
                    options,
                    bits=options.versus,
                    mean_bits=None,
                    prefill_mean_bits=None,
                    read_price=None,
                )
            )
        outcomes: dict[int, _Outcome] = {}
        # The larger one first: if it does not fit, that shows before any work is done.
        for i in sorted(range(len(settings)), key=lambda i: -(settings[i].bits or LEVELS[-1])):
            outcomes[i] = _measure(settings[i], work)
        out = {"file": options.store} | outcomes[0].figures
        if work.texts:
            out |= {"texts": list(options.texts), "ctx": options.ctx}
            out |= {"stride": options.stride or options.ctx}
        if options.ref is not None:
            out |= {"ref": options.ref}
        if options.versus is not None:
            paired = _paired(outcomes[0], outcomes[1])
            out["versus"] = outcomes[1].figures | {"paired": paired}
    out |= {"peak_rss_bytes": budget.peak_rss_bytes()}
    print(json.dumps(out) if options.as_json else "\n".join(lines(out)))
    return 0


def _check_belonging(options: EvalOptions) -> None:
    """Refuse settings of what is not measured: they would do nothing."""
    if options.limit is not None and not (options.lambada or options.piqa):
        raise UsageError("--limit counts questions: give --lambada FILE or --piqa FILE")
    given = {
        "--stride": options.stride,
        "--chunks": options.chunks,
        "--parse-special": options.parse_special or None,
    }
    for name, value in given.items():
        if value is not None and not options.texts:
            raise UsageError(f"{name} is about texts: give --text FILE")


@dataclass
class _Work:
    """What is to be scored: windows of texts, and of each task; what the reference says of each."""

    texts: list[Window]
    tasks: list[tuple[Task, list[Window]]]
    longest: int
    text_reference: ReferenceFile | None = None
    task_scores: dict[str, Mapping[str, F64]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Outcome:
    """Figures as they are printed, and what paired comparisons need."""

    figures: dict[str, Any]
    texts: list[TokenScores]
    tasks: dict[str, Mapping[str, F64]]


def _prepare(options: EvalOptions, stack: ExitStack) -> _Work:
    """Read and cut everything up, and run the reference, before the store's weights are loaded."""
    with closing(open_model(options.store)) as opened:
        limit = opened.config.max_position_embeddings
        texts = _windows(opened, options) if options.texts else []
        read = [(read_lambada, options.lambada), (read_piqa, options.piqa)]
        tasks = [
            (task, task.windows(_encoder(opened.tokenizer), limit))
            for task in (reader(name, options.limit) for reader, name in read if name is not None)
        ]
        sizes = [len(w.inputs) for part in [texts, *(ws for _, ws in tasks)] for w in part]
        work = _Work(texts, tasks, max(sizes))
        if options.ref is not None:
            _refer(opened, options.ref, options, work, stack)
    return work


def _encoder(tokenizer: Tokenizer, parse_special: bool = True) -> Callable[[str], list[int]]:
    """Ids of a text with what the tokenizer puts before it, and nothing after it."""
    first = tokenizer.first_special()
    lead = [] if first is None else [first]
    return lambda text: (
        lead + tokenizer.encode(text, add_special=False, parse_special=parse_special)
    )


def _windows(opened: OpenedModel, options: EvalOptions) -> list[Window]:
    longest = opened.config.max_position_embeddings
    if not 4 <= options.ctx <= longest:
        raise UsageError(f"--ctx must be from 4 to {longest} for this model, not {options.ctx}")
    encode = _encoder(opened.tokenizer, options.parse_special)
    bos = opened.tokenizer.first_special()
    ceiling = budget.resolve_ceiling(options.mem)
    out: list[Window] = []
    for name in options.texts:
        text = read_text(name)
        check_room(name, len(text), ceiling)
        try:
            out += windows(encode(text), options.ctx, options.stride or options.ctx, bos)
        except UsageError as exc:
            raise UsageError(f"{shown(name)}: {exc}") from None
        budget.release_heap()
    return out[: options.chunks]


def read_text(name: str) -> str:
    """A text file, without the newline that ends it: as llama.cpp reads one.

    Raises:
        UsageError: it cannot be read, is empty, or is not UTF-8 text.
    """
    try:
        data = Path(name).read_bytes()
    except OSError as exc:
        raise UsageError(f"{shown(name)}: cannot read the text: {exc.strerror}") from None
    if not data.strip():
        raise UsageError(f"{shown(name)}: the text is empty")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise UsageError(
            f"{shown(name)}: not UTF-8 text at byte {exc.start}: re-encode it"
        ) from None
    if "\0" in text:
        raise UsageError(f"{shown(name)}: a binary file, not text (a zero byte)")
    return text.removesuffix("\n")


def check_room(name: str, characters: int, ceiling: int) -> None:
    """Refuse a text whose tokenizing would break through the ceiling."""
    needed = budget.rss_bytes() + TOKENIZING * characters
    if needed > ceiling:
        raise MemoryBudgetError(
            f"tokenizing {shown(name)} takes about {budget.format_size(needed)}: give --mem "
            f"{-(-needed >> 20)}M or more, or a shorter text",
            needed_bytes=needed,
            budget_bytes=ceiling,
        )


def _refer(
    opened: OpenedModel, name: str, options: EvalOptions, work: _Work, stack: ExitStack
) -> None:
    """Run the reference, or find what it said before; the store's weights are not loaded yet."""
    checkpoint = open_checkpoint(name)
    _check_vocabulary(opened, checkpoint)
    threads = options.threads or kernels.default_threads()

    def make(what: str, todo: Sequence[Window], top: int) -> ReferenceFile:
        budget.release_heap()
        with progress(f"reference, {what}") as report:
            made = reference(
                checkpoint,
                todo,
                threads=threads,
                ceiling=budget.resolve_ceiling(options.mem),
                used=budget.rss_bytes(),
                top=top,
                progress=report,
            )
        return stack.enter_context(made)

    if work.texts:
        work.text_reference = make("text", work.texts, TOP)
    for task, todo in work.tasks:
        kept = make(task.name, todo, 1)
        likelihoods = multiple_choice.reference_likelihoods(kept, todo)
        work.task_scores[task.name] = task.scores(likelihoods)
    budget.release_heap()


def _check_vocabulary(opened: OpenedModel, checkpoint: Checkpoint) -> None:
    """Refuse a reference whose token ids mean something else than the store's."""
    where, ours = shown(checkpoint.path), opened.config.vocab_size
    theirs = checkpoint.config.vocab_size
    if ours != theirs:
        raise UsageError(
            f"{where} has a vocabulary of {theirs} tokens and the store one of {ours}: give the "
            "checkpoint that the store was made of"
        )
    data = checkpoint.files.get("tokenizer.json")
    if data is None or data == opened.store.section("tokenizer.json"):
        return
    other = Tokenizer(data, eos_token_ids=checkpoint.config.eos_token_ids)
    for i in range(ours):
        a, b = opened.tokenizer.token_bytes(i), other.token_bytes(i)
        if a and b and a != b:  # one may count as special what is text to the other
            raise UsageError(
                f"{where}: token {i} is {b!r} there and {a!r} in the store: give the checkpoint "
                "that the store was made of"
            )


def _measure(options: EvalOptions, work: _Work) -> _Outcome:
    budget.release_heap()
    start = time.perf_counter()
    opened = open_model(options.store)
    vocab = opened.config.vocab_size
    reserve = scratch_bytes(vocab, min(TOP, vocab) if work.text_reference is not None else 0)
    reserve += 64 * sum(len(w.targets) for w in work.texts)
    with load(
        opened,
        mem=options.mem,
        bits=options.bits,
        mean_bits=options.mean_bits,
        prefill_mean_bits=options.prefill_mean_bits,
        read_price=options.read_price,
        dense_bits=options.dense_bits,
        ctx_size=work.longest,
        threads=options.threads,
        kv_type=options.kv_type,
        cache=options.cache,
        io_limit=options.io_limit,
        exact=options.exact,
        reserve=reserve,
    ) as model:
        plan, run = model.plan, window_logits(model)
        figures: dict[str, Any] = {"bits": plan.bits, "dense_bits": plan.dense_bits}
        figures["kv_type"] = plan.kv_type
        if plan.mean_bits is not None:
            figures["mean_bits_wanted"] = plan.mean_bits
        setting = f"{plan.mean_bits or plan.bits:g}"
        scores: list[TokenScores] = []
        if work.texts:
            with progress(f"{setting} bits, text") as report:
                scores = score_windows(run, work.texts, work.text_reference, report)
            size = sum(_bytes(model.tokenizer, w.targets) for w in work.texts)
            summary = asdict(summarize(scores, size))
            figures |= {k: v for k, v in summary.items() if v is not None}
            figures["windows"] = len(work.texts)
        tasks: dict[str, Mapping[str, F64]] = {}
        for task, todo in work.tasks:
            with progress(f"{setting} bits, {task.name}") as report:
                likelihoods = multiple_choice.likelihoods(run, todo, report)
            tasks[task.name] = task.scores(likelihoods)
            figures[task.name] = _task_figures(task, tasks[task.name], work)
        used = model.usage()
    figures["seconds"] = time.perf_counter() - start
    figures["mem_budget_bytes"] = used.mem_budget_bytes
    figures["cache_bytes"] = used.cache_bytes
    traffic = used.traffic
    for name in ("mean_bits", "gate_weighted_bits", "wished_mean_bits"):
        figures[name] = getattr(traffic, name)
    for name in ("bytes_read", "hit_rate", "evictions"):
        figures[name] = getattr(traffic, name)
    figures["unhidden_wait_s"] = traffic.wait_s
    return _Outcome(figures, scores, tasks)


def _task_figures(task: Task, scores: Mapping[str, F64], work: _Work) -> dict[str, Any]:
    out = {"file": task.file} | multiple_choice.figures(scores)
    known = work.task_scores.get(task.name)
    if known is not None:
        out["ref"] = multiple_choice.figures(known)
        out["against_ref"] = multiple_choice.paired(scores, known)
    return out


def _bytes(tokenizer: Tokenizer, ids: I64) -> int:
    return sum(len(tokenizer.token_bytes(int(i))) for i in ids)


def _paired(a: _Outcome, b: _Outcome) -> dict[str, Any]:
    """Paired comparisons of what both have; "nll" stands for perplexity (its logarithm)."""
    out: dict[str, Any] = {}
    if a.texts:
        out["nll"] = asdict(compare([s.nll for s in a.texts], [s.nll for s in b.texts]))
        ka, kb = ([s.kld for s in x.texts if s.kld is not None] for x in (a, b))
        if ka and kb:
            out["kld"] = asdict(compare(ka, kb))
    for name, scores in a.tasks.items():
        out[name] = multiple_choice.paired(scores, b.tasks[name])
    return out
