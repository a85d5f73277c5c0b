"""What one run and a conversation share: options, prompt ids, loading, streamed text, figures."""

from __future__ import annotations

import os
import secrets
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from ..engine import Model, load
from ..generation import Generation
from ..loader.budget import format_size
from ..opened import OpenedModel
from ..sampling import SamplingParams
from ..types import Stats, Streaming

INTERACTIVE_CTX = 4096


@dataclass(frozen=True)
class RunOptions:
    """What `edgemoe run` was asked for; None leaves a choice to the model or the machine.

    io_limit: bytes a second.
    """

    model: str | None = None
    prompt: str | None = None
    raw: bool = False
    mem: str = "auto"
    cache: str | None = None
    bits: int | None = None
    mean_bits: float | None = None
    prefill_mean_bits: float | None = None
    read_price: float | None = None
    dense_bits: int | None = None
    exact: bool = False
    io_limit: float | None = None
    max_tokens: int = 256
    ctx_size: int | None = None
    threads: int | None = None
    kv_type: str = "f16"
    sampling: dict[str, Any] | None = None
    stop: Sequence[str] = ()
    as_json: bool = False
    logits_hash: bool = False
    look_ahead: bool = True
    preload: bool = False
    trace: str | None = None


def prompt_ids(opened: OpenedModel, messages: Sequence[dict[str, str]], *, raw: bool) -> list[int]:
    """Token ids of a conversation; of its last message alone where there is no chat template."""
    if raw or opened.chat_template is None:
        return opened.tokenizer.encode(messages[-1]["content"])
    text = opened.chat_template.render(messages)
    return opened.tokenizer.encode(text, add_special=False)


def choose_sampling(opened: OpenedModel, options: RunOptions) -> SamplingParams:
    """The model's own settings with those asked for; a seed is drawn where one is needed.

    Drawing it here lets the figures name it, so that any run can be repeated.
    """
    params = replace(opened.generation_defaults, **(options.sampling or {}))
    if params.temperature > 0 and params.seed is None:
        params = replace(params, seed=secrets.randbits(32))
    return params


def note_idle_settings(options: RunOptions, params: SamplingParams) -> None:
    """Say which of the settings asked for cannot matter."""
    idle = [name for name in ("top_k", "top_p", "min_p") if name in (options.sampling or {})]
    if params.temperature == 0 and idle:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
        note(f"{names} without effect: the likeliest token is taken (--temp 0)")


def load_model(opened: OpenedModel, options: RunOptions, ctx_size: int) -> Model:
    """Load with progress on a terminal, then say with what settings it runs."""
    shows = sys.stderr.isatty()

    def progress(done: int, total: int) -> None:
        sys.stderr.write(f"\rloading {100 * done // max(total, 1)} %")
        sys.stderr.flush()

    try:
        model = load(
            opened,
            mem=options.mem,
            bits=options.bits,
            mean_bits=options.mean_bits,
            prefill_mean_bits=options.prefill_mean_bits,
            read_price=options.read_price,
            dense_bits=options.dense_bits,
            ctx_size=ctx_size,
            threads=options.threads,
            kv_type=options.kv_type,
            cache=options.cache,
            io_limit=options.io_limit,
            exact=options.exact,
            streaming=Streaming(
                look_ahead=options.look_ahead,
                preload=options.preload,
                trace=None if options.trace is None else Path(options.trace),
            ),
            progress=progress if shows else None,
        )
    finally:
        if shows:
            sys.stderr.write("\r\033[K")
    plan = model.plan
    most = "the store's most" if options.exact else "the most that fit"
    if plan.streamed:
        why = f" streamed through {format_size(plan.budget.experts)}"
    else:
        why = "" if options.bits or options.mean_bits else f" ({most})"
    experts = f"{plan.bits}-bit experts"
    if plan.mean_bits is not None:
        experts = f"experts of {plan.mean_bits:g} bits on average, {plan.bits} at most,"
    name = os.path.basename(model.store_path)
    note(
        f"{name}: {experts}{why}, {plan.dense_bits}-bit "
        f"dense weights, context {plan.ctx_size}, {plan.threads} threads, ceiling "
        f"{format_size(plan.budget.ceiling)}"
    )
    return model


