"""GGML blocks become the float32 bits that gguf's own decoder gives, on every backend."""

from __future__ import annotations

import mmap
import warnings
from pathlib import Path

import numpy as np
import pytest

from edgemoe import kernels, reference_ggml
from edgemoe.errors import KernelError
from edgemoe.kernels import GGML_BLOCKS, dispatch

gguf = pytest.importorskip("gguf", reason="gguf is not installed")

TYPES = list(GGML_BLOCKS)
HALVES = {
    "F16": (0,),
    "Q8_0": (0,),
    "Q6_K": (208,),
    "Q5_K": (0, 2),
    "Q4_K": (0, 2),
    "Q3_K": (108,),
    "Q2_K": (80, 82),
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "IQ4_NL": (0,),
}
"""Bytes at which the float16 fields of a block start."""

TASK = 1 << 15
"""Weights of one native task."""


@pytest.fixture(params=["native", "numba"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "native":
        module = pytest.importorskip("edgemoe._native", reason="the extension is not built")
    else:
        pytest.importorskip("numba", reason="numba is not installed: pip install 'edgemoe[numba]'")
        from edgemoe import numba_backend as module
        from edgemoe.numba_backend import pool

        monkeypatch.setattr(pool, "SHARE", 1)  # let even tiny operations use every thread
    monkeypatch.setattr(dispatch, "native", module)
    return str(request.param)


def random_blocks(name: str, blocks: int, seed: int = 0) -> np.ndarray:
    """uint8 [blocks, bytes] of random bytes; float16 fields are random but finite."""
    rng = np.random.default_rng(seed)
    b = rng.integers(0, 256, (blocks, GGML_BLOCKS[name][1]), dtype=np.uint8)
    for at in HALVES.get(name, ()):
        special = b[:, at + 1] & 0x7C == 0x7C
        b[special, at + 1] ^= 0x40
    if name in ("F32", "BF16"):
        b[:, -1] &= 0xBF
    if name == "MXFP4":
        b[:, 0] &= 0x7F
    return b


def dequantized(data: np.ndarray, name: str, threads: int = 2) -> np.ndarray:
    weights, size = GGML_BLOCKS[name]
    out = np.full(data.size // size * weights, np.float32(-1))
    kernels.dequantize(kernels.new_pool(threads), data, name, out)
    return out


def by_gguf(b: np.ndarray, name: str) -> np.ndarray:
    if b.size == 0:
        return np.empty(0, np.float32)
    with np.errstate(all="ignore"):
        out = gguf.quants.dequantize(b.reshape(1, -1), gguf.GGMLQuantizationType[name])
    return np.asarray(out, np.float32).reshape(-1)


def same_bits(got: np.ndarray, want: np.ndarray) -> None:
    assert got.dtype == want.dtype == np.float32
    np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))


def same_or_nan(got: np.ndarray, want: np.ndarray) -> None:
    """Equal bits, but any NaN for a NaN: which one comes out depends on the processor."""
    nan = np.isnan(want)
    np.testing.assert_array_equal(np.isnan(got), nan)
    same_bits(got[~nan], want[~nan])


@pytest.mark.parametrize("name", TYPES)
def test_sizes_are_those_of_gguf(backend: str, name: str) -> None:
    sizes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    assert GGML_BLOCKS[name] == sizes
    assert dispatch.native.ggml_blocks()[name] == sizes
    assert reference_ggml.BLOCK_TYPES[name][:2] == sizes


def test_every_implementation_has_the_same_types(backend: str) -> None:
    assert list(dispatch.native.ggml_blocks()) == TYPES == list(reference_ggml.BLOCK_TYPES)


@pytest.mark.parametrize("name", TYPES)
def test_random_blocks(backend: str, name: str) -> None:
    for blocks in (0, 1, 2, 7, 333, 3 * TASK // GGML_BLOCKS[name][0] + 5):
        b = random_blocks(name, blocks, seed=blocks)
        want = by_gguf(b, name)
        assert np.isfinite(want).all()
        for threads in (1, 2, 3):
            same_bits(dequantized(b.reshape(-1), name, threads), want)


@pytest.mark.parametrize("name", TYPES)
def test_twin(name: str) -> None:
    for blocks in (0, 1, 501):
        b = random_blocks(name, blocks, seed=blocks)
        same_bits(reference_ggml.dequantize(b.reshape(-1), name), by_gguf(b, name))


@pytest.mark.parametrize("fill", [0, 255])
@pytest.mark.parametrize("name", TYPES)
def test_extreme_codes(backend: str, name: str, fill: int) -> None:
    b = np.full((3, GGML_BLOCKS[name][1]), fill, np.uint8)
    for at in HALVES.get(name, ()):
        b[:, at : at + 2].view(np.float16)[:] = -1.5
    want = by_gguf(b, name)
    same_or_nan(dequantized(b.reshape(-1), name), want)
    same_or_nan(reference_ggml.dequantize(b.reshape(-1), name), want)


@pytest.mark.parametrize("name", sorted({*HALVES, "MXFP4"}))
def test_every_scale(backend: str, name: str) -> None:
    """Every float16, or a sample of them for large blocks, or every exponent byte.

    Subnormal, negative, infinite and NaN of any payload.
    """
    if name == "MXFP4":
        b = random_blocks(name, 256)
        b[:, 0] = np.arange(256)
    else:
        some = np.arange(1 << 16, dtype="<u2")[:: 29 if GGML_BLOCKS[name][0] == 256 else 1]
        edges = np.array([0, 1, 0x3FF, 0x400, 0x7BFF, 0x7C00, 0x7C01, 0x7E00], "<u2")
        every = np.concatenate([some, edges, edges | 0x8000]).view(np.uint8).reshape(-1, 2)
        b = np.resize(random_blocks(name, 50), (len(every), GGML_BLOCKS[name][1]))
        for at in HALVES[name]:
            b[:, at : at + 2] = every[:: -1 if at % 4 == 2 else 1]
    want = by_gguf(b, name)
    assert name == "MXFP4" or np.isnan(want).any()
    assert name == "F16" or np.isinf(want).any()
    same_or_nan(dequantized(b.reshape(-1), name), want)
    same_or_nan(reference_ggml.dequantize(b.reshape(-1), name), want)


@pytest.mark.parametrize("name", TYPES)
def test_any_alignment_and_nothing_beyond_the_output(
    backend: str, name: str, tmp_path: Path
) -> None:
    """Blocks in a read-only mapping, from an odd address up to its very last byte."""
    weights, size = GGML_BLOCKS[name]
    b = random_blocks(name, 9)
    length = 2 * mmap.PAGESIZE
    path = tmp_path / "blocks"
    path.write_bytes(b.tobytes().rjust(length, b"\0"))
    mapped = np.memmap(path, np.uint8, "r")
    room = np.full(9 * weights + 2, np.float32(7))
    kernels.dequantize(kernels.new_pool(2), mapped[length - 9 * size :], name, room[1:-1])
    same_bits(room[1:-1], by_gguf(b, name))
    assert room[0] == room[-1] == 7
    odd = np.zeros(9 * size + 1, np.uint8)[1:]
    odd[:] = b.reshape(-1)
    same_bits(dequantized(odd, name), by_gguf(b, name))


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q5_1", "MXFP4"])
def test_what_gguf_quantized(backend: str, name: str) -> None:
    """Weights that gguf packs come back within half a step of the coarsest of them."""
    w = np.random.default_rng(0).standard_normal((4, 256)).astype(np.float32)
    data = gguf.quants.quantize(w, gguf.GGMLQuantizationType[name])
    got = dequantized(data.reshape(-1), name).reshape(w.shape)
    peak = np.abs(w.reshape(4, -1, 32)).max(axis=-1, keepdims=True).repeat(32, axis=-1)
    step = {"Q8_0": 1 / 127, "Q4_0": 1 / 4, "Q5_1": 2 / 31, "MXFP4": 1 / 2}[name]
    assert (np.abs(got - w) <= step * peak.reshape(w.shape)).all()
    assert np.abs(got - w).max() > 0


def test_wrong_arguments(backend: str) -> None:
    pool = kernels.new_pool(1)
    out = np.empty(512, np.float32)
    data = np.zeros(288, np.uint8)
    kernels.dequantize(pool, data, "Q4_K", out)
    for bad_data in (
        data[:-1],
        data[:144],
        np.zeros(289, np.uint8),
        data[None],
        data.view(np.int8),
        np.zeros(576, np.uint8)[::2],
        bytes(288),
    ):
        with pytest.raises(KernelError, match=r"^data: "):
            kernels.dequantize(pool, bad_data, "Q4_K", out)  # type: ignore[arg-type]
    readonly = out.copy()
    readonly.setflags(write=False)
    for bad_out in (
        out[:511],
        out[:256],
        out[:0],
        out.astype(np.float64),
        out[None],
        np.empty(1024, np.float32)[::2],
        readonly,
    ):
        with pytest.raises(KernelError, match=r"^(out|data): "):
            kernels.dequantize(pool, data, "Q4_K", bad_out)


@pytest.mark.parametrize("name", ["", "q4_k", "Q8_K", "IQ1_S", "Q4_K\n", "x" * 9000])
def test_other_types_are_refused_in_one_line(backend: str, name: str) -> None:
    with pytest.raises(KernelError, match="cannot be decoded") as error:
        kernels.dequantize(
            kernels.new_pool(1), np.zeros(0, np.uint8), name, np.empty(0, np.float32)
        )
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_no_warning_for_infinite_scales() -> None:
    b = random_blocks("Q4_K", 2)
    b[:, 0:4].view(np.float16)[:] = np.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = reference_ggml.dequantize(b.reshape(-1), "Q4_K")
    assert not np.isfinite(got).any()
