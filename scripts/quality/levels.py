"""Our side: every level of a store as the engine runs it, against its checkpoint in float32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgemoe import kernels
from edgemoe.checkpoint import Checkpoint
from edgemoe.cpu_attn.kv_cache import KVCache
from edgemoe.engine import load
from edgemoe.errors import UsageError, shown
from edgemoe.evaluate import TokenScores, score_windows, scratch_bytes
from edgemoe.reference_cache import ReferenceFile
from edgemoe.reference_logits import TOP
from edgemoe.store import Store
from edgemoe.terminal.evaluate_output import progress
from edgemoe.window_logits import window_logits

from . import scores
from .scored_text import ScoredText
from .work import Work, identity, say

DENSE_BITS = 8


def measure(
    checkpoint: Checkpoint, store: Path, text: ScoredText, work: Work, wanted: Sequence[int] = ()
) -> list[dict[str, Any]]:
    """Bits, divergence, change of perplexity and same-top share of each level; JSON-ready.

    bits are those of an expert's prefix on disk, scales and padding included. Dense weights are
    read at 8 bits, activations are the engine's int8, keys and values float32.

    Raises:
        UsageError: the store lacks a wanted level (none: all it has), or is another model's.
    """
    with Store.open(store) as opened:
        bits = expert_bits(opened)
        if opened.config != checkpoint.config:
            raise UsageError(f"{shown(store)} was not made of {shown(checkpoint.path)}")
    missing = set(wanted) - set(bits)
    if missing:
        raise UsageError(f"{shown(store)} has no level {min(missing)}; it has {sorted(bits)}")
    out = []
    for level in wanted or bits:
        # made only when some level has still to be scored
        key = {"store": identity(store), "text": text.digest, "level": level, "isa": kernels.isa()}

        def make(path: Path, level: int = level) -> None:
            with scores.references(checkpoint, text) as known:
                found = _scores(store, level, text, known)
            scores.save(path, found, text)

        name = f"levels-{store.stem}-{level}-{text.name}.npz"
        saved = scores.load(work.product(name, key, make).path)
        found = scores.figures(saved.windows, text)
        out.append({"level": level, "bits": bits[level]} | found)
        say(f"level {level}: {bits[level]:.3f} bits, KLD {found['kld']:.6f}")
    return out


def expert_bits(store: Store) -> dict[int, float]:
    """Bits a weight of the read that brings an expert to each level it has."""
    layouts = [store.expert_layout(layer) for layer in store.config.moe_layers]
    weights = sum(layout.weights() for layout in layouts)
    return {
        level: 8 * sum(layout.prefix_bytes(i) for layout in layouts) / weights
        for i, level in enumerate(store.quant.expert_levels)
    }


def _scores(store: Path, level: int, text: ScoredText, known: ReferenceFile) -> list[TokenScores]:
    longest = max(len(w.inputs) for w in text.windows)
    with Store.open(store) as opened:
        vocab = opened.config.vocab_size
    reserve = scratch_bytes(vocab, min(TOP, vocab))
    with (
        load(store, bits=level, dense_bits=DENSE_BITS, ctx_size=longest, reserve=reserve) as model,
        progress(f"level {level}") as report,
    ):
        # llama.cpp's float16 cache is on both sides of its divergences; here it is on neither
        run = window_logits(model, KVCache(model.config, model.plan.ctx_size, "f32"))
        return score_windows(run, text.windows, known, report)
