"""Rounds of our model and of llama.cpp in turn, and what they add up to."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path

import numpy as np

from .. import kernels
from ..engine import DEFAULT_STREAMING, Model, load
from ..errors import UsageError, shown
from ..model import Span
from ..opened import OpenedModel, open_model
from ..types import I64, Streaming, Traffic
from .llamacpp import LlamaCpp
from .machine import STREAM_BYTES, Limits, OtherPrograms, cpu_name
from .result import (
    Bench,
    LlamaCppBench,
    Machine,
    Memory,
    Reading,
    ReadSettings,
    Round,
    Theirs,
    decoding,
    prefilling,
    rates,
    versus,
)
from .timing import Spread, Timing
from .tokens import SEED, token_stream
from .traffic import gguf_traffic, mean_traffic, products

Progress = Callable[[int, int, str], None]
"""Called with (steps done, steps in all, what was done)."""

REPACK = {"repack on": True, "repack off": False}
"""The two ways llama.cpp keeps weights: in a copy of another order too, or as they are."""

SETTLE_S = 0.1
"""Pause before the other side's turn, in which threads stop spinning for more work."""


@dataclass(frozen=True)
class Workload:
    """What every round does: prefill `prompt_tokens` of `tokens` (int64 [n]), decode the others."""

    tokens: I64
    prompt_tokens: int

    @property
    def generated_tokens(self) -> int:
        """Tokens that are decoded one by one."""
        return len(self.tokens) - self.prompt_tokens


def bench(
    path: str | os.PathLike[str] | None = None,
    *,
    prompt_tokens: int = 512,
    generated_tokens: int = 64,
    rounds: int = 5,
    steps: int | None = None,
    mem: str | int | None = "auto",
    bits: int | None = None,
    mean_bits: float | None = None,
    prefill_mean_bits: float | None = None,
    read_price: float | None = None,
    dense_bits: int | None = None,
    threads: int | None = None,
    kv_type: str = "f16",
    cache: str | int | None = None,
    io_limit: float | None = None,
    exact: bool = False,
    streaming: Streaming = DEFAULT_STREAMING,
    gguf: str | os.PathLike[str] | None = None,
    llama_python: str | None = None,
    progress: Progress | None = None,
) -> Bench:
    """Measure a store (None: the bundled model), and llama.cpp in turn where a GGUF is given.

    Every round feeds the same tokens (tokens.py) to an empty sequence. A first one is not counted.

    Args:
        prompt_tokens, generated_tokens: of a round; 0 leaves that part out.
        rounds: that are counted.
        steps: feed 0, 1, 2, ... modulo this instead of words' frequencies.
        mem, bits, mean_bits, prefill_mean_bits, read_price, dense_bits, threads, kv_type, cache,
            io_limit, exact, streaming: as `engine.load`; llama.cpp's memory is its own.
        gguf: the same model for llama.cpp, which gets as many threads and float16 keys and values.
        llama_python: a Python with llama_cpp; None: EDGEMOE_LLAMA_PYTHON, else this one.
        progress: called after every step.

    Raises:
        UsageError: nothing to measure, more tokens than the model's context, a GGUF of another
            vocabulary, no Python with llama_cpp; and as `load`, its other errors too.
        EdgeMoEError: llama.cpp fails.
    """
    opened = open_model(path)
    with ExitStack() as stack:
        stack.callback(opened.close)
        check(opened, prompt_tokens, generated_tokens, rounds)
        count = prompt_tokens + generated_tokens
        work = Workload(token_stream(opened.config.vocab_size, count, steps), prompt_tokens)
        meter = Meter(progress, rounds, 1 if gguf is None else 1 + len(REPACK))
        theirs: dict[str, LlamaCpp] = {}
        if gguf is not None:
            workers = threads or kernels.default_threads()
            for name, repack in REPACK.items():
                theirs[name] = stack.enter_context(
                    LlamaCpp(
                        llama_python,
                        Path(gguf),
                        threads=workers,
                        repack=repack,
                        tokens=work.tokens,
                        prompt_tokens=prompt_tokens,
                    )
                )
                _same_vocabulary(Path(gguf), theirs[name], opened)
                meter.step(f"llama.cpp loaded, {name}")
        model = load(
            opened,
            mem=mem,
            bits=bits,
            mean_bits=mean_bits,
            prefill_mean_bits=prefill_mean_bits,
            read_price=read_price,
            dense_bits=dense_bits,
            ctx_size=count,
            threads=threads,
            kv_type=kv_type,
            cache=cache,
            io_limit=io_limit,
            exact=exact,
            streaming=streaming,
            reserve=STREAM_BYTES,
        )
        stack.callback(model.close)
        meter.step("model loaded")
        feed(model, work)
        used = model.usage()
        memory = Memory(
            weights_bytes=model.plan.budget.weights,
            cache_bytes=used.cache_bytes,
            peak_rss_bytes=used.peak_rss_bytes,
            mem_budget_bytes=used.mem_budget_bytes,
        )
        meter.step("warm-up")
        for name, side in theirs.items():
            side.round()
            meter.step(f"warm-up, llama.cpp, {name}")
        limits = Limits(model.plan.threads)
        done = [_round(i, model, work, limits, theirs, meter) for i in range(rounds)]
        beside = _sum_up_theirs(opened, Path(gguf), work, done, theirs) if gguf else None
        how = ReadSettings.of(exact, io_limit, streaming)
        return _sum_up(opened, model, work, steps, how, memory, done, beside)


