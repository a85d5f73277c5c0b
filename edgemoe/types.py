"""Frozen dataclasses that cross room borders. Imports nothing of edgemoe but its errors."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .errors import UsageError, shown

F32: TypeAlias = NDArray[np.float32]
F64: TypeAlias = NDArray[np.float64]
I8: TypeAlias = NDArray[np.int8]
I32: TypeAlias = NDArray[np.int32]
I64: TypeAlias = NDArray[np.int64]
U8: TypeAlias = NDArray[np.uint8]
U64: TypeAlias = NDArray[np.uint64]

Pass: TypeAlias = Generator[tuple[int, F32, I32, F32], F32 | None, F32]
"""A forward pass that stops wherever it wants experts: yields the arguments of a call of them, goes
on with what they give, and returns what the last layer leaves."""

LEVELS = (2, 3, 4, 6, 8)
"""Bit-widths a store can be read at; each is a prefix of the next."""

READ_PRICE = 8.0
"""How many times as much a bit has to gain that is not in memory as one that is, unless told
otherwise (pipeline/bit_router.py)."""

POLICIES = ("worth", "lru", "lfu")
"""What decides which segments of experts stay in memory (loader/policies.py)."""

ORDERS = ("shortest", "hebf", "fifo")
"""In which order a layer's missing segments are read (hebf/loads.py)."""


@dataclass(frozen=True)
class ModelConfig:
    """Everything the forward pass needs to know of a model; names as in Hugging Face configs.

    `dense_layers` are the layers whose feed-forward part is one plain gated MLP of
    `intermediate_size`; all others are mixtures of `num_experts` experts, with, if
    `shared_expert_intermediate_size` is not 0, one more that every token takes, scaled by the
    sigmoid of its own gate. `full_attention_layers` see everything even where there is a
    `sliding_window`. `attention_multiplier` scales attention scores, None: head_dim ** -0.5.
    Biases: `attention_bias` on q, k, v and o, `qkv_bias` on q, k and v.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qk_norm: Literal["none", "head", "full"] = "none"
    attention_bias: bool = False
    qkv_bias: bool = False
    clip_qkv: float | None = None
    sliding_window: int | None = None
    full_attention_layers: tuple[int, ...] = ()
    intermediate_size: int = 0
    dense_layers: tuple[int, ...] = ()
    shared_expert_intermediate_size: int = 0
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    attention_multiplier: float | None = None
    logits_scaling: float = 1.0
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have experts, ascending."""
        return tuple(i for i in range(self.num_hidden_layers) if i not in self.dense_layers)

    @property
    def biases(self) -> tuple[str, ...]:
        """Which of the projections q, k, v, o have a bias."""
        if self.attention_bias:
            return ("q", "k", "v", "o")
        return ("q", "k", "v") if self.qkv_bias else ()


@dataclass(frozen=True)
class QuantSpec:
    """How the weights of a store are nested.

    levels: ascending bit-widths, the last is 8. group_size: input columns that share a step and a
    zero point (the last group of a row may be narrower). max_level: the highest level that experts
    hold; dense linears hold all.
    """

    levels: tuple[int, ...] = LEVELS
    group_size: int = 128
    max_level: int = LEVELS[-1]

    @property
    def expert_levels(self) -> tuple[int, ...]:
        """Levels that experts can be read at."""
        return tuple(level for level in self.levels if level <= self.max_level)


@dataclass(frozen=True)
class NestedScales:
    """What turns the codes of one matrix (or a run of its rows) into weights, at every level.

    A group's step is 2^(exponent - 127) * (1 + (step mod 16) / 16) * 2^(step div 16); with
    c = code >> (8 - b) and the shift of level b,

        w = step * (2^(8-b) * (c - (2^b - 1) / 2 + (shift - 8) / 16) + 127.5 - zero)

    exponent: uint8 [rows], 1 to 239. step, zero: uint8 [rows, groups]. shift: uint8 [levels, rows,
    groups], 0 to 15, at 8 bits 8.
    """

    exponent: U8
    step: U8
    zero: U8
    shift: U8


@dataclass(frozen=True)
class PlaneRef:
    """Where a segment lies in the store file: byte offset, byte size, CRC32C of those bytes."""

    offset: int
    size: int
    crc32c: int


@dataclass(frozen=True)
class Demands:
    """What one layer's batch wants: job j is one expert at one level, for some (token, slot) pairs.

    expert, level_index: int32 [jobs]. first_pair: int32 [jobs + 1]; job j serves
    pair[first_pair[j] : first_pair[j + 1]], int32 flat indices token * num_experts_per_tok + slot,
    ascending within a job.
    """

    expert: I32
    level_index: I32
    first_pair: I32
    pair: I32


@dataclass(frozen=True)
class Budget:
    """A memory ceiling and what is set aside under it, all in bytes.

    weights: of everything but experts. experts: all of them, or what they are streamed through.
    """

    ceiling: int
    process: int
    weights: int
    experts: int
    kv_cache: int
    scratch: int
    margin: int

    @property
    def needed(self) -> int:
        """Smallest ceiling under which the same run fits."""
        spent = self.process + self.weights + self.experts + self.kv_cache + self.scratch
        return spent + self.margin