def speak(generation: Generation, *, silent: bool = False) -> None:
    """Write the text piece by piece as it comes, until it ends or Ctrl-C ends it.

    Raises:
        KeyboardInterrupt: before the first token; there is no text to end then.
    """
    out, ends_line = sys.stdout, True
    with generation, soft_interrupt() as interrupt:
        try:
            for piece in generation:
                interrupt.soft = True
                if not silent:
                    out.write(_harmless(piece) if out.isatty() else piece)
                    out.flush()
                    ends_line = piece.endswith("\n")
                if interrupt.seen:
                    break
        except KeyboardInterrupt:
            if not generation.token_ids:
                raise
        # From here on only the end of the line and the figures are left.
        interrupt.soft = True
    if not silent and not ends_line:
        out.write("\n")
        out.flush()


def _harmless(piece: str) -> str:
    """A piece for a terminal: control characters other than newline and tab made visible."""
    return piece.translate(_VISIBLE)


_VISIBLE = {c: f"^{c:02X}" for c in (*range(0x20), *range(0x7F, 0xA0)) if c not in (9, 10)}


class Interrupt:
    """State of Ctrl-C: while `soft`, the first one only sets `seen`."""

    def __init__(self) -> None:
        self.soft = self.seen = False


@contextmanager
def soft_interrupt() -> Iterator[Interrupt]:
    """Between pieces Ctrl-C is looked at when the next one comes, so no step is cut in half."""
    state = Interrupt()

    def on_signal(signum: int, frame: FrameType | None) -> None:
        if state.soft and not state.seen:
            state.seen = True
        else:
            raise KeyboardInterrupt

    handles = threading.current_thread() is threading.main_thread() and (
        signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    )
    before = signal.signal(signal.SIGINT, on_signal) if handles else None
    try:
        yield state
    finally:
        if handles:
            signal.signal(signal.SIGINT, before)


def report(generation: Generation, sampling: SamplingParams, *, logits_hash: bool) -> None:
    """The figures of a generation on stderr: one line, after the hash where it was asked for."""
    if logits_hash:
        note(f"logits hash {generation.logits_hash}")
    s = generation.stats
    seed = f", seed {sampling.seed}" if sampling.temperature > 0 else ""
    mean, by_gate = f"{s.mean_bits:.2f}", f"{s.gate_weighted_bits:.2f}"
    wished = f"{s.wished_mean_bits:.2f}"
    more = [] if mean == by_gate else [f"by gate weight {by_gate}"]
    if wished != mean:
        more.append(f"{wished} had all been in memory")
    bits = f"{mean} ({', '.join(more)})" if more else mean
    note(
        f"{s.prompt_tokens} prompt tokens at {s.prefill_tok_s:.1f}/s, {s.generated_tokens} "
        f"generated at {s.decode_tok_s:.1f}/s, first after {s.ttft_s:.2f} s, peak "
        f"{format_size(s.peak_rss_bytes)} of {format_size(s.mem_budget_bytes)}, mean bits {bits}"
        f"{_reads(s)}, ended by {_ENDINGS.get(s.stop_reason, s.stop_reason)}{seed}"
    )


def _reads(s: Stats) -> str:
    """What was read while the text was made; nothing where everything was resident."""
    if not s.bytes_read:
        return ""
    a_token = format_size(round(s.bytes_read_per_token))
    return (
        f", read {format_size(s.bytes_read)} ({a_token} a token, "
        f"hits {100 * s.hit_rate:.0f} %, waited {s.unhidden_wait_s:.1f} s)"
    )


_ENDINGS = {
    "eos": "the model",
    "stop": "--stop",
    "length": "--max-tokens",
    "context": "--ctx-size",
    "closed": "Ctrl-C",
}


def note(message: str) -> None:
    """One line on stderr that is not an error."""
    print(f"edgemoe: {message}", file=sys.stderr, flush=True)
