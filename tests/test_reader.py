"""The read queue: the same bytes and answers from every engine; bad arguments; memory; signals."""

from __future__ import annotations

import errno
import gc
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgemoe import kernels
from edgemoe.errors import KernelError, UsageError
from edgemoe.kernels import crc32c, dispatch, reader
from edgemoe.kernels.reader import BLOCK, Landed, Reader
from edgemoe.types import U8, U64

SIZE = 1 << 20

Open = Callable[..., Reader]


def uring_refused() -> str:
    """Why io_uring cannot be used here; empty if it can."""
    with open(os.devnull) as file:
        try:
            Reader(file.fileno(), engine="uring").close()
        except UsageError as exc:
            return str(exc)
    return ""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)
    path = tmp_path_factory.mktemp("reader") / "data"
    path.write_bytes(data.tobytes())
    return path


@pytest.fixture(params=["uring", "threads", "numba"])
def open_reader(
    request: pytest.FixtureRequest, path: Path, monkeypatch: pytest.MonkeyPatch
) -> Open:
    """Opens readers of the file, with one engine of the two native ones or the numba backend's."""
    engine: str | None = request.param
    if engine == "numba":
        pytest.importorskip("numba", reason="numba is not installed: pip install 'edgemoe[numba]'")
        from edgemoe import numba_backend

        monkeypatch.setattr(dispatch, "native", numba_backend)
        engine = "threads"
    elif kernels.backend() == "numba":
        pytest.skip("the native extension is not built")
    elif engine == "uring" and (why := uring_refused()):
        pytest.skip(why)

    def opened(**options: Any) -> Reader:
        with open(path, "rb") as file:
            return Reader(file.fileno(), engine=engine, **options)

    return opened


def aligned(size: int) -> U8:
    """Uninitialized bytes that begin at a multiple of BLOCK."""
    raw = np.empty(size + BLOCK, np.uint8)
    at = -raw.ctypes.data % BLOCK
    return raw[at : at + size]


