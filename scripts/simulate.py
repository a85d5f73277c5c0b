#!/usr/bin/env python3
"""Replay a routing trace against a cache of experts: what would be read, found and waited for.

Cache and order of reads are the engine's own code (edgemoe/loader, edgemoe/hebf); only disk and
processor are made up: reads go one after another at --bandwidth, and the experts of a layer compute
for --compute-ms in all, each as soon as it is there. One sequence is decoded, after its prompt
where the trace has one; figures are of decoding alone. At first the cache is empty.
A table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from routing_trace import Trace, read_trace

from edgemoe.errors import EdgeMoEError, UsageError
from edgemoe.hebf.loads import Costs, hottest_bit_first, on_demand, shortest_makespan, timeline
from edgemoe.hebf.order import hottest_first
from edgemoe.layout import RecordLayout, align_up, expert_layout
from edgemoe.loader.budget import parse_size
from edgemoe.loader.policies import (
    ByExpert,
    ByProfile,
    ByWorth,
    LeastFrequentlyUsed,
    LeastRecentlyUsed,
    hottest,
    static_levels,
    worth_of,
)
from edgemoe.loader.residency import Lease, Policy, Residency, Want
from edgemoe.mwq import sensitivity
from edgemoe.pipeline.bit_router import BitRouter, GateGains, OneLevel
from edgemoe.pipeline.mean_bits import MeanBits
from edgemoe.store import Store
from edgemoe.types import F32, F64, I32, I64, LEVELS, READ_PRICE, QuantSpec

ORDERS = {"johnson": shortest_makespan, "hebf": hottest_bit_first, "fifo": on_demand}
SHAPES = {"qwen3": (48, 128, 2048, 768), "q7": (16, 64, 2048, 1024)}
MB = 1e6

EPILOG = """policies:
  worth    edgemoe's: decayed hits and distance in layers, segment by segment
  quality  the same, weighted with what a segment adds to quality (the store's sensitivities)
  lru      global LRU over whole experts, what streaming rivals do
  lfu      uses since the start, whole experts
  edgemoe  EdgeMoE's: the most frequent experts loaded at start (not counted as read), frequency and
           distance in layers, bits an expert by offline sensitivity where a store tells; its
           profile is the trace itself, which favours it
  belady   clairvoyant: drops what is wanted last; with experts of one size and no prompt, no
           cache that starts empty reads less
examples:
  simulate.py qwen.route.csv --shape qwen3 --level 4 --cache 10% --cache 20% --cache 30%
  simulate.py qwen.route.csv --shape qwen3 --bits 4.25 --policy lru --cache 10%
  simulate.py qwen.route.csv --shape qwen3 --level 4 --mean-bits 2.25 --policy worth --cache 20%
  simulate.py olmoe_299.jsonl --store q7.emoe --cache 1750MB --bandwidth 0.8 --compute-ms 2.5
  simulate.py olmoe_299.jsonl --shape 16,64,2048,1024 --cache 1G | tail -1 | jq .runs[0]
"""


class Model(NamedTuple):
    """What is cached. depth: segments of the level that is asked for. sizes: bytes of a segment,
    int64 [layers, levels]. loss: of an expert at each level, float32 [layers, experts, levels]."""

    experts: int
    depth: int
    bits: tuple[int, ...]
    sizes: I64
    loss: F32 | None


class Clairvoyant(ByExpert):
    """Belady's: the later an expert is wanted next, the sooner it goes, segment by segment."""

    whole = False

    def __init__(self, routes: I32, experts: int) -> None:
        tokens, layers, top_k = routes.shape
        super().__init__(layers, experts)
        self._routes = routes
        self._next = np.empty((tokens * layers, top_k))
        self._steps = 0
        self.value -= tokens * layers + 1
        for step in reversed(range(tokens * layers)):
            token, layer = divmod(step, layers)
            self._next[step] = self.value[layer, routes[token, layer]]
            self.value[layer, routes[token, layer]] = -step

    def observe(self, layer: int, wants: Sequence[Want]) -> None:
        token = self._steps // len(self.value)
        self.value[layer, self._routes[token, layer]] = self._next[self._steps]
        self._steps += 1


def slots(layout: RecordLayout) -> list[int]:
    """Bytes of the segments of a record as they are read."""
    return [align_up(size, layout.alignment) for size in layout.segment_sizes]


def model_of(args: argparse.Namespace, routes: I32) -> Model:
    """What --store, or --shape and --bits or --level, say.

    Raises:
        UsageError: they contradict the trace.
    """
    if args.store:
        with Store.open(args.store) as store:
            sizes = np.array([slots(store.expert_layout(i)) for i in store.config.moe_layers])
            loss = sensitivity.of_store(store)
            experts, bits = store.config.num_experts, store.quant.expert_levels
    else:
        count, experts, hidden, inner = args.shape
        if args.bits:
            size, bits = [round(3 * hidden * inner * args.bits / 8)], (args.level,)
        else:
            size, bits = slots(expert_layout(hidden, inner, QuantSpec())), LEVELS
        sizes, loss = np.tile(size, (count, 1)), None
    if args.level not in bits:
        raise UsageError(f"the experts of this store have levels {bits}, not {args.level}")
    if len(sizes) != routes.shape[1] or experts <= routes.max():
        raise UsageError(
            f"the trace has {routes.shape[1]} layers and experts up to {routes.max()}, the model "
            f"{len(sizes)} layers of {experts} experts: give the shape of the model that was traced"
        )
    return Model(experts, bits.index(args.level) + 1, bits, sizes, loss)


def whole_bytes(model: Model) -> int:
    """Bytes of all experts at the level."""
    return int(model.sizes[:, : model.depth].sum()) * model.experts


def counts(routes: I32, experts: int) -> I64:
    """Uses of each expert: int64 [layers, experts]."""
    return np.stack([np.bincount(r.ravel(), minlength=experts) for r in routes.swapaxes(0, 1)])


def by_worth(model: Model, routes: I32, worth: F64 | None) -> Policy:
    layers, levels = model.sizes.shape
    return ByWorth(layers, model.experts, levels, routes.shape[2], worth)


POLICIES: dict[str, Callable[[Model, I32], Policy]] = {
    "worth": lambda m, r: by_worth(m, r, None),
    "quality": lambda m, r: by_worth(m, r, worth_of(m.bits, m.sizes, m.loss)),
    "lru": lambda m, r: LeastRecentlyUsed(len(m.sizes), m.experts),
    "lfu": lambda m, r: LeastFrequentlyUsed(len(m.sizes), m.experts),
    "edgemoe": lambda m, r: ByProfile(counts(r, m.experts)),
    "belady": lambda m, r: Clairvoyant(r, m.experts),
}


OURS = ("worth", "quality")


def start_edgemoe(cache: Residency, model: Model, routes: I32) -> I64:
    """Load the most frequent experts until the next does not fit.

    Returns int64 [layers, experts], the segments that each expert has for ever.
    """
    profile = counts(routes, model.experts)
    depths = np.full(profile.shape, model.depth)
    if model.loss is not None:
        depths = static_levels(model.loss, model.sizes, whole_bytes(model)) + 1
    for layer, expert in hottest(profile):
        depth = int(depths[layer, expert])
        if cache.used_bytes + model.sizes[layer, :depth].sum() > cache.budget:
            break
        step(cache, layer, [Want(expert, depth)])
    return depths


def step(cache: Residency, layer: int, wants: Sequence[Want], ahead: bool = False) -> Lease:
    """All that a layer step does to the cache. ahead: evict for the next, as the engine does."""
    lease = cache.acquire(layer, wants)
    if lease is None:
        raise AssertionError("a lease is held that nobody took")
    evict = cache.spare(layer, max(want.depth for want in wants)) if ahead and lease.load else ()
    for segment in lease.load:
        cache.land(segment)
    cache.release(lease)
    return lease._replace(evict=lease.evict + evict)


def replay(
    model: Model, trace: Trace, name: str, budget: int, args: argparse.Namespace
) -> dict[str, Any]:
    """One policy on one cache of `budget` bytes.

    Raises:
        MemoryBudgetError: a layer's experts do not fit.
    """
    routes = trace.routes
    cache = Residency(model.sizes.tolist(), model.experts, budget, POLICIES[name](model, routes))
    depths = np.full((len(model.sizes), model.experts), model.depth)
    router: BitRouter = OneLevel(model.depth - 1)
    if args.mean_bits is not None:
        layers = range(len(model.sizes))
        gains = GateGains(layers, model.bits, model.loss)
        per_token = routes[0].size
        router = MeanBits(gains, model.bits, args.mean_bits, args.read_price, per_token)
        depths[:] = sum(bits <= args.mean_bits for bits in model.bits)  # of the prompt
    if name == "edgemoe":
        depths = start_edgemoe(cache, model, routes)
    for layer, experts in enumerate(trace.prompt):
        wants = [Want(expert, int(depths[layer, expert])) for expert in experts]
        if name != "belady":  # it knows only of decoding
            cache.observe(layer, wants)
        for want in wants:
            step(cache, layer, [want])
    order = ORDERS[args.order]
    pair = [args.compute_ms / 1e3 / routes.shape[2]] * len(model.bits)
    nothing = [0.0] * len(model.bits)
    costs = [Costs((row / (args.bandwidth * 1e9)).tolist(), nothing, pair) for row in model.sizes]
    wanted = read = evictions = reads = given = 0
    wait = 0.0
    x = np.empty((1, 0), np.float32)
    gates = np.ones(routes.shape, np.float32) if trace.gates is None else trace.gates
    for token, picked in enumerate(routes):
        for layer, ids in enumerate(picked):
            claimed = cache.claimed(layer)
            held = np.array(claimed, np.int32)
            depth = wished = depths[layer, ids]
            if name != "edgemoe":
                grant = router(layer, x, ids[None], gates[token, layer][None], claimed)
                depth, wished = (each[0] + 1 for each in grant)
            given += int(np.asarray(model.bits)[depth - 1].sum()) if token >= args.skip else 0
            wants = [Want(*want) for want in zip(ids.tolist(), depth.tolist(), strict=True)]
            cache.observe(
                layer, [Want(*w) for w in zip(ids.tolist(), wished.tolist(), strict=True)]
            )
            lease = step(cache, layer, wants, name in OURS)
            if token < args.skip:
                continue
            wanted += lease.wanted_bytes
            read += lease.load_bytes
            reads += len(lease.load)
            evictions += len(lease.evict)
            if lease.load:
                demands = hottest_first(ids[None], (depth[None] - 1).astype(np.int32))
                loads = order(demands, held, costs[layer])
                wait += timeline(loads, demands, held, costs[layer]).wait
    tokens = len(routes) - args.skip
    return {
        "policy": name,
        "cache_bytes": budget,
        "demand_bytes_per_token": wanted / tokens,
        "bytes_read": read,
        "bytes_read_per_token": read / tokens,
        "hit_rate": 1 - read / wanted,
        "mean_bits": given / (tokens * routes[0].size),
        "evictions": evictions,
        "segments_read": reads,
        "unhidden_wait_s": wait,
        "wait_s_per_token": wait / tokens,
    }


def shape(text: str) -> tuple[int, ...]:
    if text in SHAPES:
        return SHAPES[text]
    try:
        numbers = tuple(map(int, text.split(",")))
    except ValueError:
        numbers = ()
    if len(numbers) != 4 or min(numbers) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give {' or '.join(SHAPES)}, or LAYERS,EXPERTS,HIDDEN,INTERMEDIATE"
        )
    return numbers


