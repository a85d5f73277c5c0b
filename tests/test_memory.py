"""The memory ceiling: sizes as written, refusals that name a figure, a peak that stays below."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import make_tiny

import edgemoe
from edgemoe.errors import MemoryBudgetError, UsageError
from edgemoe.loader import budget
from edgemoe.loader.arena import Arena
from edgemoe.perfmodel import fit
from edgemoe.types import LEVELS

RUN = """
import json, sys, edgemoe
from edgemoe.loader import budget
mem, bits, ctx, prompt = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
with edgemoe.load(mem=mem, bits=bits, ctx_size=ctx, threads=2) as model:
    sampling = edgemoe.SamplingParams(temperature=0.9, top_p=0.95, seed=1)
    generation = model.stream([7] * prompt, max_tokens=40, sampling=sampling)
    for _ in generation:
        pass
    print(json.dumps({"peak": budget.peak_rss_bytes(), "stats": generation.stats.peak_rss_bytes,
                      "budget": generation.stats.mem_budget_bytes}))
"""

ACTIVATIONS = """
import json, sys, tracemalloc, edgemoe
from edgemoe.model import Span
from edgemoe.perfmodel import fit
with edgemoe.load(json.loads(sys.argv[1]), bits=2, ctx_size=100, threads=2) as model:
    tokens = list(range(3, 103))
    for _ in range(2):  # the pool's scratch is there the second time
        span = Span(model.new_cache(), len(tokens))
        tracemalloc.start()
        model.hidden(tokens, [span])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    sampling = fit.activation_bytes(model.config, 0)
    print(json.dumps([peak, fit.activation_bytes(model.config, len(tokens)) - sampling]))
