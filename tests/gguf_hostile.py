"""How tests refuse a GGUF file: in one clear line, at once, in little memory."""

from __future__ import annotations

import os
import time
import tracemalloc
from pathlib import Path

import pytest
from gguf_samples import STRING, entry

from edgemoe.checkpoint.gguf_header import GgufHeader, read_gguf_header
from edgemoe.errors import CheckpointError

ARCH = entry("general.architecture", STRING, "olmoe")
F32, Q4_0, Q8_0, Q4_K = 0, 2, 8, 12
HUGE = (1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


def parse(path: Path, data: bytes, size: int | None = None) -> GgufHeader:
    """Read the header of a file of these bytes, made sparse up to `size`."""
    path.write_bytes(data)
    if size is not None:
        os.truncate(path, size)
    return read_gguf_header(path)


def refused(
    path: Path,
    data: bytes,
    *words: str,
    size: int | None = None,
    kind: type[CheckpointError] = CheckpointError,
    memory: int = 8 << 20,
) -> None:
    """The file is refused in one line with all these words, in under a second and `memory`."""
    tracemalloc.start()
    begin = time.process_time()
    try:
        with pytest.raises(CheckpointError) as caught:
            parse(path, data, size)
        took, peak = time.process_time() - begin, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert type(caught.value) is kind, message
    assert str(path) in message
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert len(message) < 600 + len(str(path))
    assert took < 1
    assert peak < memory
