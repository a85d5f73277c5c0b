"""The only importer of the two backends: checks arrays, then calls kernels.

Every function takes C-contiguous arrays of exactly the stated dtype and shape; anything else raises
KernelError, and nothing is ever copied or converted. Reduction orders are fixed (native/edgemoe.h):
outputs are the same bits for any thread count, batch, instruction set and backend.

EDGEMOE_BACKEND=native|numba forces a backend; the default is native, and numba where the extension
cannot be imported. EDGEMOE_ISA=scalar|avx2 forces an instruction set of the native one; the default
is the best this machine has.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .errors import EdgeMoEError, KernelError, UsageError, shown
from .layout import ROW_BLOCK, UNIT, MatrixLayout, RecordLayout
from .types import F32, I8, I32, I64, LEVELS, U8, U64, NestedScales, QuantSpec

_BUILD_NATIVE = "build it with a C compiler at hand (pip install .)"
_INSTALL_NUMBA = "install numba (pip install 'edgemoe[numba]')"


def _choose_backend() -> ModuleType:
    """The native extension, or the numba module that has the same functions (_native.pyi)."""
    choice = os.environ.get("EDGEMOE_BACKEND", "")
    if choice not in ("", "native", "numba"):
        raise UsageError(f"EDGEMOE_BACKEND={choice}: must be native or numba")
    if choice != "numba":
        try:
            from . import _native

            return _native
        except ImportError as exc:
            missing = f"the native extension cannot be imported ({exc})"
    if choice == "native":
        raise EdgeMoEError(f"EDGEMOE_BACKEND=native: {missing}: {_BUILD_NATIVE}")
    try:
        from . import numba_backend
    except (ImportError, OSError) as exc:
        if choice == "numba":
            raise EdgeMoEError(
                f"EDGEMOE_BACKEND=numba: numba cannot be imported ({exc}): {_INSTALL_NUMBA}"
            ) from None
        raise EdgeMoEError(
            f"{missing}, nor can numba: {_BUILD_NATIVE}, or {_INSTALL_NUMBA}"
        ) from None
    if choice != "numba":
        # explicit, so that the line printed is this one alone, without the source of the caller
        text = f"{missing}: using numba, which is slower; {_BUILD_NATIVE}"
        warnings.warn_explicit(text, RuntimeWarning, "edgemoe", 1)
    return numba_backend


if TYPE_CHECKING:
    from . import _native
else:
    _native = _choose_backend()

Pool = _native.Pool
MAX_THREADS = 1024


def _check(what: str, array: NDArray[Any], dtype: type, *shape: int | None) -> None:
    if not isinstance(array, np.ndarray):
        raise KernelError(f"{what}: expected a numpy array, got {type(array).__name__}")
    if array.dtype != dtype:
        raise KernelError(f"{what}: expected dtype {np.dtype(dtype)}, got {array.dtype}")
    if array.ndim != len(shape) or any(
        want is not None and got != want for got, want in zip(array.shape, shape, strict=True)
    ):
        wanted = tuple("any" if s is None else s for s in shape)
        raise KernelError(f"{what}: expected shape {wanted}, got {array.shape}")
    if not array.flags.c_contiguous:
        raise KernelError(f"{what}: expected a C-contiguous array, got strides {array.strides}")


def backend() -> str:
    """Name of the backend in use: "native" or "numba"."""
    return "numba" if _native.__name__.endswith("numba_backend") else "native"


def isa_names() -> list[str]:
    """Instruction sets this build and machine can run, best first."""
    return _native.isa_names()


def isa() -> str:
    """Name of the instruction set in use."""
    return _native.isa()


def set_isa(name: str) -> None:
    """Use the named instruction set from now on, in the whole process."""
    if not _native.set_isa(name):
        raise UsageError(
            f"EDGEMOE_ISA={name}: not available here; the {backend()} backend has "
            f"{', '.join(isa_names())} on this machine"
        )


if os.environ.get("EDGEMOE_ISA"):
    set_isa(os.environ["EDGEMOE_ISA"])


def default_threads() -> int:
    """CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), MAX_THREADS)
    return min(os.cpu_count() or 1, MAX_THREADS)


