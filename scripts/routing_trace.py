"""Which experts a model picked, token by token, as files in ../shared/traces tell."""

from __future__ import annotations

import csv
import json
import operator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from edgemoe.errors import UsageError
from edgemoe.types import F32, I32


def checked(expert: int) -> int:
    if not 0 <= expert < 1 << 16:
        raise ValueError(f"expert {expert}")
    return expert


class Trace(NamedTuple):
    """routes: experts of each decoded token, int32 [tokens, layers, top_k]. prompt: of each layer,
    the experts that the prompt's tokens take, in order; nothing where the file has no prompt.
    gates: float32 [tokens, layers, top_k], the routes' weights; None where the file has none."""

    routes: I32
    prompt: list[list[int]]
    gates: F32 | None = None


def read_trace(path: Path) -> Trace:
    """Read a file of decoded tokens, and of those of the prompt before them.

    Raises:
        UsageError: not a trace of shared/traces' kinds, or its steps differ in shape.
    """
    steps: dict[tuple[int, int], list[int]] = {}
    weights: dict[tuple[int, int], list[float]] = {}
    before: list[tuple[int, int]] = []
    try:
        with path.open(newline="") as file:
            if path.suffix == ".jsonl":
                for token, line in enumerate(filter(str.strip, file)):
                    for layer, experts in enumerate(json.loads(line)["layers"]):
                        steps[token, layer] = [checked(operator.index(e)) for e in experts]
            else:
                for row in csv.DictReader(line for line in file if not line.startswith("#")):
                    layer, expert = int(row["layer"]), checked(int(row["expert"]))
                    if row["phase"] == "1":
                        steps.setdefault((int(row["step"]), layer), []).append(expert)
                        weight = float(row["weight"])
                        weights.setdefault((int(row["step"]), layer), []).append(weight)
                    else:
                        before.append((layer, expert))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: not a trace that this reads: {error!r}") from None
    tokens, layers = ({at[i] for at in steps} for i in (0, 1))
    widths = {len(experts) for experts in steps.values()}
    if not steps or len(steps) != len(tokens) * len(layers) or len(widths) != 1:
        raise UsageError(f"{path}: its decoded tokens do not all have the same layers and experts")
    flat = [steps[token, layer] for token in sorted(tokens) for layer in sorted(layers)]
    routes = np.array(flat, np.int32).reshape(len(tokens), len(layers), -1)
    ordered = np.sort(routes, axis=2)
    if (ordered[:, :, 1:] == ordered[:, :, :-1]).any():
        raise UsageError(f"{path}: a token takes an expert twice")
    prompt = [[e for at, e in dict.fromkeys(before) if at == layer] for layer in sorted(layers)]
    if not weights:
        return Trace(routes, prompt)
    ordered_weights = [
        weights[token, layer] for token in sorted(tokens) for layer in sorted(layers)
    ]
    gates = np.array(ordered_weights, np.float32).reshape(routes.shape)
    return Trace(routes, prompt, gates if np.isfinite(gates).all() and gates.max() > 0 else None)