def cache_bytes(text: str, whole: int) -> int:
    """Bytes of "1750MB" or of "10%" of `whole`."""
    if not text.endswith("%"):
        size = parse_size(text)
        if size is None:
            raise UsageError("--cache auto means nothing here: give a size or a share")
        return size
    try:
        share = float(text[:-1])
    except ValueError:
        share = 0.0
    if not 0 < share <= 100:
        raise UsageError(f"--cache {text}: a share is above 0 % and at most 100 %")
    return int(whole * share / 100)


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be above 0")
    return value


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("trace", type=Path, help="CSV or JSON lines, as in ../shared/traces")
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--store", help="take sizes and sensitivities from a store")
    what.add_argument(
        "--shape", type=shape, help="qwen3, q7 or LAYERS,EXPERTS,HIDDEN,INTERMEDIATE: sizes as in "
        "a store of groups of 128"
    )  # fmt: skip
    p.add_argument("--level", type=int, default=4, help="bits that every expert is wanted at (4)")
    p.add_argument(
        "--bits", type=positive, help="with --shape: an expert is one piece of so many bits a "
        "weight, as in files without levels"
    )  # fmt: skip
    p.add_argument(
        "--cache", action="append", metavar="SIZE|SHARE%", help="arena of experts, in bytes or as "
        "a share of all experts at the level; may be repeated (10%%, 20%%, 30%%)"
    )  # fmt: skip
    p.add_argument("--policy", action="append", choices=POLICIES, help="may be repeated; all")
    p.add_argument(
        "--mean-bits", type=positive, metavar="X", help="levels by token and expert, as `edgemoe "
        "run` has it, of all that there are; --level is then what a --cache share is of"
    )  # fmt: skip
    p.add_argument(
        "--read-price", type=positive, default=READ_PRICE, metavar="X", help="with --mean-bits, "
        f"as `edgemoe run` has it ({READ_PRICE:g})"
    )  # fmt: skip
    p.add_argument("--order", choices=ORDERS, default="johnson", help="of reads in a layer")
    p.add_argument(
        "--bandwidth", type=positive, default=1.0, metavar="GB/S", help="of the disk, in 1e9 (1)"
    )
    p.add_argument(
        "--compute-ms", type=positive, default=1.0, metavar="MS", help="experts of a layer (1)"
    )
    p.add_argument(
        "--skip", type=int, default=0, metavar="N", help="first tokens left out of the figures (0)"
    )
    args = p.parse_args()
    if args.bits and args.store:
        p.error("--bits goes with --shape: a store has sizes of its own")
    return args