def new_pool(threads: int) -> Pool:
    """A pool of `threads` workers, the calling thread included."""
    if not 1 <= threads <= MAX_THREADS:
        raise UsageError(f"threads must be between 1 and {MAX_THREADS}, got {threads}")
    return _native.Pool(threads)


def crc32c(data: NDArray[np.uint8], seed: int = 0) -> int:
    """CRC-32C of a uint8 array; `seed` is the CRC of the bytes before it."""
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or not data.flags.c_contiguous:
        raise KernelError("crc32c: expected a C-contiguous uint8 array")
    return _native.crc32c(data, seed)


def _addresses(layout: RecordLayout, segments: Sequence[U8]) -> U64:
    levels = len(layout.quant.levels)
    out = np.zeros(levels, np.uint64)
    for i, segment in enumerate(segments):
        _check(f"segment {i}", segment, np.uint8, layout.segment_sizes[i])
        out[i] = segment.ctypes.data
    return out


MAX_GROUP_SIZE = 256
"""Input columns that may share a scale; the kernels keep a group's codes on the stack."""


def _group_units(layout: RecordLayout) -> int:
    quant = layout.quant
    if (
        quant.levels != LEVELS[: len(quant.levels)]
        or quant.group_size % UNIT
        or quant.group_size > MAX_GROUP_SIZE
    ):
        raise KernelError(
            f"levels {quant.levels} in groups of {quant.group_size}: the kernels take {LEVELS} in "
            f"groups of a multiple of {UNIT} up to {MAX_GROUP_SIZE}"
        )
    return quant.group_size // UNIT


@dataclass(frozen=True)
class NestedMatrix:
    """One matrix of a record read at one level, with the memory it points into.

    segments: uint8 arrays, one a segment from the first to that of the level.
    """

    layout: MatrixLayout
    native: _native.Matrix
    segments: tuple[U8, ...]

    @classmethod
    def of(cls, layout: RecordLayout, segments: Sequence[U8], index: int = 0) -> NestedMatrix:
        """Matrix `index` of a record whose first len(segments) segments are given."""
        if not 1 <= len(segments) <= len(layout.quant.levels):
            raise KernelError(f"expected 1 to {len(layout.quant.levels)} segments")
        mat = layout.matrices[index]
        native = _native.matrix(
            _addresses(layout, segments),
            layout.part_offsets,
            index,
            len(segments) - 1,
            mat.rows,
            mat.cols,
            _group_units(layout),
        )
        return cls(mat, native, tuple(segments))


def linear(pool: Pool, x: F32, matrices: Sequence[NestedMatrix]) -> list[F32]:
    """y_m = x @ w_m.T for matrices that share their input, which is quantized once.

    x: float32 [n, cols]. Returns float32 [n, rows_m] each. Activations are rounded to int8 with one
    scale for every 32 columns.
    """
    for m in matrices:
        _check("x", x, np.float32, None, m.layout.cols)
    out = [np.empty((x.shape[0], m.layout.rows), np.float32) for m in matrices]
    _native.linear(pool, x, [m.native for m in matrices], out)
    return out


def accumulate(pool: Pool, x: F32, matrix: NestedMatrix) -> tuple[I8, F32, I32]:
    """The integer half of `linear`, for tests.

    Returns (q int8 [n, units * 32], scale float32 [n, units], dots int32 [n, padded rows, units]).
    """
    mat = matrix.layout
    _check("x", x, np.float32, None, mat.cols)
    n = x.shape[0]
    q = np.empty((n, mat.units * UNIT), np.int8)
    scale = np.empty((n, mat.units), np.float32)
    dots = np.empty((n, mat.row_blocks * 8, mat.units), np.int32)
    _native.accumulate(pool, x, matrix.native, q, scale, dots)
    return q, scale, dots


