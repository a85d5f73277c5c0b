"""A model out to a GGUF file that llama.cpp loads and that computes the same.

Knows configurations and canonical tensors; source.py reads them, architectures.py says what they
are to llama.cpp, tokens.py writes the tokenizer, file.py the file.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..errors import UsageError
from ..layout import ROW_BLOCK
from ..types import F32
from .architectures import Architecture, PlannedTensor, architecture_of, metadata, plan
from .encode import encode
from .file import TYPES, GgufFile, TensorSpec, Value
from .source import Source, open_source
from .tokens import tokenizer_metadata

__all__ = ["ExportReport", "WeightType", "export"]

WeightType = Literal["f16", "q8_0"]

Progress = Callable[[int, int, str], None]
"""Called with (weights done, weights in all, part at hand)."""

_RUN_WEIGHTS = 1 << 22
"""Weights read at a time: 16 MiB of float32."""

_FILE_TYPES = {"f16": 1, "q8_0": 7}
"""general.file_type of a file whose matrices are mostly of this type."""


@dataclass(frozen=True)
class ExportReport:
    """What an export did.

    out: the file. weights, tensors: how many. file_bytes: its size. seconds: wall time. notes: what
    the file does not carry over as it was, a sentence each.
    """

    out: str
    weights: int
    tensors: int
    file_bytes: int
    seconds: float
    notes: tuple[str, ...]


def export(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    type: WeightType = "f16",
    bits: int | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Write a store or a checkpoint as a GGUF file.

    Norms, biases and routers are float32 in it, all other matrices of `type`.

    Args:
        src: a store, or what `edgemoe.checkpoint.open_checkpoint` takes.
        out: the file to make; appears when it is complete, and replaces a GGUF file of that name.
        type: f16, or q8_0: 8 bits and a float16 scale for 32 weights (matrices whose rows are no
            multiple of 32 long stay f16).
        bits: level at which the experts of a store are decoded; None: its highest.
        progress: called after every run of rows with (weights done, weights in all, part).

    Raises:
        StoreError, CheckpointError: the source is missing or damaged.
        UnsupportedError: llama.cpp does not compute this model, or the type cannot hold a weight.
        UsageError: no such type, or no such level. OutputError: the file cannot be written.
    """
    start = time.monotonic()
    if type not in _FILE_TYPES:
        raise UsageError(f"type must be f16 or q8_0, not {type}")
    with open_source(src, bits) as source:
        arch = architecture_of(source.config, source.where)
        tokens, notes = tokenizer_metadata(source.files, source.config, source.where)
        groups = plan(source.config, arch)
        planned = [tensor for group in groups for tensor in group]
        kinds = {t.name: _kind(t, type) for t in planned}
        specs = [TensorSpec(t.name, t.shape, kinds[t.name]) for t in planned]
        total = sum(math.prod(t.shape) for t in planned)
        with GgufFile(out, _header(source, arch, type) | tokens, specs) as file:
            writer = _Writer(source, file, total, progress)
            for group in groups:
                for index in range(len(group[0].parts)):
                    for tensor in group:
                        if tensor.matrix:
                            writer.matrix(tensor, kinds[tensor.name], index)
                        else:
                            writer.vector(tensor)
            file.commit()
    narrow = [t.name for t in planned if t.matrix and kinds[t.name] != type]
    if narrow:
        more = f" and {len(narrow) - 1} more" if len(narrow) > 1 else ""
        notes.append(f"{narrow[0]}{more} stayed f16: the rows are no multiple of 32 long")
    return ExportReport(
        out=os.fspath(out),
        weights=total,
        tensors=len(planned),
        file_bytes=os.stat(out).st_size,
        seconds=time.monotonic() - start,
        notes=tuple(notes),
    )


def _header(source: Source, arch: Architecture, type: WeightType) -> dict[str, Value]:
    general: dict[str, Value] = {
        "general.architecture": arch.name,
        "general.type": "model",
        "general.name": source.name,
        "general.file_type": _FILE_TYPES[type],
        "general.quantization_version": 2,
    }
    return general | metadata(source.config, arch)


def _kind(tensor: PlannedTensor, type: WeightType) -> str:
    if not tensor.matrix:
        return "f32"
    return "f16" if tensor.shape[-1] % TYPES[type][1] else type


class _Writer:
    """Carries runs of rows from the source to the file."""

    def __init__(
        self, source: Source, file: GgufFile, total: int, progress: Progress | None
    ) -> None:
        self._source, self._file = source, file
        self._done, self._total, self._progress = 0, total, progress

    def vector(self, tensor: PlannedTensor) -> None:
        """A tensor that stays float32."""
        (name,) = tensor.parts
        x = self._source.whole(str(name)).reshape(tensor.shape)
        self._put(tensor, "f32", 0, _paired(x, tensor))

    def matrix(self, tensor: PlannedTensor, kind: str, index: int) -> None:
        """The matrix `index` of those a tensor is made of, run by run."""
        rows, cols = tensor.shape[-2:]
        _, weights, size = TYPES[kind]
        row_bytes = cols // weights * size
        # whole row blocks of a store, and whole heads where their rows change places
        unit = math.lcm(ROW_BLOCK, rows // tensor.heads if tensor.heads else 1)
        step = max(_RUN_WEIGHTS // (cols * unit), 1) * unit
        for first in range(0, rows, step):
            stop = min(first + step, rows)
            x = self._source.rows(tensor.parts[index], first, stop)
            self._put(tensor, kind, (index * rows + first) * row_bytes, _paired(x, tensor))

    def _put(self, tensor: PlannedTensor, kind: str, offset: int, x: F32) -> None:
        self._file.write(tensor.name, offset, encode(x, kind, tensor.name))
        self._done += x.size
        if self._progress is not None:
            self._progress(self._done, self._total, tensor.name)


def _paired(x: F32, tensor: PlannedTensor) -> F32:
    """Rows of whole heads with element i of the second half put behind element i of the first."""
    if not tensor.heads:
        return x
    half = tensor.shape[0] // tensor.heads // 2
    halves = x.reshape(-1, 2, half, *x.shape[1:])
    out: F32 = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(x.shape)
    return out
