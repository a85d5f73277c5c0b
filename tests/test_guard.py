"""The watch over the ceiling: what it asks back, what it reads, and a process that grows."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from store_samples import WIDE, make_store

from edgemoe.errors import UsageError
from edgemoe.loader import budget
from edgemoe.loader.guard import Guard, memory_bytes

MIB = 1 << 20


@pytest.mark.parametrize(
    ("used", "unfilled", "excess"),
    [
        (800, 0, 0),
        (900, 0, 0),  # as planned
        (950, 0, 0),  # half the margin is left
        (951, 0, 51),
        (850, 100, 0),
        (850, 101, 51),
        (1200, 0, 300),
        (0, 2000, 1100),
    ],
)
def test_excess(used: int, unfilled: int, excess: int) -> None:
    assert Guard(1000, 100, lambda: used).excess(unfilled) == excess


def test_what_was_asked_back_is_enough_for_a_while() -> None:
    used, arena, asked = 900, 500, []
    guard = Guard(1000, 100, lambda: used)
    for _ in range(200):
        used += 1
        excess = guard.excess(0)
        if excess:
            asked.append(excess)
            arena, used = arena - excess, used - excess
        assert used <= 950
    assert asked == [51, 51, 51]
    assert arena == 500 - 153


@pytest.mark.parametrize("margin", [0, -1, 1000, 2000])
def test_a_margin_that_is_none(margin: int) -> None:
    with pytest.raises(UsageError, match="margin must be 1 to 999 bytes"):
        Guard(1000, margin)


CHILD = "import sys; kept = bytearray(32 << 20); print(1, flush=True); sys.stdin.read()"
GRANDCHILD = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {CHILD!r}])"


@pytest.mark.parametrize("code", [CHILD, GRANDCHILD], ids=["child", "grandchild"])
def test_children_are_counted(code: str) -> None:
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.read(1)
        others = memory_bytes() - budget.rss_bytes()
        child.communicate()
    assert 32 * MIB < others < 128 * MIB
    assert memory_bytes() - budget.rss_bytes() < 16 * MIB


GROWS = """
import sys
import numpy as np
from edgemoe.errors import MemoryBudgetError
from edgemoe.loader import budget
from edgemoe.loader.guard import Guard
from edgemoe.loader.slots import SegmentSlots
from edgemoe.store import Store

MIB = 1 << 20
with Store.open(sys.argv[1]) as store:
    ceiling = budget.rss_bytes() + 48 * MIB
    slots = SegmentSlots(store, 40 * MIB)
    guard = Guard(ceiling, 8 * MIB)
    keys = iter([(layer, e, i) for layer in slots.layers for e in range(12) for i in range(5)])
    live, grown, shrunk = [], [], 0
    try:
        for key in keys:
            slots.commit(*key)
            slots.view(*key)[:] = 1
            slots.landed(*key)
            live.append(key)
    except MemoryBudgetError:
        pass
    for _ in range(15):
        grown.append(np.ones(2 * MIB, np.uint8))
        excess = guard.excess(slots.budget_bytes - slots.resident_bytes)
        if excess and sys.argv[2] == "guarded":
            size = slots.budget_bytes - excess
            while slots.used_bytes + slots.table_bytes > size:
                slots.evict(*live.pop())
            slots.resize(size)
            shrunk += 1
    print(budget.peak_rss_bytes() - ceiling, shrunk)
"""


@pytest.mark.parametrize("how", ["guarded", "unguarded"])
def test_a_process_that_grows_beside_its_arena(how: str, tmp_path: Path) -> None:
    """30 MiB more than planned: the arena makes way for it; without the guard it does not fit."""
    sample = make_store(tmp_path / "s.emoe", replace(WIDE, num_experts=12))
    command = [sys.executable, "-c", GROWS, str(sample.path), how]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    over, shrunk = map(int, out.stdout.split())
    if how == "guarded":
        assert over <= 0
        assert 3 <= shrunk <= 10
    else:
        assert over > 16 * MIB
