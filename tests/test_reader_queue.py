"""The read queue in a store's terms: segments land verified, and errors say what a store says."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from store_samples import TINY, WIDE, Sample, make_store

from edgemoe.errors import ChecksumError, StoreError, UsageError
from edgemoe.kernels import dispatch
from edgemoe.layout import align_up
from edgemoe.loader.arena import Arena
from edgemoe.loader.queue import Read, ReadQueue
from edgemoe.store import Store
from edgemoe.types import U8


@pytest.fixture(params=[TINY, WIDE], ids=["64", "4096"])
def sample(request: pytest.FixtureRequest, tmp_path: Path) -> Sample:
    return make_store(tmp_path / "s.emoe", request.param)


def plan(sample: Sample, store: Store) -> tuple[U8, list[Read], list[bytes]]:
    """Every segment of every expert, in slots of an arena; the bytes that shall land."""
    reads, want, at = [], [], 0
    for (layer, expert), segments in sample.experts.items():
        for i, data in enumerate(segments):
            ref = store.expert_segment(layer, expert, i)
            room = align_up(ref.size, 4096)
            reads.append(Read(ref, at, room, len(reads)))
            want.append(data.tobytes())
            at += room
    return Arena(at).take(at, 4096), reads, want


def all_tags(queue: ReadQueue) -> list[int]:
    out = []
    while (arrival := queue.wait_any()) is not None:
        out.append(arrival.tag)
    return out


@pytest.fixture(params=["", "threads", "numba"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What queues opened in the test read with: the best there is, threads, the numba backend."""
    name: str = request.param
    if name == "numba":
        slow_down_reads(monkeypatch, 0)
    else:
        monkeypatch.setenv("EDGEMOE_IO", name)
    return name


