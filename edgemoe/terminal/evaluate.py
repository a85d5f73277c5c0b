"""`edgemoe eval`: texts in, figures out."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import kernels
from ..engine import Model, OpenedModel, load, open_model
from ..errors import UsageError, shown
from ..evaluate import (
    Comparison,
    ReferenceRows,
    Runner,
    TokenScores,
    Window,
    compare,
    score_windows,
    summarize,
    windows,
)
from ..model import Span
from ..reference_logits import mean_rest, reference_rows
from ..tokenizer import Tokenizer
from ..types import F32, I64


@dataclass(frozen=True)
class EvalOptions:
    """What `edgemoe eval` was asked for; None leaves a choice to the machine."""

    store: str
    texts: Sequence[str]
    bits: int | None = None
    dense_bits: int | None = None
    versus: int | None = None
    ref: str | None = None
    ctx: int = 512
    stride: int | None = None
    chunks: int | None = None
    mem: str = "auto"
    threads: int | None = None
    as_json: bool = False


def run(options: EvalOptions) -> int:
    """Evaluate and print; returns the exit code."""
    opened = open_model(options.store)
    try:
        todo = _windows(opened, options)
        references = None
        threads = options.threads or kernels.default_threads()
        if options.ref is not None:
            with _progress("reference") as progress:
                references = reference_rows(options.ref, todo, threads, progress)
        first = _evaluate(opened, options, options.bits, todo, references)
    finally:
        opened.close()
    out = first.figures | {"file": options.store, "texts": list(options.texts), "ctx": options.ctx}
    if references is not None:
        out["ref_rest"] = mean_rest(references)
    if options.versus is not None:
        again = open_model(options.store)
        try:
            second = _evaluate(again, options, options.versus, todo, references)
        finally:
            again.close()
        out["versus"] = second.figures
        out["versus"]["paired"] = {
            name: asdict(c) for name, c in _pairs(first.scores, second.scores).items()
        }
    print(json.dumps(out) if options.as_json else "\n".join(_lines(out)))
    return 0


@dataclass(frozen=True)
class _Outcome:
    scores: list[TokenScores]
    figures: dict[str, Any]


def _evaluate(
    opened: OpenedModel,
    options: EvalOptions,
    bits: int | None,
    todo: Sequence[Window],
    references: Sequence[ReferenceRows] | None,
) -> _Outcome:
    start = time.perf_counter()
    with (
        load(
            opened,
            mem=options.mem,
            bits=bits,
            dense_bits=options.dense_bits,
            ctx_size=options.ctx,
            threads=options.threads,
        ) as model,
        _progress(f"{model.plan.bits} bits") as progress,
    ):
        scores = score_windows(_runner(model), todo, references, progress)
        scored = sum(_bytes(model.tokenizer, w.targets) for w in todo)
        summary = asdict(summarize(scores, scored, references))
        figures = {k: v for k, v in summary.items() if v is not None}
        figures |= {"bits": model.plan.bits, "dense_bits": model.plan.dense_bits}
        figures |= {"windows": len(todo), "seconds": time.perf_counter() - start}
    return _Outcome(scores, figures)


def _runner(model: Model) -> Runner:
    def run(tokens: I64, first: int) -> Iterator[F32]:
        cache, chunk = model.new_cache(), model.plan.prefill_chunk
        for at in range(0, len(tokens), chunk):
            part = tokens[at : at + chunk]
            want = range(max(first - at, 0), len(part))
            logits = model.forward(part.tolist(), [Span(cache, len(part))], want)
            if len(want):
                yield logits

    return run


def _windows(opened: OpenedModel, options: EvalOptions) -> list[Window]:
    longest = opened.config.max_position_embeddings
    if not 4 <= options.ctx <= longest:
        raise UsageError(f"--ctx must be from 4 to {longest} for this model, not {options.ctx}")
    lead = opened.tokenizer.encode("")
    out: list[Window] = []
    for name in options.texts:
        ids = opened.tokenizer.encode(read_text(name))
        try:
            out += windows(
                ids, options.ctx, options.stride or options.ctx, lead[0] if lead else None
            )
        except UsageError as exc:
            raise UsageError(f"{shown(name)}: {exc}") from None
    return out[: options.chunks]


def read_text(name: str) -> str:
    """A text file.

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
    return text


def _bytes(tokenizer: Tokenizer, ids: I64) -> int:
    return sum(len(tokenizer.token_bytes(int(i))) for i in ids)


def _pairs(a: Sequence[TokenScores], b: Sequence[TokenScores]) -> dict[str, Comparison]:
    """Paired comparisons of what both have; "nll" stands for perplexity (its logarithm)."""
    out = {"nll": compare([s.nll for s in a], [s.nll for s in b])}
    ka, kb = ([s.kld for s in x if s.kld is not None] for x in (a, b))
    if ka and kb:
        out["kld"] = compare(ka, kb)
    return out


def _lines(out: dict[str, Any]) -> Iterator[str]:
    yield (
        f"{out['bits']}-bit experts, {out['dense_bits']}-bit dense: {out['tokens']} tokens scored "
        f"in {out['windows']} windows of {out['ctx']}"
    )
    yield from _figure_lines(out)
    if "versus" in out:
        other = out["versus"]
        yield f"{other['bits']}-bit experts, {other['dense_bits']}-bit dense:"
        yield from _figure_lines(other)
        for name, c in other["paired"].items():
            low, high = c["difference_low"], c["difference_high"]
            yield (
                f"  {out['bits']} against {other['bits']} bits, {name}: difference "
                f"{c['difference']:.6f} [{low:.6f}, {high:.6f}], ratio {c['ratio']:.4f} "
                f"[{c['ratio_low']:.4f}, {c['ratio_high']:.4f}] (95 %)"
            )


def _figure_lines(out: dict[str, Any]) -> Iterator[str]:
    yield f"  perplexity       {out['ppl']:.4f} +- {out['ppl_se']:.4f}"
    yield f"  bits per byte    {out['bits_per_byte']:.4f} +- {out['bits_per_byte_se']:.4f}"
    if "kld" in out:
        change = 100 * (out["ppl"] / out["ref_ppl"] - 1)
        same, rms = 100 * out["same_top"], 100 * out["rms_delta_p"]
        yield f"  reference        perplexity {out['ref_ppl']:.4f}, so {change:+.3f} %"
        yield f"  KL divergence    {out['kld']:.6f} +- {out['kld_se']:.6f}"
        yield f"  99th percentile  {out['kld_p99']:.6f} +- {out['kld_p99_se']:.6f}"
        yield f"  same top token   {same:.3f} % +- {100 * out['same_top_se']:.3f}"
        yield f"  RMS change of p  {rms:.3f} % +- {100 * out['rms_delta_p_se']:.3f}"


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """Windows done on stderr, where that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    start = time.monotonic()

    def show(done: int, total: int) -> None:
        left = (time.monotonic() - start) * (total - done) / max(done, 1)
        sys.stderr.write(f"\r{what}: window {done} of {total}, {math.ceil(left)} s left\033[K")
        sys.stderr.flush()

    try:
        yield show
    finally:
        sys.stderr.write("\r\033[K")
        sys.stderr.flush()