def check(opened: OpenedModel, prompt_tokens: int, generated_tokens: int, rounds: int) -> None:
    """Raise UsageError where there is nothing to measure, or too much for the model."""
    for name, value in (("-p", prompt_tokens), ("-n", generated_tokens)):
        if value < 0:
            raise UsageError(f"{name} must be at least 0, not {value}")
    if prompt_tokens + generated_tokens == 0:
        raise UsageError("-p 0 and -n 0 leave nothing to measure: give one of them some tokens")
    if rounds < 1:
        raise UsageError(f"--rounds must be at least 1, not {rounds}")
    longest = opened.config.max_position_embeddings
    if prompt_tokens + generated_tokens > longest:
        raise UsageError(
            f"-p {prompt_tokens} and -n {generated_tokens} are more than the context of {longest} "
            "tokens that this model takes: give fewer"
        )


def _same_vocabulary(gguf: Path, theirs: LlamaCpp, opened: OpenedModel) -> None:
    if theirs.vocab_size != opened.config.vocab_size:
        raise UsageError(
            f"{shown(gguf)} has {theirs.vocab_size} tokens and {shown(opened.path)} "
            f"{opened.config.vocab_size}: they are not the same model"
        )


class Meter:
    """Counts the steps of a benchmark: each side is loaded, warmed up, and runs its rounds."""

    def __init__(self, report: Progress | None, rounds: int, sides: int) -> None:
        self._report, self._done, self._total = report, 0, sides * (rounds + 2)

    def step(self, what: str) -> None:
        """One more is done."""
        self._done += 1
        if self._report is not None:
            self._report(self._done, self._total, what)


def feed(model: Model, work: Workload, after_prefill: Callable[[], None] | None = None) -> Timing:
    """Run the tokens through an empty sequence; nothing is sampled, but all logits are computed.

    after_prefill: called between prefill and decoding, not timed.
    """
    cache, prompt = model.new_cache(), work.tokens[: work.prompt_tokens].tolist()
    start = time.perf_counter()
    for first in range(0, len(prompt), model.plan.prefill_chunk):
        chunk = prompt[first : first + model.plan.prefill_chunk]
        model.forward(chunk, [Span(cache, len(chunk))], [len(chunk) - 1])
    prefill_s = time.perf_counter() - start
    if after_prefill is not None:
        after_prefill()
    steps = []
    for token in work.tokens[work.prompt_tokens :].tolist():
        start = time.perf_counter()
        model.forward([token], [Span(cache, 1)], [0])
        steps.append(time.perf_counter() - start)
    return Timing(prefill_s, tuple(steps))


