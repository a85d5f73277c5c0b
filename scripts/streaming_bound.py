"""The bound of a streamed run, from traces, and what rounds of measuring add up to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from edgemoe.bench.timing import Spread
from edgemoe.errors import EdgeMoEError
from edgemoe.types import F64


class Passes(NamedTuple):
    """What a trace tells of each forward pass: float64 [passes, layers that have experts], and of
    the head [passes]. Seconds computed, and bytes that a layer step had to read."""

    dense: F64
    experts: F64
    missed: F64
    head: F64


class Compute(NamedTuple):
    """Seconds that a pass computes where all is resident: float64 [layers], and of the head."""

    dense: F64
    experts: F64
    head: float


def passes_of(events: Iterable[Mapping[str, Any]]) -> Passes:
    """Of the events of a Chrome trace (pipeline/timeline.py) of one sequence, in microseconds.

    A pass ends with its head. A read is a miss where it begins in the step of its layer, which ends
    with the layer's experts: one that begins elsewhere was not asked for by a step.
    """
    spans = [e for e in events if e["ph"] == "X"]
    heads = sorted((e for e in spans if e["name"] == "head"), key=lambda e: e["ts"])
    ends = np.array([e["ts"] + e["dur"] for e in heads])
    known = sorted({e["args"]["layer"] for e in spans if e["name"] == "experts"})
    if not heads or not known:
        raise EdgeMoEError("the trace has no pass with experts: is it of `edgemoe run --trace`?")
    column = {layer: i for i, layer in enumerate(known)}
    dense, experts, missed, first, last = np.zeros((5, len(heads), len(known)))
    reads = []
    for e in spans:
        at = (
            int(np.searchsorted(ends, e["ts"], side="right")),
            column.get(e.get("args", {}).get("layer"), -1),
        )
        if at[0] == len(heads) or at[1] < 0:
            continue
        if e["name"] == "read":
            reads.append((*at, e["ts"], e["args"]["bytes"]))
        elif e["name"] == "dense":
            dense[at] += e["dur"] / 1e6
            first[at] = e["ts"] + e["dur"]
        elif e["name"] == "experts":
            experts[at] += e["dur"] / 1e6
            last[at] = max(last[at], e["ts"] + e["dur"])
    for row, col, ts, size in reads:
        if first[row, col] <= ts <= last[row, col]:
            missed[row, col] += size
    return Passes(dense, experts, missed, np.array([e["dur"] for e in heads]) / 1e6)


def decoding(passes: Passes) -> Compute:
    """Medians over tokens; the first, the prompt, is left out."""
    dense, experts = (np.median(part[1:], axis=0) for part in passes[:2])
    return Compute(dense, experts, float(np.median(passes.head[1:])))


def prefilling(passes: Passes) -> Compute:
    """Sums over chunks."""
    return Compute(passes.dense.sum(0), passes.experts.sum(0), float(passes.head.sum()))


def bound(missed: F64, bandwidth: float, compute: Compute) -> F64:
    """Seconds of each pass, float64 [passes], that no order of its reads can go below.

    missed: bytes [passes, layers]. bandwidth: bytes a second. compute: of one pass.
    """
    layers = compute.dense + np.maximum(missed / bandwidth, compute.experts)
    out: F64 = layers.sum(axis=1) + compute.head
    return out


def same(what: str, values: Iterable[object]) -> None:
    """Raise EdgeMoEError unless all are equal."""
    if len(set(values)) > 1:
        raise EdgeMoEError(f"{what} differ from run to run: nothing measured here can be compared")


def spread(values: Iterable[float]) -> dict[str, float]:
    """p10, median and p90."""
    return asdict(Spread.of(list(values)))


def cap_summary(rounds: Sequence[Mapping[str, Any]], missed: F64) -> dict[str, Any]:
    """Figures of a cap: spreads of what is per round, the worst of what must not happen.

    rounds: of each the `run` of this cap, `llama` (tokens a second by setting), `bandwidth` and
    `compute`, None where it was not measured. missed: bytes [tokens, layers] of a traced run, the
    prompt first.
    """
    runs = [r["run"] for r in rounds]
    out: dict[str, Any] = {"tok_s": spread(r["decode_tok_s"] for r in runs)}
    if rounds[0]["llama"]:
        out["of_llama"] = spread(
            r["run"]["decode_tok_s"] / max(r["llama"].values()) for r in rounds
        )
    for name in ("bytes_read_per_token", "hit_rate", "unhidden_wait_s"):
        out[name] = float(np.median([r[name] for r in runs]))
    if all(r["compute"] for r in rounds):
        bounds = [float(bound(missed[1:], r["bandwidth"], r["compute"]).mean()) for r in rounds]
        out["bound_s"] = spread(bounds)
        out["time_of_bound"] = spread(
            1 / r["decode_tok_s"] / b for r, b in zip(runs, bounds, strict=True)
        )
    out["peak_rss_bytes"] = max(r["peak_rss_bytes"] for r in runs)
    out["traced_of_read"] = float(missed.sum()) / max(runs[0]["bytes_read"], 1)
    if all("kills" in r for r in runs):
        out["kills"] = sum(r["kills"] for r in runs)
        out["cgroup_peak_mib"] = max(r["peak_mib"] for r in runs)
    return out


def pair_summary(
    rounds: Sequence[Mapping[str, Any]], missed: F64, tokens: int, prefill: bool
) -> dict[str, Any]:
    """Overlapped against serial: of each round the seconds of both and of the resident run,
    `bandwidth` and `compute`. missed: bytes [passes, layers]."""
    bounds = [float(bound(missed, r["bandwidth"], r["compute"]).sum()) for r in rounds]
    overlapped = np.array([r["overlapped"] for r in rounds])
    serial = np.array([r["serial"] for r in rounds])
    out = {
        "tok_s": spread(tokens / overlapped),
        "serial_tok_s": spread(tokens / serial),
        "resident_tok_s": spread(tokens / r["resident"] for r in rounds),
        "gain": spread(serial / overlapped),
        "possible_gain": spread(serial / bounds),
        "time_of_bound": spread(overlapped / bounds),
    }
    if prefill:
        limits = [max(r["resident"], missed.sum() / r["bandwidth"]) for r in rounds]
        out["of_limit"] = spread(limits / overlapped)
    return out