@dataclass(frozen=True)
class RunPlan:
    """Settings of a run that follow from the model, the machine and the ceiling.

    bits: the level of all experts, the highest of them if there is a mean. streamed: experts are
    read as they are wanted; else all of them are kept. mean_bits: of demands, or None: all get the
    same.
    """

    bits: int
    dense_bits: int
    ctx_size: int
    prefill_chunk: int
    threads: int
    kv_type: str
    streamed: bool
    budget: Budget
    mean_bits: float | None = None


@dataclass(frozen=True)
class Streaming:
    """How experts are streamed where they do not all fit.

    policy: one of POLICIES. order: one of ORDERS. overlap: compute while reading; False: read what
    a layer needs, then compute it. look_ahead: read what the next layer will probably want, while
    such guesses prove right (pipeline/ahead.py). preload: fill memory with experts before anything
    is asked for (of levels that differ, the lowest). trace: a Chrome trace of the run to be written
    (pipeline/timeline.py), or None; also where all experts fit. profile: a .npy file of how often
    each expert was used, [layers with experts, experts]: EdgeMoE's choices instead
    (pipeline/edge_moe.py), for policy and levels.

    Raises:
        UsageError: an unknown policy or order.
    """

    policy: str = "worth"
    order: str = "shortest"
    overlap: bool = True
    look_ahead: bool = True
    preload: bool = False
    trace: Path | None = None
    profile: Path | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("policy", self.policy, POLICIES),
            ("order", self.order, ORDERS),
        ):
            if value not in known:
                raise UsageError(f"{name} must be one of {', '.join(known)}, not {shown(value)}")


@dataclass(frozen=True)
class Traffic:
    """Counters of the mixture part since a model was loaded; `b - a` is what came between.

    A demand is a (token, slot) pair. wanted_bytes counts, for each layer step, the segments of the
    experts it wants, each once; missed_bytes what had to be read for them, or was read early for
    steps to come, wanted or not.

    demands: how many. bits: sum over demands of the bits they were computed at; wished_bits: of
    those that they would have been computed at had all been in memory. gates, gated_bits: sums of
    gate weights, and of gate weight * bits. bytes_read: from the file. evictions: segments
    that went. wait_s: seconds in which nothing was computed because something was being read.
    """

    demands: int = 0
    bits: int = 0
    wished_bits: int = 0
    gates: float = 0.0
    gated_bits: float = 0.0
    wanted_bytes: int = 0
    missed_bytes: int = 0
    bytes_read: int = 0
    evictions: int = 0
    wait_s: float = 0.0

    def __sub__(self, earlier: Traffic) -> Traffic:
        names = [f.name for f in fields(self)]
        return Traffic(**{name: getattr(self, name) - getattr(earlier, name) for name in names})

    @property
    def mean_bits(self) -> float:
        """Bits used / demands; 0 without demands."""
        return self.bits / self.demands if self.demands else 0.0

    @property
    def wished_mean_bits(self) -> float:
        """The mean that there would have been, at the same prices, had all been in memory."""
        return self.wished_bits / self.demands if self.demands else 0.0

    @property
    def gate_weighted_bits(self) -> float:
        """Mean bits with each demand counting by its gate weight."""
        return self.gated_bits / self.gates if self.gates else 0.0

    @property
    def hit_rate(self) -> float:
        """Share of the wanted bytes that were there; 1 if nothing was wanted."""
        return 1 - self.missed_bytes / self.wanted_bytes if self.wanted_bytes else 1.0


@dataclass(frozen=True)
class Usage:
    """What a loaded model has used so far: bytes, and the traffic of its experts.

    peak_rss_bytes: of the process. mem_budget_bytes: the ceiling. cache_bytes: memory for experts,
    the arena's budget, or the size of them all where everything is resident.
    """

    peak_rss_bytes: int
    mem_budget_bytes: int
    cache_bytes: int
    traffic: Traffic


@dataclass(frozen=True)
class Stats:
    """What one generation did. Rates are tokens a second, times seconds, sizes bytes.

    mean_bits: bits used / demands (token, slot); gate_weighted_bits: the same by gate weight;
    wished_mean_bits: had nothing had to be read for it.
    bytes_read: from the store, and for each prompt or generated token. hit_rate: share of the bytes
    wanted that were in memory. unhidden_wait_s: in which nothing was computed because something was
    being read. evictions: segments that left memory. cache_bytes: memory for experts.
    """

    prompt_tokens: int
    generated_tokens: int
    prefill_tok_s: float
    decode_tok_s: float
    ttft_s: float
    peak_rss_bytes: int
    mem_budget_bytes: int
    cache_bytes: int
    mean_bits: float
    gate_weighted_bits: float
    wished_mean_bits: float
    bytes_read: int
    bytes_read_per_token: float
    hit_rate: float
    unhidden_wait_s: float
    evictions: int
    stop_reason: str
