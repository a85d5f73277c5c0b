"""Results as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def losses(rows: Sequence[Row], first: str) -> str:
    """Bits and losses of levels or types; `first` names what the first column tells."""
    return _table(
        [first, "bits/weight", "mean KLD", "change of PPL", "same top token"],
        (
            [
                f"{r['variant']} {r['level']}" if first == "variant" else str(r[first]),
                f"{r['bits']:.4f}",
                f"{r['kld']:.6f} +- {r['kld_se']:.6f}",
                f"{100 * r['dppl']:+.3f} %",
                f"{100 * r['same_top']:.2f} +- {100 * r['same_top_se']:.2f} %",
            ]
            for r in rows
        ),
    )


def verdicts(rows: Sequence[Row]) -> str:
    """Ours against theirs at the same bits."""
    head = ["type", "bits/weight", "llama.cpp", "ours", "at", "ours / theirs", "errors", "lower?"]
    return _table(
        head,
        (
            [
                r["type"],
                f"{r['bits']:.4f}",
                f"{r['theirs']:.6f}",
                "-" if r["ours"] is None else f"{r['ours']:.6f}",
                r["at"],
                "-" if r["ratio"] is None else f"{r['ratio']:.3f}",
                "-" if r["errors"] is None else f"{r['errors']:+.1f}",
                "yes" if r["passed"] else "no",
            ]
            for r in rows
        ),
    )


def means(rows: Sequence[Row]) -> str:
    """Levels that differ against one for all at the same mean, and what an oracle gains."""
    return _table(
        ["mean bits", "one level for all", "untrained", "of it", "oracle", "of the oracle's gain"],
        (
            [
                f"{r['mean_bits']:g}",
                f"{r['uniform']:.6f}",
                f"{r['untrained']['kld']:.6f} +- {r['untrained']['kld_se']:.6f}",
                f"{r['of_uniform']:.3f}",
                f"{r['oracle']['kld']:.6f} +- {r['oracle']['kld_se']:.6f}",
                f"{100 * r['of_oracle']:.0f} %",
            ]
            for r in rows
        ),
    )


def by_gate(rows: Sequence[Row], bits: Sequence[int]) -> str:
    """Share of each level by rank of the gate, heaviest first, of the untrained router."""
    out = []
    for r in rows:
        for rank, counts in enumerate(r["untrained"]["counts"]):
            shares = [f"{100 * count / sum(counts):.1f} %" for count in counts]
            out.append([f"{r['mean_bits']:g}", str(rank + 1), *shares])
    return _table(["mean bits", "gate", *(f"{b} bits" for b in bits)], out)


def ratios(rows: Sequence[Row]) -> str:
    """Nested over dedicated divergence, a level a row."""
    return _table(
        ["level", "nested KLD", "dedicated KLD", "ratio", "95 % interval"],
        (
            [
                str(r["level"]),
                f"{r['nested']:.6f}",
                f"{r['dedicated']:.6f}",
                f"{r['ratio']:.4f}",
                f"[{r['ratio_low']:.4f}, {r['ratio_high']:.4f}]",
            ]
            for r in rows
        ),
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