def linear_f32(pool: Pool, x: F32, w: F32) -> F32:
    """x [n, cols] @ w [rows, cols].T in float32 -> [n, rows]."""
    _check("w", w, np.float32, None, None)
    _check("x", x, np.float32, None, w.shape[1])
    y = np.empty((x.shape[0], w.shape[0]), np.float32)
    _native.linear_f32(pool, x, w, y)
    return y


def decode_rows(matrix: NestedMatrix, ids: I64) -> F32:
    """Rows `ids` (int64 [n]) of a nested matrix, decoded -> float32 [n, cols]."""
    _check("ids", ids, np.int64, None)
    if ids.size and not (int(ids.min()) >= 0 and int(ids.max()) < matrix.layout.rows):
        raise KernelError(f"ids: expected values in [0, {matrix.layout.rows})")
    out = np.empty((ids.shape[0], matrix.layout.cols), np.float32)
    _native.decode_rows(matrix.native, ids, out)
    return out


def rmsnorm(pool: Pool, x: F32, w: F32, eps: float) -> F32:
    """x / sqrt(mean(x^2) + eps) * w over the last axis; x float32 [n, d], w float32 [d]."""
    _check("w", w, np.float32, None)
    _check("x", x, np.float32, None, w.shape[0])
    y = np.empty_like(x)
    _native.rmsnorm(pool, x, w, eps, y)
    return y


def silu_mul(gate: F32, up: F32) -> F32:
    """gate * sigmoid(gate) * up, in place on gate, which is returned; float32 [n, d] both."""
    _check("gate", gate, np.float32, None, None)
    _check("up", up, np.float32, *gate.shape)
    _native.silu_mul(gate, up)
    return gate


def gated_add(y: F32, gate: F32, x: F32) -> None:
    """y += sigmoid(gate) * x in place; y, x float32 [n, d], gate float32 [n, 1]."""
    _check("y", y, np.float32, None, None)
    _check("x", x, np.float32, *y.shape)
    _check("gate", gate, np.float32, y.shape[0], 1)
    _native.gated_add(y, gate, x)


