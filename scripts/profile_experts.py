#!/usr/bin/env python3
"""How often each expert is used: the profile that EdgeMoE's policy wants (edgemoe bench --profile).

Of a trace (../shared/traces), or of a text that a store is run on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from routing_trace import read_trace

import edgemoe
from edgemoe.errors import EdgeMoEError
from edgemoe.model import Span, drive, layers
from edgemoe.store import Store
from edgemoe.terminal.evaluate import read_text
from edgemoe.types import F32, I32, I64


def of_trace(path: Path, experts: int) -> I64:
    """Of the decoded tokens: int64 [layers, experts]."""
    routes = read_trace(path).routes
    if int(routes.max()) >= experts:
        raise SystemExit(f"{path}: names expert {int(routes.max())} of {experts}")
    return np.stack([np.bincount(r.ravel(), minlength=experts) for r in routes.swapaxes(0, 1)])


def of_text(store: Path, text: str, most: int) -> I64:
    """Of the first tokens of a text, at most so many, in windows of the model's context."""
    with edgemoe.load(store) as model:
        config, weights, run = model.config, model._weights, model._experts
        if weights is None or run is None:
            raise SystemExit(f"{store}: cannot be run")
        row = {layer: i for i, layer in enumerate(config.moe_layers)}
        out = np.zeros((len(row), config.num_experts), np.int64)

        def counted(layer: int, x: F32, ids: I32, gates: F32) -> F32:
            out[row[layer]] += np.bincount(ids.ravel(), minlength=config.num_experts)
            return run(layer, x, ids, gates)

        ids = np.asarray(model.tokenizer.encode(text, add_special=False)[:most], np.int64)
        chunk = model.plan.prefill_chunk
        for first in range(0, len(ids), model.plan.ctx_size):
            cache, window = model.new_cache(), ids[first : first + model.plan.ctx_size]
            for at in range(0, len(window), chunk):
                part = window[at : at + chunk]
                spans = [Span(cache, len(part))]
                drive(layers(weights, model._pool, part, spans), counted)
        return out


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("store", type=Path, help="whose experts they are")
    p.add_argument("out", type=Path, metavar="OUT.npy")
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--trace", type=Path)
    what.add_argument("--text", type=Path)
    p.add_argument("--tokens", type=int, default=20_000, help="of a text, at most (20000)")
    args = p.parse_args()
    with Store.open(args.store) as store:
        experts, rows = store.config.num_experts, len(store.config.moe_layers)
    if args.trace is not None:
        found = of_trace(args.trace, experts)
    else:
        found = of_text(args.store, read_text(str(args.text)), args.tokens)
    if len(found) != rows:
        raise SystemExit(f"{args.trace}: {len(found)} layers, the store has {rows} with experts")
    with args.out.open("wb") as file:
        np.save(file, found)
    print(f"{args.out}: {int(found.sum())} uses of {experts} experts in {rows} layers")


if __name__ == "__main__":
    try:
        main()
    except EdgeMoEError as exc:
        raise SystemExit(f"error: {exc}") from None
