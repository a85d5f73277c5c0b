"""A checkpoint in, a store out, a few million weights at a time.

Matrices are read, quantized, packed and written in runs of rows, so memory does not grow with the
model: a run's float32 weights and codes, and the scales of the one matrix at hand.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from .. import kernels
from ..arch import EXPERT_PARTS, ExpertPart, is_nested
from ..checkpoint import Checkpoint, open_checkpoint
from ..errors import CheckpointError, UsageError, shown
from ..layout import ROW_BLOCK
from ..store import RecordWriter, StoreWriter
from ..types import F32, NestedScales, QuantSpec
from .calibrate import CalibratedExperts, ExpertMatrices
from .packing import pack_scales, plane_pieces
from .quantize import quantize_matrix

Progress = Callable[[int, int, str], None]
"""Called with (weights done, weights in all, part at hand)."""

Calibrate = Callable[[CalibratedExperts], None]
"""Runs the checkpoint in float32 over a text, all of it as one batch, with these experts."""

_RUN_WEIGHTS = 1 << 22
"""Weights read at a time: 16 MiB of float32."""


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion did.

    out: the store. weights: all of the model. experts, tensors: how many. max_level: most bits of
    an expert. file_bytes: of the store. seconds: wall time. starved: experts that the calibration
    text hardly reached, None without one.
    """

    out: str
    weights: int
    experts: int
    tensors: int
    max_level: int
    file_bytes: int
    seconds: float
    starved: int | None = None


def convert(
    src: str | os.PathLike[str] | Checkpoint,
    out: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
    quant: QuantSpec | None = None,
    max_level: int | None = None,
    threads: int | None = None,
    calibrate: Calibrate | None = None,
) -> ConvertReport:
    """Convert a checkpoint into a store.

    Args:
        src: a Hugging Face directory or a GGUF file (see edgemoe.checkpoint), or one that is open.
        out: the store to make; appears when it is complete, and replaces a store of that name.
        progress: called after every run of rows with (weights done, weights in all, part).
        quant: levels and group size; by default 2, 3, 4, 6, 8 bits in groups of 128.
        max_level: highest level that experts keep, 2 to 8; what is above it is left out of the
            store. None: that of `quant` if there is one, else what the source has (4 for a 4-bit
            GGUF, 8 for a checkpoint).
        threads: that dequantize and quantize; None: one for each CPU this process may use.
        calibrate: lets experts be quantized for the inputs they see; None: weight by weight.

    Raises:
        UsageError: `max_level` is no level.
        CheckpointError: the source is missing, damaged or unsupported.
        OutputError: the store cannot be written; nothing of it is left behind.
    """
    start = time.monotonic()
    pool = kernels.new_pool(kernels.default_threads() if threads is None else threads)
    checkpoint = src if isinstance(src, Checkpoint) else open_checkpoint(src, pool=pool)
    checkpoint.require_tokenizer()
    config, quant = checkpoint.config, quant or QuantSpec(max_level=checkpoint.max_level)
    if max_level is not None:
        if max_level not in quant.levels:
            raise UsageError(
                f"max_level must be one of {', '.join(map(str, quant.levels))}, not {max_level}"
            )
        quant = replace(quant, max_level=max_level)
    names = checkpoint.dense_names()
    expert_weights = 3 * config.moe_intermediate_size * config.hidden_size
    experts = len(config.moe_layers) * config.num_experts
    total = experts * expert_weights + sum(math.prod(checkpoint.shape(n)) for n in names)
    meter = _Meter(total, progress)
    metadata = {
        "source": shown(checkpoint.path.resolve().name),
        "quantizer": "affine8-nearest" if calibrate is None else "affine8-nested",
    }
    starved = None
    with StoreWriter(out, config, quant, metadata) as writer:
        if calibrate is None:
            for layer in config.moe_layers:
                for expert in range(config.num_experts):
                    record = writer.open_expert(layer, expert)
                    for m, part in enumerate(EXPERT_PARTS):
                        _write_matrix(
                            record, m, _expert_rows(checkpoint, layer, expert, part), meter, pool
                        )
                    record.close()
        else:

            def write(
                layer: int, expert: int, matrices: ExpertMatrices, feedback: tuple[F32, F32, F32]
            ) -> None:
                record = writer.open_expert(layer, expert)
                for m, (matrix, by) in enumerate(zip(matrices, feedback, strict=True)):
                    _write_matrix(record, m, _slices(matrix), meter, pool, by)
                record.close()

            calibrated = CalibratedExperts(checkpoint.expert, config.num_experts, write)
            calibrate(calibrated)
            starved = calibrated.starved
        for name in names:
            if is_nested(name):
                rows, cols = checkpoint.shape(name)
                record = writer.open_nested(name, (rows, cols))
                _write_matrix(record, 0, _dense_rows(checkpoint, name), meter, pool)
                record.close()
            else:
                array = checkpoint.tensor(name)
                writer.write_f32(name, array)
                meter.add(array.size, name)
        for name, data in checkpoint.files.items():
            writer.add_section(name, data)
        writer.commit()
    return ConvertReport(
        out=os.fspath(out),
        weights=total,
        experts=experts,
        tensors=len(names),
        max_level=quant.max_level,
        file_bytes=os.stat(out).st_size,
        seconds=time.monotonic() - start,
        starved=starved,
    )


class _Meter:
    """Adds up finished weights and tells the caller's progress function."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def add(self, weights: int, what: str) -> None:
        self._done += weights
        if self._progress is not None:
            self._progress(self._done, self._total, what)


_Rows = Callable[[int, int], F32]
"""Reads rows [first, stop) of one matrix."""


def _expert_rows(checkpoint: Checkpoint, layer: int, expert: int, part: ExpertPart) -> _Rows:
    return lambda first, stop: checkpoint.expert_matrix(layer, expert, part, rows=(first, stop))


def _dense_rows(checkpoint: Checkpoint, name: str) -> _Rows:
    return lambda first, stop: checkpoint.tensor(name, rows=(first, stop))


def _slices(matrix: F32) -> _Rows:
    return lambda first, stop: matrix[first:stop]


def _write_matrix(
    record: RecordWriter,
    m: int,
    read: _Rows,
    meter: _Meter,
    pool: kernels.Pool,
    feedback: F32 | None = None,
) -> None:
    """Quantize matrix m of a record and write its planes and scale blocks."""
    layout = record.layout
    matrix = layout.matrices[m]
    parts: list[NestedScales] = []
    step = max(_RUN_WEIGHTS // (matrix.cols * ROW_BLOCK), 1) * ROW_BLOCK
    for first in range(0, matrix.rows, step):
        stop = min(first + step, matrix.rows)
        try:
            codes, scales = quantize_matrix(read(first, stop), layout.quant, pool, feedback)
        except UsageError as exc:
            raise CheckpointError(f"{record.what}: {exc}") from exc
        parts.append(scales)
        for i, offset, data in plane_pieces(layout, m, first, codes, pool):
            record.write(i, offset, data)
        meter.add(codes.size, record.what)
    whole = NestedScales(
        np.concatenate([part.exponent for part in parts]),
        np.concatenate([part.step for part in parts]),
        np.concatenate([part.zero for part in parts]),
        np.concatenate([part.gain for part in parts], axis=1),
        np.concatenate([part.shift for part in parts], axis=1),
    )
    for i in range(len(layout.quant.levels)):
        record.write(i, int(layout.part_offsets[i, m, 0]), pack_scales(layout, m, i, whole))
