"""`edgemoe bench`: the command, its progress, and the figures as a table or as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError
from .options import early, loading, number

if TYPE_CHECKING:
    from ..bench import Bench, LlamaCppBench, Spread
    from ..bench.result import Reading

BUSY = 0.2
"""CPUs' worth of other programs' time from which the figures come with a warning."""


@click.command(
    short_help="Measure how fast a store runs here.",
    epilog="""\b
Examples:
  edgemoe bench                                  the bundled model
  edgemoe bench olmoe.emoe --bits 4 -t 2         at 4 bits on 2 threads
  edgemoe bench olmoe.emoe -p 0 -n 128           decoding only
  edgemoe bench olmoe.emoe --vs llama.cpp --gguf olmoe-Q4_K.gguf
  edgemoe bench olmoe.emoe --json | jq .decode.share.median
""",
)
@click.argument("store", metavar="[STORE]", required=False)
@click.option(
    "-p",
    "--prompt-tokens",
    callback=number(0, 2**31 - 1, whole=True),
    metavar="N",
    default="512",
    show_default=True,
    help="Tokens to prefill; 0 leaves prefill out.",
)
@click.option(
    "-n",
    "--generated-tokens",
    callback=number(0, 2**31 - 1, whole=True),
    metavar="N",
    default="64",
    show_default=True,
    help="Tokens to decode one by one; 0 leaves decoding out.",
)
@click.option(
    "--rounds",
    callback=number(1, 10000, whole=True),
    metavar="N",
    default="5",
    show_default=True,
    help="Times that everything is measured, in turn.",
)
@click.option(
    "--steps",
    callback=number(1, 2**31 - 1, whole=True),
    metavar="N",
    help="Feed tokens 0, 1, 2, ... modulo N, for a model that replays a trace of N steps.",
)
@loading
@click.option(
    "--policy",
    type=click.Choice(("worth", "lru", "lfu")),
    default="worth",
    show_default=True,
    help="Which experts stay in memory: those worth most, used last, or used most.",
)
@click.option(
    "--order",
    type=click.Choice(("shortest", "hebf", "fifo")),
    default="shortest",
    show_default=True,
    help="What is read first: what ends the layer soonest, the hottest bits, or what is demanded "
    "first.",
)
@click.option(
    "--profile",
    metavar="FILE.npy",
    help="EdgeMoE's choices instead: uses of each expert, [layers, experts], decide for good what "
    "is read at start and kept; with --mean-bits, sensitivities decide the bits of each expert.",
)
@early
@click.option("--serial", is_flag=True, help="Read what a layer needs, then compute; no overlap.")
@click.option("--vs", type=click.Choice(["llama.cpp"]), help="Measure llama.cpp in turn with us.")
@click.option("--gguf", metavar="FILE", help="The same model for llama.cpp (see edgemoe export).")
@click.option(
    "--llama-python",
    metavar="PYTHON",
    help="A Python with llama-cpp-python.  [default: EDGEMOE_LLAMA_PYTHON, else edgemoe's own]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with every figure.")
def bench(
    store: str | None,
    vs: str | None,
    gguf: str | None,
    llama_python: str | None,
    as_json: bool,
    policy: str,
    order: str,
    serial: bool,
    look_ahead: bool,
    profile: str | None,
    preload: bool,
    **settings: Any,
) -> int:
    """Measure STORE, or the bundled model: tokens a second of prefill and of decoding.

    Every round feeds the same tokens, drawn with the frequencies of words, to an empty sequence.
    Beside the rates stand what limits them, measured in the same rounds: how fast the machine
    reads memory, and how fast it multiplies 8-bit integers. p10 and p90 are over the rounds.

    With --vs llama.cpp both models are in memory, and --mem holds for edgemoe alone. llama.cpp gets
    the same tokens and threads; ratios are to its better setting of weight repacking.
    """
    if vs is not None and gguf is None:
        raise UsageError(
            "--vs llama.cpp needs --gguf FILE, the same model: edgemoe export makes one"
        )
    if vs is None and (gguf is not None or llama_python is not None):
        raise UsageError("--gguf and --llama-python are for --vs llama.cpp: give that too")
    from .long_job import progress
    from .model_path import require_store

    if store is not None:
        require_store(store)
    from ..bench import bench as measure
    from ..types import Streaming

    settings["streaming"] = Streaming(
        policy,
        order,
        not serial,
        look_ahead,
        preload,
        profile=None if profile is None else Path(profile),
    )
    with progress("bench") as report:
        result = measure(store, gguf=gguf, llama_python=llama_python, progress=report, **settings)
    print(json.dumps(result.as_dict()) if as_json else "\n".join(text(result)))
    return 0


def text(result: Bench) -> list[str]:
    """The lines of the human form."""
    machine, memory = result.machine, result.memory
    rows: list[tuple[str, Spread, str]] = []
    if result.prefill is not None:
        p = result.prefill
        rows += [
            (f"prefill of {result.prompt_tokens}, tokens/s", p.tok_s, ".1f"),
            ("  10^9 multiply-adds/s", p.gmac_s, ".1f"),
            ("  share of the int8 peak", p.share, ".1%"),
            *_reading([r.prefill for r in result.rounds], result.prompt_tokens),
        ]
    if result.decode is not None:
        d = result.decode
        rows += [
            (f"decoding {result.generated_tokens}, tokens/s", d.tok_s, ".2f"),
            ("  GB/s of weights", d.gb_s, ".2f"),
            ("  share of reading memory", d.share, ".1%"),
            *_reading([r.decode for r in result.rounds], result.generated_tokens),
        ]
    other = result.llama_cpp
    if other is not None:
        rows += _theirs(other)
    per_token = result.bytes_per_token
    experts = f"{result.bits}-bit experts"
    if result.mean_bits is not None:
        experts = f"experts of {result.mean_bits:g} bits on average"
    return [
        f"{os.path.basename(result.model)}: {experts}, {result.dense_bits}-bit "
        f"dense weights, {result.kv_type} keys and values; {machine.threads} threads, "
        f"{machine.isa}, {machine.cpu}",
        f"{len(result.rounds)} rounds, tokens: {result.tokens}",
        "",
        *_table(rows),
        "",
        f"a token reads {per_token.total / 1e6:.1f} MB of weights: experts "
        f"{per_token.experts / 1e6:.1f}, dense {per_token.dense / 1e6:.1f}, head "
        f"{per_token.head / 1e6:.1f}, float32 {per_token.float32 / 1e6:.1f}",
        *(
            [f"llama.cpp {other.version} reads {other.bytes_per_token / 1e6:.1f} MB"]
            if other is not None and other.bytes_per_token is not None
            else []
        ),
        f"peak memory {memory.peak_rss_bytes / 1e6:.0f} MB, of which weights "
        f"{memory.weights_bytes / 1e6:.0f} MB, for experts {memory.cache_bytes / 1e6:.0f} MB",
        *_warning(result.others_cpus.median),
    ]


def _warning(others_cpus: float) -> list[str]:
    if others_cpus < BUSY:
        return []
    return [
        f"other programs used {others_cpus:.1f} CPUs meanwhile: repeat this when they are idle, "
        "threads that have to share a CPU hold up all others"
    ]


def _theirs(other: LlamaCppBench) -> list[tuple[str, Spread, str]]:
    rows = []
    for name, run in other.runs.items():
        if run.prefill_tok_s is not None:
            rows.append((f"llama.cpp, {name}, prefill", run.prefill_tok_s, ".1f"))
        if run.decode_tok_s is not None:
            rows.append((f"llama.cpp, {name}, decoding", run.decode_tok_s, ".2f"))
    for what, ratio in (("prefill", other.prefill), ("decoding", other.decode)):
        if ratio is not None:
            rows.append((f"{what} against {ratio.against}", ratio.ratio, ".2fx"))
    return rows


def _reading(parts: Sequence[Reading], tokens: int) -> list[tuple[str, Spread, str]]:
    """What was read of experts, in a part of each round; nothing where all were in memory."""
    if not any(part.bytes_read for part in parts):
        return []
    from ..bench import Spread

    return [
        ("  MB read a token", Spread.of([p.bytes_read / tokens / 1e6 for p in parts]), ".1f"),
        ("  hits, by bytes", Spread.of([p.hit_rate for p in parts]), ".1%"),
        ("  mean bits", Spread.of([p.mean_bits for p in parts]), ".2f"),
        ("  waited for reads, s", Spread.of([p.unhidden_wait_s for p in parts]), ".2f"),
    ]


def _table(rows: list[tuple[str, Spread, str]]) -> list[str]:
    width = max(len(name) for name, _, _ in rows)
    lines = [f"{'':{width}}  {'p10':>9}  {'median':>9}  {'p90':>9}"]
    for name, spread, how in rows:
        unit = "x" if how.endswith("x") else ""
        values = (spread.p10, spread.median, spread.p90)
        cells = [f"{format(value, how.removesuffix('x')) + unit:>9}" for value in values]
        lines.append("  ".join([name.ljust(width), *cells]))
    return lines
