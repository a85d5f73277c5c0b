#!/usr/bin/env python3
"""Measure ways to put one expert segment in the place of another: time and processor time of each.

    kept       the pages of the old one are read over (what loader/slots.py does)
    given back its pages go back to the system; others are faulted in by the read
    populated  the same, faulted in at once before the read (MADV_POPULATE_WRITE)
    moved      its pages are moved under the addresses of the new one (mremap)

Each round replaces segments of a store by others through the read queue, `--depth` at a time. All
ways take their turn in every round, and the one that begins changes. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import time
from typing import Any

import numpy as np

from edgemoe.errors import EdgeMoEError, UsageError
from edgemoe.loader.queue import Read, ReadQueue
from edgemoe.loader.rooms import whole_pages
from edgemoe.store import Store
from edgemoe.types import I64, PlaneRef

WAYS = ("kept", "given back", "populated", "moved")
PLACES = 4
"""Places reserved for every segment that is there."""
POPULATE_WRITE = 23
MAYMOVE, FIXED, DONTUNMAP = 1, 2, 4


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description="What it costs to replace an expert segment in memory.",
        epilog="examples: bench_slots.py olmoe.emoe\n"
        "          bench_slots.py olmoe.emoe --rounds 21 | tail -1 | jq '.segments'",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("store", help="a store whose segments are aligned to 4096 bytes")
    p.add_argument("--depth", type=int, default=8, metavar="N", help="segments replaced at once")
    p.add_argument("--rounds", type=int, default=11, metavar="N", help="alternating measurements")
    p.add_argument("--count", type=int, default=160, metavar="N", help="segments a measurement")
    args = p.parse_args()
    if min(args.depth, args.rounds) < 1 or args.count < args.depth:
        p.error("--depth and --rounds must be at least 1, --count at least --depth")
    return args


class Places:
    """Memory for `count` segments of `size` bytes (whole pages) in more places than that."""

    def __init__(self, count: int, size: int) -> None:
        self.size = size
        self._map = mmap.mmap(
            -1, PLACES * count * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
        self._map.madvise(mmap.MADV_NOHUGEPAGE)
        self.memory = np.frombuffer(self._map, np.uint8)
        self.memory[: count * size] = 1
        self.taken = np.arange(count)
        self.free = np.arange(count, PLACES * count)
        self._mremap = ctypes.CDLL(None, use_errno=True).mremap
        self._mremap.restype = ctypes.c_void_p

    def replace(self, way: str, which: int, by: int) -> int:
        """The segment in taken[which] goes, one comes, in free[by] unless kept: its first byte."""
        old, new = int(self.taken[which]), int(self.free[by])
        if way == "kept":
            return old * self.size
        self.taken[which], self.free[by] = new, old
        if way == "moved":
            first = self.memory.ctypes.data
            at, to = (ctypes.c_void_p(first + place * self.size) for place in (old, new))
            size = ctypes.c_size_t(self.size)
            if self._mremap(at, size, size, MAYMOVE | FIXED | DONTUNMAP, to) != to.value:
                raise UsageError(f"mremap: {os.strerror(ctypes.get_errno())}")
            return new * self.size
        self._map.madvise(mmap.MADV_DONTNEED, old * self.size, self.size)
        if way == "populated":
            self._map.madvise(POPULATE_WRITE, new * self.size, self.size)
        return new * self.size


def replace_all(
    queue: ReadQueue | None, places: Places, way: str, refs: list[PlaneRef], order: I64, depth: int
) -> None:
    """Each of `refs` in the place of a segment; without a queue its pages are touched instead."""
    for first in range(0, len(refs), depth):
        reads = []
        for i in range(first, min(first + depth, len(refs))):
            at = places.replace(way, i % len(places.taken), int(order[i]))
            reads.append(Read(refs[i], at, places.size, i))
        if queue is None:
            for read in reads:
                places.memory[read.at : read.at + read.room : mmap.PAGESIZE] = 1
            continue
        queue.submit(places.memory, reads)
        while queue.wait_any() is not None:
            pass


def measure(store: Store, args: argparse.Namespace, level_index: int) -> dict[str, Any]:
    """Milliseconds a segment of each way: p10, median, p90; of the processor; against kept."""
    refs = [
        store.expert_segment(layer, e, level_index)
        for layer in store.config.moe_layers
        for e in range(store.config.num_experts)
    ]
    size = whole_pages(max(r.size for r in refs))
    out: dict[str, Any] = {"bytes": size}
    rng = np.random.default_rng(0)
    with ReadQueue(store, depth=args.depth) as opened:
        for name, queue in (("with the read", opened), ("memory alone", None)):
            wall: dict[str, list[float]] = {way: [] for way in WAYS}
            busy: dict[str, list[float]] = {way: [] for way in WAYS}
            for turn in range(args.rounds):
                todo = [refs[i] for i in rng.integers(0, len(refs), args.count)]
                turned = WAYS[turn % len(WAYS) :] + WAYS[: turn % len(WAYS)]
                for way in turned:
                    places = Places(4 * args.depth, size)
                    order = rng.integers(0, len(places.free), args.count)
                    begun, used = time.perf_counter(), time.process_time()
                    replace_all(queue, places, way, todo, order, args.depth)
                    wall[way].append((time.perf_counter() - begun) / args.count * 1e3)
                    busy[way].append((time.process_time() - used) / args.count * 1e3)
            out[name] = {
                way: {
                    "ms": [round(float(v), 4) for v in np.percentile(wall[way], (10, 50, 90))],
                    "cpu_ms": round(float(np.median(busy[way])), 4),
                    "of_kept": round(float(np.median(np.divide(wall[way], wall["kept"]))), 3),
                }
                for way in WAYS
            }
    return out


def show(found: dict[str, Any]) -> None:
    for name in ("with the read", "memory alone"):
        for way, got in found[name].items():
            low, median, high = got["ms"]
            print(
                f"{found['bytes']} bytes, {name}, {way}: {low:.3f} / {median:.3f} / {high:.3f} ms, "
                f"{got['cpu_ms']:.3f} ms of processor, {got['of_kept']:.2f} x kept"
            )


def main() -> None:
    args = options()
    with Store.open(args.store) as store:
        levels = range(min(2, len(store.quant.expert_levels)))
        segments = [measure(store, args, i) for i in levels]
    for found in segments:
        show(found)
    print(json.dumps({"depth": args.depth, "rounds": args.rounds, "segments": segments}))


if __name__ == "__main__":
    try:
        main()
    except EdgeMoEError as exc:
        raise SystemExit(f"error: {exc}") from None