"""


def peak_of_run(mem: int, bits: int, ctx: int, prompt: int, *wrapper: str) -> dict[str, int]:
    command = [*wrapper, sys.executable, "-c", RUN, str(mem), str(bits), str(ctx), str(prompt)]
    out = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    result: dict[str, int] = json.loads(out.stdout)
    return result


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512M", 512 << 20),
        ("8G", 8 << 30),
        ("8GiB", 8 << 30),
        ("8GB", 8 * 10**9),
        ("1.5G", 3 << 29),
        ("64kib", 64 << 10),
        (" 100 MB ", 10**8),
        ("123456", 123456),
        ("1T", 1 << 40),
        ("auto", None),
    ],
)
def test_parse_size(text: str, size: int | None) -> None:
    assert budget.parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "0", "-1G", "8X", "G", "8 G B", "1e9", "nan", "9999999T", "8G8"]
)
def test_parse_size_refuses(text: str) -> None:
    with pytest.raises(UsageError):
        budget.parse_size(text)


def test_format_size_never_rounds_down() -> None:
    for size in (1, 1023, 1025, 123_456_789, 10**11 + 1):
        shown = budget.format_size(size)
        number, unit = shown.split()
        scale = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}[unit]
        assert float(number) * scale >= size
        assert float(number) * scale <= size * 1.2 + 1


def test_too_little_names_what_is_needed_and_that_suffices() -> None:
    """The refusal's figure is right: it runs there, in a fresh process, and stays below."""
    code = (
        "import edgemoe\n"
        "try: edgemoe.load(mem='1M', bits=8, ctx_size=512, threads=2)\n"
        "except edgemoe.MemoryBudgetError as e: print(e.needed_bytes, e.budget_bytes); print(e)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    numbers, message = out.stdout.splitlines()
    needed, given = map(int, numbers.split())
    assert given == 1 << 20
    assert re.search(r"needs? .*give --mem \d+M", message)
    # another process may start out some pages larger
    ceiling = needed + (2 << 20)
    result = peak_of_run(ceiling, 8, 512, 300)
    assert result["peak"] <= ceiling
    assert result["stats"] <= ceiling
    assert result["budget"] == ceiling
    with pytest.raises(MemoryBudgetError, match=r"--mem"):
        edgemoe.load(mem=needed - (40 << 20), bits=8, ctx_size=512, threads=2)


@pytest.mark.parametrize(("bits", "ctx", "prompt"), [(8, 1024, 900), (2, 256, 100)])
def test_peak_stays_below_the_ceiling(bits: int, ctx: int, prompt: int) -> None:
    result = peak_of_run(192 << 20, bits, ctx, prompt)
    assert result["peak"] <= 192 << 20


def test_survives_a_cgroup_of_exactly_the_ceiling(shared: Path) -> None:
    capped = shared / "bench" / "capped.sh"
    probe = subprocess.run(["bash", str(capped), "64M", "true"], capture_output=True, text=True)
    if os.geteuid() or probe.returncode:
        pytest.skip("memory cgroups cannot be made here")
    result = peak_of_run(160 << 20, 8, 1024, 900, "bash", str(capped), "160M")
    assert result["peak"] <= 160 << 20
    assert result["budget"] == 160 << 20


@pytest.mark.parametrize("levels", [LEVELS, LEVELS[:3]])
def test_highest_level_that_fits(levels: tuple[int, ...]) -> None:
    with edgemoe.load(mem="2G", ctx_size=256) as model:
        assert (model.plan.bits, model.plan.dense_bits) == (8, 8)
    mib = 1 << 20
    footprint = fit.Footprint(
        dense=lambda level: level * mib,
        experts=lambda level: 20 * (level + 1) * mib,
        least_cache=lambda level: (level + 1) * mib,
        whole_cache=lambda level: 21 * (level + 1) * mib,
        streaming=mib,
        kv_cache=0,
        scratch=0,
        process=0,
    )

    def chosen(ceiling: int, *wish: Any) -> tuple[int, bool]:
        got = fit.choose(
            footprint, ceiling, 64, levels, LEVELS, fit.Wish(*wish), budget.format_size
        )
        assert got.budget.needed <= ceiling
        assert got.dense_bits == (8 if got.bits == 8 else 6)
        if got.streamed:
            index = levels.index(got.bits)
            assert (index + 1) * mib <= got.budget.experts <= 21 * (index + 1) * mib
        return got.bits, got.streamed

    seen = []
    for ceiling in range(40, 160):
        try:
            seen.append(chosen(ceiling * mib))
        except MemoryBudgetError as exc:
            assert exc.needed_bytes > ceiling * mib
            assert chosen(exc.needed_bytes) == (2, True), "the floor is right"
            seen.append((0, True))
    # 4 bits are streamed until all experts fit at 2, and where even that is too much, fewer
    streamed = [(0, True), (2, True), (3, True), (4, True)]
    assert list(dict.fromkeys(seen)) == streamed + [(bits, False) for bits in levels]
    assert chosen(80 * mib, 4) == (4, True), "what is asked for is not lowered"
    assert chosen(80 * mib, None, None, True) == (levels[-1], True)
    assert chosen(200 * mib, None, None, True) == (levels[-1], False)
    assert chosen(200 * mib, 4, None, False, 7 * mib) == (4, True), "a cache is one"
    with pytest.raises(MemoryBudgetError, match="smaller --cache"):
        chosen(60 * mib, 4, None, False, 30 * mib)


@pytest.mark.parametrize("backend", ["native", "numba"])
@pytest.mark.parametrize("family", [None, "qwen3_moe", "qwen2_moe-options", "olmoe-options"])
def test_activations_are_what_a_pass_allocates(
    family: str | None, backend: str, tmp_path: Path
) -> None:
    """At most what is set aside for them, and not much less; None: the bundled model."""
    path = None
    if family is not None:
        make_tiny(tmp_path, family)
        edgemoe.convert(tmp_path, tmp_path / "x.emoe")
        path = str(tmp_path / "x.emoe")
    environment = os.environ | {"EDGEMOE_BACKEND": backend}
    command = [sys.executable, "-c", ACTIVATIONS, json.dumps(path)]
    out = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    peak, planned = json.loads(out.stdout)
    assert peak <= planned <= 1.5 * peak


def test_smallest_ceiling_is_tight() -> None:
    for bare in (10 << 20, 500 << 20, 5 << 30, 100 << 30):
        parts = fit.Budget(0, bare, 0, 0, 0, 0, fit.margin(0))
        ceiling = fit.smallest_ceiling(parts)
        assert bare + fit.margin(ceiling) <= ceiling
        assert bare + fit.margin(ceiling - (1 << 20)) > ceiling - (1 << 20)


def test_arena_hands_out_disjoint_aligned_slots() -> None:
    arena = Arena(1 << 16)
    a, b = arena.take(100), arena.take(5000, 4096)
    a[:], b[:] = 1, 2
    assert (a == 1).all()
    assert b.ctypes.data % 4096 == 0
    assert a.ctypes.data % 64 == 0
    with pytest.raises(edgemoe.KernelError):
        arena.take(1 << 16)


def test_auto_takes_a_share_of_what_is_free() -> None:
    import psutil

    assert 0 < budget.auto_ceiling() <= psutil.virtual_memory().total
    assert budget.peak_rss_bytes() >= budget.rss_bytes() > 0