def table(path: Path, places: list[tuple[int, int]], alignment: int) -> tuple[U64, int]:
    """Reads of these (offset, size), one behind the other in memory, tags from 0; bytes in all."""
    data = np.fromfile(path, np.uint8)
    rows, at = [], 0
    for tag, (offset, size) in enumerate(places):
        room = -(-size // alignment) * alignment
        rows.append((offset, size, crc32c(data[offset : offset + size]), at, room, tag))
        at += room
    return np.array(rows, np.uint64), at


def collect(r: Reader) -> dict[int, Landed]:
    out = {}
    while (landed := r.wait(seconds=20)) is not None:
        out[landed.tag] = landed
    return out


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("alignment", [64, BLOCK])
def test_every_engine_reads_the_same(
    open_reader: Open, path: Path, alignment: int, direct: bool
) -> None:
    rng = np.random.default_rng(alignment)
    starts = np.sort(rng.choice(SIZE // alignment, 40, replace=False)) * alignment
    ends = [*starts[1:], SIZE]
    places = [(int(a), int(rng.integers(1, b - a + 1))) for a, b in zip(starts, ends, strict=True)]
    reads, size = table(path, places, alignment)
    memory = aligned(size)
    with open_reader(direct=direct, chunk=16 * BLOCK, depth=3) as r:
        r.submit(memory, reads[::-1].copy())
        landed = collect(r)
        stats = r.stats()
    assert sorted(landed) == list(range(40))
    assert {x.status for x in landed.values()} == {reader.OK}
    data = path.read_bytes()
    for offset, n, _, at, _, _ in reads.tolist():
        assert memory[at : at + n].tobytes() == data[offset : offset + n]
    assert stats["bytes_verified"] == sum(n for _, n in places) <= stats["bytes_read"]
    assert stats["in_flight"] == stats["waiting"] == 0
    assert stats["busy_s"] > 0
    assert stats["reads"] > 0
    if alignment == BLOCK or not direct:
        assert stats["bytes_copied"] == 0


def test_what_is_wrong_is_told_of_each_read(open_reader: Open, path: Path) -> None:
    places = [(0, 5000), (8192, 100), (SIZE - 100, 100), (2 * BLOCK, 9000)]
    reads, size = table(path, places, BLOCK)
    reads[1, 2] ^= 1
    reads[2, :2] = SIZE - 100, 300
    memory = aligned(size)
    with open_reader() as r:
        r.submit(memory, reads)
        landed = collect(r)
    assert landed[0].status == landed[3].status == reader.OK
    assert landed[1][:4] == (1, reader.DAMAGED, 0, 8192)
    assert landed[2][:4] == (2, reader.TRUNCATED, 0, SIZE)


def test_when_reads_ran(open_reader: Open, path: Path) -> None:
    """On the clock of time.monotonic_ns, from the first piece of each to its last."""
    reads, size = table(path, [(0, 4 * BLOCK), (20 * BLOCK, 100), (30 * BLOCK, 100)], BLOCK)
    reads[2, 2] ^= 1  # damaged ones have times, too
    memory = aligned(size)
    # one at a time, the second and third 4 blocks' time after the first
    with open_reader(depth=1, chunk=BLOCK, bytes_per_second=4 * BLOCK / 0.2) as r:
        r.wait(seconds=0)
        before = time.monotonic_ns()
        r.submit(memory, reads)
        landed = collect(r)
        after = time.monotonic_ns()
    assert landed[2].status == reader.DAMAGED
    times = [t for i in range(3) for t in landed[i][4:]]
    assert [before, *times, after] == sorted([before, *times, after])
    assert all(r.begun_ns < r.ended_ns for r in landed.values())
    assert landed[1].begun_ns - landed[0].begun_ns > 0.15e9
    assert landed[0].ended_ns - landed[0].begun_ns < landed[1].begun_ns - landed[0].begun_ns


def test_waiting_reads_are_moved_and_taken_back(open_reader: Open, path: Path) -> None:
    """A limit that the first read uses up for hours keeps the others waiting."""
    reads, size = table(path, [(3 * BLOCK * i, BLOCK) for i in range(6)], BLOCK)
    memory = aligned(size)
    with open_reader(bytes_per_second=0.1) as r:
        r.submit(memory, reads)
        first = r.wait(seconds=20)
        assert first is not None
        assert first.tag == 0
        assert r.stats()["waiting"] == 5
        assert r.wait(1, 0.02) is None
        assert r.wait(seconds=0.02) is None
        assert r.reprioritise(4, -1)
        assert r.cancel(3)
        assert r.stats()["waiting"] == 4
        assert r.stats()["waited_s"] > 0.03
        for gone in (0, 3, 77):
            for call in (r.cancel, r.wait, lambda tag: r.reprioritise(tag, 0)):
                with pytest.raises(UsageError, match=f"no read has the tag {gone}"):
                    call(gone)
        with pytest.raises(UsageError, match="in use"):
            r.submit(memory, reads[4:5])
    with pytest.raises(UsageError, match="closed"):
        r.wait(1, 20)
    with pytest.raises(UsageError, match="closed"):
        r.submit(memory, reads)
    r.close()


def test_all_that_can_be_is_taken_back(open_reader: Open, path: Path) -> None:
    """Those that wait are forgotten; of one that was begun the rest is not read."""
    reads, size = table(path, [(0, 100), (20 * BLOCK, 3 * BLOCK), (30 * BLOCK, 100)], BLOCK)
    memory = aligned(size)
    alive = weakref.ref(memory)
    with open_reader(depth=1, chunk=BLOCK, bytes_per_second=BLOCK / 0.4) as r:
        r.submit(memory, reads)
        while r.stats()["reads"] + r.stats()["in_flight"] < 2:
            time.sleep(0.01)
        r.cancel_all()
        landed = collect(r)
        assert r.stats()["waiting"] == r.stats()["in_flight"] == 0
        assert list(landed) == [0, 1]
        assert landed[0].status == reader.OK
        if landed[1].status == reader.OK:  # begun, there, is as good as done
            assert dispatch.native.__name__.endswith("numba_backend")
        else:
            assert landed[1][1:4] == (reader.FAILED, errno.ECANCELED, 21 * BLOCK)
            assert landed[1].begun_ns < landed[1].ended_ns
        with pytest.raises(UsageError, match="no read has the tag 2"):
            r.wait(2)
        del memory
        gc.collect()
        assert alive() is None
        r.cancel_all()
    with pytest.raises(UsageError, match="closed"):
        r.cancel_all()


def test_order_is_that_of_priorities(open_reader: Open, path: Path) -> None:
    reads, size = table(path, [(3 * BLOCK * i, BLOCK) for i in range(6)], BLOCK)
    memory = aligned(size)
    # the second read begins some 0.2 s after the first: until then all are queued
    with open_reader(depth=1, bytes_per_second=2e4) as r:
        r.submit(memory, reads[:1])
        assert list(collect(r)) == [0]
        r.submit(memory, reads[1:2])
        r.submit(memory, reads[2:4], priority=-1)
        r.submit(memory, reads[4:], priority=1)
        r.reprioritise(5, -2)
        assert list(collect(r)) == [5, 2, 3, 1, 4]


def test_the_limit_holds(open_reader: Open, path: Path) -> None:
    reads, size = table(path, [(64 * 1024 * i, 40000) for i in range(16)], BLOCK)
    begun = time.perf_counter()
    with open_reader(bytes_per_second=4e6) as r:
        r.submit(aligned(size), reads)
        assert len(collect(r)) == 16
        # the last begins when those before are paid for, less 0.02 s to catch up on
        assert time.perf_counter() - begun >= 15 * 40000 / 4e6 - 0.025


def test_memory_is_kept_until_the_read_is_collected(open_reader: Open, path: Path) -> None:
    reads, size = table(path, [(0, 9000), (30000, 5)], 64)
    memory = np.empty(size, np.uint8)
    alive = weakref.ref(memory)
    with open_reader() as r:
        r.submit(memory, reads)
        del memory
        gc.collect()
        assert alive() is not None
        assert len(collect(r)) == 2
        gc.collect()
        assert alive() is None
    memory = np.empty(size, np.uint8)
    alive = weakref.ref(memory)
    r = open_reader()
    r.submit(memory, reads)
    del memory
    r.close()
    gc.collect()
    assert alive() is None


def test_a_reader_outlives_its_file(path: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.write_bytes(path.read_bytes())
    reads, size = table(path, [(0, SIZE)], BLOCK)
    with open(gone, "rb") as file:
        gone.unlink()
        r = Reader(file.fileno())
    memory = aligned(size)
    with r:
        r.submit(memory, reads)
        assert collect(r)[0].status == reader.OK
    assert memory[:SIZE].tobytes() == path.read_bytes()


def test_wrong_arguments(open_reader: Open, path: Path) -> None:
    reads, size = table(path, [(0, 5000), (8192, 100)], BLOCK)
    memory = aligned(size)
    frozen = memory.copy()
    frozen.flags.writeable = False
    with open_reader(capacity=2) as r:
        for bad in (memory.view(np.int8), memory[::2], memory.reshape(2, -1), frozen):
            with pytest.raises(KernelError, match="memory"):
                r.submit(bad, reads)
        for bad in (reads.astype(np.int64), reads[:, :5].copy(), reads[0], reads[::-1]):
            with pytest.raises(KernelError, match="reads"):
                r.submit(memory, bad)
        for column, value in ((1, 0), (4, 4999), (3, size), (4, size + 1), (4, 2**64 - 1)):
            bad = reads.copy()
            bad[0, column] = value
            with pytest.raises(KernelError, match="reads"):
                r.submit(memory, bad)
        for offset in (2**63 - 1, 2**64 - 1):
            bad = reads.copy()
            bad[1, 0] = offset
            with pytest.raises(KernelError, match="offsets"):
                r.submit(memory, bad)
        same = reads.copy()
        same[:, 5] = 9
        with pytest.raises(UsageError, match="in use"):
            r.submit(memory, same)
        with pytest.raises(UsageError, match="no place for 4"):
            r.submit(memory, np.concatenate([reads, reads]))
        assert r.wait(seconds=20) is None  # none of them was queued
        r.submit(memory, reads)
        assert len(collect(r)) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "reads in flight"),
        ({"depth": 257}, "reads in flight"),
        ({"chunk": 0}, "longest read"),
        ({"chunk": 5000}, "longest read"),
        ({"chunk": 1 << 31}, "longest read"),
        ({"capacity": 0}, "queue holds"),
        ({"bytes_per_second": -1.0}, "limit"),
        ({"bytes_per_second": float("nan")}, "limit"),
        ({"engine": "aio"}, "engine aio: must be uring or threads"),
    ],
)
def test_options_out_of_range(path: Path, options: dict[str, Any], message: str) -> None:
    with open(path, "rb") as file, pytest.raises(UsageError, match=message):
        Reader(file.fileno(), **options)


def test_the_environment_chooses(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(path, "rb") as file:
        monkeypatch.setenv("EDGEMOE_IO", "threads")
        with Reader(file.fileno()) as r:
            assert r.stats()["engine"] == "threads"
        monkeypatch.setenv("EDGEMOE_IO", "aio")
        with pytest.raises(UsageError, match=re.escape("EDGEMOE_IO=aio: must be uring or threads")):
            Reader(file.fileno())
        monkeypatch.setenv("EDGEMOE_IO", "uring")
        if uring_refused():
            with pytest.raises(UsageError, match=r"EDGEMOE_IO=uring: .*; use threads"):
                Reader(file.fileno())
        else:
            with Reader(file.fileno()) as r:
                assert r.stats()["engine"] == "uring"


WAITING = """
    import sys, time
    import numpy as np
    from edgemoe.kernels.reader import Reader
    file = open(sys.argv[1], "rb")
    r = Reader(file.fileno(), bytes_per_second=0.1)
    reads = np.array([[0, 9, 0, 0, 9, 1], [30000, 9, 0, 9, 9, 2]], np.uint64)
    r.submit(np.empty(20, np.uint8), reads)
    r.wait(1, 20)
    print("waiting", flush=True)
    try:
        r.wait(2, 60)
    except KeyboardInterrupt:
        r.close()
        print("interrupted")
"""


def test_a_wait_can_be_interrupted(path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WAITING), str(path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "waiting\n"
        time.sleep(0.2)
        begun = time.perf_counter()
        child.send_signal(signal.SIGINT)
        assert child.stdout.readline() == "interrupted\n"
        assert time.perf_counter() - begun < 0.5
    assert child.returncode == 0
