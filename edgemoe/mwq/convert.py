"""A checkpoint in, a store out, a few million weights at a time.

Matrices are read, quantized, packed and written in runs of rows, so memory does not grow with the
model: a run's float32 weights and codes, and the scales of the one matrix at hand.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from .. import kernels
from ..arch import EXPERT_PARTS, ExpertPart, is_nested
from ..checkpoint import Checkpoint, open_checkpoint
from ..errors import CheckpointError, UsageError, shown
from ..layout import ROW_BLOCK, RecordLayout
from ..store import RecordWriter, StoreWriter, expert_name
from ..types import F32, U8, NestedScales, QuantSpec
from .calibrate import CalibratedExperts, Chunk, Coupling, ExpertInputs, ExpertMatrices, UnitSurvey
from .packing import pack_record, plane_pieces, scale_pieces
from .quantize import DENSE, EXPERTS, Worth, quantize_matrix
from .sensitivity import SECTION, Estimate, measured

Progress = Callable[[int, int, str], None]
"""Called with (weights done, weights in all, part at hand), every some tenths of a second; a first
look counts for some too. What it raises ends the conversion."""

Calibrate = Callable[[ExpertInputs], None]
"""Runs the checkpoint in float32 over a text, all of it as one batch, with these experts."""

_SURVEY_SHARE = 10
"""To look at an expert's inputs takes about this share of the time to choose its codes by them."""

_RUN_WEIGHTS = 1 << 22
"""Weights read at a time: 16 MiB of float32."""

_RUN_WORK = 1 << 31
"""Of rows whose codes are chosen by what their columns have in common, this many weights times
columns at a time: some tenths of a second."""


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
    worth: Worth = EXPERTS,
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
        worth: with `calibrate`, what an error of experts counts at each level.

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
    surveyed = 0 if calibrate is None else expert_weights // _SURVEY_SHARE
    meter = _Meter(total + experts * surveyed, progress)
    metadata = {
        "source": shown(checkpoint.path.resolve().name),
        "quantizer": "affine8-nearest" if calibrate is None else "affine8-nested",
        "sensitivity": "estimated" if calibrate is None else "measured",
    }
    survey: UnitSurvey | None = None
    if calibrate is not None:

        def seen(layer: int, expert: int) -> None:
            meter.add(surveyed, f"{expert_name(layer, expert)}, first look")

        survey = UnitSurvey(checkpoint.expert, config.num_experts, seen, meter.step)
        calibrate(survey)
    ahead = None if survey is None else survey.ahead()
    with StoreWriter(out, config, quant, metadata, ahead) as writer:
        job = _Conversion(checkpoint, writer, pool, meter, worth)
        if calibrate is None or survey is None:
            job.write_experts()
        else:
            read, count = checkpoint.expert, config.num_experts
            calibrate(CalibratedExperts(read, count, survey, job, meter.step))
        for name in names:
            job.write_tensor(name)
        for name, data in checkpoint.files.items():
            writer.add_section(name, data)
        writer.add_section(SECTION, job.sensitivity.astype("<f4").tobytes())
        writer.commit()
    return ConvertReport(
        out=os.fspath(out),
        weights=total,
        experts=experts,
        tensors=len(names),
        max_level=quant.max_level,
        file_bytes=os.stat(out).st_size,
        seconds=time.monotonic() - start,
        starved=None if survey is None else survey.starved,
    )


