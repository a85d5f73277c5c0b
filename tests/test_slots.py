"""Memory of streamed expert segments: what is accounted is resident, and nothing is lost."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from convert_samples import make_checkpoint
from store_samples import TINY, WIDE, Sample, make_store

import edgemoe
from edgemoe import kernels
from edgemoe.errors import EdgeMoEError, KernelError, MemoryBudgetError, UsageError
from edgemoe.loader import resident
from edgemoe.loader.arena import Arena
from edgemoe.loader.queue import Read, ReadQueue
from edgemoe.loader.rooms import PAGE, room_sizes, table_bytes
from edgemoe.loader.slots import SegmentSlots, budget_for
from edgemoe.store import Store

Key = tuple[int, int, int]
"""Layer, expert, level index."""

needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """48 MB of experts, whose segments have other sizes in each layer."""
    path = tmp_path_factory.mktemp("slots") / "many.emoe"
    return make_store(path, replace(WIDE, num_experts=12))


def all_keys(store: Store) -> list[Key]:
    levels = range(len(store.quant.expert_levels))
    experts = range(store.config.num_experts)
    return [(layer, e, i) for layer in store.config.moe_layers for e in experts for i in levels]


def present_bytes(slots: SegmentSlots) -> int:
    """Bytes of the slots' addresses that have memory, as the kernel counts its pages."""
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(slots.memory.ctypes.data // PAGE * 8)
        entries = np.frombuffer(file.read(slots.memory.size // PAGE * 8), np.uint64)
    return int(np.count_nonzero(entries >> np.uint64(62))) * PAGE


def mapping_rss(slots: SegmentSlots) -> int:
    """The same from /proc/self/smaps: Rss of the mappings from the first to the last address."""
    first = slots.memory.ctypes.data
    last, total, inside = first + slots.memory.size, 0, False
    with open("/proc/self/smaps", encoding="ascii", errors="replace") as file:
        for line in file:
            head = line.split()
            if not head[0].endswith(":"):
                begin, end = (int(x, 16) for x in head[0].split("-"))
                inside = first <= begin and end <= last
            elif inside and head[0] == "Rss:":
                total += int(head[1]) * 1024
    return total


def load(slots: SegmentSlots, store: Store, keys: Sequence[Key], queue: ReadQueue) -> None:
    reads = [
        Read(store.expert_segment(*key), *slots.commit(*key), tag) for tag, key in enumerate(keys)
    ]
    queue.submit(slots.memory, reads)
    for tag, key in enumerate(keys):
        queue.wait(tag)
        slots.landed(*key)


@needs_linux
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("small", [True, False], ids=["64", "4096"])
def test_accounting_is_what_the_kernel_says(
    many: Sample, small: bool, seed: int, tmp_path: Path
) -> None:
    """Random commits, evictions and budgets; every landed segment keeps its bytes through them."""
    rng = np.random.default_rng(seed)
    sample = make_store(tmp_path / "s.emoe", replace(TINY, num_experts=12)) if small else many
    with Store.open(sample.path) as store:
        most = budget = 45 * PAGE if small else 9 << 20
        slots = SegmentSlots(store, budget)
        keys = all_keys(store)
        live: dict[Key, int] = {}
        refused = kept = 0
        for step in range(400):
            key = keys[rng.integers(len(keys))]
            if key in live:
                del live[key]
                slots.evict(*key)
            elif step % 40 == 39:
                budget = int(rng.integers(slots.used_bytes + slots.table_bytes, most))
                slots.resize(budget)
            else:
                taken = sum(slots.room_bytes(k[0], k[2]) for k in [*live, key])
                try:
                    at, room = slots.commit(*key)
                except MemoryBudgetError as exc:
                    assert exc.needed_bytes > exc.budget_bytes == budget
                    assert taken > slots.capacity(budget)
                    assert exc.needed_bytes > slots.used_bytes + room_of(store, key)
                    victim = sorted(live)[rng.integers(len(live))]
                    del live[victim]
                    slots.evict(*victim)
                    refused += 1
                    continue
                slots.memory[at : at + room] = step % 251
                if rng.random() < 0.1:
                    slots.abandon(*key)
                else:
                    slots.landed(*key)
                    live[key] = step % 251
            assert slots.used_bytes >= sum(room_of(store, key) for key in live)
            assert slots.resident_bytes <= slots.budget_bytes == budget
            assert present_bytes(slots) == slots.used_bytes + slots.kept_bytes
            kept = max(kept, slots.kept_bytes)
            if step % 20 == 0:
                assert mapping_rss(slots) == slots.used_bytes + slots.kept_bytes
                for key, fill in live.items():
                    assert (slots.view(*key) == fill).all()
        assert refused > 5
        assert kept > 0
        for layer in slots.layers:
            landed = {(layer, e, i) for e, i in np.argwhere(slots.segments(layer)).tolist()}
            assert landed == {key for key in live if key[0] == layer}
        slots.close()
        slots.close()
        assert slots.used_bytes == slots.kept_bytes == present_bytes(slots) == 0
        assert not any(slots.segments(layer).any() for layer in slots.layers)


def room_of(store: Store, key: Key) -> int:
    return -(-store.expert_segment(*key).size // PAGE) * PAGE


@pytest.mark.parametrize(
    "sizes", [{}, {"hidden_size": 1024, "moe_intermediate_size": 672}], ids=["64", "4096"]
)
def test_a_mixture_from_slots_has_the_bits_of_a_resident_one(
    sizes: dict[str, Any], tmp_path: Path
) -> None:
    make_checkpoint(tmp_path / "hf", num_experts=4, **sizes)
    edgemoe.convert(tmp_path / "hf", tmp_path / "x.emoe")
    rng = np.random.default_rng(0)
    pool, level = kernels.new_pool(2), 2
    with Store.open(tmp_path / "x.emoe") as store:
        whole = resident.ResidentExperts(store, Arena(resident.expert_bytes(store, level)), level)
        # two of the four experts of one of the two layers at a time, and page tables
        slots = SegmentSlots(store, budget_for(store, level) // 4 + 16 * PAGE)
        with ReadQueue(store) as queue:
            for layer in whole.layers * 3:
                chosen = rng.permutation(4)[:2]
                keys = [(layer, int(e), i) for e in chosen for i in range(level + 1)]
                load(slots, store, keys, queue)
                x = rng.standard_normal((5, store.config.hidden_size), np.float32)
                ids = chosen[rng.integers(0, 2, (5, 2))].astype(np.int32)
                levels = np.full_like(ids, level)
                work = pool, x, ids, levels, rng.random((5, 2), np.float32)
                from_slots, resident_one = (
                    kernels.Mixture(have.layout(layer), have.segments(layer))
                    for have in (slots, whole)
                )
                outs = from_slots(*work), resident_one(*work)
                assert np.abs(outs[0]).max() > 0
                assert {out.tobytes() for out in outs} == {outs[0].tobytes()}
                for key in keys:
                    slots.evict(*key)
                with pytest.raises(KernelError, match="address"):
                    from_slots(*work)
            if sizes:
                assert queue.stats()["bytes_copied"] == 0
        slots.close()


def test_what_is_in_flight_stays(many: Sample) -> None:
    with Store.open(many.path) as store:
        slots = SegmentSlots(store, 16 << 20)
        layer = slots.layers[1]
        with ReadQueue(store, depth=1, limit=0.1) as queue:
            reads = []
            for expert in range(2):
                ref = store.expert_segment(layer, expert, 0)
                reads.append(Read(ref, *slots.commit(layer, expert, 0), expert))
            queue.submit(slots.memory, reads)
            with pytest.raises(UsageError, match=f"expert 1 in layer {layer} is loading, not lan"):
                slots.evict(layer, 1, 0)
            with pytest.raises(UsageError, match="2 expert segments are still loading"):
                slots.close()
            assert queue.cancel(1)
            slots.abandon(layer, 1, 0)
            assert not slots.segments(layer).any()
            queue.wait(0)
        slots.landed(layer, 0, 0)
        assert slots.view(layer, 0, 0)[: reads[0].ref.size].tobytes() == (
            many.experts[layer, 0][0].tobytes()
        )
        assert slots.segments(layer)[0, 0] == slots.view(layer, 0, 0).ctypes.data
        slots.close()


def test_a_room_is_used_again_as_it_is(many: Sample) -> None:
    """Segments of one size, or of one near it, follow each other without new pages."""
    with Store.open(many.path) as store:
        slots = SegmentSlots(store, 16 << 20)
        layer = slots.layers[0]
        first = slots.commit(layer, 0, 1)
        slots.landed(layer, 0, 1)
        slots.evict(layer, 0, 1)
        before = slots.resident_bytes
        assert slots.commit(layer, 5, 1) == first
        assert slots.resident_bytes == before
        slots.abandon(layer, 5, 1)
        slots.close()


def test_states_that_do_not_follow(many: Sample) -> None:
    with Store.open(many.path) as store:
        slots = SegmentSlots(store, 16 << 20)
        layer = slots.layers[0]
        for act in (slots.landed, slots.abandon):
            with pytest.raises(UsageError, match="is absent, not loading"):
                act(layer, 0, 0)
        with pytest.raises(UsageError, match="is absent, not landed"):
            slots.evict(layer, 0, 0)
        with pytest.raises(UsageError, match="is absent, not loading or landed"):
            slots.view(layer, 0, 0)
        slots.commit(layer, 0, 0)
        with pytest.raises(UsageError, match="is loading, not absent"):
            slots.commit(layer, 0, 0)
        slots.landed(layer, 0, 0)
        with pytest.raises(UsageError, match="is landed, not absent"):
            slots.commit(layer, 0, 0)
        with pytest.raises(UsageError, match="no segment 5 of expert 0 in"):
            slots.room_bytes(layer, 5)
        for key in ((1, 0, 0), (layer, 12, 0), (layer, -1, 0), (layer, 0, 5), (layer, 0, -1)):
            with pytest.raises(UsageError, match=f"no segment {key[2]} of expert {key[1]} in"):
                slots.commit(*key)
        slots.close()


def test_budgets(many: Sample) -> None:
    with Store.open(many.path) as store:
        largest = max(room_of(store, key) for key in all_keys(store))
        with pytest.raises(MemoryBudgetError, match="largest expert segment") as too_small:
            SegmentSlots(store, largest)
        needed = too_small.value.needed_bytes
        assert largest < needed <= largest + 5 * PAGE
        # where the addresses begin may add a page table
        slots = SegmentSlots(store, needed + 3 * PAGE)
        key = next(key for key in all_keys(store) if room_of(store, key) == largest)
        assert 0 < slots.capacity(needed) < slots.room_bytes(key[0], key[2])
        slots.commit(*key)
        slots.landed(*key)
        slots.close()
        slots = SegmentSlots(store, 2 * largest + 20 * PAGE)
        keys = [key for key in all_keys(store) if room_of(store, key) == largest]
        for key in keys[:2]:
            slots.commit(*key)
            slots.landed(*key)
        with pytest.raises(
            MemoryBudgetError, match=r"an expert segment needs .* more than .*evict some"
        ):
            slots.commit(*keys[2])
        with pytest.raises(MemoryBudgetError, match=r"segments in use need .*evict some"):
            slots.resize(2 * largest)
        slots.evict(*keys[0])
        slots.resize(largest + slots.table_bytes)
        assert slots.kept_bytes == 0
        with pytest.raises(UsageError, match="at most, as it was at first"):
            slots.resize(1 << 30)
        slots.close()


def test_a_budget_holds_what_it_is_for(many: Sample) -> None:
    with Store.open(many.path) as store:
        for level_index in range(5):
            slots = SegmentSlots(store, budget_for(store, level_index))
            for key in all_keys(store):
                if key[2] <= level_index:
                    slots.commit(*key)
                    slots.landed(*key)
            assert slots.resident_bytes > 0.96 * slots.budget_bytes
            slots.close()
            few = budget_for(store, level_index, 3)
            slots = SegmentSlots(store, few)
            wanted = 3 * max(
                sum(slots.room_bytes(layer, i) for i in range(level_index + 1))
                for layer in slots.layers
            )
            assert wanted <= slots.capacity(few) < wanted + 16 * PAGE
            slots.close()


def test_addresses_that_are_refused(many: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with Store.open(many.path) as store:
        monkeypatch.setattr(mmap, "mmap", refuse)
        with pytest.raises(EdgeMoEError, match=r"refuses .* \(Cannot allocate memory\): raise"):
            SegmentSlots(store, 16 << 20)


def test_near_sizes_share_rooms() -> None:
    sizes = [n * PAGE for n in (415, 427, 414, 198, 200, 192, 7, 8)]
    rooms = {size // PAGE: room // PAGE for size, room in room_sizes(sizes).items()}
    assert rooms == {415: 427, 427: 427, 414: 427, 198: 200, 200: 200, 192: 192, 7: 7, 8: 8}


STREAM = """
import sys
import numpy as np
from edgemoe.errors import MemoryBudgetError
from edgemoe.loader import budget
from edgemoe.loader.queue import Read, ReadQueue
from edgemoe.loader.slots import SegmentSlots
from edgemoe.store import Store

path, size = sys.argv[1], int(sys.argv[2])
rng, live, read = np.random.default_rng(0), [], 0
with Store.open(path) as store, ReadQueue(store) as queue:
    slots = SegmentSlots(store, size)
    keys = [(layer, e, i) for layer in slots.layers for e in range(12) for i in range(5)]
    before = budget.rss_bytes()
    for at in rng.integers(0, len(keys), 600):
        key = keys[at]
        if key in live:
            continue
        while True:
            try:
                place = slots.commit(*key)
                break
            except MemoryBudgetError:
                slots.evict(*live.pop(rng.integers(len(live))))
        ref = store.expert_segment(*key)
        queue.submit(slots.memory, [Read(ref, *place, 0)])
        queue.wait(0)
        slots.landed(*key)
        live.append(key)
        read += ref.size
    print(budget.peak_rss_bytes() - before, read)
"""

BESIDE = 1 << 20
"""What a process that streams takes beside the budget: the queue's tables, Python's objects."""


@needs_linux
@pytest.mark.parametrize("mib", [3, 12, 40])
def test_a_process_that_streams_stays_within_the_budget(many: Sample, mib: int) -> None:
    command = [sys.executable, "-c", STREAM, str(many.path), str(mib << 20)]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, read = map(int, out.stdout.split())
    assert read > 2 * mib << 20
    assert (mib - 1) << 20 < grown <= (mib << 20) + BESIDE


@needs_linux
def test_page_tables_are_counted(many: Sample) -> None:
    """Those that rooms need are no more than counted, and few."""
    with Store.open(many.path) as store:
        before = page_tables()
        slots = SegmentSlots(store, 48 << 20)
        for key in all_keys(store):
            try:
                at, room = slots.commit(*key)
            except MemoryBudgetError:
                continue
            slots.memory[at : at + room] = 1
            slots.abandon(*key) if key[1] % 2 else slots.landed(*key)
        grown = page_tables() - before
        assert slots.used_bytes > 20 << 20
        assert slots.used_bytes // 512 <= grown + 4 * PAGE
        assert grown <= slots.table_bytes
        slots.close()


def page_tables() -> int:
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        return next(int(x.split()[1]) * 1024 for x in file if x.startswith("VmPTE"))


def test_table_bytes_count_every_level() -> None:
    span = PAGE * (PAGE // 8)
    assert table_bytes(span, span) == 0
    assert table_bytes(0, 1) == 3 * PAGE
    assert table_bytes(span - 1, span + 1) == 4 * PAGE
    assert table_bytes(0, 1000 * span) == (1000 + -(-1000 // (PAGE // 8)) + 1) * PAGE
