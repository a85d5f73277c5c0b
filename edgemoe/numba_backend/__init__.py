"""The second backend: the functions of _native.pyi compiled by numba, with the same bits.

It lacks those that are several others in one call: see dispatch.fused.

For machines without the built extension. Arrays are as in _native.pyi: C-contiguous, of exactly
the stated dtype, never copied; shapes are checked in kernels/. Segments start at multiples of 8
bytes, as all memory of NumPy and of the arena does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import KernelError
from ..types import F32, I8, I32, I64, U8, U64
from . import conversion, dequant, floats, kv_attention, products
from .jit import Kernel
from .peak import int8_peak
from .pool import Pool, padded
from .reader import Reader

__all__ = [
    "Matrix",
    "Pool",
    "Reader",
    "accumulate",
    "attention",
    "attention_scratch",
    "combine",
    "crc32c",
    "decode_rows",
    "dequantize",
    "experts",
    "experts_scratch",
    "gated_add",
    "ggml_blocks",
    "int8_peak",
    "isa",
    "isa_names",
    "kv_block_bytes",
    "kv_write",
    "linear",
    "linear_f32",
    "linear_scratch",
    "matrix",
    "nest_rows",
    "pack_rows",
    "quantize_rows",
    "rmsnorm",
    "rope",
    "route",
    "set_isa",
    "silu_mul",
    "stream_read",
]

_ALL_TOKENS = np.empty(0, np.int32)


class Matrix:
    """A [rows, cols] matrix read at levels[level]; points into memory it does not own."""

    def __init__(self, product: I64) -> None:
        self.product = product
        self.rows, self.cols = int(product[products.ROWS]), int(product[products.COLS])
        self.level = int(product[products.LEVEL])


def isa_names() -> list[str]:
    """The instruction sets to choose from: numba compiles for the machine it runs on."""
    return ["numba"]


def isa() -> str:
    """The instruction set in use."""
    return "numba"


def set_isa(name: str) -> bool:
    """Whether `name` can be used."""
    return name == "numba"


def crc32c(data: U8, seed: int) -> int:
    """CRC-32C of data; `seed` is the CRC of the bytes before it."""
    return int(floats.crc32c(data, seed))


def _check_addresses(segments: U64) -> None:
    if (segments & 7).any():
        raise KernelError("segments: expected addresses that are multiples of 8")


def matrix(
    segments: U64,
    offsets: I64,
    index: int,
    level: int,
    ahead: int,
    rows: int,
    cols: int,
    group_units: int,
) -> Matrix:
    """Matrix `index` of a record: offsets [steps, matrices, 2] of its parts in the segments."""
    _check_addresses(segments)
    product = np.zeros(products.FIELDS, np.int64)
    shape = (rows, cols, group_units)
    products.describe_matrix(product, segments, offsets, index, level, ahead, *shape)
    return Matrix(product)


def _quantize(
    pool: Pool, x: F32, begin: int, cols: int, group_units: int, acts: Sequence[Any]
) -> None:
    """Columns [begin, begin + cols) of x to codes, scales and sums of groups."""
    work = 16 * x.shape[0] * cols
    pool.run(products.quantize, x.shape[0], work, x, begin, cols, group_units, *acts)


def _acts(n: int, cols: int, group_units: int) -> list[tuple[type, tuple[int, ...]]]:
    """Arrays for activations: codes, a scale for each unit, sums over groups."""
    units = -(-cols // products.UNIT)
    return [
        (np.uint64, (n, 4, units * 8)),
        (np.float32, (n, units)),
        (np.float32, (n, -(-units // group_units))),
    ]


def _bytes(parts: Sequence[tuple[type, tuple[int, ...]]]) -> int:
    return sum(padded(np.dtype(dtype).itemsize, *shape) for dtype, shape in parts)


def _workspace(cols: int, group_units: int) -> int:
    units = -(-cols // products.UNIT)
    return products.workspace_bytes(units, -(-units // group_units))


def linear(pool: Pool, x: F32, w: Sequence[Matrix], y: Sequence[F32]) -> None:
    """y_m [n, rows_m] = x [n, cols] w_m^T; x is quantized once."""
    n = x.shape[0]
    group_units = int(w[0].product[products.GROUP_UNITS])
    todo = np.array([m.product for m in w])
    todo[:, products.COUNT] = n
    todo[:, products.OUT] = [out.ctypes.data for out in y]
    work = n * sum(m.rows * m.cols for m in w)
    with pool.lock:
        acts = pool.carve(*_acts(n, w[0].cols, group_units))
        _quantize(pool, x, 0, x.shape[1], group_units, acts)
        tasks = products.number_tasks(todo)
        pool.run(products.multiply, tasks, work, todo, _ALL_TOKENS, *acts)


def accumulate(pool: Pool, x: F32, w: Matrix, q: I8, scale: F32, out: I32) -> None:
    """The integer half of `linear`: q int8 [n, units * 32], scale [n, units], dots
    int32 [n, padded rows, units]."""
    group_units = int(w.product[products.GROUP_UNITS])
    with pool.lock:
        acts = pool.carve(*_acts(x.shape[0], w.cols, group_units))
        _quantize(pool, x, 0, x.shape[1], group_units, acts)
        products.accumulate(w.product, acts[0], q, out)
        scale[:] = acts[1]


def linear_f32(pool: Pool, x: F32, w: F32, y: F32) -> None:
    """y [n, rows] = x [n, cols] w [rows, cols]^T."""
    with pool.lock:
        pool.run(floats.linear, x.shape[0] * w.shape[0], x.shape[0] * w.size, x, w, y)


def decode_rows(w: Matrix, ids: I64, out: F32) -> None:
    """out [n, cols] = rows `ids` of w."""
    products.decode_rows(w.product, ids, out)


def rmsnorm(pool: Pool, x: F32, w: F32, eps: float, y: F32) -> None:
    """y = x / sqrt(mean(x^2) + eps) * w over the last axis."""
    with pool.lock:
        pool.run(floats.rmsnorm, x.shape[0], 2 * x.size, x, w, eps, y)


def silu_mul(gate: F32, up: F32) -> None:
    """gate = silu(gate) * up."""
    floats.silu_mul(0, gate.shape[0], gate, up)


def gated_add(y: F32, gate: F32, x: F32) -> None:
    """y += sigmoid(gate) * x; gate [n, 1]."""
    floats.gated_add(y, gate, x)


def rope(pool: Pool, x: F32, cos: F32, sin: F32) -> None:
    """Rotate the halves of every head of x [n, heads, d] in place."""
    with pool.lock:
        pool.run(floats.rope, x.shape[0], x.size, x, cos, sin)


def route(logits: F32, normalize: bool, ids: I32, weights: F32) -> None:
    """Softmax over experts, then the k largest in falling order; ties: the lower index."""
    floats.route(logits, normalize, ids, weights)


def experts(
    pool: Pool,
    x: F32,
    segments: U64,
    offsets: I64,
    levels: I32,
    first_pair: I32,
    pair_token: I32,
    intermediate: int,
    ahead: int,
    group_units: int,
    pair_out: F32,
) -> None:
    """pair_out [pairs, hidden] = down(silu(gate x) * (up x)) for every pair of every job."""
    (n, hidden), pairs, jobs = x.shape, pair_token.shape[0], levels.shape[0]
    if jobs == 0:
        return
    _check_addresses(segments)
    record = (segments, offsets, levels, first_pair)
    with pool.lock:
        parts = pool.carve(*_experts_parts(n, pairs, hidden, intermediate, ahead, group_units))
        outer, (gate, up, more), inner = parts[:3], parts[3:6], parts[6:]
        _quantize(pool, x, 0, hidden, group_units, outer)
        wide = [(i, 0, intermediate, hidden, out) for i, out in enumerate((gate, up))]
        _run_jobs(pool, record, wide, group_units, pair_token, outer)
        pool.run(floats.silu_mul, pairs, 8 * gate.size, gate, up)
        for i, (begin, cols, by) in enumerate(_down_columns(intermediate, ahead)):
            out, acts = more if i else pair_out, inner[3 * i : 3 * i + 3]
            _quantize(pool, gate, begin, cols, group_units, acts)
            down = [(2 + i, by, hidden, cols, out)]
            _run_jobs(pool, record, down, group_units, _ALL_TOKENS, acts)
            if i:
                pair_out += more


def _down_columns(intermediate: int, ahead: int) -> list[tuple[int, int, int]]:
    """(first column, columns, levels ahead) of each of an expert's down matrices."""
    parts = [(0, ahead, 1), (ahead, intermediate - ahead, 0)]
    return [part for part in parts if part[1]]


