"""Random nested records with extreme codes, as kernels and as NumPy twins see them."""

from __future__ import annotations

import numpy as np

from edgemoe.layout import RecordLayout
from edgemoe.mwq import packing
from edgemoe.reference import CodedMatrix
from edgemoe.types import U8


def random_record(
    layout: RecordLayout, rng: np.random.Generator, fill: str = "random"
) -> tuple[list[U8], list[list[CodedMatrix]]]:
    """Segments, and for every level the coded matrices, of a record of random codes.

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
        per_level = []
        for bits in layout.quant.levels:
            s = rng.uniform(0.5, 1.5, (m.rows, m.groups)) * 2.0**-bits
            o = rng.uniform(-0.6, -0.4, (m.rows, m.groups))
            per_level.append((s.astype(np.float32), o.astype(np.float32)))
        scales.append(per_level)
    segments = packing.pack_record(layout, codes, scales)
    coded = []
    for i, bits in enumerate(layout.quant.levels):
        at_level = []
        for m, mat in enumerate(layout.matrices):
            first = int(layout.part_offsets[i, m, 0])
            s, o = packing.unpack_scales(mat, segments[i][first : first + mat.scale_bytes])
            at_level.append(CodedMatrix(codes[m] >> (8 - bits), s, o, layout.quant.group_size))
        coded.append(at_level)
    return segments, coded
