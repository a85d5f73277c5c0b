"""Wires everything: a store becomes a Model that continues text under a memory ceiling."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from . import kernels
from .closing import Closing
from .cpu_attn.kv_cache import KVCache
from .errors import UsageError, shown
from .generation import Generation
from .kv_layout import KV_TYPES
from .loader import budget as memory
from .loader.arena import Arena
from .loader.guard import Guard
from .loader.resident import Progress, ResidentExperts
from .model import Span, Weights, drive, halves, layers, logits
from .opened import OpenedModel, open_model
from .perfmodel import fit
from .pipeline.ahead import NextRouter, Routing
from .pipeline.assembly import choices, streamed_mixture
from .pipeline.bit_router import BitRouter
from .pipeline.drive import alternate, traced
from .pipeline.mean_bits import check_mean
from .pipeline.serial import SerialExperts
from .pipeline.streamed import StreamedMixture
from .pipeline.timeline import Timeline
from .planning import plan
from .sampling import SamplingParams
from .types import F32, I64, READ_PRICE, RunPlan, Stats, Streaming, Traffic, Usage
from .weights import from_store

DEFAULT_CTX = 4096
DEFAULT_STREAMING = Streaming()


def load(
    path: str | os.PathLike[str] | OpenedModel | None = None,
    *,
    mem: str | int | None = "auto",
    bits: int | None = None,
    mean_bits: float | None = None,
    prefill_mean_bits: float | None = None,
    read_price: float | None = None,
    dense_bits: int | None = None,
    ctx_size: int | None = None,
    threads: int | None = None,
    kv_type: str = "f16",
    cache: str | int | None = None,
    io_limit: float | None = None,
    exact: bool = False,
    streaming: Streaming = DEFAULT_STREAMING,
    sequences: int = 1,
    progress: Progress | None = None,
    reserve: int = 0,
) -> Model:
    """Load a store (None: the bundled model) under a memory ceiling.

    Args:
        path: a store, or the result of `open_model`, which the Model then owns.
        mem: ceiling on everything this process uses: "512M", "8G", bytes, or "auto" for 70 % of
            what is free now. A cgroup's limit is a ceiling too.
        bits: level of every expert, one of the store's, streamed if not all of them fit; None: the
            highest at which all fit, or, where there is none, 4 at most, streamed.
        mean_bits: instead of one level for all, each token gets each of its experts at as many bits
            as it gains from, this many on average.
        prefill_mean_bits: with mean_bits, the average for the tokens of a prompt; what fewer bits
            leave in the KV cache is part of what all later tokens see.
        read_price: with mean_bits, how many times as much a bit has to gain that is not in memory
            as one that is, 8 unless given; 1: memory does not matter.
        dense_bits: level of all other matrices; None: 8 with bits=8, else 6.
        ctx_size: most tokens of prompt and answer together; None: the model's own, at most 4096.
        threads: worker threads; None: one for each performance core this process may use.
        kv_type: what keys and values are kept as: "f16", or "int8", which takes half as much.
        cache: memory for experts alone, "1G" or bytes, through which they are streamed; None: what
            the ceiling leaves. The ceiling holds all the same.
        io_limit: bytes a second that reading experts may take; None: no limit.
        exact: never lower the level to make all experts fit: it is `bits`, or the highest there is.
        streaming: how experts that do not all fit are read.
        sequences: contexts kept at once (see `Model.step`).
        progress: called with (bytes read, bytes in all) while experts are read.
        reserve: bytes under the ceiling that the caller will use itself.

    Raises:
        UsageError: a setting out of range. StoreError: the store cannot be used.
        MemoryBudgetError: the model does not fit; says what it needs.
    """
    if threads is not None and not 1 <= threads <= kernels.MAX_THREADS:
        raise UsageError(f"threads must be from 1 to {kernels.MAX_THREADS}, not {threads}")
    if kv_type not in KV_TYPES:
        raise UsageError(f"kv_type must be {' or '.join(KV_TYPES)}, not {shown(str(kv_type))}")
    if isinstance(mem, str):
        memory.parse_size(mem)
    cache_bytes = None if cache is None else memory.parse_size(cache)
    if cache is not None and cache_bytes is None:
        raise UsageError("cache must be a size, not auto: leave it out to take what is left")
    if io_limit is not None and not 0 < io_limit < float("inf"):
        raise UsageError(f"io_limit must be above 0 bytes a second, not {io_limit}")
    if sequences < 1:
        raise UsageError(f"sequences must be at least 1, not {sequences}")
    opened = path if isinstance(path, OpenedModel) else open_model(path)
    try:
        cfg, quant = opened.config, opened.store.quant
        for name, value in (("bits", bits), ("dense_bits", dense_bits)):
            if value is not None and value not in quant.levels:
                raise UsageError(f"{name} must be one of {_either(quant.levels)}, not {value}")
        if bits is not None and bits > quant.max_level:
            raise UsageError(
                f"bits is {bits}, but the experts of {shown(opened.store.path)} were kept up to "
                f"{quant.max_level} bits; convert the model again with --max-level {bits}"
            )
        longest = cfg.max_position_embeddings
        ctx = min(longest, DEFAULT_CTX) if ctx_size is None else ctx_size
        if not 1 <= ctx <= longest:
            raise UsageError(
                f"the context size must be from 1 to {longest} for this model, not {ctx}"
            )
        if mean_bits is not None:
            if bits is not None or exact:
                raise UsageError("mean_bits lets levels differ: leave out bits and exact")
            check_mean(mean_bits, quant.expert_levels)
        for name, number in (("read_price", read_price), ("prefill_mean_bits", prefill_mean_bits)):
            if number is not None and mean_bits is None:
                raise UsageError(f"{name} goes with mean_bits: give that too")
        if prefill_mean_bits is not None:
            check_mean(prefill_mean_bits, quant.expert_levels, "prefill_mean_bits")
        price = READ_PRICE if read_price is None else read_price
        if not 1 <= price < float("inf"):
            raise UsageError(f"read_price must be 1 or more, not {price:g}")
        wish = fit.Wish(bits, dense_bits, exact, cache_bytes, mean_bits)
        chosen = plan(
            opened.store,
            wish,
            memory.resolve_ceiling(mem),
            ctx,
            threads or kernels.default_threads(),
            kv_type,
            sequences=sequences,
            reserve=reserve,
        )
        return Model(opened, chosen, progress, streaming, io_limit or 0.0, price, prefill_mean_bits)
    except BaseException:
        opened.close()
        raise


def _either(values: Sequence[int]) -> str:
    return ", ".join(map(str, values[:-1])) + f" or {values[-1]}"


class Completion(str):
    """Generated text; a str that also knows `token_ids`, `stats` and `logits_hash`."""

    token_ids: list[int]
    stats: Stats
    logits_hash: str | None

    @classmethod
    def of(cls, generation: Generation) -> Completion:
        """The result of a generation that has ended."""
        out = cls(generation.text)
        out.token_ids = generation.token_ids
        out.stats = generation.stats
        out.logits_hash = generation.logits_hash
        return out


class Model(Closing):
    """A loaded model. Close it, or use it in a `with`, to give its memory back.

    Attributes:
        config, tokenizer, chat_template, generation_defaults: of the store.
        plan: the settings this model runs with and how the memory is spent.
        store_path: the store's path.
    """

    def __init__(
        self,
        opened: OpenedModel,
        plan: RunPlan,
        progress: Progress | None = None,
        streaming: Streaming = DEFAULT_STREAMING,
        io_limit: float = 0.0,
        read_price: float = READ_PRICE,
        prefill_mean_bits: float | None = None,
    ) -> None:
        self.config, self.tokenizer = opened.config, opened.tokenizer
        self.chat_template = opened.chat_template
        self.generation_defaults = opened.generation_defaults
        self.store_path, self.plan = opened.path, plan
        self._opened = opened
        self._prefill_mean_bits = prefill_mean_bits
        self._timeline = None if streaming.trace is None else Timeline(streaming.trace)
        self._weights: Weights | None = None
        self._experts: SerialExperts | StreamedMixture | None = None
        self._traffic = Traffic()  # of a model that was closed
        self._busy = False
        try:
            self._read(plan, progress, streaming, io_limit, read_price)
        except BaseException:
            if self._experts is not None:
                self._experts.close()
            if self._timeline is not None:
                self._timeline.discard()
            raise

    def _read(
        self,
        plan: RunPlan,
        progress: Progress | None,
        streaming: Streaming,
        io_limit: float,
        read_price: float,
    ) -> None:
        span = None if self._timeline is None else self._timeline.add
        self._pool = kernels.new_pool(plan.threads)
        store, budget, quant = self._opened.store, plan.budget, self._opened.store.quant
        arena = Arena(budget.weights + (0 if plan.streamed else budget.experts))
        dense_level = quant.levels.index(plan.dense_bits)
        self._weights = from_store(store, self._pool, arena, dense_level)
        level = quant.expert_levels.index(plan.bits)
        chosen = choices(store, level, plan.mean_bits, read_price, streaming)
        if plan.streamed:
            guard = Guard(budget.ceiling, budget.margin)
            guess = self._guess() if streaming.look_ahead and streaming.overlap else None
            self._experts = streamed_mixture(
                store,
                self._pool,
                budget.experts,
                level,
                chosen,
                streaming,
                guess,
                guard,
                io_limit,
                span,
            )
            self._experts.preload(progress)
        else:
            resident = ResidentExperts(store, arena, level, progress)
            self._experts = SerialExperts(self._pool, resident, chosen.router, span)

    def _guess(self) -> NextRouter:
        """At what the next layer will want."""
        layers_ = enumerate(self._weights.layers if self._weights is not None else ())
        routings = [Routing(i, v.post_norm, v.router) for i, v in layers_ if v.router is not None]
        return NextRouter(self._pool, routings, self.config.num_experts_per_tok)

    def close(self) -> None:
        """Give the weights' memory back and close the store; twice is fine."""
        if self._experts is not None:
            self._traffic = self._experts.traffic
            self._experts.close()
        self._weights = self._experts = None
        self._opened.close()
        if self._timeline is not None:
            self._timeline.close()

    def new_cache(self) -> KVCache:
        """An empty KV cache of this model's context size."""
        return KVCache(self.config, self.plan.ctx_size, self.plan.kv_type)

    def forward(self, tokens: Sequence[int], spans: Sequence[Span], want: Sequence[int]) -> F32:
        """Logits float32 [len(want), vocab] of rows `want` of a flat batch (see model.forward)."""
        return self.logits(self.hidden(tokens, spans)[np.asarray(want, np.int64)])

    def hidden(
        self,
        tokens: Sequence[int] | I64,
        spans: Sequence[Span],
        watch: Callable[[int, F32], None] | None = None,
    ) -> F32:
        """What the last layer leaves of a flat batch: float32 [n, hidden]; watch: shown each
        layer's residual stream (see model.hidden)."""
        if self._weights is None or self._experts is None:
            raise UsageError("this model is closed: load it again")
        ids = np.asarray(tokens, np.int64)
        experts = self._experts
        halved = isinstance(experts, StreamedMixture) and experts.overlap and len(spans) > 1
        batches = halves(ids, spans) if halved else [(ids, spans)]
        means = [self._means(part) for _, part in batches]
        parts = [layers(self._weights, self._pool, *batch, watch) for batch in batches]
        if self._timeline is not None:
            parts = [traced(part, self._timeline.add) for part in parts]
        if isinstance(experts, StreamedMixture) and halved:
            return np.concatenate(alternate(parts, experts, means))
        return drive(parts[0], partial(experts, means=means[0]))

    def route_with(self, router: BitRouter) -> BitRouter:
        """Let another router choose levels, of those up to plan.bits; returns the one before. For
        measurements: nothing else is told of it."""
        if self._experts is None:
            raise UsageError("this model is closed: load it again")
        before, self._experts.router = self._experts.router, router
        return before

    def _means(self, spans: Sequence[Span]) -> list[float] | None:
        """Bits that the experts of each row are to have on average; None: all the same."""
        usual = self.plan.mean_bits
        if usual is None:
            if any(span.mean_bits is not None for span in spans):
                raise UsageError("mean_bits of one sequence: load the model with mean_bits")
            return None
        of_prompts = self._prefill_mean_bits
        out: list[float] = []
        for span in spans:
            mean = span.mean_bits
            if mean is None:
                mean = usual if span.count == 1 or of_prompts is None else of_prompts
            elif mean != usual:
                check_mean(mean, self._opened.store.quant.expert_levels)
            out += [round(mean, 2)] * span.count
        return out

    def step(
        self,
        tokens: Sequence[int],
        caches: Sequence[KVCache],
        mean_bits: Sequence[float | None] | None = None,
    ) -> F32:
        """One more token of each of some sequences: logits float32 [len(tokens), vocab].

        tokens: the next of each sequence, whose cache it goes to. mean_bits: of each, None: what
        the model was loaded with; all of them share what is read. Where experts are streamed two
        halves of the batch alternate: one's attention runs while the other's experts are read.
        """
        wanted = [None] * len(caches) if mean_bits is None else mean_bits
        spans = [Span(cache, 1, mean) for cache, mean in zip(caches, wanted, strict=True)]
        return self.forward(tokens, spans, range(len(tokens)))

    def logits(self, x: F32) -> F32:
        """Logits float32 [n, vocab] of rows of `hidden`."""
        if self._weights is None:
            raise UsageError("this model is closed: load it again")
        begun = time.monotonic_ns()
        out = logits(self._weights, self._pool, x)
        if self._timeline is not None:
            self._timeline.add("head", begun, time.monotonic_ns())
        return out

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 256,
        sampling: SamplingParams | None = None,
        stop: Sequence[str] = (),
        logits_hash: bool = False,
        add_special: bool = True,
        mean_bits: float | None = None,
    ) -> Generation:
        """Continue a prompt; iterate over the result for text pieces.

        Args:
            prompt: text, or token ids taken as they are.
            max_tokens: most tokens to generate.
            sampling: None: the model's own defaults.
            stop: strings that end the text; they are not part of it.
            logits_hash: hash all logits that were sampled from (Generation.logits_hash).
            add_special: add the tokenizer's special tokens to a text prompt; False for the text
                of a chat template, which has its own.
            mean_bits: of this generation's experts on average, where the model was loaded with
                mean_bits; None: what it was loaded with.

        Raises:
            UsageError: an empty prompt, one longer than the context, ids outside the vocabulary, a
                setting out of range, or another generation of this model still runs.
        """
        if max_tokens < 1:
            raise UsageError(f"max_tokens must be at least 1, not {max_tokens}")
        if self._busy:
            raise UsageError("this model is generating already: close that generation first")
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt, add_special=add_special)
            if not ids and self.config.bos_token_id is not None:
                ids = [self.config.bos_token_id]
        else:
            ids = [int(t) for t in prompt]
        if not ids:
            raise UsageError("the prompt is empty: give at least one token")
        if not all(0 <= t < self.config.vocab_size for t in ids):
            raise UsageError(f"token ids must be from 0 to {self.config.vocab_size - 1}")
        if len(ids) >= self.plan.ctx_size:
            raise UsageError(
                f"the prompt has {len(ids)} tokens and the context {self.plan.ctx_size}: shorten "
                "it or give a larger --ctx-size (this model's limit: "
                f"{self.config.max_position_embeddings})"
            )
        if mean_bits is not None:
            self._means([Span(self.new_cache(), 1, mean_bits)])
        self._busy = True
        return Generation(
            _Sequence(self, mean_bits),
            self.tokenizer,
            ids,
            max_tokens=max_tokens,
            sampling=self.generation_defaults if sampling is None else sampling,
            stop=stop,
            eos_token_ids=self.config.eos_token_ids,
            logits_hash=logits_hash,
            measure=self.usage,
            release=self._release,
        )

    def generate(self, prompt: str | Sequence[int], **settings: Any) -> Completion:
        """The whole text at once; settings as for `stream`."""
        with self.stream(prompt, **settings) as generation:
            for _ in generation:
                pass
        return Completion.of(generation)

    def usage(self) -> Usage:
        """Memory used so far, and the traffic of the experts since this model was loaded."""
        return Usage(
            peak_rss_bytes=memory.peak_rss_bytes(),
            mem_budget_bytes=self.plan.budget.ceiling,
            cache_bytes=self.plan.budget.experts,
            traffic=self._traffic if self._experts is None else self._experts.traffic,
        )

    def _release(self) -> None:
        self._busy = False


class _Sequence:
    """One sequence of a model: its cache, fed in chunks."""

    def __init__(self, model: Model, mean_bits: float | None) -> None:
        self._model, self._mean_bits = model, mean_bits
        self._cache = model.new_cache()

    @property
    def room(self) -> int:
        return self._cache.capacity - self._cache.length

    def prefill(self, tokens: Sequence[int]) -> F32:
        logits = np.empty(0, np.float32)
        for chunk in _chunks(tokens, self._model.plan.prefill_chunk):
            last = [len(chunk) - 1]
            span = Span(self._cache, len(chunk), self._mean_bits)
            logits = self._model.forward(chunk, [span], last)[0]
        return logits

    def step(self, token: int) -> F32:
        span = Span(self._cache, 1, self._mean_bits)
        out: F32 = self._model.forward([token], [span], [0])[0]
        return out


def _chunks(tokens: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for first in range(0, len(tokens), size):
        yield tokens[first : first + size]
