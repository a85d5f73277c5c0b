"""Frozen dataclasses that cross room borders. Imports nothing of edgemoe but its errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

F32: TypeAlias = NDArray[np.float32]
F64: TypeAlias = NDArray[np.float64]
I8: TypeAlias = NDArray[np.int8]
I32: TypeAlias = NDArray[np.int32]
I64: TypeAlias = NDArray[np.int64]
U8: TypeAlias = NDArray[np.uint8]
U64: TypeAlias = NDArray[np.uint64]

LEVELS = (2, 3, 4, 6, 8)
"""Bit-widths a store can be read at; each is a prefix of the next."""


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

    streamed: experts are read as they are wanted; else all of them are kept.
    """

    bits: int
    dense_bits: int
    ctx_size: int
    prefill_chunk: int
    threads: int
    kv_type: str
    streamed: bool
    budget: Budget


@dataclass(frozen=True)
class Streaming:
    """How experts are streamed where they do not all fit.

    policy: what goes when room is needed: "worth", edgemoe's own, or "lru" or "lfu", what others
    do. order: of a layer's reads: "shortest" (the layer is done soonest), "hebf" (D2MoE's) or
    "fifo". overlap: compute while reading; else first one, then the other.
    """

    policy: str = "worth"
    order: str = "shortest"
    overlap: bool = True


@dataclass(frozen=True)
class Stats:
    """What one generation did. Rates are tokens a second, times seconds, sizes bytes."""

    prompt_tokens: int
    generated_tokens: int
    prefill_tok_s: float
    decode_tok_s: float
    ttft_s: float
    peak_rss_bytes: int
    mem_budget_bytes: int
    mean_bits: float
    stop_reason: str
