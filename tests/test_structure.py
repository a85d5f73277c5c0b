"""The house rules that code can check: direction of imports, public names, file sizes."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import edgemoe

PACKAGE = Path(edgemoe.__file__).parent

# A module may import only from lower ranks; equal ranks only where ALLOWED names the pair.
RANK = {
    "errors": -1,
    "closing": 0,
    "types": 0,
    "cpus": 0,
    "layout": 1,
    "kv_layout": 1,
    "numba_backend": 1,
    "kernels": 2,
    "reference": 2,
    "reference_attention": 2,
    "reference_ggml": 2,
    "store": 3,
    "arch": 2,
    "checkpoint": 4,
    "mwq": 5,
    "loader": 5,
    "hebf": 5,
    "perfmodel": 5,
    "cpu_attn": 5,
    "tokenizer": 5,
    "sampling": 5,
    "chat_sandbox": 5,
    "chat": 6,
    "model": 6,
    "pipeline": 6,
    "weights": 7,
    "opened": 7,
    "planning": 7,
    "generation": 7,
    "evaluate": 7,
    "export": 8,
    "multiple_choice": 8,
    "reference_cache": 8,
    "reference_logits": 9,
    "calibration": 10,
    "window_logits": 9,
    "layer_costs": 10,
    "engine": 8,
    "bench": 11,
}
TOP = 11  # cli and what only it uses
SIBLINGS = {"mwq", "loader", "hebf", "perfmodel", "cpu_attn"}


def rooms() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Rooms that a file imports from, its own left out."""
    package = ("edgemoe", *path.relative_to(PACKAGE).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "edgemoe" and len(parts) > 1:
                found.add(parts[1])
    return found - {room(path), "__version__"}


@pytest.mark.parametrize("path", rooms(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    here = room(path)
    for other in imports(path):
        if other in ("_native", "numba_backend"):
            assert here == "kernels", f"{path}: only kernels/ imports the backends"
        if other == "_native":
            continue
        assert RANK.get(other, TOP) < RANK.get(here, TOP + 1), f"{path} imports {other}"
        assert not {here, other} <= SIBLINGS, f"{path}: siblings never import each other"
        assert not (here == "model" and other == "pipeline")
        if other == "hebf" or (other == "loader" and here not in ("engine", "planning", "weights")):
            assert here == "pipeline" or RANK.get(here, TOP) >= TOP, f"{path} imports {other}"


def test_every_room_is_ranked() -> None:
    """A new module has to take its place in the order above; what is left is the command line."""
    unranked = {room(p) for p in rooms()} - set(RANK)
    assert unranked <= {"cli", "terminal"}, unranked


def test_no_torch_at_run_time() -> None:
    for path in rooms():
        for name in ("torch", "transformers"):
            assert f"import {name}" not in path.read_text(), path


def test_public_names() -> None:
    assert sorted(edgemoe.__all__) == [
        "CheckpointError",
        "ChecksumError",
        "Completion",
        "EdgeMoEError",
        "Generation",
        "KernelError",
        "MemoryBudgetError",
        "Model",
        "ModelConfig",
        "OutputError",
        "RunPlan",
        "SamplingParams",
        "Stats",
        "StoreError",
        "Streaming",
        "UnsupportedError",
        "UsageError",
        "__version__",
        "convert",
        "load",
    ]
    for name in edgemoe.__all__:
        assert getattr(edgemoe, name) is not None
    with pytest.raises(AttributeError):
        edgemoe.nosuch  # noqa: B018


def test_import_is_cheap() -> None:
    code = "import sys, edgemoe; print('numpy' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_no_file_is_too_long() -> None:
    for path in rooms():
        lines = len(path.read_text().splitlines())
        assert lines <= 500, f"{path} has {lines} lines: what does it do that another room should?"