def _run_jobs(
    pool: Pool,
    record: tuple[U64, I64, I32, I32],
    matrices: Sequence[tuple[int, int, int, int, F32]],
    group_units: int,
    tokens: I32,
    acts: Sequence[Any],
) -> None:
    """Products of matrices (index, levels ahead, rows, cols, result) of every job's record.

    record: segments [jobs, levels], offsets, levels [jobs], first_pair [jobs + 1].
    """
    todo = np.zeros((len(record[2]) * len(matrices), products.FIELDS), np.int64)
    for i, (index, by, rows, cols, out) in enumerate(matrices):
        own = todo[i :: len(matrices)]
        products.describe_jobs(own, *record, index, by, rows, cols, group_units, out)
    tasks, work = products.number_tasks(todo), sum(m[3] * m[4].size for m in matrices)
    pool.run(products.multiply, tasks, work, todo, tokens, *acts)


def combine(pool: Pool, pair_out: F32, position: I32, weights: F32, y: F32) -> None:
    """y [n, hidden] = sum over slots ascending of weights [n, k] * pair_out[position [n, k]]."""
    with pool.lock:
        work = position.size * y.shape[1]
        pool.run(floats.combine, y.shape[0], work, pair_out, position, weights, y)


def kv_block_bytes(kind: int, d: int) -> int:
    """Bytes of a block of the KV cache (kv_layout.py)."""
    padded_d = padded(d, 4) // 4
    return (4, 2, 1)[kind] * 64 * (d + padded_d) + (512 if kind == 2 else 0)


