"""Writing that fails or is killed at any moment: nothing half-done is ever seen."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from store_samples import TINY, Sample, make_store

from edgemoe.errors import EdgeMoEError, OutputError, StoreError
from edgemoe.store import Store, StoreWriter, replace_section
from edgemoe.types import QuantSpec

WRITING_CALLS = ("pwrite", "fsync", "ftruncate", "replace")


class Counter:
    """Counts the writing system calls and fails, or kills the run, at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, action: Callable[[], None]) -> None:
        self.count, self.fatal = 0, -1
        for name in WRITING_CALLS:
            monkeypatch.setattr(os, name, self.wrap(getattr(os, name), action))

    def wrap(self, call: Callable[..., Any], action: Callable[[], None]) -> Callable[..., Any]:
        def wrapped(*args: Any) -> Any:
            self.count += 1
            if self.count == self.fatal:
                action()
            return call(*args)

        return wrapped


def no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("action", [no_space, interrupt])
def test_a_write_that_fails_leaves_nothing_whichever_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: Callable[[], None]
) -> None:
    calls = Counter(monkeypatch, action)
    make_store(tmp_path / "count")
    total = calls.count
    os.unlink(tmp_path / "count")
    assert total > 80
    for fatal in (*range(1, 8), *range(8, total - 8, 9), *range(total - 8, total + 1)):
        calls.count, calls.fatal = 0, fatal
        with pytest.raises((OutputError, KeyboardInterrupt)) as info:
            make_store(tmp_path / "m.emoe")
        if action is no_space:
            assert re.search(
                r"m\.emoe: No space left on device; free (\d+ bytes|some space) or choose another"
                " place$",
                str(info.value),
            )
        assert os.listdir(tmp_path) == []
    calls.fatal = -1
    make_store(tmp_path / "m.emoe")


def test_no_room_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fstatvfs

    def small(fd: int) -> Any:
        fields = list(real(fd))
        fields[3] = fields[4] = 10  # blocks free
        return os.statvfs_result(fields)

    monkeypatch.setattr(os, "fstatvfs", small)
    with pytest.raises(OutputError, match=r"needs \d+ bytes .* No space left .* free \d+ bytes"):
        StoreWriter(tmp_path / "m.emoe", TINY, QuantSpec(), {})
    assert os.listdir(tmp_path) == []


@contextmanager
def small_disk(where: Path, size: str) -> Iterator[Path]:
    """A tmpfs of this size."""
    where.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(where)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", str(where)], check=True)


def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = make_store(tmp_path / "m.emoe").path.stat().st_size
    with small_disk(tmp_path / "disk", "64k") as disk:
        with pytest.raises(OutputError, match=r"No space left on device; free \d+ bytes"):
            make_store(disk / "m.emoe")
        assert os.listdir(disk) == []
        # another program takes the room after the check at the start
        monkeypatch.setattr(StoreWriter, "_check_room", lambda self: None)
        with pytest.raises(OutputError, match=r"No space left on device; free (\d+) ") as info:
            make_store(disk / "m.emoe")
        match = re.search(r"free (\d+) ", str(info.value))
        assert match is not None and 0 < int(match[1]) < needed
        assert os.listdir(disk) == []


def run(code: str, *args: object, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
        env=os.environ | env,
    )


def test_a_limit_on_file_sizes(tmp_path: Path) -> None:
    process = run(
        """
        import resource, signal, sys
        from pathlib import Path
        from edgemoe.errors import OutputError
        from store_samples import make_store
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            make_store(Path(sys.argv[1]) / "m.emoe")
        except OutputError as exc:
            print(exc)
        """,
        tmp_path,
    )
    out, err = process.communicate()
    assert not err
    assert re.search(r"m\.emoe: File too large; raise the limit on file sizes", out)
    assert os.listdir(tmp_path) == []


