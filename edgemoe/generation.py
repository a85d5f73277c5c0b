"""One sequence being continued: prefill, decode, stop; text comes out piece by piece."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Protocol

import numpy as np

from .closing import Closing
from .sampling import REPEAT_WINDOW, Sampler, SamplingParams
from .tokenizer import Tokenizer
from .types import F32, Stats, Usage


class Sequencer(Protocol):
    """What a generation needs of an engine: run tokens through the model, tell what it cost."""

    def prefill(self, tokens: Sequence[int]) -> F32:
        """Append tokens to the sequence; logits float32 [vocab] of the last."""
        ...

    def step(self, token: int) -> F32:
        """Append one token; its logits float32 [vocab]."""
        ...

    @property
    def room(self) -> int:
        """Tokens that still fit the context."""
        ...


class StopMatcher:
    """Withholds text that may be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [s for s in stops if s]
        self._held = ""
        self.hit = False

    def push(self, piece: str) -> str:
        """Text that is certain to come before any stop string; sets `hit` when one appears."""
        self._held += piece
        found = [at for at in (self._held.find(s) for s in self._stops) if at >= 0]
        if found:
            self.hit = True
            out, self._held = self._held[: min(found)], ""
            return out
        keep = max((self._overlap(s) for s in self._stops), default=0)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out

    def flush(self) -> str:
        """What was withheld, once no more text comes."""
        out, self._held = self._held, ""
        return out

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins `stop`."""
        for n in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:n]):
                return n
        return 0


class Generation(Closing):
    """An iterator of text pieces; `stats` tells, at any time, what has happened so far.

    Close it (or leave its `with`) to end early; what was generated stays readable.

    Attributes:
        prompt_ids, token_ids: ids given and generated so far (the end-of-text token not counted).
        text: the text so far.
        stop_reason: "eos", "stop" (a stop string), "length" (max_tokens), "context" (full),
            "closed" (ended early), or "running".
    """

    def __init__(
        self,
        sequencer: Sequencer,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        *,
        max_tokens: int,
        sampling: SamplingParams,
        stop: Sequence[str],
        eos_token_ids: Sequence[int],
        logits_hash: bool,
        measure: Callable[[], Usage],
        release: Callable[[], None],
    ) -> None:
        self.prompt_ids = list(prompt_ids)
        self.token_ids: list[int] = []
        self.text = ""
        self.stop_reason = "running"
        self._sequencer = sequencer
        self._stream = tokenizer.stream()
        self._stop = StopMatcher(stop)
        self._sampler = Sampler(sampling)
        self._eos = frozenset(eos_token_ids)
        self._max_tokens = max_tokens
        self._hash = hashlib.sha256() if logits_hash else None
        self._measure = measure
        self._before = measure().traffic
        self._after: Usage | None = None
        self._release: Callable[[], None] | None = release
        self._prefill_s = self._decode_s = self._ttft_s = 0.0
        self._steps = 0
        self._started = time.perf_counter()
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """End the generation; twice is fine."""
        self._pieces.close()
        self._finish("closed")

    @property
    def logits_hash(self) -> str | None:
        """SHA-256 over the float32 little-endian logits of every position sampled from so far."""
        return None if self._hash is None else self._hash.hexdigest()

    @property
    def stats(self) -> Stats:
        """What this generation did so far."""
        used = self._after or self._measure()
        traffic = used.traffic - self._before
        tokens = len(self.prompt_ids) + len(self.token_ids)
        return Stats(
            prompt_tokens=len(self.prompt_ids),
            generated_tokens=len(self.token_ids),
            prefill_tok_s=len(self.prompt_ids) / self._prefill_s if self._prefill_s else 0.0,
            decode_tok_s=self._steps / self._decode_s if self._decode_s else 0.0,
            ttft_s=self._ttft_s,
            peak_rss_bytes=used.peak_rss_bytes,
            mem_budget_bytes=used.mem_budget_bytes,
            cache_bytes=used.cache_bytes,
            mean_bits=traffic.mean_bits,
            gate_weighted_bits=traffic.gate_weighted_bits,
            wished_mean_bits=traffic.wished_mean_bits,
            bytes_read=traffic.bytes_read,
            bytes_read_per_token=traffic.bytes_read / tokens,
            hit_rate=traffic.hit_rate,
            unhidden_wait_s=traffic.wait_s,
            evictions=traffic.evictions,
            stop_reason=self.stop_reason,
        )

    def _finish(self, reason: str) -> None:
        if self.stop_reason == "running":
            self.stop_reason = reason
        if self._release is not None:
            self._release()
            self._release = None
            self._after = self._measure()

    def _run(self) -> Generator[str, None, None]:
        try:
            yield from self._decode()
        finally:
            self._finish("closed")

    def _decode(self) -> Iterator[str]:
        logits = self._sequencer.prefill(self.prompt_ids)
        self._prefill_s = time.perf_counter() - self._started
        while True:
            if self._hash is not None:
                self._hash.update(np.ascontiguousarray(logits, "<f4").tobytes())
            token = self._sampler.sample(logits, self._recent())
            if not self.token_ids:
                self._ttft_s = time.perf_counter() - self._started
            if token in self._eos:
                yield from self._end("eos")
                return
            self.token_ids.append(token)
            piece = self._stop.push(self._stream.push(token))
            self.text += piece
            if piece:
                yield piece
            if self._stop.hit:
                self._finish("stop")
                return
            if len(self.token_ids) >= self._max_tokens:
                yield from self._end("length")
                return
            if self._sequencer.room < 1:
                yield from self._end("context")
                return
            before = time.perf_counter()
            logits = self._sequencer.step(token)
            self._decode_s += time.perf_counter() - before
            self._steps += 1

    def _recent(self) -> list[int]:
        """The last ids, prompt included, as many as the repeat penalty looks at."""
        return [*self.prompt_ids[-REPEAT_WINDOW:], *self.token_ids[-REPEAT_WINDOW:]]

    def _end(self, reason: str) -> Iterator[str]:
        """The last text, then the end."""
        rest = self._stop.push(self._stream.flush()) + self._stop.flush()
        self.text += rest
        self._finish(reason)
        if rest:
            yield rest
