"""The read queue in a store's terms: segments land verified, and errors say what a store says."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
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
    while (tag := queue.wait_any()) is not None:
        out.append(tag)
    return out


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
    """Only the numba backend reads through Python, where a test can make it slow."""
    pytest.importorskip("numba", reason="numba is not installed: pip install 'edgemoe[numba]'")
    from edgemoe import numba_backend

    monkeypatch.setattr(dispatch, "native", numba_backend)
    preadv = os.preadv

    def slow(*args: Any) -> int:
        time.sleep(0.8)
        return preadv(*args)

    with Store.open(sample.path) as store:
        memory, reads, _ = plan(sample, store)
        monkeypatch.setattr(os, "preadv", slow)
        with ReadQueue(store, stall=0.2) as queue:
            queue.submit(memory, reads[:1])
            with pytest.raises(StoreError, match=r"s\.emoe: a read has taken 0\.\d s"):
                queue.wait(0)
        with ReadQueue(store, stall=5) as queue:
            queue.submit(memory, reads[:1])
            queue.wait(0)
