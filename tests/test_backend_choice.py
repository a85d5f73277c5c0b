"""Which backend runs, and what is said when one is missing; each case in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

PROMPT = "Once upon a time"
NEEDS_NUMBA = pytest.mark.skipif(
    importlib.util.find_spec("numba") is None, reason="numba is not installed"
)
NO_EXTENSION = "import sys; sys.modules['edgemoe._native'] = None\n"
NO_NUMBA = "import sys; sys.modules['numba'] = None\n"
GENERATE = f"""
import edgemoe
with edgemoe.load(mem="600M", bits=4, threads=2) as model:
    text = model.generate({PROMPT!r}, max_tokens=24, sampling=edgemoe.SamplingParams())
print(text.token_ids)
assert text.stats.peak_rss_bytes <= 600 << 20, text.stats
"""
COMMAND = f"""
from edgemoe.cli import main
sys.exit(main(["run", "--temp", "0", "--bits", "4", "-n", "24", {PROMPT!r}]))
"""


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("EDGEMOE_")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def works(code: str, **environment: str) -> tuple[str, str]:
    done = python(code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def says(code: str, exit_code: int, *words: str, **environment: str) -> None:
    """The command line fails with one line that has all the words."""
    done = python("import sys\n" + code + COMMAND, **environment)
    assert done.returncode == exit_code, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("edgemoe: error: "), done.stderr
    for word in words:
        assert word in lines[0]


LOADED = "print([m for m in ('numba', 'llvmlite', 'edgemoe._native') if m in sys.modules])"


def test_numba_is_never_imported_on_the_native_path() -> None:
    for environment in ({}, {"EDGEMOE_BACKEND": "native"}, {"EDGEMOE_ISA": "scalar"}):
        out, err = works("import sys\n" + GENERATE + LOADED, **environment)
        assert out.splitlines()[1] == "['edgemoe._native']"
        assert err == ""


@NEEDS_NUMBA
def test_numba_when_asked_for() -> None:
    want = works(GENERATE)[0]
    out, err = works("import sys\n" + GENERATE + LOADED, EDGEMOE_BACKEND="numba")
    assert out == want + "['numba', 'llvmlite']\n"
    assert err == ""


@NEEDS_NUMBA
def test_a_missing_extension_warns_in_one_line_and_runs() -> None:
    want = works(GENERATE)[0]
    out, err = works(NO_EXTENSION + GENERATE)
    assert out == want
    (line,) = err.splitlines()
    assert "RuntimeWarning" in line and "numba" in line and "pip install ." in line

    want, figures = works("import sys\n" + COMMAND)
    out, err = works(NO_EXTENSION + COMMAND)
    assert out == want
    assert len(err.splitlines()) == len(figures.splitlines()) + 1
    assert err.startswith(line)


def test_neither_backend_names_both_remedies() -> None:
    says(NO_EXTENSION + NO_NUMBA, 1, "pip install .", "C compiler", "edgemoe[numba]")
    done = python(NO_EXTENSION + NO_NUMBA + "import edgemoe; edgemoe.load()")
    assert done.stderr.splitlines()[-1].startswith("edgemoe.errors.EdgeMoEError: ")


def test_a_forced_backend_that_is_missing() -> None:
    words = ("EDGEMOE_BACKEND=native", "pip install .")
    says(NO_EXTENSION, 1, *words, EDGEMOE_BACKEND="native")
    says(NO_NUMBA, 1, "EDGEMOE_BACKEND=numba", "edgemoe[numba]", EDGEMOE_BACKEND="numba")


def test_an_unknown_backend() -> None:
    for name in ("cuda", "NUMBA", "native,numba"):
        words = (f"EDGEMOE_BACKEND={name}", "native or numba")
        says("", 2, *words, EDGEMOE_BACKEND=name)


@NEEDS_NUMBA
def test_numba_has_one_instruction_set() -> None:
    says("", 2, "EDGEMOE_ISA=scalar", "numba", EDGEMOE_BACKEND="numba", EDGEMOE_ISA="scalar")
    code = (
        "from edgemoe import kernels; print(kernels.backend(), kernels.isa(), kernels.isa_names())"
    )
    out, _ = works(code, EDGEMOE_BACKEND="numba", EDGEMOE_ISA="numba")
    assert out == "numba numba ['numba']\n"
    says("", 2, "EDGEMOE_ISA=numba", "native", EDGEMOE_ISA="numba")
