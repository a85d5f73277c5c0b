"""The C tests on instruction sets this machine lacks: NEON under qemu, AVX-512 through SIMDe.

They compare every kernel with the scalar body and replay a recorded layer, bit for bit.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RECORDING = ROOT / "tests" / "golden" / "layer.bin"
ARM = [
    "-DCMAKE_SYSTEM_NAME=Linux",
    "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
    "-DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc",
    "-DCMAKE_EXE_LINKER_FLAGS=-static",
]


def tool(name: str) -> str:
    """A program beside this Python or on the PATH."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def build(directory: Path, *options: str) -> None:
    common = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", "-DEDGEMOE_TESTS=ON"]
    source = ["-S", str(ROOT / "native"), "-B", str(directory), "-DEDGEMOE_WERROR=ON"]
    for command in (
        [tool("cmake"), *source, *common, *options],
        [tool("cmake"), "--build", str(directory)],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def ran(directory: Path, *emulator: str) -> set[str]:
    """Instruction sets on which all C tests passed."""
    names = []
    for command in (["test_native"], ["test_attention"], ["test_layer", str(RECORDING)]):
        done = subprocess.run(
            [*emulator, str(directory / command[0]), *command[1:]], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        print(" ".join([*emulator, command[0]]), "|", done.stdout.replace("\n", "; "))
        names.append(set(re.findall(r"^ran: (\S+)", done.stdout, re.MULTILINE)))
    assert names[0] == names[1] == names[2]
    return names[0]


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tool("aarch64-linux-gnu-gcc")
    directory = tmp_path_factory.mktemp("arm")
    build(directory, *ARM)
    return directory


@pytest.mark.parametrize(
    ("cpu", "bodies"),
    [
        ("cortex-a72", {"neon"}),
        ("cortex-a76", {"neon", "neon-dotprod"}),
        ("max", {"neon", "neon-dotprod", "neon-i8mm"}),
    ],
)
def test_neon_under_qemu(arm: Path, cpu: str, bodies: set[str]) -> None:
    """Each processor gets just the bodies it has instructions for."""
    assert ran(arm, tool("qemu-aarch64"), "-cpu", cpu) == bodies | {"scalar"}


def test_avx512_through_simde(tmp_path: Path) -> None:
    if not Path("/usr/include/simde/x86/avx512.h").exists():
        pytest.skip("SIMDe's headers (libsimde-dev) are not installed")
    build(tmp_path, "-DEDGEMOE_SIMDE=ON")
    assert {"avx512vnni-simde", "avx2", "scalar"} <= ran(tmp_path)


def test_recording_is_of_this_code() -> None:
    """The layer that the C tests replay is what the kernels compute now."""
    from record_layer import encode, record

    assert encode(record()) == RECORDING.read_bytes()
