"""Levels that differ by token and expert (--mean-bits), beside one level for all and an oracle.

The oracle is the same router with other gains: instead of the expert's mean sensitivity it is told
the squared error of this very output, at each level against the store's highest, over the mean
square of the residual stream that the output is added to. Beyond what it sees it knows nothing: not
what an error does to later layers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgemoe import kernels
from edgemoe.checkpoint import Checkpoint
from edgemoe.cpu_attn.kv_cache import KVCache
from edgemoe.engine import load
from edgemoe.errors import UsageError, shown
from edgemoe.evaluate import TokenScores, compare, score_windows, scratch_bytes
from edgemoe.kernels.mixture import part_of
from edgemoe.pipeline import aim, bit_router, mean_bits
from edgemoe.pipeline.bit_router import BitRouter, Grant, slopes
from edgemoe.pipeline.mean_bits import MeanBits
from edgemoe.pipeline.serial import SerialExperts
from edgemoe.reference_cache import ReferenceFile
from edgemoe.reference_logits import TOP
from edgemoe.store import Store
from edgemoe.terminal.evaluate_output import progress
from edgemoe.types import F32, F64, I32, I64
from edgemoe.window_logits import window_logits

from . import levels, scores
from .levels import DENSE_BITS
from .scored_text import ScoredText
from .work import Work, identity, say

WAYS = ("untrained", "oracle")


class TrueGains:
    """The oracle's: of this token's output, not of the expert's on average.

    experts: all resident. `watch` has to be shown the residual stream of each layer before.
    """

    def __init__(self, pool: kernels.Pool, experts: SerialExperts, bits: Sequence[int]) -> None:
        self._pool, self._experts, self._bits = pool, experts, np.asarray(bits, np.float64)
        self._power: F64 = np.ones(1)

    def watch(self, layer: int, x: F32) -> None:
        """The residual stream float32 [n, hidden] that a layer's experts are added to."""
        self._power = np.square(x, dtype=np.float64).mean(axis=1)

    def __call__(self, layer: int, x: F32, ids: I32, gates: F32) -> F32:
        outputs = [self._outputs(layer, x, ids, level) for level in range(len(self._bits))]
        error = np.stack([np.square(o - outputs[-1]).mean(axis=-1) for o in outputs], axis=-1)
        share = np.square(gates, dtype=np.float64) / self._power[:, None]
        return slopes(error * share[..., None], self._bits).astype(np.float32)

    def _outputs(self, layer: int, x: F32, ids: I32, level: int) -> F64:
        """What each expert gives its token: [n, k, hidden]."""
        mixture = self._experts._mixtures[layer]
        out = np.empty((ids.size, x.shape[1]), np.float32)
        position = np.empty(ids.shape, np.int32)
        jobs = range(mixture.segments.size)
        at_level = np.full(ids.shape, level, np.int32)
        whole = x, ids, at_level, jobs, 0, position, out
        if part_of(self._pool, mixture.layout, mixture.segments, *whole) != ids.size:
            raise UsageError(f"layer {layer} has experts that are not all in memory")
        return out[position].astype(np.float64)


class Recorded:
    """A router, and how often each rank of gates got each level: int64 [k, levels]."""

    early_depth = 1

    def __init__(self, router: BitRouter, depth: int, slots: int) -> None:
        self._router = router
        self.counts: I64 = np.zeros((slots, depth), np.int64)

    def __call__(
        self,
        layer: int,
        x: F32,
        ids: I32,
        gates: F32,
        held: Sequence[int] | None,
        means: Sequence[float] | None = None,
    ) -> Grant:
        grant = self._router(layer, x, ids, gates, held, means)
        rank = np.argsort(np.argsort(-gates, axis=1, kind="stable"), axis=1)
        np.add.at(self.counts, (rank.ravel(), grant.levels.ravel()), 1)
        return grant


def measure(
    checkpoint: Checkpoint, store: Path, text: ScoredText, work: Work, means: Sequence[float]
) -> dict[str, Any]:
    """Divergences at each mean, uniform levels, and the histogram of bits by gate rank; JSON-ready.

    Raises:
        UsageError: the store is another model's, or its experts do not all fit in memory.
    """
    uniform = levels.measure(checkpoint, store, text, work)
    with Store.open(store) as opened:
        bits = opened.quant.expert_levels
    methods = b"".join(Path(str(m.__file__)).read_bytes() for m in (aim, bit_router, mean_bits))
    digest = hashlib.sha256(methods + Path(__file__).read_bytes()).hexdigest()
    curve = np.log([row["kld"] for row in uniform])
    found = []
    for mean in means:
        row: dict[str, Any] = {"mean_bits": mean}
        row["uniform"] = float(np.exp(np.interp(mean, [r["level"] for r in uniform], curve)))
        kept = {}
        for way in WAYS:
            key = {"store": identity(store), "text": text.digest, "method": digest}
            key |= {"mean": mean, "way": way, "isa": kernels.isa()}

            name = f"means-{store.stem}-{way}-{mean:g}-{text.name}"
            by_gate = work.directory / f"{name}-by-gate.npy"

            def make(
                path: Path, way: str = way, mean: float = mean, by_gate: Path = by_gate
            ) -> None:
                with scores.references(checkpoint, text) as known:
                    given, counts = _scores(store, way, mean, text, known)
                np.save(by_gate, counts)
                scores.save(path, given, text)

            kept[way] = scores.load(work.product(f"{name}.npz", key, make).path)
            row[way] = scores.figures(kept[way].windows, text)
            row[way]["counts"] = np.load(by_gate).tolist()
        row["of_oracle"] = (row["uniform"] - row["untrained"]["kld"]) / (
            row["uniform"] - row["oracle"]["kld"]
        )
        row["against_oracle"] = compare(kept["untrained"].kld, kept["oracle"].kld).ratio
        row["of_uniform"] = row["untrained"]["kld"] / row["uniform"]
        found.append(row)
        say(f"mean {mean:g}: KLD {row['untrained']['kld']:.6f}, oracle {row['oracle']['kld']:.6f}")
    return {"bits": list(bits), "levels": uniform, "means": found}


def _scores(
    store: Path, way: str, mean: float, text: ScoredText, known: ReferenceFile
) -> tuple[list[TokenScores], I64]:
    longest = max(len(w.inputs) for w in text.windows)
    with Store.open(store) as opened:
        config, bits = opened.config, opened.quant.expert_levels
    reserve = scratch_bytes(config.vocab_size, min(TOP, config.vocab_size))
    settings: Mapping[str, Any] = {"ctx_size": longest, "reserve": reserve}
    with load(store, mean_bits=mean, dense_bits=DENSE_BITS, **settings) as model:
        experts, slots = model._experts, config.num_experts_per_tok
        if not isinstance(experts, SerialExperts):
            raise UsageError(f"{shown(store)}: its experts do not all fit in memory")
        oracle, router, watch = TrueGains(model._pool, experts, bits), experts.router, None
        if way == "oracle":
            router = MeanBits(oracle, bits, mean, 1.0, len(config.moe_layers) * slots)
            watch = oracle.watch
        recorded = Recorded(router, len(bits), slots)
        model.route_with(recorded)
        # As levels.py: keys and values in float32, as the reference has them.
        run = window_logits(model, KVCache(config, model.plan.ctx_size, "f32"), watch)
        with progress(f"mean {mean:g}, {way}") as report:
            return score_windows(run, text.windows, known, report), recorded.counts
