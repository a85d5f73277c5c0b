"""`edgemoe inspect`: what a store holds, as text for people or one JSON object for programs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..errors import shown
from ..kv_layout import BLOCK, KV_TYPES, KVLayout
from ..loader.budget import format_size
from ..store import Store
from ..types import ModelConfig
from .model_path import require_store


def run(path: str, *, as_json: bool = False, verify: bool = False) -> int:
    """Print what the store at `path` holds; 1 if `verify` finds damage, else 0.

    Raises:
        StoreError: it is no store, or too damaged to open.
    """
    require_store(path)
    with Store.open(path) as store:
        facts = describe(store)
        if verify:
            facts["damaged"] = store.verify(_progress if sys.stderr.isatty() else None)
            if sys.stderr.isatty():
                sys.stderr.write("\r\033[K")
    print(json.dumps(facts) if as_json else "\n".join(text(facts)))
    return 1 if facts.get("damaged") else 0


def describe(store: Store) -> dict[str, Any]:
    """Everything `inspect` tells, JSON-ready.

    Sizes are bytes of the file, scales, offsets and padding counted. levels: for each level the
    bytes a read up to it takes and the bits that makes a weight, for the experts (at the highest
    level they hold where that is lower), for all other matrices, and for the whole model with its
    float32 parts.
    """
    report = store.size_report()
    experts, dense, plain = report["experts"], report["dense"], report["float32"]
    weights = experts["weights"] + dense["weights"] + plain["weights"]
    levels: dict[str, Any] = {}
    so_far = {"experts": 0, "dense": 0}
    for level in map(str, store.quant.levels):
        row: dict[str, Any] = {}
        for part, of in (("experts", experts), ("dense", dense)):
            # Experts may stop below the highest level; the last one they have is then read.
            so_far[part] += of["segments"].get(level, 0)
            row[f"{part}_bytes"] = so_far[part]
            bits = of["bits_per_weight"]
            row[f"{part}_bits_per_weight"] = bits.get(level, max(bits.values(), default=0.0))
        row["model_bytes"] = sum(so_far.values()) + plain["bytes"]
        row["model_bits_per_weight"] = 8 * row["model_bytes"] / weights if weights else 0.0
        levels[level] = row
    config = store.config
    return {
        "path": str(store.path),
        "config": asdict(config),
        "weights": weights,
        "active_weights": _active(store, experts, dense, plain),
        "quant": {
            **asdict(store.quant),
            "alignment": max(store.expert_layout(i).alignment for i in config.moe_layers),
            "columns_ahead": list(store.ahead),
        },
        "sizes": report,
        "levels": levels,
        "kv_bytes_per_token": {kind: _kv_bytes(config, kind) for kind in KV_TYPES},
        "checksums": _checksums(store, experts["records"]),
        "metadata": dict(store.metadata),
    }


def _active(
    store: Store, experts: dict[str, Any], dense: dict[str, Any], plain: dict[str, Any]
) -> int:
    """Weights that one token's forward pass multiplies with; of the embedding, its one row."""
    cfg = store.config
    share = cfg.num_experts_per_tok / cfg.num_experts if cfg.num_experts else 0.0
    embedding = 0 if cfg.tie_word_embeddings else (cfg.vocab_size - 1) * cfg.hidden_size
    total: int = dense["weights"] + plain["weights"] - embedding
    active: int = round(experts["weights"] * share)
    return total + active


def _kv_bytes(config: ModelConfig, kind: str) -> int:
    """Bytes that a token takes in a KV cache, over all layers; blocks hold many."""
    block = KVLayout(kind, config.num_key_value_heads, config.head_dim, BLOCK)
    return config.num_hidden_layers * math.prod(block.shape) // BLOCK


def _checksums(store: Store, expert_records: int) -> dict[str, Any]:
    levels = len(store.quant.expert_levels)
    parts = expert_records * levels + sum(len(t.parts) for t in store.tensors.values())
    return {"kind": "crc32c", "segments": parts, "sections": len(store.sections)}


