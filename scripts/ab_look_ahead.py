#!/usr/bin/env python3
"""Whether reading ahead on guesses pays, by how many of the guesses are right.

Decodes from token 0 ('!') with experts streamed, without look-ahead and with it, in rounds, each
way in turn. On a store whose router is scripted (synth_gguf.py --routes) every guess is right, so
each guessed expert is replaced by a random one with probability 1 - recall. A letter `a` behind a
recall reads on all guesses; without it on those that are trusted, as a run does.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

import edgemoe
from edgemoe.bench.timing import Spread
from edgemoe.model import Span
from edgemoe.pipeline.ahead import Guess, LookAhead
from edgemoe.pipeline.streamed import StreamedMixture
from edgemoe.types import F32


def degraded(guess: Guess, recall: float, experts: int) -> Guess:
    """The same guess with some experts replaced by any."""
    draw = random.Random(1)

    def worse(layer: int, x: F32) -> tuple[int, list[int]] | None:
        made = guess(layer, x)
        if made is None:
            return None
        ids = [e if draw.random() < recall else draw.randrange(experts) for e in made[1]]
        return made[0], list(dict.fromkeys(ids))

    return worse


def run(args: argparse.Namespace, way: str) -> dict[str, Any]:
    """Tokens of one run; the rate leaves out those that fill the cache."""
    with edgemoe.load(args.store, mem=args.mem, bits=args.bits, ctx_size=args.tokens + 1) as model:
        mixture = model._experts
        if not isinstance(mixture, StreamedMixture) or mixture._ahead is None:
            raise SystemExit(f"{args.store}: all experts fit in {args.mem}; give less")
        if way == "off":
            mixture._ahead = None
        else:
            guess = degraded(
                mixture._ahead._guess, float(way.rstrip("a")), model.config.num_experts
            )
            mixture._ahead = LookAhead(guess, always=way.endswith("a"))
        cache, token, out = model.new_cache(), 0, []
        for i in range(args.tokens):
            if i == args.skip:
                begun, before = time.perf_counter(), model.usage().traffic
            token = int(model.forward([token], [Span(cache, 1)], [0])[0].argmax())
            out.append(token)
        seconds, traffic = time.perf_counter() - begun, model.usage().traffic
        count = args.tokens - args.skip
        ahead = mixture._ahead
        return {
            "tokens": out,
            "rate": count / seconds,
            "read": (traffic.bytes_read - before.bytes_read) / count / 2**20,
            "wait": (traffic.wait_s - before.wait_s) / count * 1e3,
            "right": 0.0 if ahead is None else ahead._right / max(ahead._all, 1e-9),
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", type=Path)
    parser.add_argument("--mem", required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--skip", type=int, default=16, help="tokens that fill the cache")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--recall", nargs="+", default=["1", "1a", "0.97a", "0.95a", "0.9a", "0.9", "0.8a", "0.8"]
    )
    args = parser.parse_args()
    ways = ["off", *args.recall]
    results: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for turn in range(args.rounds):
        print(f"round {turn + 1} of {args.rounds}", flush=True)
        for i in range(len(ways)):
            way = ways[(turn + i) % len(ways)]
            results[way].append(run(args, way))
            if results[way][-1]["tokens"] != results[ways[turn % len(ways)]][0]["tokens"]:
                raise SystemExit(f"{way}: other tokens than {ways[turn % len(ways)]}")
    print(
        "recall | tokens/s over off, p10 / median / p90 | MiB a token | wait ms | right of missing"
    )
    for way in ways:
        rates = [r["rate"] / o["rate"] for r, o in zip(results[way], results["off"], strict=True)]
        middle = {
            key: Spread.of([r[key] for r in results[way]]).median
            for key in ("read", "wait", "right")
        }
        s = Spread.of(rates)
        print(
            f"{way:6} | {s.p10:.2f} / {s.median:.2f} / {s.p90:.2f} | {middle['read']:.1f} "
            f"| {middle['wait']:.1f} | {middle['right']:.2f}"
        )


if __name__ == "__main__":
    main()
