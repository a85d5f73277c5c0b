#!/usr/bin/env python3
"""Measure the read queue against a plain reader of the same file.

Each round picks experts of a store at random and reads what each needs at a level, into memory that
has been touched before: plain threads with one O_DIRECT preadv an expert, and the queue with one
request a segment, verified, on each of its engines. All take their turn in every round, and the one
that begins changes. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from edgemoe.errors import EdgeMoEError, StoreError, UsageError
from edgemoe.kernels import crc32c
from edgemoe.kernels.reader import BLOCK, ENGINES
from edgemoe.layout import align_up
from edgemoe.loader.arena import Arena
from edgemoe.loader.queue import Read, ReadQueue
from edgemoe.store import Store
from edgemoe.types import U8, PlaneRef

MIB = 1 << 20

Prefix = list[PlaneRef]
"""Segments that lie one behind the other: what one expert needs at a level."""


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description="The read queue's share of what a plain reader gets.",
        epilog="examples: bench_reader.py olmoe.emoe\n"
        "          bench_reader.py olmoe.emoe --depth 16 --chunk 512 --engine uring\n"
        "          bench_reader.py olmoe.emoe | tail -1 | jq '.reads[\"level 4\"]'",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("store", help="a store whose segments are aligned to 4096 bytes")
    p.add_argument("--depth", type=int, default=8, metavar="N", help="reads in flight; threads")
    p.add_argument("--chunk", type=int, default=1024, metavar="KIB", help="longest single read")
    p.add_argument("--engine", choices=ENGINES, action="append", help="of the queue; both")
    p.add_argument("--level", type=int, action="append", help="bits of the experts; 2 and 4")
    p.add_argument("--rounds", type=int, default=9, metavar="N", help="alternating measurements")
    p.add_argument("--mib", type=int, default=256, metavar="N", help="to read at a time")
    args = p.parse_args()
    if args.rounds < 1 or args.mib < 8 or args.depth < 1 or args.chunk < 1:
        p.error("--rounds, --depth and --chunk must be at least 1, --mib at least 8")
    return args


def spread(values: Sequence[float]) -> dict[str, float]:
    """p10, median and p90."""
    return dict(zip(("p10", "median", "p90"), np.percentile(values, (10, 50, 90)), strict=True))


def prefixes(store: Store, bits: int) -> list[Prefix]:
    """What each expert needs at a level."""
    levels = store.quant.expert_levels
    if bits not in levels:
        raise UsageError(f"the experts of this store have levels {levels}, not {bits}")
    return [
        [store.expert_segment(layer, e, i) for i in range(levels.index(bits) + 1)]
        for layer in store.config.moe_layers
        for e in range(store.config.num_experts)
    ]


def pieces(store: Store, size: int) -> list[Prefix]:
    """Reads of one size, a multiple of BLOCK, all over the file, and their checksums."""
    buffer = np.empty(size, np.uint8)
    out = []
    for offset in range(0, os.fstat(store.fileno()).st_size - size, size * 8):
        os.preadv(store.fileno(), [buffer], offset)
        out.append([PlaneRef(offset, size, crc32c(buffer))])
    return out


def plain(fd: int, todo: list[Prefix], memory: U8, depth: int) -> None:
    """Each prefix by one read, `depth` threads."""
    places = []
    at = 0
    for prefix in todo:
        first, end = prefix[0].offset, prefix[-1].offset + prefix[-1].size
        size = align_up(end, BLOCK) - first
        places.append((first, at, size))
        at += size

    def read(place: tuple[int, int, int]) -> None:
        offset, start, size = place
        done = 0
        while done < size:
            got = os.preadv(fd, [memory[start + done : start + size]], offset + done)
            if not got:
                raise StoreError(f"the file ends at byte {offset + done}")
            done += got

    with ThreadPoolExecutor(depth) as pool:
        list(pool.map(read, places))


def queued(queue: ReadQueue, todo: list[Prefix], memory: U8) -> None:
    """Each segment a request, with its own slot."""
    reads, at = [], 0
    for prefix in todo:
        for ref in prefix:
            room = align_up(ref.size, BLOCK)
            reads.append(Read(ref, at, room, len(reads)))
            at += room
    queue.submit(memory, reads)
    while queue.wait_any() is not None:
        pass


def measure(
    store: Store, fd: int, args: argparse.Namespace, memory: U8, units: list[Prefix]
) -> dict[str, Any]:
    """GB/s of everyone who reads, ratios, processor time; all in turn, `args.rounds` times."""
    engines = args.engine or ENGINES
    queues = {
        e: ReadQueue(store, depth=args.depth, chunk=args.chunk * 1024, capacity=1 << 16, engine=e)
        for e in engines
    }
    each = max(sum(align_up(r.size, BLOCK) for r in unit) for unit in units)
    count = min(len(units), args.mib * MIB // each)
    rng = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {name: [] for name in ("plain", *engines)}
    busy: dict[str, list[float]] = {name: [] for name in seconds}
    sizes = []
    for turn in range(args.rounds):
        todo = [units[i] for i in rng.permutation(len(units))[:count]]
        sizes.append(sum(r.size for unit in todo for r in unit))
        work: list[tuple[str, Callable[[], None]]] = [
            ("plain", partial(plain, fd, todo, memory, args.depth)),
            *((e, partial(queued, q, todo, memory)) for e, q in queues.items()),
        ]
        for name, read in work[turn % len(work) :] + work[: turn % len(work)]:
            begun, used = time.perf_counter(), time.process_time()
            read()
            seconds[name].append(time.perf_counter() - begun)
            busy[name].append(time.process_time() - used)
    read_bytes = np.array(sizes)
    rate = {name: read_bytes / np.array(took) / 1e9 for name, took in seconds.items()}
    out: dict[str, Any] = {
        "requests": count * len(units[0]),
        "bytes": int(np.median(read_bytes)),
        "gb_s": {name: spread(v) for name, v in rate.items()},
        "share_of_plain": {e: spread(rate[e] / rate["plain"]) for e in engines},
        "cpu_s_per_gb": {n: float(np.median(v / read_bytes * 1e9)) for n, v in busy.items()},
    }
    stats = {e: q.stats() for e, q in queues.items()}
    out["crc_gb_s"] = {e: s["bytes_verified"] / s["verify_s"] / 1e9 for e, s in stats.items()}
    out["reads"] = {e: s["reads"] // args.rounds for e, s in stats.items()}
    out["direct"] = all(s["direct"] for s in stats.values())
    for q in queues.values():
        q.close()
    return out


def main() -> None:
    args = options()
    with Store.open(args.store) as store:
        memory = Arena(args.mib * MIB + 64 * BLOCK).take(args.mib * MIB, BLOCK)
        memory[:] = 1
        fd = os.open(args.store, os.O_RDONLY | os.O_DIRECT)
        results = {f"level {bits}": prefixes(store, bits) for bits in args.level or (2, 4)}
        results["1 MiB"] = pieces(store, MIB)
        found = {}
        for name, units in results.items():
            got = found[name] = measure(store, fd, args, memory, units)
            rates = ", ".join(f"{k} {v['median']:.3f} GB/s" for k, v in got["gb_s"].items())
            shares = ", ".join(
                f"{k} {v['p10']:.2f} / {v['median']:.2f} / {v['p90']:.2f}"
                for k, v in got["share_of_plain"].items()
            )
            print(f"{name}: {rates}; share of plain (p10 / median / p90): {shares}")
        os.close(fd)
    print(
        json.dumps(
            {"depth": args.depth, "chunk": args.chunk * 1024, "rounds": args.rounds, "reads": found}
        )
    )


if __name__ == "__main__":
    try:
        main()
    except EdgeMoEError as exc:
        raise SystemExit(f"error: {exc}") from None
