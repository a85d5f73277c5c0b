"""Exchanging one section of a finished store in place, safe against being killed at any moment."""

from __future__ import annotations

import contextlib
import fcntl
import os
from dataclasses import replace

from ..errors import OutputError, StoreError, shown
from ..kernels import crc32c
from ..layout import PART_ALIGN, align_up
from .checks import check_section_name, check_section_size
from .file import as_bytes, reporting, write_exactly
from .header import SUPERBLOCK, SectionEntry, Superblock, decode_superblock
from .parse import load_header, parse_header, read_bytes


def replace_section(path: str | os.PathLike[str], name: str, data: bytes) -> None:
    """Replace (or add) one section of a finished store without rewriting the rest.

    The new section and a new header are appended and synced, then the superblocks are switched one
    after the other: killed at any moment, the store opens with the old section or with the new one.

    Raises:
        StoreError: `path` is no sound store. OutputError: it cannot be written, or another process
            is replacing a section of it; the store is sound and has the old section or the new one.
    """
    where = shown(path)
    check_section_name(name)
    check_section_size(name, len(data))
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as exc:
        raise StoreError(f"{where}: cannot open the store: {exc.strerror}") from exc
    except OSError as exc:
        raise OutputError(f"cannot write {where}: {exc.strerror}") from exc
    try:
        with reporting(where):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputError(
                    f"cannot write {where}: another process is changing it; try again later"
                ) from None
        _append_section(fd, where, name, data)
    finally:
        os.close(fd)


def _append_section(fd: int, where: str, name: str, data: bytes) -> None:
    block, header = load_header(fd, where)
    old = header.sections.get(name)
    dead = [*header.dead, (block.header_offset, block.header_length)]
    if old is not None:
        dead.append((old.offset, old.size))
    at = align_up(block.file_length, PART_ALIGN)
    entry = SectionEntry(name, at, len(data), crc32c(as_bytes(data)))
    header = replace(header, sections=header.sections | {name: entry}, dead=_merged(dead))
    raw = header.encode()
    header_at = align_up(at + len(data), PART_ALIGN)
    crc = crc32c(as_bytes(raw))
    new = Superblock(block.generation + 1, header_at, len(raw), crc, header_at + len(raw))
    parse_header(raw, new)  # what a reader would refuse is not written
    with reporting(where, fd, new.file_length):
        try:
            os.ftruncate(fd, block.file_length)  # an interrupted replacement may have left a tail
            write_exactly(fd, memoryview(data), at)
            write_exactly(fd, memoryview(raw), header_at)
            os.fsync(fd)
        except BaseException:
            with contextlib.suppress(OSError):
                os.ftruncate(fd, block.file_length)
            raise
        first = decode_superblock(read_bytes(fd, 0, SUPERBLOCK, where))
        newest = 0 if first is not None and first.generation == block.generation else 1
        for slot in (1 - newest, newest):  # one of the two is sound at any moment
            write_exactly(fd, memoryview(new.encode()), slot * SUPERBLOCK)
            os.fsync(fd)


def _merged(dead: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The same dead regions, neighbours with nothing but padding between them made one."""
    out: list[tuple[int, int]] = []
    for offset, size in sorted(d for d in dead if d[1]):
        if out and align_up(sum(out[-1]), PART_ALIGN) == offset:
            out[-1] = (out[-1][0], offset + size - out[-1][0])
        else:
            out.append((offset, size))
    return tuple(out)
