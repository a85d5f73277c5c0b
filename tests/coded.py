"""Random nested records with extreme codes, as kernels and as NumPy twins see them."""

from __future__ import annotations

import numpy as np

from edgemoe.layout import RecordLayout
from edgemoe.mwq import packing
from edgemoe.reference import CodedMatrix
from edgemoe.types import U8, NestedScales


def random_scales(rows: int, groups: int, levels: int, rng: np.random.Generator) -> NestedScales:
    """Every byte a step or zero can have, exponents around those of weights.

    The last level has no shift: it is that of 8 bits.
    """
    shift = rng.integers(0, 16, (levels, rows, groups)).astype(np.uint8)
    shift[-1] = 8
    return NestedScales(
        rng.integers(98, 104, rows).astype(np.uint8),
        rng.integers(0, 256, (rows, groups)).astype(np.uint8),
        rng.integers(0, 256, (rows, groups)).astype(np.uint8),
        shift,
    )


def random_record(
    layout: RecordLayout, rng: np.random.Generator, fill: str = "random"
) -> tuple[list[U8], list[list[CodedMatrix]]]:
    """Segments, and for every level the coded matrices, of a random record as it is stored.

    fill: "random", or "max" (every code 255) or "edges" (0 and 255 only).
    """
    codes, scales = [], []
    for m in layout.matrices:
        shape = (m.rows, m.cols)
        code = rng.integers(0, 256, shape).astype(np.uint8)
        if fill == "max":
            code = np.full(shape, 255, np.uint8)
        if fill == "edges":
            code = np.where(code > 127, 255, 0).astype(np.uint8)
        codes.append(code)
        scales.append(random_scales(m.rows, m.groups, len(layout.quant.levels), rng))
    segments = packing.pack_record(layout, codes, scales)
    coded = []
    for i in range(layout.depth):
        at_level = []
        for m in range(len(layout.matrices)):
            step = layout.matrix_level(m, i)
            bits = layout.quant.levels[step]
            s, o = packing.affine(packing.read_scales(layout, segments, i, m), bits, step)
            at_level.append(CodedMatrix(codes[m] >> (8 - bits), s, o, layout.quant.group_size))
        coded.append(at_level)
    return segments, coded
