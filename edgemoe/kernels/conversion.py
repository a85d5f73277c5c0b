"""Weights to codes and bytes; blocks of GGML to weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from ..errors import KernelError, shown
from ..layout import ROW_BLOCK, UNIT
from ..types import F32, I32, LEVELS, U8, NestedScales, QuantSpec
from . import dispatch
from .dispatch import Pool, check


def quantize_rows(pool: Pool, w: F32, quant: QuantSpec) -> tuple[U8, NestedScales]:
    """8-bit codes of weights float32 [rows, cols], and their scales.

    Returns codes uint8 [rows, cols]. Raises KernelError if a weight is NaN or infinite, or the
    weights of a group lie more than 2^127 apart.
    """
    check("w", w, np.float32, None, None)
    rows, cols = w.shape
    groups = -(-cols // quant.group_size)
    codes = np.empty((rows, cols), np.uint8)
    exponent = np.empty(rows, np.uint8)
    step, zero = np.empty((rows, groups), np.uint8), np.empty((rows, groups), np.uint8)
    levels = np.array(quant.levels, np.int32)
    shift = np.empty((len(levels), rows, groups), np.uint8)
    out = (codes, exponent, step, zero, shift)
    if not dispatch.native.quantize_rows(pool, w, quant.group_size, levels, *out):
        raise KernelError("w: holds NaN, infinity or values beyond 1e38")
    return codes, NestedScales(exponent, step, zero, shift)


def nest_rows(
    pool: Pool,
    w: F32,
    codes: U8,
    starts: I32,
    bits: I32,
    affine: tuple[F32, F32],
    coupling: tuple[F32, F32],
    weight: F32,
    reach: int,
    sweeps: int,
) -> None:
    """Replace nearest codes [rows, cols] by those that serve all levels best together, in place.

    Column after column takes the code, at most `reach` from the nearest, of the smallest sum
    over levels of weight[l] * (decoded - target)^2. At first targets are the weights less what they
    make up of the errors of earlier columns, level by level (GPTQ's compensation, arXiv 2210.17323,
    with one code for several levels). Then each column in turn is brought where the output's
    error, summed over levels, is least with all others as they are (coordinate descent, as in
    QuantEase, arXiv 2309.01885), until nothing changes.

    Args:
        w: float32 [rows, cols].
        starts: int32 [groups + 1], first column of each group and, last, cols.
        bits: int32 [levels, groups], 1 to 8: what a group is read at at each level.
        affine: (s, o) float32 [levels, rows, groups], w = s * code + o.
        coupling: (moment, feedback), float32 [cols, cols]. Moment is symmetric, its diagonal above
            zero: the error e of a row counts e moment e^T. feedback[i, j] is what column j > i
            makes up of column i's error.
        weight: float32 [levels]. reach: 0 to 255. sweeps: descents at most.
    """
    check("w", w, np.float32, None, None)
    rows, cols = w.shape
    count, groups = len(weight), len(starts) - 1
    check("codes", codes, np.uint8, rows, cols)
    moment, feedback = coupling
    check("moment", moment, np.float32, cols, cols)
    check("feedback", feedback, np.float32, cols, cols)
    if not (np.diag(moment) > 0).all():
        raise KernelError("moment: its diagonal is not above zero")
    check("weight", weight, np.float32, None)
    check("starts", starts, np.int32, None)
    check("bits", bits, np.int32, count, groups)
    for name, array in zip("so", affine, strict=True):
        check(name, array, np.float32, count, rows, groups)
    if not 0 <= reach <= 255:
        raise KernelError(f"reach: {reach} is not from 0 to 255")
    if not 1 <= count <= len(LEVELS):
        raise KernelError(f"weight: {count} levels; the kernels take 1 to {len(LEVELS)}")
    if groups < 1 or starts[0] != 0 or starts[-1] != cols or (np.diff(starts) < 1).any():
        raise KernelError(f"starts: expected groups that divide {cols} columns")
    if not ((bits >= 1) & (bits <= 8)).all():
        raise KernelError("bits: expected 1 to 8")
    args = (starts, bits, feedback, moment, *affine, weight, reach, sweeps, codes)
    dispatch.native.nest_rows(pool, w, *args)


def pack_rows(pool: Pool, codes: U8, levels: Sequence[int]) -> list[U8]:
    """The bytes that a run of whole row blocks adds to the plane of each level.

    codes: uint8 [rows, cols]. Returns one uint8 array a level, [row_blocks * units * 32 * bits the
    level adds]; padding rows and columns get code 0.
    """
    check("codes", codes, np.uint8, None, None)
    cells = -(-codes.shape[0] // ROW_BLOCK) * -(-codes.shape[1] // UNIT) * 32
    planes = [
        np.empty(cells * (level - below), np.uint8)
        for level, below in zip(levels, (0, *levels), strict=False)
    ]
    dispatch.native.pack_rows(pool, codes, np.array(levels, np.int32), planes)
    return planes


GGML_BLOCKS: Mapping[str, tuple[int, int]] = MappingProxyType(dispatch.native.ggml_blocks())
"""The block formats of GGML that `dequantize` takes: name -> (weights, bytes) of one block."""


def dequantize(pool: Pool, data: U8, type_name: str, out: F32) -> None:
    """Decode GGML blocks: out [n] = the weights of the whole blocks in `data`, in their order.

    data: uint8 [n / weights * bytes], a block being GGML_BLOCKS[type_name] = (weights, bytes), at
    any address; out: float32 [n]. The float32 operations are those of ggml, in its order.
    """
    if type_name not in GGML_BLOCKS:
        raise KernelError(
            f"type {shown(str(type_name))}: cannot be decoded; known: {', '.join(GGML_BLOCKS)}"
        )
    weights, size = GGML_BLOCKS[type_name]
    check("out", out, np.float32, None)
    if out.size % weights:
        raise KernelError(f"out: {out.size} weights are not whole {type_name} blocks of {weights}")
    check("data", data, np.uint8, out.size // weights * size)
    if not out.flags.writeable:
        raise KernelError("out: expected a writable array")
    dispatch.native.dequantize(pool, data, type_name, out)