class _Meter:
    """Adds up finished weights and tells the caller's progress function."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress
        self._what = "first look"

    def add(self, weights: int, what: str) -> None:
        self._done += weights
        self._what = what
        self.step()

    def step(self) -> None:
        """Nothing is finished, but the caller may want to show that work goes on, or to end it."""
        if self._progress is not None:
            self._progress(self._done, self._total, self._what)


_Rows = Callable[[int, int], F32]
"""Reads rows [first, stop) of one matrix."""


class _Conversion:
    """A checkpoint on its way into a store.

    Attributes:
        sensitivity: float32 [layers with experts, experts, levels], see sensitivity.py.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        writer: StoreWriter,
        pool: kernels.Pool,
        meter: _Meter,
        worth: Worth,
    ) -> None:
        self._checkpoint, self._writer, self._pool, self._meter = checkpoint, writer, pool, meter
        self._worth, self._written = worth, set[str]()
        config, levels = checkpoint.config, len(writer.quant.expert_levels)
        shape = len(config.moe_layers), config.num_experts, levels
        self.sensitivity: F32 = np.zeros(shape, np.float32)

    def _note(self, layer: int, expert: int, values: F32) -> None:
        self.sensitivity[self._checkpoint.config.moe_layers.index(layer), expert] = values

    def write_experts(self) -> None:
        """All experts, weight by weight, a run of rows at a time."""
        source = self._checkpoint
        for layer in source.config.moe_layers:
            norm = source.tensor(f"layers.{layer}.post_norm")
            for expert in range(source.config.num_experts):
                record = self._writer.open_expert(layer, expert)
                estimate = Estimate(record.layout)
                for whole, part in enumerate(EXPERT_PARTS):
                    read = partial(self._expert_rows, layer, expert, part)
                    for w, scales in self._write_matrix(record, whole, read):
                        estimate.add(whole, w, scales)
                record.close()
                self._note(layer, expert, estimate.result(norm))

    def _expert_rows(self, layer: int, expert: int, part: ExpertPart, first: int, stop: int) -> F32:
        return self._checkpoint.expert_matrix(layer, expert, part, rows=(first, stop))

    def expert(
        self,
        layer: int,
        expert: int,
        matrices: ExpertMatrices,
        couplings: tuple[Coupling, Coupling, Coupling],
        sample: Chunk,
    ) -> None:
        """Write one, its codes chosen for all levels together; see calibrate.Sink."""
        layout, what = self._writer.expert_layout(layer), expert_name(layer, expert)
        parts = []
        for whole, (w, by) in enumerate(zip(matrices, couplings, strict=True)):
            runs = []
            step = _run_rows(w.shape[1], by)
            for first in range(0, len(w), step):
                rows = w[first : first + step]
                runs.append(self._quantize(what, rows, layout, whole, by, self._worth))
                self._meter.add(rows.size, what)
            for stored in zip(*runs, strict=True):
                run_codes, run_scales = zip(*stored, strict=True)
                parts.append((np.concatenate(run_codes), _joined(run_scales)))
        codes, scales = zip(*parts, strict=True)
        segments = pack_record(layout, codes, scales, self._pool)
        self._writer.write_expert(layer, expert, segments)
        self._note(layer, expert, measured(layout, segments, sample, matrices[2]))

    def linears(self, names: Sequence[str], columns: Coupling) -> None:
        """Write matrices outside the experts; see calibrate.Sink."""
        for name in names:
            self._write_nested(name, columns)

    def write_tensor(self, name: str) -> None:
        """A tensor outside the experts, if it is not written already."""
        if is_nested(name):
            if name not in self._written:
                self._write_nested(name)
            return
        array = self._checkpoint.tensor(name)
        self._writer.write_f32(name, array)
        self._meter.add(array.size, name)

    def _write_nested(self, name: str, columns: Coupling | None = None) -> None:
        source = self._checkpoint
        rows, cols = source.shape(name)
        record = self._writer.open_nested(name, (rows, cols))
        runs = self._write_matrix(
            record, 0, lambda first, stop: source.tensor(name, rows=(first, stop)), columns
        )
        for _ in runs:
            pass
        record.close()
        self._written.add(name)

    def _write_matrix(
        self, record: RecordWriter, whole: int, read: _Rows, columns: Coupling | None = None
    ) -> Iterator[tuple[F32, list[NestedScales]]]:
        """Write one whole matrix of a record; yields each run of rows and the scales of its parts.

        The scale blocks come last, so all runs must be taken.
        """
        layout = record.layout
        parts = layout.wholes[whole]
        rows = layout.matrices[parts[0]].rows
        cols = sum(layout.matrices[m].cols for m in parts)
        done: list[list[NestedScales]] = []
        step = _run_rows(cols, columns)
        for first in range(0, rows, step):
            w = read(first, min(first + step, rows))
            run = self._quantize(record.what, w, layout, whole, columns)
            for m, (codes, _) in zip(parts, run, strict=True):
                for i, offset, data in plane_pieces(layout, m, first, codes, self._pool):
                    record.write(i, offset, data)
            self._meter.add(w.size, record.what)
            done.append([scales for _, scales in run])
            yield w, done[-1]
        for m, runs in zip(parts, zip(*done, strict=True), strict=True):
            for i, offset, data in scale_pieces(layout, m, _joined(runs)):
                record.write(i, offset, data)

    def _quantize(
        self,
        what: str,
        w: F32,
        layout: RecordLayout,
        whole: int,
        columns: Coupling | None,
        worth: Worth = DENSE,
    ) -> list[tuple[U8, NestedScales]]:
        try:
            return quantize_matrix(w, layout, whole, self._pool, columns, worth)
        except UsageError as exc:
            raise CheckpointError(f"{what}: {exc}") from exc


def _run_rows(cols: int, columns: Coupling | None) -> int:
    """Rows that are quantized at a time, whole row blocks."""
    rows = _RUN_WEIGHTS // cols if columns is None else _RUN_WORK // cols**2
    return max(rows // ROW_BLOCK, 1) * ROW_BLOCK


def _joined(runs: Sequence[NestedScales]) -> NestedScales:
    """The scales of a matrix from those of its runs of rows."""
    return NestedScales(
        np.concatenate([run.exponent for run in runs]),
        np.concatenate([run.step for run in runs]),
        np.concatenate([run.zero for run in runs]),
        np.concatenate([run.shift for run in runs], axis=1),
    )
