"""What numba compiles: nothing is fused, and machine code is kept wherever it can be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba", reason="numba is not installed: pip install 'edgemoe[numba]'")

FUSED = r"\bvfn?m(?:add|sub)|\bfn?m(?:add|sub)\b|\bfml[as]\b|llvm\.fmuladd|llvm\.fma\."
"""Fused multiply-adds of x86 and of ARM, and LLVM's own."""

SCAN = f"""
import re
import numba, numpy as np
from edgemoe.numba_backend import jit

def code_of(function):
    texts = [*function.inspect_asm().values(), *function.inspect_llvm().values()]
    assert all(texts)
    return len(re.findall({FUSED!r}, "".join(texts)))

def control(x, y):
    for i in range(y.size):
        y[i] = x[i] * x[i] + y[i]

signature = jit.types.void(jit.array_in(jit.types.float32, 1), jit.array_out(jit.types.float32, 1))
print(code_of(numba.njit(signature, fastmath=True)(control)))
print(sum(code_of(k.compiled()) for k in jit.Kernel.every), len(jit.Kernel.every))
"""

SMALL = """
import sys
from edgemoe.numba_backend.jit import helper, kernel, types

@helper
def twice(x):
    return 2 * x

@kernel(types.int64, returns=types.int64)
def small(x):
    return twice(x) + 1

assert small(20) == 41
print(sum(small.compiled().stats.cache_hits.values()))
"""


def python(*args: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *args],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_nothing_is_fused(tmp_path: Path) -> None:
    # a fresh cache directory: what comes from a cache cannot be looked at
    control, kernels = python("-c", SCAN, NUMBA_CACHE_DIR=str(tmp_path)).splitlines()
    found, count = map(int, kernels.split())
    assert count >= 15 and found == 0
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    if "fma" in flags or "asimd" in flags:
        assert int(control) > 0  # the search does find them where they are


@pytest.fixture
def module(tmp_path: Path) -> Path:
    (tmp_path / "package").mkdir()
    path = tmp_path / "package" / "small.py"
    path.write_text(SMALL)
    return path


def test_machine_code_is_kept_beside_the_source(module: Path) -> None:
    assert python(str(module), NUMBA_CACHE_DIR="") == "0\n"
    assert python(str(module), NUMBA_CACHE_DIR="") == "1\n"
    for kept in module.parent.glob("__pycache__/*.nb*"):
        kept.write_bytes(kept.read_bytes()[:20])
    assert python(str(module), NUMBA_CACHE_DIR="") == "0\n"  # damaged: compiled anew


def test_machine_code_of_a_read_only_package_goes_to_the_user(module: Path, tmp_path: Path) -> None:
    (module.parent / "__pycache__").write_text("a file where the directory should be")
    places = {"NUMBA_CACHE_DIR": "", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    assert python(str(module), **places) == "0\n"
    assert list((tmp_path / "cache").rglob("*.nbc"))
    assert python(str(module), **places) == "1\n"


def test_without_any_place_for_it_all_is_compiled_anew(module: Path) -> None:
    blocked = module.parent / "__pycache__"
    blocked.write_text("a file where the directory should be")
    for _ in range(2):
        out = python(str(module), NUMBA_CACHE_DIR="", XDG_CACHE_HOME=str(blocked / "cache"))
        assert out == "0\n"