def kv_write(pool: Pool, data: U8, kind: int, k: F32, v: F32, start: int) -> None:
    """Store keys and values [n, kv_heads, d] of positions start, start + 1, ..."""
    with pool.lock:
        tasks = k.shape[0] * k.shape[1]
        pool.run(kv_attention.write, tasks, 4 * k.size, data, kind, k, v, start)


def attention(
    pool: Pool,
    q: F32,
    data: U8,
    kind: int,
    start: int,
    window: int,
    scale: float,
    sinks: F32,
    out: F32,
) -> None:
    """Causal attention of new tokens at positions start, ...; window 0 and empty sinks are none."""
    n, heads, d = q.shape
    seen = start + n
    if window:
        seen = min(seen, window)
    tasks = -(-n // kv_attention.TILE) * data.shape[0]
    with pool.lock:
        args = (q, data, kind, start, window, scale, sinks, out)
        pool.run(kv_attention.attention, tasks, 2 * n * heads * seen * d, *args)


def stream_read(pool: Pool, data: U8) -> int:
    """Sum modulo 2^64 of the 64-bit words of data."""
    return int(data.view(np.uint64).sum(dtype=np.uint64))


def quantize_rows(
    pool: Pool,
    w: F32,
    group: int,
    levels: I32,
    codes: U8,
    exponent: U8,
    step: U8,
    zero: U8,
    shift: U8,
) -> bool:
    """w [rows, cols] to codes, exponents [rows], steps, zeros [rows, groups], shifts of all levels.

    False: w is unfit.
    """
    bad = np.empty(w.shape[0], np.bool_)
    out = (codes, exponent, step, zero, shift, bad)
    with pool.lock:
        pool.run(conversion.quantize_rows, len(w), 8 * w.size, w, group, levels, *out)
    return not bad.any()


def nest_rows(
    pool: Pool,
    w: F32,
    starts: I32,
    bits: I32,
    feedback: F32,
    moment: F32,
    s: F32,
    o: F32,
    weight: F32,
    reach: int,
    sweeps: int,
    codes: U8,
) -> None:
    """Better codes [rows, cols] of w for all levels together, in place: kernels.nest_rows."""
    with pool.lock:
        out = (w, starts, bits, feedback, moment, s, o, weight, reach, sweeps, codes)
        pool.run(conversion.nest_rows, len(w), 8 * w.size * w.shape[1], *out)


def pack_rows(pool: Pool, codes: U8, levels: I32, planes: Sequence[U8]) -> None:
    """The bytes that codes [rows, cols] of whole row blocks add to the plane of each level."""
    blocks = -(-codes.shape[0] // conversion.ROW_BLOCK)
    places = np.array([plane.ctypes.data for plane in planes], np.int64)
    with pool.lock:
        pool.run(conversion.pack_rows, blocks, codes.size, codes, levels, places)


def ggml_blocks() -> dict[str, tuple[int, int]]:
    """The GGML block formats that can be decoded: name -> (weights, bytes)."""
    return {name: (t.weights, t.size) for name, t in dequant.BLOCK_TYPES.items()}


def dequantize(pool: Pool, data: U8, type_name: str, out: F32) -> None:
    """out [n] = the weights of the GGML blocks in `data`; a NaN may be another than native's."""
    block = dequant.BLOCK_TYPES[type_name]
    data, out = data.reshape(-1, block.size), out.reshape(-1, block.weights)
    with pool.lock:
        pool.run(block.decode, len(data), 2 * out.size, data, out)


def linear_scratch(n: int, cols: int, group_units: int) -> int:
    """Bytes that `linear` needs for n tokens on one thread."""
    return _bytes(_acts(n, cols, group_units)) + _workspace(cols, group_units)


def _experts_parts(
    n: int, pairs: int, hidden: int, intermediate: int, ahead: int, group_units: int
) -> list[tuple[type, tuple[int, ...]]]:
    """Activations going in, results of gate, up and a second down, activations of the middle."""
    middle = (np.float32, (pairs, intermediate))
    columns = _down_columns(intermediate, ahead)
    more = (np.float32, (pairs * (len(columns) - 1), hidden))
    inner = [part for _, cols, _ in columns for part in _acts(pairs, cols, group_units)]
    return [*_acts(n, hidden, group_units), middle, middle, more, *inner]


def experts_scratch(
    threads: int,
    n: int,
    pairs: int,
    hidden: int,
    intermediate: int,
    ahead: int,
    group_units: int,
) -> int:
    """Bytes that `experts` needs.

    Compiles all kernels of a forward pass first: whoever asks for sizes goes on to measure what
    this process holds, and the machine code and the compiler are part of it.
    """
    for module in (products, floats, kv_attention):
        for kernel in vars(module).values():
            if isinstance(kernel, Kernel):
                kernel.compiled()
    parts = _experts_parts(n, pairs, hidden, intermediate, ahead, group_units)
    own = max(_workspace(hidden, group_units), _workspace(intermediate, group_units))
    return _bytes(parts) + threads * own


def attention_scratch(threads: int, n: int, heads: int, kv_heads: int, d: int) -> int:
    """Bytes that `attention` needs for n tokens."""
    return threads * kv_attention.workspace_bytes(heads, kv_heads, d)
