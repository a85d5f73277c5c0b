"""The default number of threads: performance cores, the affinity mask, the CPU quota."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import edgemoe
from edgemoe import cpus, kernels


def machine(root: Path, name: str, *speeds: int) -> list[int]:
    """CPUs with these speeds under a /sys of their own."""
    for i, speed in enumerate(speeds):
        path = root / f"sys/devices/system/cpu/cpu{i}" / name
        path.parent.mkdir(parents=True)
        path.write_text(f"{speed}\n")
    return list(range(len(speeds)))


@pytest.mark.parametrize(
    ("speeds", "count"),
    [
        ((1024,) * 4, 4),
        ((1024, 1010, 1010, 446, 446, 446), 3),  # one prime core, two big, three little
        ((446, 446, 446, 446), 4),
        ((1024,), 1),
    ],
)
def test_capacities_of_arm(tmp_path: Path, speeds: tuple[int, ...], count: int) -> None:
    assert cpus.performance_cores(machine(tmp_path, "cpu_capacity", *speeds), tmp_path) == count


def test_frequencies_of_hybrids(tmp_path: Path) -> None:
    found = machine(
        tmp_path, "cpufreq/cpuinfo_max_freq", 5_200_000, 5_000_000, 3_900_000, 3_900_000
    )
    assert cpus.performance_cores(found, tmp_path) == 2
    assert cpus.performance_cores(found[2:], tmp_path) == 2  # only they may be used
    assert cpus.performance_cores([*found, 9], tmp_path) == 5  # one is not known: all count


def test_unknown_speeds_count_every_cpu(tmp_path: Path) -> None:
    assert cpus.performance_cores([0, 1, 5], tmp_path) == 3


def cgroup(root: Path, lines: str, **files: str) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(lines)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("_max", ".max")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_quota_of_the_tightest_group(tmp_path: Path) -> None:
    cgroup(
        tmp_path,
        "0::/a/b\n",
        cpu_max="max 100000\n",
        a__cpu_max="150000 100000\n",
        a__b__cpu_max="300000 100000\n",
    )
    assert cpus.cpu_quota(tmp_path) == 1.5


def test_quota_of_version_1(tmp_path: Path) -> None:
    cgroup(tmp_path, "7:cpu,cpuacct:/job\n3:memory:/x\n")
    directory = tmp_path / "sys/fs/cgroup/cpu/job"
    directory.mkdir(parents=True)
    (directory / "cpu.cfs_quota_us").write_text("-1\n")
    (directory / "cpu.cfs_period_us").write_text("100000\n")
    assert cpus.cpu_quota(tmp_path) is None
    (directory / "cpu.cfs_quota_us").write_text("250000\n")
    assert cpus.cpu_quota(tmp_path) == 2.5


def test_no_cgroup_is_no_quota(tmp_path: Path) -> None:
    assert cpus.cpu_quota(tmp_path) is None


def test_usable_is_the_least_of_them(tmp_path: Path) -> None:
    mask = len(os.sched_getaffinity(0))
    assert cpus.usable(tmp_path) == mask
    cgroup(tmp_path, "0::/\n", cpu_max="50000 100000\n")
    assert cpus.usable(tmp_path) == 1  # a share of one CPU is still one thread
    assert 1 <= kernels.default_threads() <= mask


def test_the_mask_is_honoured() -> None:
    mask = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(mask)})
        assert kernels.default_threads() == 1
    finally:
        os.sched_setaffinity(0, mask)


def test_threads_are_counted_and_the_limit_is_named() -> None:
    before = len(os.listdir("/proc/self/task"))
    pool = kernels.new_pool(5)
    assert len(os.listdir("/proc/self/task")) in (before, before + 4)  # numba's start when used
    del pool
    with pytest.raises(edgemoe.UsageError, match="1024"):
        edgemoe.load(threads=10_000)


@pytest.mark.skipif(kernels.backend() != "native", reason="of the native pool")
def test_an_idle_pool_uses_no_cpu() -> None:
    pool = kernels.new_pool(4)
    data = np.zeros(1 << 20, "u1")
    aligned = data[-data.ctypes.data % 64 :][: 1 << 19]
    kernels.stream_read(pool, aligned)
    time.sleep(0.05)
    used = time.process_time()
    threading.Event().wait(0.5)
    assert time.process_time() - used < 0.1
