"""What a run did when: a Chrome trace (chrome://tracing, ui.perfetto.dev) written as it grows.

Format: "Trace Event Format", complete events ("X") and thread names ("M"); times in microseconds.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from ..closing import Closing
from ..errors import OutputError, UsageError
from ..store.file import AtomicFile, reporting, write_exactly

MAGIC = b'{"traceEvents":['
"""The first bytes of a file that a timeline writes; only such a file is replaced."""

READ = "read"
"""Spans of this name are the disk's, all others the thread's that computes."""

_HELD = 1024
"""Spans that are held before they are written, so that a long run takes no more memory."""

_COMPUTE = 0


_Span: TypeAlias = tuple[str, int, int, Mapping[str, Any]]
"""Name, begin and end in nanoseconds, arguments."""

_json = json.JSONEncoder(check_circular=False, separators=(",", ":")).encode


class _Written(NamedTuple):
    """What is in the file, and the spans that are not yet.

    size: bytes. lanes: ends of the last span of each lane of the disk. total_ns: by name.
    """

    size: int
    lanes: Sequence[int]
    total_ns: Mapping[str, int]
    spans: list[_Span]


class Timeline(Closing):
    """Spans of one run, for one thread to add; the file at `path` appears when it is closed.

    Names in use: "dense" (attention and router), "experts", "wait" (nothing is computed, because
    something is being read), "head", "sample"; and "read". Reads overlap: each goes to a lane of
    the disk on which nothing else was going on, so that no viewer has to draw two in one place.
    Spans of other names follow one another. `otherData` of the file holds the seconds of each name.

    Raises:
        OutputError: nothing can be written there, or something other than a trace is there.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = AtomicFile(path, MAGIC)
        self._closed = False
        self._origin_ns = time.monotonic_ns()
        self._now = _Written(0, (), {}, [])
        try:
            self._write(f"{MAGIC.decode()}\n{_json(_named('compute', _COMPUTE))}", self._now)
        except BaseException:
            self.discard()
            raise

    def add(self, name: str, begin_ns: int, end_ns: int, **args: Any) -> None:
        """A span by the clock of `time.monotonic_ns`, with what JSON can say of it.

        Raises:
            UsageError: the timeline is closed.
            OutputError: what was held could not be written; nothing is left behind.
        """
        if self._closed:
            raise UsageError("the timeline is closed: no more spans can be added")
        spans = self._now.spans
        spans.append((name, begin_ns, end_ns, args))
        if len(spans) >= _HELD:
            try:
                self._flush()
            except OutputError:
                self.discard()
                raise

    def close(self) -> None:
        """Write the rest and give the file its name; twice is fine.

        Raises:
            OutputError: it could not be written; nothing is left behind.
        """
        if self._closed:
            return
        try:
            self._flush()
            seconds = {name: ns / 1e9 for name, ns in self._now.total_ns.items()}
            about = {"displayTimeUnit": "ms", "otherData": {"total_s": seconds}}
            self._write(f"\n],{_json(about)[1:]}\n", self._now)
            with reporting(self._file.where):
                self._file.commit()
        finally:
            self.discard()

    def discard(self) -> None:
        """Leave nothing behind; after `close` this changes nothing."""
        self._closed = True
        self._file.discard()

    def _flush(self) -> None:
        """Write the spans that are held."""
        spans, total_ns, lanes = self._now.spans, dict(self._now.total_ns), list(self._now.lanes)
        events: list[dict[str, Any]] = []
        for name, begin_ns, end_ns, args in spans:
            total_ns[name] = total_ns.get(name, 0) + end_ns - begin_ns
            thread = _COMPUTE
            if name == READ:
                known = len(lanes)
                thread = 1 + _lane(lanes, begin_ns, end_ns)
                if len(lanes) > known:
                    events.append(_named("disk", thread))
            ts, dur = (begin_ns - self._origin_ns) / 1e3, (end_ns - begin_ns) / 1e3
            event = {"name": name, "ph": "X", "pid": 0, "tid": thread, "ts": ts, "dur": dur}
            if args:
                event["args"] = args
            events.append(event)
        if events:
            done = _Written(self._now.size, lanes, total_ns, [])
            self._write(",\n" + _json(events)[1:-1], done)

    def _write(self, text: str, then: _Written) -> None:
        """Write at the end of the file. All that changes by it changes in one assignment: if Ctrl-C
        comes before, the same bytes are written again at the same place."""
        data = text.encode()
        with reporting(self._file.where):
            write_exactly(self._file.fd, memoryview(data), then.size)
        self._now = then._replace(size=then.size + len(data))


def _named(name: str, thread: int) -> dict[str, Any]:
    return {"name": "thread_name", "ph": "M", "pid": 0, "tid": thread, "args": {"name": name}}


def _lane(lanes: list[int], begin_ns: int, end_ns: int) -> int:
    """A lane that is free when a span begins, of those the one that ended last; else a new one.

    With spans in the order of their ends that makes the fewest lanes.
    """
    free = [i for i, end in enumerate(lanes) if end <= begin_ns]
    if not free:
        lanes.append(end_ns)
        return len(lanes) - 1
    best = max(free, key=lanes.__getitem__)
    lanes[best] = end_ns
    return best