HOLD = """
    import sys, time
    from edgemoe.store import StoreWriter
    from edgemoe.types import QuantSpec
    from store_samples import TINY
    with StoreWriter(sys.argv[1], TINY, QuantSpec(), {}) as writer:
        print("ready", flush=True)
        time.sleep(60)
"""


def test_temporaries_of_killed_runs_go_and_those_of_living_runs_stay(tmp_path: Path) -> None:
    target = tmp_path / "m.emoe"
    living, dead = run(HOLD, target), run(HOLD, target)
    try:
        for process in (living, dead):
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        assert len(os.listdir(tmp_path)) == 2
        dead.kill()
        dead.wait()
        unrelated = tmp_path / ".m.emoe.notes.tmp"
        unrelated.write_text("mine")
        make_store(target)
        left = sorted(os.listdir(tmp_path))
        assert len(left) == 3
        assert left[-1] == "m.emoe"
        assert f".m.emoe.{living.pid}." in left[0]
    finally:
        for process in (living, dead):
            process.kill()
            process.communicate()
    make_store(target)
    assert sorted(os.listdir(tmp_path)) == [".m.emoe.notes.tmp", "m.emoe"]


def test_a_temporary_of_our_own_process_is_not_stale(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "m.emoe", TINY, QuantSpec(), {}):
        make_store(tmp_path / "m.emoe")
        assert len(os.listdir(tmp_path)) == 2
    assert os.listdir(tmp_path) == ["m.emoe"]


def test_without_locks_the_process_id_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    gone = subprocess.Popen(["true"])
    gone.wait()
    stale = tmp_path / f".m.emoe.{gone.pid}.00000000.tmp"
    alive = tmp_path / f".m.emoe.{os.getppid()}.00000000.tmp"
    for path in (stale, alive):
        path.touch()
    make_store(tmp_path / "m.emoe")
    assert sorted(os.listdir(tmp_path)) == sorted([alive.name, "m.emoe"])


# Replacing a section


