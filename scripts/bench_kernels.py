#!/usr/bin/env python3
"""Measure products with nested matrices: decoding against the memory it reads, prefill in GMAC/s.

Decoding reads every weight once a token, so memory sets its limit. Each round reads the segments of
many matrices as plain memory (the sum of its words, all threads) and then multiplies one token with
all of them: both see what the machine has to give at that moment. The matrices are larger than the
processor's own caches, so none is found there again. Prefill's limit is integer multiply-adds. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass

import numpy as np

from edgemoe import kernels
from edgemoe.bench.timing import Spread, seconds
from edgemoe.bench.traffic import bytes_read
from edgemoe.kernels import NestedMatrix
from edgemoe.layout import align_up, dense_layout
from edgemoe.loader.arena import Arena
from edgemoe.mwq.packing import pack_record
from edgemoe.mwq.quantize import quantize_matrix
from edgemoe.types import F32, LEVELS, U8, QuantSpec

SHAPES = {"gate": (1024, 2048), "down": (2048, 1024), "dense": (2048, 2048)}
"""Rows and columns in OLMoE-1B-7B: an expert's gate (and up) and down, an attention matrix."""

MIB = 1 << 20


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description="The kernels' share of the memory bandwidth in decoding, and their GMAC/s.",
        epilog="examples: bench_kernels.py -t 2                  every level and shape\n"
        "          bench_kernels.py --level 4 --shape gate --no-prefill\n"
        "          bench_kernels.py | tail -1 | jq '.decode[\"gate-4\"].share.median'",
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
    p.add_argument("--level", type=int, choices=LEVELS, action="append", help="bits; all levels")
    p.add_argument("--shape", choices=SHAPES, action="append", help="of one matrix only")
    p.add_argument("--rounds", type=int, default=15, metavar="N", help="alternating measurements")
    p.add_argument(
        "--mib", type=int, default=256, metavar="N", help="weights that a round of decoding reads"
    )
    p.add_argument("--no-prefill", action="store_true", help="measure decoding only")
    args = p.parse_args()
    if args.rounds < 1 or args.mib < 1:
        p.error("--rounds and --mib must be at least 1")
    return args


@dataclass(frozen=True)
class Stack:
    """Copies of one matrix at one level, one after the other in memory."""

    memory: U8
    matrices: list[NestedMatrix]
    nbytes: int
    """Of scales and planes that products read."""
    weights: int
    """Of all matrices."""

    def inputs(self, n: int) -> F32:
        """Random activations of n tokens."""
        cols = self.matrices[0].layout.cols
        return np.random.default_rng(n).standard_normal((n, cols), np.float32)


def stacked(shape: tuple[int, int], bits: int, nbytes: int) -> Stack:
    """As many copies of a random matrix as make `nbytes`, at least one."""
    layout = dense_layout(*shape, QuantSpec())
    w = np.random.default_rng(0).standard_normal(shape, np.float32)
    codes, scales = zip(*quantize_matrix(w, layout), strict=True)
    level = LEVELS.index(bits)
    segments = pack_record(layout, codes, scales)[: level + 1]
    size = sum(align_up(s.size, 64) for s in segments)
    count = max(1, nbytes // size)
    memory = Arena(count * size).take(count * size)
    matrices = []
    for row in memory.reshape(count, size):
        parts, at = [], 0
        for segment in segments:
            parts.append(row[at : at + segment.size])
            parts[-1][:] = segment
            at += align_up(segment.size, 64)
        matrices.append(NestedMatrix.of(layout, parts))
    read = count * bytes_read(layout, level)
    return Stack(memory, matrices, read, count * layout.weights())


def decode(pool: kernels.Pool, stack: Stack, rounds: int) -> dict[str, Spread]:
    """GB/s of plain reading, GB/s of weights in products with one token, and the share."""
    x = stack.inputs(1)

    def multiply() -> None:
        kernels.linear(pool, x, stack.matrices)

    multiply()
    pairs = [
        (seconds(lambda: kernels.stream_read(pool, stack.memory)), seconds(multiply))
        for _ in range(rounds)
    ]
    reading, multiplying = np.array(pairs).T
    stream = stack.memory.nbytes / reading / 1e9
    weights = stack.nbytes / multiplying / 1e9
    return {
        "stream_gb_s": Spread.of(stream),
        "weights_gb_s": Spread.of(weights),
        "share": Spread.of(weights / stream),
    }


def prefill(pool: kernels.Pool, stack: Stack, n: int, rounds: int) -> Spread:
    """GMAC/s of products with n tokens."""
    x = stack.inputs(n)

    def multiply() -> None:
        kernels.linear(pool, x, stack.matrices)

    multiply()
    return Spread.of([n * stack.weights / seconds(multiply) / 1e9 for _ in range(rounds)])


def main() -> None:
    args = options()
    pool = kernels.new_pool(args.threads)
    decoded: dict[str, object] = {}
    prefilled: dict[str, object] = {}
    for name in args.shape or SHAPES:
        for bits in args.level or LEVELS:
            stack = stacked(SHAPES[name], bits, args.mib * MIB)
            got = decode(pool, stack, args.rounds)
            decoded[f"{name}-{bits}"] = {k: asdict(v) for k, v in got.items()}
            parts = ", ".join(f"{k} {v.shown()}" for k, v in got.items())
            print(f"decode {name}, {bits} bits (p10 / median / p90): {parts}")
            if args.no_prefill:
                continue
            few = stacked(SHAPES[name], bits, MIB)
            for n in (64, 512):
                gmacs = prefill(pool, few, n, max(3, args.rounds // 3))
                prefilled[f"{name}-{bits}-{n}"] = asdict(gmacs)
                print(f"prefill {name}, {bits} bits, {n} tokens: {gmacs.shown(1)}")
    out: dict[str, object] = {"isa": kernels.isa(), "threads": args.threads, "mib": args.mib}
    out["decode"] = decoded
    if not args.no_prefill:
        out["prefill_gmac_s"] = prefilled
    print(json.dumps(out))


if __name__ == "__main__":
    main()