def main() -> None:
    args = options()
    trace = read_trace(args.trace)
    routes = trace.routes
    if not 0 <= args.skip < len(routes):
        raise UsageError(f"--skip {args.skip}: the trace has {len(routes)} tokens")
    model = model_of(args, routes)
    if args.mean_bits is not None and trace.gates is None:
        raise UsageError(f"{args.trace} has no gate weights, which --mean-bits goes by")
    whole = whole_bytes(model)
    caches = [cache_bytes(text, whole) for text in args.cache or ("10%", "20%", "30%")]
    top_k = routes.shape[2]
    token = int(model.sizes[:, : model.depth].sum()) * top_k
    print(
        f"{len(routes)} tokens, {top_k} of {model.experts} experts in {len(model.sizes)} layers; "
        f"experts {whole / MB:.0f} MB, a token wants {token / MB:.1f} MB"
    )
    print("cache MB        policy   MB/token    hits  evicted  wait ms/token")
    runs = []
    for cache in caches:
        for name in args.policy or POLICIES:
            run = replay(model, trace, name, cache, args)
            runs.append(run)
            print(
                f"{cache / MB:8.0f}{100 * cache / whole:4.0f} % {name:>7}"
                f"{run['bytes_read_per_token'] / MB:11.1f}{100 * run['hit_rate']:6.1f} %"
                f"{run['evictions']:9}{1e3 * run['wait_s_per_token']:15.2f}",
                flush=True,
            )
        if cache < token:
            print(
                "         below what one token wants: an LRU keeps nothing till its layer returns"
            )
    print(
        json.dumps(
            {
                "trace": str(args.trace),
                "level": args.level,
                "order": args.order,
                "bandwidth": args.bandwidth * 1e9,
                "compute_s_per_layer": args.compute_ms / 1e3,
                "tokens": len(routes) - args.skip,
                "expert_bytes": whole,
                "token_bytes": token,
                "runs": runs,
            }
        )
    )


if __name__ == "__main__":
    try:
        main()
    except EdgeMoEError as exc:
        raise SystemExit(f"error: {exc}") from None