class Recorder:
    """Notes the writes to one file, so that the state after any prefix of them can be made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[tuple[str, int, bytes]] = []
        pwrite, ftruncate = os.pwrite, os.ftruncate

        def write(fd: int, data: memoryview, offset: int) -> int:
            self.steps.append(("write", offset, bytes(data)))
            return pwrite(fd, data, offset)

        def truncate(fd: int, size: int) -> None:
            self.steps.append(("truncate", size, b""))
            ftruncate(fd, size)

        monkeypatch.setattr(os, "pwrite", write)
        monkeypatch.setattr(os, "ftruncate", truncate)

    def states(self, before: bytes) -> Iterator[bytes]:
        """File contents after a crash in every step: not done, torn at some byte, done."""
        state = bytearray(before)
        yield before
        for kind, at, data in self.steps:
            if kind == "truncate":
                del state[at:]
                continue
            for torn in sorted({1, 8, 13, 40, 47, len(data) // 2, len(data) - 1, len(data)}):
                partial = bytearray(state)
                partial.extend(bytes(max(at + torn - len(partial), 0)))
                partial[at : at + torn] = data[:torn]
                yield bytes(partial)
            state = partial


def section_of(path: Path, name: str) -> bytes:
    with Store.open(path) as store:
        return store.section(name)


def test_a_replacement_killed_at_any_byte_gives_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = make_store(tmp_path / "m.emoe")
    old = sample.sections["bit_router"]
    for new in (b"first" * 100, b"second" * 30):
        before = sample.path.read_bytes()
        with monkeypatch.context() as patch:
            recorder = Recorder(patch)
            replace_section(sample.path, "bit_router", new)
        after = sample.path.read_bytes()
        seen = set()
        for state in recorder.states(before):
            sample.path.write_bytes(state)
            seen.add(section_of(sample.path, "bit_router"))
            with Store.open(sample.path) as store:
                bad = [line for line in store.verify() if not line.startswith("superblock")]
                assert bad == []
        assert seen == {old, new}
        # and the next replacement works whatever the crash left
        for state in list(recorder.states(before))[::3]:
            sample.path.write_bytes(state)
            replace_section(sample.path, "bit_router", b"third")
            assert section_of(sample.path, "bit_router") == b"third"
            with Store.open(sample.path) as store:
                assert store.verify() == []
        sample.path.write_bytes(after)
        old = new


def test_a_replacement_that_fails_leaves_the_store_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = make_store(tmp_path / "m.emoe")
    before = sample.path.read_bytes()
    calls = Counter(monkeypatch, no_space)
    replace_section(sample.path, "bit_router", b"count")
    total = calls.count
    for fatal in range(1, total + 1):
        sample.path.write_bytes(before)
        calls.count, calls.fatal = 0, fatal
        with pytest.raises(OutputError, match="No space left"):
            replace_section(sample.path, "bit_router", b"new")
        calls.fatal = -1
        content = section_of(sample.path, "bit_router")
        if fatal <= 4:  # nothing was switched yet
            assert sample.path.read_bytes() == before
        assert content in (sample.sections["bit_router"], b"new")
        with Store.open(sample.path) as store:
            assert store.verify() == []


def test_many_replacements_keep_the_store_sound(tmp_path: Path) -> None:
    sample = make_store(tmp_path / "m.emoe")
    want = dict(sample.sections)
    for i in range(30):
        name = ("bit_router", "tokenizer.json", f"extra{i % 4}")[i % 3]
        want[name] = os.urandom(i * 37)
        replace_section(sample.path, name, want[name])
        with Store.open(sample.path) as store:
            assert {n: store.section(n) for n in store.sections} == want
            assert store.verify() == []
            assert store.metadata["source"] == "random"


def test_an_open_store_keeps_reading_its_sections(tmp_path: Path) -> None:
    sample = make_store(tmp_path / "m.emoe")
    with Store.open(sample.path) as store:
        replace_section(sample.path, "bit_router", b"new")
        assert store.section("bit_router") == sample.sections["bit_router"]


def test_replacements_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = make_store(tmp_path / "m.emoe")
    before = sample.path.read_bytes()
    with pytest.raises(StoreError, match="No such file"):
        replace_section(tmp_path / "missing", "x", b"")
    with pytest.raises(OutputError, match="directory"):
        replace_section(tmp_path, "x", b"")
    with pytest.raises(StoreError, match="section is named"):
        replace_section(sample.path, "a\n", b"")
    with open(sample.path, "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another process is changing it"):
            replace_section(sample.path, "x", b"")
    junk = tmp_path / "junk"
    junk.write_bytes(b"x" * 10000)
    with pytest.raises(StoreError, match="not an edgemoe store"):
        replace_section(junk, "x", b"")
    assert junk.read_bytes() == b"x" * 10000
    assert sample.path.read_bytes() == before


def test_a_replacement_killed_by_a_signal(tmp_path: Path) -> None:
    sample = make_store(tmp_path / "m.emoe")
    loop = """
        import sys, itertools
        from edgemoe.store import replace_section
        for i in itertools.count():
            replace_section(sys.argv[1], "bit_router", b"%d" % i * 1000)
            if not i:
                print("ready", flush=True)
    """
    for i in range(4):
        process = run(loop, sample.path)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.013 * i)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        with Store.open(sample.path) as store:
            damaged = [d for d in store.verify() if not d.startswith("superblock")]
            assert damaged == []
            assert len(set(store.section("bit_router").decode())) <= 10


def test_messages_are_one_line(tmp_path: Path) -> None:
    where = tmp_path / "a\nb" / "m"
    with pytest.raises(EdgeMoEError) as info:
        make_store(where)
    assert "\n" not in str(info.value)
    sample: Sample = make_store(tmp_path / "c\nd")
    with pytest.raises(EdgeMoEError) as info:
        replace_section(sample.path, "\n", b"")
    assert "\n" not in str(info.value)
