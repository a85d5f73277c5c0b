"""What a benchmark says, and how it follows from the rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..types import Streaming, Traffic
from .timing import Spread, Timing
from .traffic import Products, TokenBytes


@dataclass(frozen=True)
class Reading:
    """What a part of a round read of experts that were not in memory.

    hit_rate: share of the bytes wanted that were. unhidden_wait_s: seconds in which nothing was
    computed because something was being read. mean_bits: that experts were computed at.
    """

    bytes_read: int
    hit_rate: float
    unhidden_wait_s: float
    mean_bits: float

    @classmethod
    def of(cls, traffic: Traffic) -> Reading:
        """Of that part's counters."""
        return cls(traffic.bytes_read, traffic.hit_rate, traffic.wait_s, traffic.mean_bits)


@dataclass(frozen=True)
class Round:
    """What was measured in one round.

    prefill, decode: what was read in these parts of our own turn.
    stream_bytes_s: bytes a second of reading memory, around decoding; 0 without it. int8_peak:
    integer multiply-adds a second, around the prefill; 0 without it. theirs: llama.cpp's timings
    by the way it keeps weights. others_cpus: CPUs' worth of time that other programs took.
    """

    ours: Timing
    prefill: Reading
    decode: Reading
    stream_bytes_s: float
    int8_peak: float
    theirs: dict[str, Timing]
    others_cpus: float


@dataclass(frozen=True)
class Prefill:
    """Tokens a second, 10^9 integer multiply-adds a second, the peak of those, and its share."""

    tok_s: Spread
    gmac_s: Spread
    int8_peak_gmac_s: Spread
    share: Spread


@dataclass(frozen=True)
class Decode:
    """Tokens a second, 10^9 bytes of weights a second, those of plain reading, and its share."""

    tok_s: Spread
    gb_s: Spread
    stream_gb_s: Spread
    share: Spread


@dataclass(frozen=True)
class ReadSettings:
    """How experts were to be read, as it was asked for; see `engine.load`."""

    exact: bool
    io_limit: float | None
    policy: str
    order: str
    overlap: bool

    @classmethod
    def of(cls, exact: bool, io_limit: float | None, streaming: Streaming) -> ReadSettings:
        """From the arguments of `engine.load`."""
        return cls(exact, io_limit, streaming.policy, streaming.order, streaming.overlap)


@dataclass(frozen=True)
class Machine:
    """Where it ran."""

    cpu: str
    backend: str
    isa: str
    threads: int


@dataclass(frozen=True)
class Memory:
    """Bytes: of weights resident; of those, of experts; of the process at its peak before the
    memory's own measurement; and the ceiling."""

    weights_bytes: int
    cache_bytes: int
    peak_rss_bytes: int
    mem_budget_bytes: int


@dataclass(frozen=True)
class Theirs:
    """llama.cpp with weights kept in one way; its memory counts the pages of the mapped file."""

    prefill_tok_s: Spread | None
    decode_tok_s: Spread | None
    peak_rss_bytes: int


@dataclass(frozen=True)
class Ratio:
    """Our rate over llama.cpp's, round by round, against its faster way of keeping weights."""

    against: str
    ratio: Spread


@dataclass(frozen=True)
class LlamaCppBench:
    """The other side. bytes_per_token: of weights read in decoding; None: not known."""

    gguf: str
    version: str
    file_bytes: int
    bytes_per_token: int | None
    runs: dict[str, Theirs]
    prefill: Ratio | None
    decode: Ratio | None


@dataclass(frozen=True)
class Bench:
    """A benchmark. mean_bits: that were asked for, None: all experts have `bits`. tokens: where
    they come from. prefill, decode: None where it was left out. others_cpus: CPUs' worth of time
    that other programs took; where threads wait for one another, one that has to share its CPU
    holds up all, and rates say little.
    """

    model: str
    machine: Machine
    bits: int
    mean_bits: float | None
    dense_bits: int
    kv_type: str
    read_settings: ReadSettings
    prompt_tokens: int
    generated_tokens: int
    tokens: str
    prefill: Prefill | None
    decode: Decode | None
    bytes_per_token: TokenBytes
    products_per_token: Products
    memory: Memory
    llama_cpp: LlamaCppBench | None
    others_cpus: Spread
    rounds: tuple[Round, ...]

    def as_dict(self) -> dict[str, Any]:
        """All of it, JSON-ready; seconds, bytes and tokens."""
        out = asdict(self)
        out["bytes_per_token"]["total"] = self.bytes_per_token.total
        return out


def prefilling(rounds: Sequence[Round], tokens: int, products: int) -> Prefill:
    """Of rounds that prefill so many tokens with so many multiply-adds."""
    return Prefill(
        Spread.of([tokens / r.ours.prefill_s for r in rounds]),
        Spread.of([products / r.ours.prefill_s / 1e9 for r in rounds]),
        Spread.of([r.int8_peak / 1e9 for r in rounds]),
        Spread.of([products / r.ours.prefill_s / r.int8_peak for r in rounds]),
    )


def decoding(rounds: Sequence[Round], tokens: int, bytes_per_token: int) -> Decode:
    """Of rounds that decode so many tokens."""
    read = tokens * bytes_per_token
    return Decode(
        Spread.of([tokens / r.ours.decode_s for r in rounds]),
        Spread.of([read / r.ours.decode_s / 1e9 for r in rounds]),
        Spread.of([r.stream_bytes_s / 1e9 for r in rounds]),
        Spread.of([read / r.ours.decode_s / r.stream_bytes_s for r in rounds]),
    )


def rates(
    rounds: Sequence[Round], name: str, tokens: int, seconds: Callable[[Timing], float]
) -> Spread | None:
    """Tokens a second of llama.cpp keeping weights in one way; None without tokens."""
    return Spread.of([tokens / seconds(r.theirs[name]) for r in rounds]) if tokens else None


def versus(
    rounds: Sequence[Round], tokens: int, seconds: Callable[[Timing], float]
) -> Ratio | None:
    """Our rate over that of llama.cpp's faster way, by the medians; None without tokens."""
    if not tokens:
        return None
    names = rounds[0].theirs
    best = min(names, key=lambda n: Spread.of([seconds(r.theirs[n]) for r in rounds]).median)
    return Ratio(best, Spread.of([seconds(r.theirs[best]) / seconds(r.ours) for r in rounds]))
