#!/usr/bin/env python3
"""Measure attention: decoding against the memory it reads, in GB/s; prefill in GFLOP/s.

Decoding reads every key and value once a token, so memory sets its limit. Each round reads the KV
cache of many layers as plain memory (the sum of its words, all threads) and then decodes one token
over the same layers: both see what the machine has to give at that moment. The cache is larger than
the processor's own caches, so no layer is found there again. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict

import numpy as np

from edgemoe import kernels
from edgemoe.bench.timing import Spread, seconds
from edgemoe.kv_layout import KV_TYPES, KVLayout

SHAPES = {"olmoe": (16, 16, 128), "qwen3": (32, 4, 128)}
"""Heads, KV heads and columns of a head of OLMoE-1B-7B and of Qwen3-30B-A3B."""

Clock = Callable[[], float]

ROTATED = 256 << 20
"""Bytes of keys and values that a round reads, at least; well above any L3."""


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description="Attention's share of the memory bandwidth in decoding, and its GFLOP/s.",
        epilog="examples: bench_attention.py -t 2                the default: f16, 4,096 tokens\n"
        "          bench_attention.py --kv-type int8 --shape qwen3\n"
        "          bench_attention.py | tail -1 | jq .decode.olmoe.share.median",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "-t",
        "--threads",
        type=int,
        default=kernels.default_threads(),
        metavar="N",
        help="threads that read and compute",
    )
    p.add_argument("--kv-type", choices=KV_TYPES, default="f16", help="what the cache holds")
    p.add_argument("--shape", choices=SHAPES, action="append", help="of one model only")
    p.add_argument("--ctx", type=int, default=4096, metavar="N", help="tokens in the cache")
    p.add_argument("--rounds", type=int, default=15, metavar="N", help="alternating measurements")
    p.add_argument(
        "--cpu-time",
        action="store_true",
        help="count time on the CPU, not on the wall, which busy machines stretch; needs -t 1",
    )
    p.add_argument("--no-prefill", action="store_true", help="measure decoding only")
    args = p.parse_args()
    if args.cpu_time and args.threads != 1:
        p.error("--cpu-time counts all threads together: give -t 1 too")
    return args


def filled(pool: kernels.Pool, layout: KVLayout, layers: int) -> np.ndarray:
    """A cache of random keys and values, uint8 [layers, kv_heads, blocks, block bytes]."""
    rng = np.random.default_rng(0)
    data = layout.allocate(layers)
    shape = (2, layout.capacity, layout.kv_heads, layout.head_dim)
    k, v = rng.standard_normal(shape, np.float32)
    kernels.kv_write(pool, layout, data[0], k, v, 0)
    data[1:] = data[0]
    return data


def decode(
    pool: kernels.Pool,
    shape: tuple[int, int, int],
    kv_type: str,
    ctx: int,
    rounds: int,
    clock: Clock,
) -> dict[str, Spread]:
    """GB/s of plain reading, GB/s of keys and values in decoding, and the share of the first."""
    heads, kv_heads, d = shape
    layout = KVLayout(kv_type, kv_heads, d, ctx)
    layers = -(-ROTATED // layout.nbytes(1))
    data = filled(pool, layout, layers)
    plain = data.reshape(-1)
    q = np.random.default_rng(1).standard_normal((1, heads, d), np.float32)

    def attend() -> None:
        for layer in data:
            kernels.attention(pool, q, layout, layer, ctx - 1, d**-0.5)

    attend()
    pairs = [
        (seconds(lambda: kernels.stream_read(pool, plain), clock), seconds(attend, clock))
        for _ in range(rounds)
    ]
    reading, attending = np.array(pairs).T
    return {
        "stream_gb_s": Spread.of(plain.nbytes / reading / 1e9),
        "kv_gb_s": Spread.of(plain.nbytes / attending / 1e9),
        "share": Spread.of(reading / attending),
        "us_a_layer": Spread.of(attending / layers * 1e6),
    }


def prefill(
    pool: kernels.Pool,
    shape: tuple[int, int, int],
    kv_type: str,
    tokens: int,
    rounds: int,
    clock: Clock,
) -> Spread:
    """GFLOP/s of `tokens` tokens that attend to themselves: 4 d a head and pair of positions."""
    heads, kv_heads, d = shape
    layout = KVLayout(kv_type, kv_heads, d, tokens)
    data = filled(pool, layout, 1)[0]
    q = np.random.default_rng(1).standard_normal((tokens, heads, d), np.float32)
    flops = 4 * d * heads * tokens * (tokens + 1) / 2

    def attend() -> None:
        kernels.attention(pool, q, layout, data, 0, d**-0.5)

    attend()
    return Spread.of([flops / seconds(attend, clock) / 1e9 for _ in range(rounds)])


def main() -> None:
    args = options()
    pool = kernels.new_pool(args.threads)
    clock: Clock = time.process_time if args.cpu_time else time.perf_counter
    shapes = {name: SHAPES[name] for name in args.shape or SHAPES}
    out: dict[str, object] = {
        "isa": kernels.isa(),
        "threads": args.threads,
        "kv_type": args.kv_type,
        "ctx": args.ctx,
        "cpu_time": args.cpu_time,
    }
    decoded = {}
    for name, shape in shapes.items():
        got = decode(pool, shape, args.kv_type, args.ctx, args.rounds, clock)
        decoded[name] = {key: asdict(v) for key, v in got.items()}
        parts = ", ".join(f"{key} {v.shown()}" for key, v in got.items())
        print(f"decode {name}, {args.ctx} tokens (p10 / median / p90): {parts}")
    out["decode"] = decoded
    if not args.no_prefill:
        prefilled = out["prefill_gflop_s"] = {}
        for name, shape in shapes.items():
            for tokens in (512, 2048):
                gflops = prefill(pool, shape, args.kv_type, tokens, max(3, args.rounds // 3), clock)
                prefilled[f"{name}-{tokens}"] = asdict(gflops)
                print(f"prefill {name}, {tokens} tokens: {gflops.shown(1)} GFLOP/s")
    print(json.dumps(out))


if __name__ == "__main__":
    main()