def rope(pool: Pool, x: F32, cos: F32, sin: F32) -> None:
    """Rotate halves of every head in place; x [n, heads, d], cos and sin [n, d / 2]."""
    _check("x", x, np.float32, None, None, None)
    if x.shape[2] % 2:
        raise KernelError(f"x: head_dim must be even, got {x.shape[2]}")
    _check("cos", cos, np.float32, x.shape[0], x.shape[2] // 2)
    _check("sin", sin, np.float32, x.shape[0], x.shape[2] // 2)
    _native.rope(pool, x, cos, sin)


def route(logits: F32, k: int, normalize: bool) -> tuple[I32, F32]:
    """Softmax over experts, then the k largest in falling order (ties: the lower index).

    logits: float32 [n, experts]. Returns (ids int32 [n, k], weights float32 [n, k]); `normalize`
    makes each row of weights sum to 1.
    """
    _check("logits", logits, np.float32, None, None)
    n, experts = logits.shape
    if not 1 <= k <= experts:
        raise KernelError(f"k: expected 1 to {experts}, got {k}")
    ids = np.empty((n, k), np.int32)
    weights = np.empty((n, k), np.float32)
    _native.route(logits, normalize, ids, weights)
    return ids, weights


def experts(
    pool: Pool,
    layout: RecordLayout,
    x: F32,
    segments: U64,
    levels: I32,
    first_pair: I32,
    pair_token: I32,
) -> F32:
    """down(silu(gate x) * (up x)) for every (expert at a level, token) pair, in one native call.

    x: float32 [n, hidden]. Job j is one expert at level index levels[j] (int32 [jobs]), whose
    segments lie at the addresses segments[j] (uint64 [jobs, levels], those above its level unused)
    and which serves pairs first_pair[j] .. first_pair[j + 1] (int32 [jobs + 1]); pair i reads row
    pair_token[i] of x (int32 [pairs]). Returns float32 [pairs, hidden].

    The addresses must stay valid and whole for the call: the caller pins them.
    """
    hidden = layout.matrices[0].cols
    jobs, pairs = levels.shape[0], pair_token.shape[0]
    depth = len(layout.quant.levels)
    _check("x", x, np.float32, None, hidden)
    _check("levels", levels, np.int32, None)
    _check("segments", segments, np.uint64, jobs, depth)
    _check("first_pair", first_pair, np.int32, jobs + 1)
    _check("pair_token", pair_token, np.int32, None)
    if jobs:
        if not (int(levels.min()) >= 0 and int(levels.max()) < depth):
            raise KernelError(f"levels: expected indices in [0, {depth})")
        if first_pair[0] != 0 or first_pair[-1] != pairs or (np.diff(first_pair) < 1).any():
            raise KernelError("first_pair: expected a rising partition of the pairs")
        if not (int(pair_token.min()) >= 0 and int(pair_token.max()) < x.shape[0]):
            raise KernelError(f"pair_token: expected rows in [0, {x.shape[0]})")
        if (segments[np.arange(depth)[None, :] <= levels[:, None]] == 0).any():
            raise KernelError("segments: a segment at or below a job's level has no address")
    out = np.empty((pairs, hidden), np.float32)
    _native.experts(
        pool,
        x,
        segments,
        layout.part_offsets,
        levels,
        first_pair,
        pair_token,
        layout.matrices[0].rows,
        _group_units(layout),
        out,
    )
    return out


def combine(pool: Pool, pair_out: F32, position: I32, weights: F32) -> F32:
    """Weighted sum over slots in ascending order: float32 [n, hidden].

    pair_out: float32 [pairs, hidden]; position: int32 [n, k], the pair of (token, slot);
    weights: float32 [n, k].
    """
    _check("pair_out", pair_out, np.float32, None, None)
    _check("position", position, np.int32, None, None)
    _check("weights", weights, np.float32, *position.shape)
    if position.size and not (int(position.min()) >= 0 and int(position.max()) < pair_out.shape[0]):
        raise KernelError(f"position: expected pairs in [0, {pair_out.shape[0]})")
    y = np.empty((position.shape[0], pair_out.shape[1]), np.float32)
    _native.combine(pool, pair_out, position, weights, y)
    return y


def attention(
    pool: Pool, q: F32, k: F32, v: F32, start: int, scale: float, window: int | None = None
) -> F32:
    """Causal softmax(q k^T * scale) v of new tokens at positions start, start + 1, ...

    q: float32 [n, heads, d]; k, v: float32 [kv_heads, capacity, d], holding positions
    0 .. start + n - 1; each position sees itself and the `window - 1` before it (None: all).
    Returns float32 [n, heads, d].
    """
    _check("q", q, np.float32, None, None, None)
    n, heads, d = q.shape
    _check("k", k, np.float32, None, None, d)
    _check("v", v, np.float32, *k.shape)
    if k.shape[0] == 0 or heads % k.shape[0]:
        raise KernelError(f"k: {k.shape[0]} KV heads do not divide {heads} heads")
    if start < 0 or start + n > k.shape[1]:
        raise KernelError(f"start: positions {start}..{start + n} exceed capacity {k.shape[1]}")
    if window is not None and window < 1:
        raise KernelError(f"window: expected at least 1, got {window}")
    out = np.empty_like(q)
    _native.attention(pool, q, k, v, start, window or 0, scale, out)
    return out


def quantize_rows(pool: Pool, w: F32, quant: QuantSpec) -> tuple[U8, NestedScales]:
    """8-bit codes of weights float32 [rows, cols], and their scales with gains of 1.

    Returns codes uint8 [rows, cols]. Raises KernelError if a weight is NaN or infinite, or the
    weights of a group lie more than 2^127 apart.
    """
    _check("w", w, np.float32, None, None)
    rows, cols = w.shape
    groups = -(-cols // quant.group_size)
    codes = np.empty((rows, cols), np.uint8)
    exponent = np.empty(rows, np.uint8)
    step, zero = np.empty((rows, groups), np.uint8), np.empty((rows, groups), np.uint8)
    levels = np.array(quant.levels, np.int32)
    shift = np.empty((len(levels), rows, groups), np.uint8)
    out = (codes, exponent, step, zero, shift)
    if not _native.quantize_rows(pool, w, quant.group_size, levels, *out):
        raise KernelError("w: holds NaN, infinity or values beyond 1e38")
    gain = np.ones((len(levels), rows), np.float32)
    return codes, NestedScales(exponent, step, zero, gain, shift)


def nest_rows(
    pool: Pool,
    w: F32,
    codes: U8,
    quant: QuantSpec,
    affine: tuple[F32, F32],
    feedback: F32,
    weight: F32,
    reach: int,
) -> None:
    """Replace nearest codes [rows, cols] by those that serve all levels best together, in place.

    Column after column takes the code, at most `reach` from the nearest, of the smallest sum over
    levels of weight[l] * (decoded - target)^2: targets are the weights less what they make up of
    the errors of earlier columns, level by level (GPTQ's compensation, arXiv 2210.17323, with one
    code for several levels).

    Args:
        w: float32 [rows, cols]. affine: (s, o) float32 [levels, rows, groups], w = s * code + o.
        feedback: float32 [cols, cols]; [i, j] is what column j > i makes up of column i's error.
        weight: float32 [levels]. reach: 0 to 255.
    """
    _check("w", w, np.float32, None, None)
    rows, cols = w.shape
    count, groups = len(quant.levels), -(-cols // quant.group_size)
    _check("codes", codes, np.uint8, rows, cols)
    _check("feedback", feedback, np.float32, cols, cols)
    _check("weight", weight, np.float32, count)
    for name, array in zip("so", affine, strict=True):
        _check(name, array, np.float32, count, rows, groups)
    if not 0 <= reach <= 255:
        raise KernelError(f"reach: {reach} is not from 0 to 255")
    bits = np.repeat(np.array(quant.levels, np.int32)[:, None], -(-cols // UNIT), axis=1)
    _native.nest_rows(pool, w, quant.group_size, feedback, *affine, bits, weight, reach, codes)


def pack_rows(pool: Pool, codes: U8, levels: Sequence[int]) -> list[U8]:
    """The bytes that a run of whole row blocks adds to the plane of each level.

    codes: uint8 [rows, cols]. Returns one uint8 array a level, [row_blocks * units * 32 * bits the
    level adds]; padding rows and columns get code 0.
    """
    _check("codes", codes, np.uint8, None, None)
    cells = -(-codes.shape[0] // ROW_BLOCK) * -(-codes.shape[1] // UNIT) * 32
    planes = [
        np.empty(cells * (level - below), np.uint8)
        for level, below in zip(levels, (0, *levels), strict=False)
    ]
    _native.pack_rows(pool, codes, np.array(levels, np.int32), planes)
    return planes


GGML_BLOCKS: Mapping[str, tuple[int, int]] = MappingProxyType(_native.ggml_blocks())
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
    _check("out", out, np.float32, None)
    if out.size % weights:
        raise KernelError(f"out: {out.size} weights are not whole {type_name} blocks of {weights}")
    _check("data", data, np.uint8, out.size // weights * size)
    if not out.flags.writeable:
        raise KernelError("out: expected a writable array")
    _native.dequantize(pool, data, type_name, out)


def scratch_bytes(
    layout: RecordLayout, dense: Sequence[RecordLayout], threads: int, n: int, k: int, ctx: int
) -> int:
    """Pool scratch that a forward pass of n tokens, k experts each, context ctx needs at most."""
    gate = layout.matrices[0]
    units = _group_units(layout)
    return max(
        _native.experts_scratch(threads, n, n * k, gate.cols, gate.rows, units),
        _native.attention_scratch(threads, ctx),
        *(_native.linear_scratch(n, d.matrices[0].cols, units) for d in dense),
    )
