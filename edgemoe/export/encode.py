"""float32 to the bytes of the types a GGUF file holds matrices in.

Source: ggml-org/ggml, src/ggml-quants.c (quantize_row_q8_0_ref).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from ..errors import UnsupportedError
from ..types import F32, U8
from .file import TYPES

LARGEST: Mapping[str, float] = MappingProxyType({"f16": 65504.0, "q8_0": 127 * 65504.0})
"""Type -> largest magnitude of a weight."""

_BLOCKS = 1 << 11
"""Q8_0 blocks encoded at a time: what is at hand stays in a core's cache."""


def encode(x: F32, kind: str, what: str) -> U8:
    """The bytes of float32 [rows, cols] (or [n]) as `kind`: f32, f16, or q8_0 (cols a multiple of
    32).

    Raises:
        UnsupportedError: `kind` cannot hold a weight of that size; names the tensor, `what`.
    """
    if kind == "f32":
        return np.ascontiguousarray(x, "<f4").reshape(-1).view(np.uint8)
    peak = max(float(x.max()), -float(x.min()))
    if peak > LARGEST[kind]:
        other = "" if kind == "q8_0" or x.shape[-1] % 32 else "; q8_0 can (--type q8_0)"
        raise UnsupportedError(
            f"{what} has a weight of size {peak:g}, which {kind} cannot hold{other}"
        )
    if kind == "f16":
        return np.ascontiguousarray(x, "<f2").reshape(-1).view(np.uint8)
    return _q8_0(np.ascontiguousarray(x))


def _q8_0(x: F32) -> U8:
    """Blocks of 32 weights: float16 scale, a 127th of the largest magnitude, and 32 int8 codes,
    weights over the (unrounded) scale, halves rounded away from zero."""
    _, weights, size = TYPES["q8_0"]
    blocks = x.reshape(-1, weights)
    out = np.empty((len(blocks), size), np.uint8)
    for first in range(0, len(blocks), _BLOCKS):
        part = blocks[first : first + _BLOCKS]
        scale = np.abs(part).max(axis=1) / np.float32(127)
        inverse = np.zeros_like(scale)
        # the scales left out are zero in float16, whatever the codes
        np.divide(np.float32(1), scale, out=inverse, where=scale >= np.finfo(np.float32).tiny)
        code = part * inverse[:, None]
        whole = np.trunc(code)
        code -= whole
        code *= 2
        whole += np.trunc(code, out=code)
        piece = out[first : first + _BLOCKS]
        piece[:, :2] = scale.astype("<f2").view(np.uint8).reshape(-1, 2)
        piece[:, 2:] = whole.astype(np.int8).view(np.uint8)
    return out.reshape(-1)
