#!/usr/bin/env python3
"""Whether reading ahead on guesses pays, by how many of the guesses are right.

Decodes from token 0 ('!') with experts streamed, without look-ahead and with it, in rounds, each
way in turn. On a store whose router is scripted (synth_gguf.py --routes) every guess is right, so
each guessed expert is replaced by a random one with probability 1 - recall. A letter `a` behind a
recall reads on all guesses; without it on those that are trusted, as a run does.

With --text: how many of the experts the guesses name, by layer, where all are resident. That is
for trained models.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

import edgemoe
from edgemoe.bench.timing import Spread
from edgemoe.model import Span, drive, layers
from edgemoe.pipeline.ahead import Guess, LookAhead, NextRouter, Routing
from edgemoe.pipeline.serial import SerialExperts
from edgemoe.pipeline.streamed import StreamedMixture
from edgemoe.types import F32, I32

WINDOW, TEXT_CHARS = 256, 50_000


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


def named(args: argparse.Namespace) -> list[float]:
    """Share of the experts that the guess at each layer but the first names."""
    with edgemoe.load(args.store, ctx_size=WINDOW) as model:
        weights, config, pool = model._weights, model.config, model._pool
        if weights is None or not isinstance(model._experts, SerialExperts):
            raise SystemExit(f"{args.store}: --text is for models that fit in memory")
        routers = enumerate(weights.layers)
        routings = [Routing(i, v.post_norm, v.router) for i, v in routers if v.router is not None]
        # One token at a time, so that a guess is of its experts and not of a batch's.
        guess, resident = NextRouter(pool, routings, config.num_experts_per_tok), model._experts
        right, guesses = Counter[int](), dict[int, list[set[int]]]()

        def experts(layer: int, x: F32, ids: I32, gates: F32) -> F32:
            if layer in guesses:
                found = zip(guesses.pop(layer), ids.tolist(), strict=True)
                right[layer] += sum(len(guessed.intersection(row)) for guessed, row in found)
            made = [guess(layer, row[None]) for row in x]
            for each in made:
                if each is not None:
                    guesses.setdefault(each[0], []).append(set(each[1]))
            return resident(layer, x, ids, gates)

        tokens = model.tokenizer.encode(args.text.read_text()[:TEXT_CHARS])
        tokens = tokens[: len(tokens) // WINDOW * WINDOW]
        for at in range(0, len(tokens), WINDOW):
            span = Span(model.new_cache(), WINDOW)
            ids = np.array(tokens[at : at + WINDOW], np.int64)
            drive(layers(weights, pool, ids, [span]), experts)
        return [n / len(tokens) / config.num_experts_per_tok for _, n in sorted(right.items())]


def run(args: argparse.Namespace, way: str) -> dict[str, Any]:
    """Tokens of one run; the rate leaves out those that fill the cache."""
    with edgemoe.load(args.store, mem=args.mem, bits=args.bits, ctx_size=args.tokens + 1) as model:
        mixture = model._experts
        if not isinstance(mixture, StreamedMixture) or mixture._early._ahead is None:
            raise SystemExit(f"{args.store}: all experts fit in {args.mem}; give less")
        if way == "off":
            mixture._early._ahead = None
        else:
            guess = degraded(
                mixture._early._ahead._guess, float(way.rstrip("a")), model.config.num_experts
            )
            mixture._early._ahead = LookAhead(guess, always=way.endswith("a"))
        cache, token, out = model.new_cache(), 0, []
        for i in range(args.tokens):
            if i == args.skip:
                begun, before = time.perf_counter(), model.usage().traffic
            token = int(model.forward([token], [Span(cache, 1)], [0])[0].argmax())
            out.append(token)
        seconds, traffic = time.perf_counter() - begun, model.usage().traffic
        count = args.tokens - args.skip
        ahead = mixture._early._ahead
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
    parser.add_argument("--mem", help="a ceiling under which experts are streamed")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--skip", type=int, default=16, help="tokens that fill the cache")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--recall", nargs="+", default=["1", "1a", "0.97a", "0.95a", "0.9a", "0.9", "0.8a", "0.8"]
    )
    args = parser.parse_args()
    if args.text is not None:
        print("named, by layer from the second: " + " ".join(f"{n:.2f}" for n in named(args)))
        return
    if args.mem is None:
        parser.error("give --mem, or --text")
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