def text(facts: dict[str, Any]) -> list[str]:
    """The lines of the human form."""
    c, sizes = facts["config"], facts["sizes"]
    moe = c["num_hidden_layers"] - len(c["dense_layers"])
    lines = [
        f"{shown(facts['path'])}: {c['model_type']}, {_millions(facts['weights'])} weights "
        f"({_millions(facts['active_weights'])} active), {format_size(sizes['file_bytes'])}",
        f"  {c['num_hidden_layers']} layers, {moe} with {c['num_experts']} experts of which "
        f"{c['num_experts_per_tok']} work on a token; hidden size {c['hidden_size']}, expert size "
        f"{c['moe_intermediate_size']}",
        f"  {c['num_attention_heads']} attention heads of {c['head_dim']}, "
        f"{c['num_key_value_heads']} for keys and values; KV cache "
        f"{' or '.join(f'{format_size(n)} ({k})' for k, n in facts['kv_bytes_per_token'].items())}"
        " a token",
        f"  vocabulary {c['vocab_size']}, context {c['max_position_embeddings']}",
        "",
        *_table(["part", "weights", "bytes", "of the file"], list(_parts(sizes))),
        "",
        *_table(
            ["level", "experts", "bits/weight", "dense", "bits/weight", "model", "bits/weight"],
            [_level_row(level, row) for level, row in facts["levels"].items()],
        ),
        "",
        f"groups of {facts['quant']['group_size']} columns share scales; records aligned "
        f"to {facts['quant']['alignment']} bytes",
        *(f"{name}: {shown(value)}" for name, value in facts["metadata"].items()),
    ]
    sums = facts["checksums"]
    what = f"checksums: CRC32C of {sums['segments']} segments and {sums['sections']} sections"
    if "damaged" not in facts:
        return [*lines, f"{what}, not compared (--verify does)"]
    if not facts["damaged"]:
        return [*lines, f"{what}, all as written"]
    return [
        *lines,
        f"{what}, DAMAGED; copy or convert the store again:",
        *_damage(facts["damaged"]),
    ]


def _parts(sizes: dict[str, Any]) -> Sequence[list[str]]:
    rows: list[tuple[str, int | None, int]] = [
        ("experts", sizes["experts"]["weights"], sizes["experts"]["bytes"]),
        ("dense matrices", sizes["dense"]["weights"], sizes["dense"]["bytes"]),
        ("float32", sizes["float32"]["weights"], sizes["float32"]["bytes"]),
        *((shown(name), None, size) for name, size in sizes["sections"].items()),
        ("replaced sections", None, sizes["dead_bytes"]),
        ("header, padding", None, sizes["overhead_bytes"]),
    ]
    whole = sizes["file_bytes"]
    return [
        [
            name,
            "" if weights is None else _millions(weights),
            format_size(size),
            f"{100 * size / whole:.1f} %",
        ]
        for name, weights, size in rows
        if size
    ]


def _level_row(level: str, row: dict[str, Any]) -> list[str]:
    cells = [f"{level} bits"]
    for part in ("experts", "dense", "model"):
        cells += [format_size(row[f"{part}_bytes"]), f"{row[f'{part}_bits_per_weight']:.3f}"]
    return cells


def _damage(parts: list[str], most: int = 20) -> list[str]:
    more = [f"  and {len(parts) - most} more"] if len(parts) > most else []
    return [f"  {shown(part)}" for part in parts[:most]] + more


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Columns as wide as their widest cell, the first one flush left."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
        ).rstrip()
        for row in [head, *rows]
    ]


def _millions(weights: int) -> str:
    return f"{weights / 1e9:.2f} B" if weights >= 10**9 else f"{weights / 1e6:.2f} M"


def _progress(done: int, total: int, what: str) -> None:
    sys.stderr.write(f"\rreading {100 * done // total} %")
    sys.stderr.flush()
