"""What `edgemoe eval` shows: progress while it runs, figures as lines, a clean end when stopped."""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ..loader.budget import format_size
from ..reference_logits import TOP

LINE_EVERY_S = 10.0
"""Pause between progress lines where stderr is no terminal."""


def lines(out: Mapping[str, Any]) -> Iterator[str]:
    """The figures of an evaluation, for people."""
    yield from _setting_lines(out, out)
    other = out.get("versus")
    if other is not None:
        yield from _setting_lines(other, out)
        bits = out.get("mean_bits_wanted", out["bits"])
        yield f"{bits:g} against {other['bits']} bits, paired, 95 % intervals:"
        for name, compared in other["paired"].items():
            nested = compared if name in ("lambada", "piqa") else {"": compared}
            for part, c in nested.items():
                yield _compared_line(f"{name} {part}".strip(), c)


def _setting_lines(out: Mapping[str, Any], common: Mapping[str, Any]) -> Iterator[str]:
    experts = f"{out['bits']}-bit experts"
    if "mean_bits_wanted" in out:
        experts = f"experts of {out['mean_bits_wanted']:g} bits on average"
    yield f"{experts}, {out['dense_bits']}-bit dense, {out['seconds']:.1f} s:"
    if "ppl" in out:
        yield from _text_lines(out, common)
    for name in ("lambada", "piqa"):
        if name in out:
            yield from _task_lines(name, out[name])
    if out["bytes_read"]:
        size, hits = format_size(out["bytes_read"]), 100 * out["hit_rate"]
        waited = out["unhidden_wait_s"]
        yield f"  read             {size}, hits {hits:.0f} %, waited {waited:.1f} s"
    if out["mean_bits"] != out["bits"]:
        yield (
            f"  mean bits        {out['mean_bits']:.3f}, by gate weight "
            f"{out['gate_weighted_bits']:.3f}, "
            f"had all been in memory {out['wished_mean_bits']:.3f}"
        )


def _text_lines(out: Mapping[str, Any], common: Mapping[str, Any]) -> Iterator[str]:
    ctx = common["ctx"]
    yield f"  scored           {out['tokens']} tokens in {out['windows']} windows of {ctx}"
    yield f"  perplexity       {out['ppl']:.4f} +- {out['ppl_se']:.4f}"
    yield f"  bits per byte    {out['bits_per_byte']:.4f} +- {out['bits_per_byte_se']:.4f}"
    if "kld" not in out:
        return
    change = 100 * (out["ppl"] / out["ref_ppl"] - 1)
    same, rms = 100 * out["same_top"], 100 * out["rms_delta_p"]
    yield (
        f"  reference        perplexity {out['ref_ppl']:.4f} +- {out['ref_ppl_se']:.4f}, "
        f"so {change:+.3f} %"
    )
    yield f"  KL divergence    {out['kld']:.6f} +- {out['kld_se']:.6f}"
    yield f"  99th percentile  {out['kld_p99']:.6f} +- {out['kld_p99_se']:.6f}"
    yield f"  same top token   {same:.3f} % +- {100 * out['same_top_se']:.3f}"
    yield f"  RMS change of p  {rms:.3f} % +- {100 * out['rms_delta_p_se']:.3f}"
    if out["ref_rest"]:
        yield (
            f"  (of the reference, the {TOP} likeliest tokens are kept; all others, "
            f"{100 * out['ref_rest']:.4f} % of its probability, count as one in the divergence)"
        )


def _task_lines(name: str, out: Mapping[str, Any]) -> Iterator[str]:
    yield f"  {name}: {out['questions']} questions, 95 % intervals"
    for key, title in (
        ("acc", "accuracy"),
        ("acc_norm", "accuracy per byte"),
        ("ppl", "perplexity"),
    ):
        if key not in out:
            continue
        scale, unit = (1, "") if key == "ppl" else (100, " %")
        low, high = scale * out[f"{key}_low"], scale * out[f"{key}_high"]
        line = f"    {title:18}{scale * out[key]:.2f}{unit} [{low:.2f}, {high:.2f}]"
        if "ref" in out:
            line += f", reference {scale * out['ref'][key]:.2f}{unit}"
        yield line
    for key, compared in out.get("against_ref", {}).items():
        yield _compared_line(f"against the reference, {key}", compared, "    ")


def _compared_line(name: str, c: Mapping[str, Any], indent: str = "  ") -> str:
    line = (
        f"{indent}{name}: difference {c['difference']:.6f} "
        f"[{c['difference_low']:.6f}, {c['difference_high']:.6f}]"
    )
    if c.get("ratio") is not None:
        line += f", ratio {c['ratio']:.4f} [{c['ratio_low']:.4f}, {c['ratio_high']:.4f}]"
    if "p" in c:
        line += f", McNemar p {c['p']:.3f}"
    return line


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Share done and time left on stderr: in place on a terminal, else a line now and then."""
    start = last = time.monotonic()
    here = sys.stderr.isatty()

    def show(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < (0.1 if here else LINE_EVERY_S):
            return
        last = now
        left = math.ceil((now - start) * (total - done) / max(done, 1))
        text = f"{what}: {100 * done // max(total, 1)} %, {left} s left"
        sys.stderr.write(f"\r{text}\033[K" if here else f"{text}\n")
        sys.stderr.flush()

    try:
        yield show
    finally:
        if here:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM end the work by an exception, so that half-written files are removed."""
    mine = threading.current_thread() is threading.main_thread()
    if not mine or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
