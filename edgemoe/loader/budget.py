"""Memory: sizes as people write them, ceilings, and what this process uses (DESIGN, decision 4)."""

from __future__ import annotations

import ctypes
import os
import re
import resource
from pathlib import Path

import psutil

from ..errors import UsageError

_UNITS = {"": 1, "B": 1}
for _i, _p in enumerate("KMGT", start=1):
    _UNITS[_p] = _UNITS[f"{_p}IB"] = 1024**_i
    _UNITS[f"{_p}B"] = 1000**_i

AUTO_SHARE = 0.7
"""Share of the memory that is free now which `--mem auto` takes."""


def parse_size(text: str | int) -> int | None:
    """Bytes of "512M", "8G", "8GB", "8GiB", "1.5G" or a plain number; None for "auto".

    K M G T and KiB MiB GiB TiB are powers of 1024, KB MB GB TB of 1000.

    Raises:
        UsageError: not a size.
    """
    if isinstance(text, int):
        size = text
    else:
        if text.strip().lower() == "auto":
            return None
        match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([A-Za-z]*)\s*", text)
        if match is None or match[2].upper() not in _UNITS:
            raise UsageError(
                f"{text!r} is not a memory size: write it as 512M, 8G, 8GB, 8GiB or auto"
            )
        size = int(float(match[1]) * _UNITS[match[2].upper()])
    if not 0 < size < 1 << 50:
        raise UsageError(f"a memory size must be above zero and below 1 PiB, got {text}")
    return size


def format_size(size: int) -> str:
    """Bytes as people read them: 1.5 GiB, 48.0 MiB; rounded up, so that giving it back suffices."""
    for unit, power in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= power:
            return f"{-(-size * 10 // power) / 10:.1f} {unit}"
    return f"{size} B"


def cgroup_limit() -> tuple[int, int] | None:
    """(limit, in use) bytes of the tightest memory cgroup this process is in; None: unlimited."""
    tightest: tuple[int, int] | None = None
    for directory, limit_name, used_name in _cgroup_directories():
        limit = _read_int(directory / limit_name)
        if limit is None or limit >= 1 << 60:  # "max" in v2, a huge number in v1
            continue
        used = _read_int(directory / used_name) or 0
        # Page cache is the kernel's to take back; it is not in use in this sense.
        used -= min(used, _cache_bytes(directory))
        if tightest is None or limit - used < tightest[0] - tightest[1]:
            tightest = (limit, used)
    return tightest


def _cgroup_directories() -> list[tuple[Path, str, str]]:
    found: list[tuple[Path, str, str]] = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = Path("/sys/fs/cgroup"), ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root = Path("/sys/fs/cgroup/memory")
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        here = root / path.lstrip("/")
        # In a container the path may be the host's: walk up to whatever is visible.
        for directory in (here, *here.parents):
            if (directory / names[0]).is_file():
                found.append((directory, *names))
            if directory == root:
                break
    return found


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _cache_bytes(directory: Path) -> int:
    total = 0
    try:
        for line in (directory / "memory.stat").read_text().splitlines():
            key, _, value = line.partition(" ")
            if key in ("inactive_file", "active_file"):
                total += int(value)
    except (OSError, ValueError):
        return 0
    return total


def auto_ceiling() -> int:
    """70 % of what is free now, in the machine or in this process's cgroup, plus what we hold."""
    free = psutil.virtual_memory().available
    group = cgroup_limit()
    if group is not None:
        free = min(free, max(group[0] - group[1], 0))
    return int(AUTO_SHARE * (free + rss_bytes()))


def resolve_ceiling(mem: str | int | None) -> int:
    """Bytes of a `--mem` value; a cgroup's own limit is a ceiling too."""
    size = None if mem is None else parse_size(mem)
    ceiling = auto_ceiling() if size is None else size
    group = cgroup_limit()
    return ceiling if group is None else min(ceiling, group[0])


def status_bytes(pid: int | str, *keys: str) -> int:
    """Sum of lines of /proc/PID/status, such as VmRSS, in bytes; OSError if it cannot be read."""
    total = 0
    with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as status:
        for line in status:
            key, _, value = line.partition(":")
            if key in keys:
                total += int(value.split()[0]) * 1024
    return total


def rss_bytes() -> int:
    """Resident memory of this process now, page tables included."""
    if os.path.exists("/proc/self/status"):
        return status_bytes("self", "VmRSS", "VmPTE")
    return int(psutil.Process().memory_info().rss)


def release_heap() -> None:
    """Give freed memory that the C library holds on to back to the system, where it can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def peak_rss_bytes() -> int:
    """Highest resident memory of this process so far (VmHWM), page tables included."""
    if os.path.exists("/proc/self/status"):
        return status_bytes("self", "VmHWM", "VmPTE")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if os.uname().sysname == "Darwin" else int(peak) * 1024
