"""`edgemoe run`: from arguments to a prompt, a model, streamed text and a line of figures."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict
from typing import Any

from ..engine import Model
from ..errors import UsageError
from ..generation import Generation
from ..opened import OpenedModel, open_model
from ..sampling import SamplingParams
from ..types import Stats
from .interactive import converse
from .session import (
    RunOptions,
    choose_sampling,
    load_model,
    note_idle_settings,
    prompt_ids,
    report,
    speak,
)

CTX_STEP = 256

LONG_TOKEN = 8
"""Characters a token; text of real languages stays well below on average."""

MAX_PIPED = 16 << 20
"""Bytes of a prompt from a pipe; no model's context holds as much."""


def run(options: RunOptions) -> int:
    """Do what was asked; returns the exit code."""
    if any(not text for text in options.stop):
        raise UsageError("--stop needs some text: an empty string would end every answer at once")
    prompt = options.prompt
    if prompt is None:
        if sys.stdin is None or not sys.stdin.isatty():
            prompt = read_pipe()
        elif options.as_json:
            raise UsageError("--json needs a prompt: give one, or pipe it in")
    if prompt == "":
        raise UsageError("the prompt is empty: give some text")
    if hasattr(sys.stdout, "reconfigure"):
        # What a terminal's encoding cannot show must not end the run.
        sys.stdout.reconfigure(errors="replace")
    opened = open_model(options.model)
    try:
        if prompt is None:
            return converse(opened, options)
        return _answer_once(opened, options, prompt)
    finally:
        opened.close()


def read_pipe() -> str:
    """The prompt on stdin, without the newline that ends its last line.

    Raises:
        UsageError: stdin is closed, not UTF-8, or longer than MAX_PIPED.
    """
    data = b"" if sys.stdin is None else sys.stdin.buffer.read(MAX_PIPED + 1)
    if len(data) > MAX_PIPED:
        raise UsageError(f"the prompt on stdin is longer than {MAX_PIPED >> 20} MiB: shorten it")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"the prompt on stdin is not UTF-8 at byte {error.start}: re-encode it"
        ) from None
    return text.removesuffix("\n").removesuffix("\r")


def refuse_endless(opened: OpenedModel, prompt: str) -> None:
    """Raise UsageError where the beginning of a prompt alone overflows the model.

    Encoding takes over 100 bytes a character, so a book that cannot fit is not encoded whole.
    """
    longest = opened.config.max_position_embeddings
    head = LONG_TOKEN * longest
    if len(prompt) > head and len(opened.tokenizer.encode(prompt[:head])) > longest:
        raise UsageError(
            f"the prompt has {len(prompt)} characters, far more than the {longest} tokens that "
            "this model takes: shorten it"
        )


def _answer_once(opened: OpenedModel, options: RunOptions, prompt: str) -> int:
    refuse_endless(opened, prompt)
    ids = prompt_ids(opened, [{"role": "user", "content": prompt}], raw=options.raw)
    longest = opened.config.max_position_embeddings
    ctx = options.ctx_size
    if ctx is None:
        ctx = min(longest, -(-(len(ids) + options.max_tokens) // CTX_STEP) * CTX_STEP)
    if len(ids) >= ctx:
        advice = "give a larger --ctx-size or shorten it" if ctx < longest else "shorten it"
        raise UsageError(
            f"the prompt has {len(ids)} tokens and the context {ctx}: {advice} "
            f"(this model takes at most {longest})"
        )
    sampling = choose_sampling(opened, options)
    note_idle_settings(options, sampling)
    with load_model(opened, options, ctx) as model:
        generation = model.stream(
            ids,
            max_tokens=options.max_tokens,
            sampling=sampling,
            stop=options.stop,
            logits_hash=options.logits_hash,
        )
        speak(generation, silent=options.as_json)
        if options.as_json:
            print(as_json(generation, model, sampling, logits_hash=options.logits_hash))
        report(generation, sampling, logits_hash=options.logits_hash)
    return 0


def as_json(
    generation: Generation, model: Model, sampling: SamplingParams, *, logits_hash: bool
) -> str:
    """The object that --json prints: text, the fields of Stats, and the settings they depend on."""
    stats: Stats = generation.stats
    out: dict[str, Any] = {"text": generation.text, **asdict(stats)}
    out |= {"bits": model.plan.bits, "dense_bits": model.plan.dense_bits}
    out |= {"ctx_size": model.plan.ctx_size, "threads": model.plan.threads}
    out["kv_type"] = model.plan.kv_type
    if sampling.temperature > 0:
        out["seed"] = sampling.seed
    if logits_hash:
        out["logits_hash"] = generation.logits_hash
    for name, value in out.items():
        if isinstance(value, float) and not math.isfinite(value):
            out[name] = None
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    return json.dumps(out, ensure_ascii=not utf8, allow_nan=False)
