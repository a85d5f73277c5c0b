"""How many threads should compute: performance cores, the affinity mask, the cgroup's CPU quota."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

BLAS_THREADS = (
    "OPENBLAS_NUM_THREADS",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
)
"""Environment variables that tell BLAS libraries how many threads to start."""

FAST = 0.8
"""A CPU below this share of the fastest one's capacity is not a performance core: turbo bins of
equal cores lie closer together, efficiency cores further apart."""


def usable(root: Path = Path("/")) -> int:
    """CPUs worth computing on, at least 1: one slow core would keep all others waiting.

    root: where /sys and /proc are looked for.
    """
    if hasattr(os, "sched_getaffinity"):
        cpus = sorted(os.sched_getaffinity(0))
    else:
        cpus = list(range(os.cpu_count() or 1))
    count = performance_cores(cpus, root)
    quota = cpu_quota(root)
    return count if quota is None else max(1, min(count, int(quota)))


def performance_cores(cpus: list[int], root: Path = Path("/")) -> int:
    """How many of the CPUs are about as fast as the fastest; all where that is not known."""
    for name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        speeds = [_number(root / f"sys/devices/system/cpu/cpu{i}" / name) for i in cpus]
        known = [s for s in speeds if s is not None]
        if known and len(known) == len(cpus):
            return sum(s >= FAST * max(known) for s in known)
    return len(cpus)


def cpu_quota(root: Path = Path("/")) -> float | None:
    """CPUs' worth of time that the tightest cgroup of this process allows; None: no limit."""
    quotas = list(_quotas(root))
    return min(quotas) if quotas else None


def _quotas(root: Path) -> Iterator[float]:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / ("sys/fs/cgroup/cpu" if controllers else "sys/fs/cgroup")
        here = top / path.lstrip("/")
        # In a container the path may be the host's: look at whatever is visible.
        for directory in (here, *here.parents):
            if controllers:
                limit = _number(directory / "cpu.cfs_quota_us")
                period = _number(directory / "cpu.cfs_period_us")
            else:
                limit, period = _pair(directory / "cpu.max")
            if limit is not None and period and limit > 0:  # -1 in v1: no limit
                yield limit / period
            if directory == top:
                break


def _number(path: Path) -> float | None:
    try:
        return float(path.read_text())
    except (OSError, ValueError):
        return None


def _pair(path: Path) -> tuple[float | None, float | None]:
    """The two numbers of cpu.max; "max 100000" has none."""
    try:
        limit, period = path.read_text().split()
        return float(limit), float(period)
    except (OSError, ValueError):
        return None, None
