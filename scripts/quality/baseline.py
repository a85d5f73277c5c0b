"""D2MoE's quantization beside a store's, both decoded and run in float32."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgemoe.checkpoint import Checkpoint
from edgemoe.store import Store
from edgemoe.terminal.evaluate_output import progress
from edgemoe.types import F32

from . import d2moe, hessians, levels, scores
from .experts import Experts, Place, of_store, places
from .float_scores import float_scores
from .scored_text import ScoredText, tokenizer_of
from .stores import CalibrationText
from .work import Work, identity, say


def calibrate(
    checkpoint: Checkpoint, source: CalibrationText, ctx: int, work: Work
) -> hessians.Hessians:
    """Hessians of all experts' inputs from a text, in windows of ctx."""

    def make(out: Path) -> None:
        ids = tokenizer_of(checkpoint).encode(source.read(), add_special=False)
        found = hessians.collect(checkpoint, ids, ctx)
        idle = int((found.counts == 0).sum())
        say(f"calibrated on {len(ids)} tokens; {idle} experts served none")
        found.save(out)

    files = [identity(f) for f in checkpoint.fingerprint_files()]
    key = {"checkpoint": files, "ctx": ctx} | source.key()
    return hessians.Hessians.load(work.product("hessians.npz", key, make).path)


def measure(
    checkpoint: Checkpoint,
    store: Path,
    known: hessians.Hessians,
    text: ScoredText,
    work: Work,
    damp: float,
) -> dict[str, list[dict[str, Any]]]:
    """{"d2moe": figures of each level of V1 and V2, "store": of each level}; JSON-ready.

    All but the experts is the checkpoint's, activations are float32: only the experts' weights
    differ. Scores are kept under d2moe-*.npz and decoded-*.npz, for `ratio`.
    """
    out: dict[str, list[dict[str, Any]]] = {"d2moe": [], "store": []}

    def one(name: str, experts: Experts, what: dict[str, Any]) -> dict[str, Any]:
        with scores.references(checkpoint, text) as reference:
            found = float_scores(checkpoint, experts, text, reference, name)
        scores.save(work.directory / f"{name}-{text.name}.npz", found, text)
        figures = what | scores.figures(found, text)
        say(f"{name}: {figures['bits']:.3f} bits, KLD {figures['kld']:.6f}")
        return figures

    for variant in (d2moe.V1, d2moe.V2):
        start = time.monotonic()
        with progress(f"D2MoE {variant.name}") as report:
            made = _quantized(checkpoint, known, variant, damp, report)
        say(f"D2MoE {variant.name}: quantized in {time.monotonic() - start:.1f} s")
        for level in variant.levels:
            bits = variant_bits(checkpoint, variant, level)
            what = {"variant": variant.name, "level": level, "bits": bits}
            out["d2moe"].append(one(f"d2moe-{variant.name}-{level}", made.pop(level), what))
    with Store.open(store) as opened:
        bits_of = levels.expert_bits(opened)
    for level, bits in bits_of.items():
        experts = of_store(checkpoint, store, level)
        out["store"].append(
            one(f"decoded-{store.stem}-{level}", experts, {"level": level, "bits": bits})
        )
    return out


def _quantized(
    checkpoint: Checkpoint,
    known: hessians.Hessians,
    variant: d2moe.Variant,
    damp: float,
    report: Callable[[int, int], None],
) -> dict[int, Experts]:
    """Every expert at every level, float32 in memory: 4 bytes a weight and level."""
    out: dict[int, dict[Place, F32]] = {level: {} for level in variant.levels}
    todo = places(checkpoint)
    for i, place in enumerate(todo):
        w = checkpoint.expert_matrix(place.layer, place.expert, place.part)
        found = d2moe.quantize(w, known.of(place), variant.levels, damp=damp)
        for level, decoded in found.items():
            out[level][place] = decoded
        report(i + 1, len(todo))
    return dict(out)


def variant_bits(checkpoint: Checkpoint, variant: d2moe.Variant, level: int) -> float:
    """Bits a weight of an expert at a level, the scales of all groups counted, narrow ones too."""
    width, middle = checkpoint.config.hidden_size, checkpoint.config.moe_intermediate_size
    groups = 2 * middle * -(-width // d2moe.GROUP) + width * -(-middle // d2moe.GROUP)
    return variant.bits(level, 3 * width * middle / groups)
