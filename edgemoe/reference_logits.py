"""The reference side of an evaluation: a checkpoint run in float32, its distributions kept on disk.

Where all of the checkpoint fits in memory as float32 it is read once. Where it does not, batches of
windows go through one layer after the other: each matrix and each expert is read when its turn
comes, serves every window of the batch, and is dropped. Logits are the same bits either way.

Of every scored position the TOP likeliest tokens and the probability of all others together are
kept; the others enter the divergence as one. What that leaves out shows in `Summary.ref_rest`:
keeping 512 of 4,096 tokens lost 1.3 % of a mean divergence of 0.013 at a rest of 0.009, and 1,024
lost 0.5 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from . import kernels
from .arch import is_nested
from .checkpoint import Checkpoint
from .cpu_attn.kv_cache import OnePass
from .errors import MemoryBudgetError, UsageError
from .evaluate import LOGITS, SCORED, ReferenceRows, Window, rows_at_once, scratch_bytes
from .model import Experts, Span, hidden, logits
from .perfmodel import fit
from .reference_cache import ReferenceFile, ReferenceWriter, path_for, row_type
from .types import F32, I32, Budget, ModelConfig
from .weights import EXPERT_ROWS, FloatExperts, FloatSource, InMemory, RowBlocks, from_checkpoint

TOP = 4096

GROUP = 1024
"""Tokens of consecutive windows that are multiplied together, where a window is not longer: enough
for BLAS to be fast on the rows of one expert."""

_KEPT_GROUPS = 4
"""Groups of a batch where all weights are in memory: longer batches would gain nothing."""

Progress = Callable[[int, int], None]
"""Called with (work done, work in all), in tokens times layers."""


@dataclass(frozen=True)
class FloatPlan:
    """keep: hold all weights, or read them once for every batch of at most `batch` tokens."""

    keep: bool
    batch: int


def plan_float(
    checkpoint: Checkpoint, todo: Sequence[Window], threads: int, ceiling: int, used: int
) -> FloatPlan:
    """How to run a checkpoint in float32 under a ceiling on memory, `used` bytes of it in use.

    Raises:
        UsageError: a window is longer than the checkpoint's context.
        MemoryBudgetError: not even its largest matrix and one group of windows fit.
    """
    config = checkpoint.config
    longest = max(len(w.inputs) for w in todo)
    if longest > config.max_position_embeddings:
        raise UsageError(
            f"windows of {longest} tokens are longer than the reference's context of "
            f"{config.max_position_embeddings}: give a smaller --ctx"
        )
    sizes = {name: math.prod(checkpoint.shape(name)) for name in checkpoint.dense_names()}
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    nested = [n for name, n in sizes.items() if is_nested(name) and name != "embed"]
    head = sizes["embed" if config.tie_word_embeddings else "lm_head"]
    a_token = bytes_per_token(config)
    scratch = _scratch_bytes(config, threads)
    group = max(sum(len(todo[i].inputs) for i in g) for g in _groups(todo))
    total = sum(len(w.inputs) for w in todo)
    free = ceiling - used - fit.margin(ceiling)

    whole = 4 * (sum(sizes.values()) + len(config.moe_layers) * config.num_experts * expert)
    room = (free - whole - scratch) // a_token
    if room >= group:
        return FloatPlan(True, min(room, _KEPT_GROUPS * max(group, GROUP), total))
    # A reader may hold a matrix's raw bytes beside its float32 values.
    largest = 5 * max(*nested, head, expert)
    vectors = 4 * sum(n for name, n in sizes.items() if not is_nested(name))
    room = (free - vectors - largest - scratch) // a_token
    if room < group:
        parts = Budget(
            ceiling, used, vectors + largest, 0, group * a_token, scratch, fit.margin(ceiling)
        )
        needed = fit.smallest_ceiling(parts)
        raise MemoryBudgetError(
            f"--mem of {ceiling >> 20} MiB is too little to run the reference in float32, even "
            f"layer by layer: give --mem {-(-needed >> 20)}M or more",
            needed_bytes=needed,
            budget_bytes=ceiling,
        )
    return FloatPlan(False, min(room, total))


def float_logits(
    checkpoint: Checkpoint,
    todo: Sequence[Window],
    plan: FloatPlan,
    threads: int,
    progress: Progress | None = None,
) -> Iterator[tuple[int, int, F32]]:
    """Logits of every scored row: (window, first scored row, float32 [n, vocab]), in order."""
    config = checkpoint.config
    source: FloatSource = InMemory(checkpoint) if plan.keep else checkpoint
    pool = kernels.new_pool(threads)
    step = rows_at_once(config.vocab_size, LOGITS)
    total, done = sum(len(w.inputs) for w in todo), 0
    with ExitStack() as stack:
        workers = stack.enter_context(ThreadPoolExecutor(threads)) if threads > 1 else None
        for batch in _batches(todo, plan.batch):
            members = [i for group in batch for i in group]
            counts = [len(todo[i].inputs) for i in members]
            sizes = [sum(len(todo[i].inputs) for i in group) for group in batch]
            # The weights of a batch are objects of their own: with them goes the head they hold.
            blocks = RowBlocks(sizes, workers)
            weights = from_checkpoint(source, blocks)
            experts = _reporting(FloatExperts(source, blocks), config, done, total, progress)
            tokens = np.concatenate([todo[i].inputs for i in members])
            spans = [Span(OnePass(config), n) for n in counts]
            x, start = hidden(weights, experts, pool, tokens, spans), 0
            for i, n in zip(members, counts, strict=True):
                for first in range(todo[i].first, n, step):
                    rows = x[start + first : start + min(first + step, n)]
                    yield i, first - todo[i].first, logits(weights, pool, rows)
                start += n
            done += start


def reference(
    checkpoint: Checkpoint,
    todo: Sequence[Window],
    *,
    threads: int,
    ceiling: int,
    used: int,
    top: int = TOP,
    progress: Progress | None = None,
) -> ReferenceFile:
    """The reference's distributions for every window; from the cache where they are there.

    Args:
        threads: that compute. ceiling: bytes of memory all may take, of which `used` are in use.
        top: tokens kept one by one of each row's distribution.

    Raises:
        UsageError, MemoryBudgetError: as `plan_float`.
        CheckpointError: a weight cannot be read. OutputError: the cache cannot be written.
    """
    path = path_for(checkpoint, todo, top)
    row = row_type(checkpoint.config.vocab_size, top)
    counts = [len(w.targets) for w in todo]
    known = ReferenceFile.open(path, row, counts)
    if known is not None:
        return known
    plan = plan_float(checkpoint, todo, threads, ceiling, used)
    scored = rows_at_once(checkpoint.config.vocab_size, SCORED)
    with ReferenceWriter(path, row) as out:
        for i, at, block in float_logits(checkpoint, todo, plan, threads, progress):
            targets = todo[i].targets[at : at + len(block)]
            for first in range(0, len(block), scored):
                part = slice(first, first + scored)
                out.add(ReferenceRows.of(block[part], targets[part], top))
    made = ReferenceFile.open(path, row, counts)
    if made is None:
        raise UsageError(f"{path} was removed while it was used: start again")
    return made


def _groups(todo: Sequence[Window]) -> list[list[int]]:
    """Indices of consecutive windows, at most GROUP tokens together, or one that is longer.

    They depend on the windows alone, so that memory has no say in what is multiplied together.
    """
    out: list[list[int]] = []
    held = GROUP
    for i, window in enumerate(todo):
        n = len(window.inputs)
        if held + n > GROUP:
            out.append([])
            held = 0
        out[-1].append(i)
        held += n
    return out


def _batches(todo: Sequence[Window], most: int) -> Iterator[list[list[int]]]:
    """Consecutive groups, at most `most` tokens together."""
    batch: list[list[int]] = []
    held = 0
    for group in _groups(todo):
        n = sum(len(todo[i].inputs) for i in group)
        if batch and held + n > most:
            yield batch
            batch, held = [], 0
        batch.append(group)
        held += n
    if batch:
        yield batch


def bytes_per_token(config: ModelConfig) -> int:
    """Bytes of the float32 arrays that `model.hidden` holds at once for a token, at most."""
    heads = 3 * config.num_attention_heads + 4 * config.num_key_value_heads
    inter = config.intermediate_size if config.dense_layers else 0
    width = (
        4 * config.hidden_size
        + heads * config.head_dim
        + 3 * max(inter, config.shared_expert_intermediate_size)
        + config.num_experts
        + 4 * config.num_experts_per_tok
    )
    return 4 * width


def _scratch_bytes(config: ModelConfig, threads: int) -> int:
    """Bytes of what does not grow with the batch: logits, an expert's rows, BLAS's own buffers."""
    rows = EXPERT_ROWS * (16 * config.hidden_size + 48 * config.moe_intermediate_size)
    return scratch_bytes(config.vocab_size) + threads * (rows + (8 << 20))


def _reporting(
    experts: Experts, config: ModelConfig, before: int, total: int, progress: Progress | None
) -> Experts:
    """The same experts, which tell after each layer how much of the work is done."""
    if progress is None:
        return experts
    layers = config.num_hidden_layers

    def run(layer: int, x: F32, ids: I32, weights: F32) -> F32:
        y = experts(layer, x, ids, weights)
        progress(before * layers + (layer + 1) * len(x), total * layers)
        return y

    return run