def slow_down_reads(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Only the numba backend reads through Python, where a test can make it slow."""
    pytest.importorskip("numba", reason="numba is not installed: pip install 'edgemoe[numba]'")
    from edgemoe import numba_backend

    preadv = os.preadv

    def slow(*args: Any) -> int:
        time.sleep(seconds)
        return preadv(*args)

    monkeypatch.setattr(dispatch, "native", numba_backend)
    monkeypatch.setattr(os, "preadv", slow)


def landed(memory: U8, reads: Sequence[Read]) -> list[bytes]:
    return [memory[r.at : r.at + r.ref.size].tobytes() for r in reads]


def test_segments_land_in_their_slots(sample: Sample) -> None:
    with Store.open(sample.path) as store, ReadQueue(store) as queue:
        memory, reads, want = plan(sample, store)
        queue.submit(memory, reads)
        assert sorted(all_tags(queue)) == list(range(len(reads)))
        assert landed(memory, reads) == want
        memory[:] = 0
        queue.submit(memory, reads, priority=1)
        for r in reads:
            queue.wait(r.tag)
            assert landed(memory, [r]) == [want[r.tag]]
        assert queue.wait_any() is None
        assert queue.poll() is None
        with pytest.raises(UsageError, match="no read has the tag 0"):
            queue.wait(0)
        stats = queue.stats()
    if sample.config is WIDE:
        assert stats["bytes_copied"] == 0


def test_neighbours_are_read_at_once(tmp_path: Path) -> None:
    if dispatch.native.__name__.endswith("numba_backend"):
        pytest.skip("the numba backend reads each by itself")
    sample = make_store(tmp_path / "s.emoe", TINY)
    with Store.open(sample.path) as store, ReadQueue(store) as queue:
        memory, reads, want = plan(sample, store)
        queue.submit(memory, sorted(reads, key=lambda r: r.ref.offset))
        assert len(all_tags(queue)) == len(reads)
        assert landed(memory, reads) == want
        assert queue.stats()["reads"] <= len(reads) / 3


def test_waiting_reads_are_moved_and_taken_back(sample: Sample) -> None:
    with Store.open(sample.path) as store, ReadQueue(store, depth=1, limit=0.1) as queue:
        memory, reads, _ = plan(sample, store)
        # the last of the file, then the first: no neighbours, and the limit holds the second up
        queue.submit(memory, [reads[-1]])
        queue.wait(reads[-1].tag)
        queue.submit(memory, [reads[0], reads[4]])
        assert queue.poll() is None
        assert queue.reprioritise(4, -1)
        assert queue.cancel(0)
        with pytest.raises(UsageError, match="no read has the tag 0"):
            queue.cancel(0)
        assert queue.stats()["waiting"] == 1


def test_damage_names_the_segment(sample: Sample) -> None:
    with Store.open(sample.path) as store:
        memory, reads, want = plan(sample, store)
        ref = reads[1].ref
        with open(sample.path, "r+b") as file:
            file.seek(ref.offset + ref.size - 1)
            file.write(bytes([want[1][-1] ^ 1]))
        with pytest.raises(ChecksumError) as plain:
            store.read_into(ref, np.empty(ref.size, np.uint8))
        with ReadQueue(store) as queue:
            queue.submit(memory, reads)
            with pytest.raises(ChecksumError, match=re.escape(str(plain.value))):
                queue.wait(1)
            assert len(all_tags(queue)) == len(reads) - 1


def test_a_store_cut_while_open(sample: Sample) -> None:
    with Store.open(sample.path) as store, ReadQueue(store) as queue:
        memory, reads, want = plan(sample, store)
        last = max(reads, key=lambda r: r.ref.offset)
        cut = last.ref.offset + last.ref.size // 2
        os.truncate(sample.path, cut)
        with pytest.raises(StoreError) as plain:
            store.read_into(last.ref, np.empty(last.ref.size, np.uint8))
        queue.submit(memory, reads)
        with pytest.raises(StoreError, match=re.escape(str(plain.value))):
            queue.wait(last.tag)
        assert len(all_tags(queue)) == len(reads) - 1
        assert landed(memory, [reads[0]]) == [want[0]]


def test_a_file_that_cannot_be_read(sample: Sample, tmp_path: Path) -> None:
    """The descriptor is that of a directory: opening works, reading does not."""
    with Store.open(sample.path) as store:
        memory, reads, _ = plan(sample, store)
        directory = os.open(tmp_path, os.O_RDONLY)
        before, store._fd = store._fd, directory
        try:
            with ReadQueue(store) as queue:
                queue.submit(memory, reads[:1])
                at = reads[0].ref.offset
                with pytest.raises(StoreError, match=f"s.emoe: cannot read at byte {at}: Is a dir"):
                    queue.wait(0)
        finally:
            store._fd = before
            os.close(directory)


def test_a_read_that_stalls(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store.open(sample.path) as store:
        memory, reads, _ = plan(sample, store)
        slow_down_reads(monkeypatch, 0.8)
        for call in (lambda q: q.wait(0), ReadQueue.wait_any, ReadQueue.drain):
            with ReadQueue(store, stall=0.2) as queue:
                queue.submit(memory, reads[:1])
                while not queue.stats()["in_flight"]:
                    time.sleep(0.001)
                begun = time.perf_counter()
                with pytest.raises(StoreError, match=r"s\.emoe: a read has taken 0\.\d s"):
                    call(queue)
                assert time.perf_counter() - begun < 0.7  # before it ends
        with ReadQueue(store, stall=5) as queue:
            queue.submit(memory, reads[:1])
            queue.wait(0)


def test_arrivals_tell_when_the_reads_ran(sample: Sample, engine: str) -> None:
    before = time.monotonic_ns()
    with Store.open(sample.path) as store, ReadQueue(store) as queue:
        memory, reads, _ = plan(sample, store)
        queue.submit(memory, reads)
        first = queue.wait(reads[3].tag)
        second = queue.wait_any()
        while (third := queue.poll()) is None:
            time.sleep(0.001)
    after = time.monotonic_ns()
    assert second is not None
    assert first.tag == reads[3].tag
    assert len({first.tag, second.tag, third.tag}) == 3
    for arrival in (first, second, third):
        assert before < arrival.begun_ns < arrival.ended_ns < after


def test_drained_queues_are_empty_and_of_use(sample: Sample, engine: str) -> None:
    """One read has landed, one is damaged, and the limit holds the third up."""
    with Store.open(sample.path) as store:
        memory, reads, want = plan(sample, store)
        # apart from each other in the file, so that each is a read of its own
        some = [reads[-1], reads[0], reads[4]]
        size = some[0].ref.size
        with ReadQueue(store, depth=1, limit=size / 0.3) as queue:
            assert queue.drain() == ([], [])
            broken = Read(replace(some[1].ref, crc32c=some[1].ref.crc32c ^ 1), *some[1][1:])
            queue.submit(memory, [some[0], broken, some[2]])
            while queue.stats()["bytes_read"] < size + broken.ref.size:
                time.sleep(0.001)
            assert queue.drain() == ([some[0].tag], [broken.tag, some[2].tag])
            assert landed(memory, some[:1]) == [want[some[0].tag]]
            assert queue.drain() == ([], [])
            assert queue.wait_any() is None
            queue.submit(memory, some[1:])
            assert sorted(all_tags(queue)) == sorted(r.tag for r in some[1:])
            assert landed(memory, some[1:]) == [want[r.tag] for r in some[1:]]
        with pytest.raises(UsageError, match="closed"):
            queue.drain()


def test_nothing_is_written_after_a_drain(sample: Sample, engine: str) -> None:
    with Store.open(sample.path) as store:
        memory, reads, want = plan(sample, store)
        size = sum(r.ref.size for r in reads)
        with ReadQueue(store, depth=2, chunk=4096, limit=size / 0.4) as queue:
            queue.submit(memory, reads)
            time.sleep(0.1)
            found, lost = queue.drain()
            assert sorted(found + lost) == [r.tag for r in reads]
            assert found
            assert lost
            assert landed(memory, [reads[tag] for tag in found]) == [want[tag] for tag in found]
            memory[:] = 7
            time.sleep(0.2)
            assert (memory == 7).all()
            assert queue.stats()["in_flight"] == queue.stats()["waiting"] == 0


def test_drain_finds_what_interrupted_calls_left(sample: Sample, engine: str) -> None:
    """Ctrl-C between a read's being collected, or before it was queued, and its being told."""
    with Store.open(sample.path) as store, ReadQueue(store) as queue:
        memory, reads, _ = plan(sample, store)
        queue.submit(memory, reads[:3])
        for r in reads[:3]:
            while queue._reader.wait(r.tag, 1) is None:
                pass
        submit = queue._reader.submit

        def interrupted(*args: Any) -> None:
            submit(*args)
            raise KeyboardInterrupt

        queue._reader.submit = interrupted
        with pytest.raises(KeyboardInterrupt):
            queue.submit(memory, reads[3:5])
        found, lost = queue.drain()
        assert sorted(found + lost) == [r.tag for r in reads[:5]]
        assert lost[:3] == [r.tag for r in reads[:3]]
        assert queue.wait_any() is None


def test_a_refused_submission_leaves_what_is_queued(sample: Sample, engine: str) -> None:
    with Store.open(sample.path) as store, ReadQueue(store) as queue:
        memory, reads, want = plan(sample, store)
        queue.submit(memory, reads[:2])
        with pytest.raises(UsageError, match="in use"):
            queue.submit(memory, reads[1:4])
        assert sorted(all_tags(queue)) == [0, 1]
        assert landed(memory, reads[:2]) == want[:2]
        assert queue.drain() == ([], [])
