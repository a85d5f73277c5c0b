"""D2MoE's quantization beside a store's, both decoded and run in float32."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from edgemoe.checkpoint import Checkpoint
from edgemoe.store import Store
from edgemoe.terminal.evaluate_output import progress
from edgemoe.types import F32

from . import d2moe, hessians, levels, scores
from .float_scores import float_scores
from .quantizers import Experts, Place, of_store, quantize
from .scored_text import ScoredText, tokenizer_of
from .work import Work, identity, say


def calibrate(
    checkpoint: Checkpoint, source: Path, size: int, ctx: int, work: Work
) -> hessians.Hessians:
    """Hessians of all experts' inputs from the first `size` bytes of a text, in windows of ctx."""

    def make(out: Path) -> None:
        text = hessians.read_calibration(source, size)
        ids = tokenizer_of(checkpoint).encode(text, add_special=False)
        with progress("calibration") as report:
            found = hessians.collect(checkpoint, ids, ctx, report)
        idle = int((found.counts == 0).sum())
        say(f"calibrated on {len(ids)} tokens; {idle} experts served none")
        found.save(out)

    files = [identity(f) for f in checkpoint.fingerprint_files()]
    key = {"checkpoint": files, "source": identity(source), "size": size, "ctx": ctx}
    return hessians.Hessians.load(work.product(f"hessians-{size}.npz", key, make).path)


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

    def quantizer(place: Place, w: F32, wanted: tuple[int, ...]) -> dict[int, F32]:
        return dict(d2moe.quantize(w, known.of(place), wanted, damp=damp))

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
            made = quantize(checkpoint, quantizer, variant.levels, report)
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


def variant_bits(checkpoint: Checkpoint, variant: d2moe.Variant, level: int) -> float:
    """Bits a weight of an expert at a level, the scales of all groups counted, narrow ones too."""
    width, middle = checkpoint.config.hidden_size, checkpoint.config.moe_intermediate_size
    groups = 2 * middle * -(-width // d2moe.GROUP) + width * -(-middle // d2moe.GROUP)
    return variant.bits(level, 3 * width * middle / groups)