def _round(
    index: int,
    model: Model,
    work: Workload,
    limits: Limits,
    theirs: dict[str, LlamaCpp],
    meter: Meter,
) -> Round:
    """Every side once; odd rounds in the opposite order, so that no side always comes first."""
    other: dict[str, Timing] = {}
    busy = OtherPrograms([os.getpid(), *(side.pid for side in theirs.values())])

    def turns(names: Iterable[str]) -> None:
        for name in names:
            time.sleep(SETTLE_S)
            other[name] = theirs[name].round()
            meter.step(f"round {index + 1}, llama.cpp, {name}")

    turns(reversed(theirs) if index % 2 else ())
    time.sleep(SETTLE_S)
    ours = _ours(model, work, limits)
    meter.step(f"round {index + 1}, edgemoe")
    turns(() if index % 2 else theirs)
    return replace(ours, theirs=other, others_cpus=busy.cpus())


def _ours(model: Model, work: Workload, limits: Limits) -> Round:
    """Our side of a round: with the memory's bytes a second around decoding, and the integer peak
    around the prefill."""
    between: list[Traffic] = []
    peaks: list[float] = []
    streams: list[float] = []

    def after_prefill() -> None:
        between.append(model.usage().traffic)
        if work.prompt_tokens:
            peaks.append(limits.int8_peak())
        if work.generated_tokens:
            streams.extend(limits.stream())

    if work.prompt_tokens:
        peaks.append(limits.int8_peak())
    before = model.usage().traffic
    timing = feed(model, work, after_prefill)
    after = model.usage().traffic
    if work.generated_tokens:
        streams.extend(limits.stream())
    return Round(
        timing,
        prefill=Reading.of(between[0] - before),
        decode=Reading.of(after - between[0]),
        stream_bytes_s=_median(streams),
        int8_peak=_median(peaks),
        theirs={},
        others_cpus=0.0,
    )


def _median(values: Sequence[float]) -> float:
    return float(np.median(values)) if values else 0.0


def _sum_up(
    opened: OpenedModel,
    model: Model,
    work: Workload,
    steps: int | None,
    how: ReadSettings,
    memory: Memory,
    rounds: Sequence[Round],
    llama_cpp: LlamaCppBench | None,
) -> Bench:
    plan, quant = model.plan, opened.store.quant
    mean = _median([r.decode.mean_bits for r in rounds]) or plan.bits
    read = mean_traffic(opened.store, mean, quant.levels.index(plan.dense_bits))
    done = products(opened.store)
    prompt, generated = work.prompt_tokens, work.generated_tokens
    logits = -(-prompt // plan.prefill_chunk)  # those of each chunk's last token
    macs = prompt * done.body + logits * done.head
    return Bench(
        model=str(opened.path),
        machine=Machine(cpu_name(), kernels.backend(), kernels.isa(), plan.threads),
        bits=plan.bits,
        mean_bits=plan.mean_bits,
        dense_bits=plan.dense_bits,
        kv_type=plan.kv_type,
        read_settings=how,
        prompt_tokens=prompt,
        generated_tokens=generated,
        tokens=f"Zipf's law, seed {SEED}" if steps is None else f"0 .. {steps - 1} in turn",
        prefill=prefilling(rounds, prompt, macs) if prompt else None,
        decode=decoding(rounds, generated, read.total) if generated else None,
        bytes_per_token=read,
        products_per_token=done,
        memory=memory,
        llama_cpp=llama_cpp,
        others_cpus=Spread.of([r.others_cpus for r in rounds]),
        rounds=tuple(rounds),
    )


def _sum_up_theirs(
    opened: OpenedModel,
    gguf: Path,
    work: Workload,
    rounds: Sequence[Round],
    theirs: dict[str, LlamaCpp],
) -> LlamaCppBench:
    prompt, generated = work.prompt_tokens, work.generated_tokens
    prefill, decode = attrgetter("prefill_s"), attrgetter("decode_s")
    file_bytes, bytes_per_token = gguf_traffic(gguf, opened.config)
    return LlamaCppBench(
        gguf=str(gguf),
        version=next(iter(theirs.values())).version,
        file_bytes=file_bytes,
        bytes_per_token=bytes_per_token,
        runs={
            name: Theirs(
                rates(rounds, name, prompt, prefill),
                rates(rounds, name, generated, decode),
                side.peak_rss_bytes,
            )
            for name, side in theirs.items()
        },
        prefill=versus(rounds, prompt, prefill),
        decode=versus(rounds, generated, decode),
    )
