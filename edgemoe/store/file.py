"""Files that appear whole or not at all, and reads and writes that either finish or say why.

An AtomicFile is written under a temporary name in the target's directory and renamed at the end.
Its writer holds an advisory lock on it for as long as it lives, so that a later run on the same
target can tell the temporary of a killed run (remove it) from that of a running one (leave it).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ..errors import OutputError, StoreError, UsageError, shown
from ..kernels import crc32c
from ..types import U8

IO_CHUNK = 4 << 20
"""Bytes a single read or write call moves at most."""

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def read_exactly(fd: int, out: memoryview, offset: int, where: str) -> None:
    """Fill `out` (bytes) from file position `offset`.

    Raises:
        StoreError: the file ends early, or the system reports a read error.
    """
    done, size = 0, len(out)
    while done < size:
        try:
            got = os.preadv(fd, [out[done : done + IO_CHUNK]], offset + done)
        except OSError as exc:
            raise unreadable(where, offset + done, exc.strerror or str(exc)) from exc
        if not got:
            raise truncated(where, offset + done, size - done)
        done += got


def unreadable(where: str, at: int, reason: str) -> StoreError:
    """The system refused to read at this byte of a file."""
    return StoreError(f"{where}: cannot read at byte {at}: {reason}")


def truncated(where: str, end: int, missing: int) -> StoreError:
    """A file ends at this byte, and what was to be read does not."""
    return StoreError(
        f"{where}: truncated: ends at byte {end}, {missing} bytes are missing; copy or convert it "
        "again"
    )


def write_exactly(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data` (bytes) at file position `offset`; OSError where the system refuses."""
    done, size = 0, len(data)
    while done < size:
        done += os.pwrite(fd, data[done : done + IO_CHUNK], offset + done)


def as_bytes(data: bytes | NDArray[np.uint8]) -> U8:
    """The data as a flat, contiguous uint8 array; UsageError for an array of another dtype."""
    if isinstance(data, bytes):
        return np.frombuffer(data, np.uint8)
    if data.dtype != np.uint8:
        raise UsageError(f"bytes to store must be uint8, not {data.dtype}")
    return np.ascontiguousarray(data).reshape(-1)


def crc_of_file(fd: int, offset: int, size: int, where: str) -> int:
    """CRC32C of a run of a file, read in pieces; StoreError where it cannot be read."""
    buffer = np.empty(min(size, IO_CHUNK), np.uint8)
    crc = done = 0
    while done < size:
        piece = buffer[: min(size - done, IO_CHUNK)]
        read_exactly(fd, piece.data, offset + done, where)
        crc = crc32c(piece, crc)
        done += piece.size
    return crc


@contextlib.contextmanager
def reporting(where: str, fd: int = -1, size: int = 0) -> Iterator[None]:
    """Turn an OSError of writing a file into a one-line OutputError.

    Args:
        where: the file, for the message.
        fd, size: the file and the bytes it will have; a full disk is then told in bytes to free.
    """
    try:
        yield
    except OSError as exc:
        advice = ""
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            missing = size - os.fstat(fd).st_blocks * 512 if size else 0
            room = f"free {missing} bytes" if missing > 0 else "free some space"
            advice = f"; {room} or choose another place"
        elif exc.errno == errno.EFBIG:
            advice = "; raise the limit on file sizes (ulimit -f) or choose another place"
        elif exc.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            advice = "; choose a place you may write to"
        raise OutputError(f"cannot write {where}: {exc.strerror or exc}{advice}") from exc


def _sync_directory(directory: str) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot do this
            raise
    finally:
        os.close(fd)


def _lock(fd: int) -> None:
    """Take the lock; a file system without locks leaves the process id as the only sign of life."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
    except OSError as exc:
        if exc.errno not in _NO_LOCKS:
            raise


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OverflowError:
        return False
    except PermissionError:
        pass
    return True


def _is_abandoned(path: str, pid: int) -> bool:
    """Whether the writer of this temporary is gone: its lock is free, or (no locks) its process."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as exc:
        return exc.errno in _NO_LOCKS and not _alive(pid)
    finally:
        os.close(fd)
    return True


def remove_stale(directory: str, name: str) -> None:
    """Remove temporaries of `name` in `directory` that killed runs left behind."""
    pattern = re.compile(re.escape(f".{name}.") + r"(\d+)\.[0-9a-f]{8}\.tmp")
    for entry in list(os.scandir(directory)):
        match = pattern.fullmatch(entry.name)
        if match is None or not entry.is_file(follow_symlinks=False):
            continue
        # another run may remove it first, or it may belong to another user: not our concern
        with contextlib.suppress(OSError):
            if _is_abandoned(entry.path, int(match[1])):
                os.unlink(entry.path)


class AtomicFile:
    """A new regular file at `path`, under a temporary name until `commit`; `discard` removes it.

    Attributes:
        fd: open for reading and writing; write at any offset.
        where: the target, for messages.

    magic: the first bytes of the kind of file to be written; only such a file is replaced.

    Raises:
        OutputError: no such directory, no permission, or something else exists under that name.
    """

    def __init__(self, path: str | os.PathLike[str], magic: bytes) -> None:
        self.where = shown(path)
        if "\0" in os.fspath(path):
            raise OutputError(f"cannot write {self.where}: a file name cannot hold a NUL")
        # a symbolic link is kept and what it points to is replaced
        self._target = os.path.realpath(path)
        self._directory, name = os.path.split(self._target)
        if not os.path.isdir(self._directory):
            raise OutputError(
                f"cannot write {self.where}: there is no directory {shown(self._directory)}; "
                "create it first"
            )
        if os.path.lexists(self._target) and not stat.S_ISREG(os.lstat(self._target).st_mode):
            raise OutputError(
                f"cannot write {self.where}: it exists and is not a file; choose another name"
            )
        with reporting(self.where):
            if not self._may_replace(magic):
                raise OutputError(
                    f"cannot write {self.where}: it exists and is another kind of file; remove it "
                    "or choose another name"
                )
            remove_stale(self._directory, name)
            self.fd, self._temporary = self._create(name)
        self._open = True

    def _may_replace(self, magic: bytes) -> bool:
        """Whether the target is free, empty, or a file of the kind that is to be written."""
        try:
            with open(self._target, "rb") as file:
                head = file.read(len(magic))
        except FileNotFoundError:
            return True
        return head in (b"", magic)

    def _create(self, name: str) -> tuple[int, str]:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        while True:
            temporary = f".{name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
            temporary = os.path.join(self._directory, temporary)
            fd = os.open(temporary, flags, 0o666)
            try:
                _lock(fd)
                linked = os.fstat(fd).st_nlink > 0
            except BaseException:
                os.close(fd)
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise
            if linked:
                return fd, temporary
            # between open and lock another run took it for abandoned: make a new one
            os.close(fd)

    def commit(self) -> None:
        """Bring the bytes to the disk, then give the file its name. OSError where that fails."""
        os.fsync(self.fd)
        os.replace(self._temporary, self._target)
        try:
            _sync_directory(self._directory)
        except BaseException:  # the name may not outlive a power cut: take it back
            with contextlib.suppress(OSError):
                os.unlink(self._target)
            raise
        self._open = False
        os.close(self.fd)

    def discard(self) -> None:
        """Remove the temporary file; nothing happens after commit."""
        if self._open:
            self._open = False
            with contextlib.suppress(OSError):
                os.unlink(self._temporary)
            with contextlib.suppress(OSError):
                os.close(self.fd)
