"""Compiled kernels over nested matrices: quantization of activations, products, decoding.

They compute what native/isa_scalar.c computes, bit for bit. Codes are unpacked eight to a 64-bit
word, a block of 8 rows at a time: byte b of word code[f, 8 * u + 4 * v + w] is row r and column
16 * v + 4 * f + j of unit u, where 4 * r + j = 8 * w + b. Activations are laid out alike, each byte
once for every row, so that a product runs along both.

A kernel computes the tasks [first, last) of an operation.
"""

from __future__ import annotations

import numba
import numpy as np
from numba import types

from ..types import F32, I8, I32, I64, U8, U64
from .jit import array_in, array_out, helper, kernel, pointer

LEVELS = 5
ROW_BLOCK = 8
UNIT = 32
PART_ALIGN = 64
CHUNK_BLOCKS = 8
TOKEN_TILE = 64

# A product is a row of int64: the addresses of the planes, of exponents, steps, shifts (0
# at 8 bits) and of the result (row-major, its first row that of token FIRST), the matrix, and the
# tokens it multiplies.
EXPONENT, STEP, SHIFT = range(LEVELS, LEVELS + 3)
LEVEL, ROWS, COLS, UNITS, GROUP_UNITS, GROUPS = range(LEVELS + 3, LEVELS + 9)
FIRST, COUNT, OUT, TASK = range(LEVELS + 9, LEVELS + 13)
FIELDS = LEVELS + 13

_EVERY_BYTE = np.uint64(0x0101010101010101)
_TWO_WORDS = np.uint64(0x0000000100000001)
_ZERO, _INT8_MAX = np.float32(0), np.float32(127)
_HALF, _SIXTEENTH = np.float32(0.5), np.float32(0.0625)
_SMALLEST_PEAK = np.float32(1e-36)

_INT = types.int64
_F32_1D, _F32_2D = array_in(types.float32, 1), array_in(types.float32, 2)
_I32_1D, _I64_1D = array_in(types.int32, 1), array_in(types.int64, 1)
_CODES_3D, _PRODUCTS = array_in(types.uint64, 3), array_in(types.int64, 2)


@helper
def _ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


@kernel(
    *(_INT, _INT, _F32_2D, _INT, _INT, _INT),
    *(array_out(types.uint64, 3), array_out(types.float32, 2), array_out(types.float32, 2)),
)
def quantize(
    first: int,
    last: int,
    x: F32,
    begin: int,
    cols: int,
    group_units: int,
    q: U64,
    scale: F32,
    group_sum: F32,
) -> None:
    """Columns [begin, begin + cols) of rows of x float32 [n, ...] to int8 codes, laid out as above.

    q uint64 [n, 4, units * 8]; scale float32 [n, units]; group_sum float32 [n, groups].
    """
    codes = np.empty(UNIT, np.int8)
    words = codes.view(np.uint32)
    for row in range(first, last):
        group_sum[row] = _ZERO
        for u in range(scale.shape[1]):
            at = begin + u * UNIT
            n = min(begin + cols - at, UNIT)
            largest = _ZERO
            for i in range(n):
                v = abs(x[row, at + i])
                if v > largest:
                    largest = v
            inverse = _INT8_MAX / largest if largest >= _SMALLEST_PEAK else _ZERO
            total = np.int32(0)
            for i in range(UNIT):
                code = np.int32(np.rint(x[row, at + i] * inverse)) if i < n else np.int32(0)
                codes[i] = code
                total += code
            scale[row, u] = largest / _INT8_MAX
            group_sum[row, u // group_units] += scale[row, u] * np.float32(total)
            for f in range(4):
                for v in range(2):
                    word = np.uint64(words[4 * v + f]) * _TWO_WORDS
                    for w in range(4):
                        q[row, f, 8 * u + 4 * v + w] = word


@helper
def _add_plane(address: int, bits: int, words: int, code: U64, spread: U64) -> None:
    """Shift the codes of a row block left and add a plane of 1 or 2 bits to them."""
    mask = _EVERY_BYTE * np.uint64(2 * bits - 1)
    plane = numba.carray(pointer(address), words * bits // 2, np.uint64)
    if bits == 1:  # a byte holds bits of both halves of a unit: bring it into the layout of two
        for u in range(words // 8):
            for w in range(4):
                spread[8 * u + w] = plane[4 * u + w]
                spread[8 * u + 4 + w] = plane[4 * u + w] >> np.uint64(4)
    else:
        spread = plane
    for f in range(4):
        by = np.uint64(bits)
        shift = np.uint64(f * bits)
        for k in range(words):
            code[f, k] = code[f, k] << by | spread[k] >> shift & mask


@helper
def _unpack(m: I64, block: int, code: U64, spread: U64) -> None:
    """Codes of a row block at the matrix's level."""
    words = m[UNITS] * 8
    code[:] = np.uint64(0)
    for s in range(m[LEVEL] + 1):
        bits = 1 if s == 1 or s == 2 else 2
        _add_plane(m[s] + block * words * 4 * bits, bits, words, code, spread)


@helper
def _scales(m: I64, block: int, scale: F32, offset: F32) -> None:
    """Scales and offsets float32 [groups, 8] of a row block."""
    groups, row = m[GROUPS], block * ROW_BLOCK
    exponents = numba.carray(pointer(m[EXPONENT] + row), ROW_BLOCK, np.uint8)
    steps = numba.carray(pointer(m[STEP] + 2 * row * groups), (groups, 2, ROW_BLOCK), np.uint8)
    bits = m[LEVEL] + 2 + (m[LEVEL] > 2) + (m[LEVEL] > 3)  # 2, 3, 4, 6, 8
    cell = np.float32(1 << (8 - bits))
    centre, sixteenth = (cell - np.float32(1)) * _HALF, cell * _SIXTEENTH
    shifted = bits < 8
    at = m[SHIFT] + row // 2 * groups if shifted else m[STEP]  # any address: not read at 8 bits
    shifts = numba.carray(pointer(at), (groups, ROW_BLOCK // 2), np.uint8)
    for r in range(ROW_BLOCK):
        raised = np.uint32(np.uint32(exponents[r]) << np.uint32(23))
        for g in range(groups):
            word = np.uint32(raised + np.uint32(np.uint32(steps[g, 0, r]) << np.uint32(19)))
            step = word.view(np.float32)
            scale[g, r] = step * cell
            origin = centre - np.float32(steps[g, 1, r])
            if shifted:
                nibble = np.int32(shifts[g, r // 2] >> (4 * (r % 2)) & 15) - np.int32(8)
                origin = origin + np.float32(nibble) * sixteenth
            offset[g, r] = step * origin


@helper
def _dots(code: U8, q: I8, row: int, sums: I32, halves: I32) -> None:
    """halves[16 * u + 8 * v + r]: dot of row r with half v of unit u of token `row`."""
    for i in range(sums.shape[0]):
        total = np.int32(0)
        for f in range(4):
            total += np.int32(code[f, i]) * np.int32(q[row, f, i])
        sums[i] = total
    for i in range(halves.shape[0]):
        halves[i] = sums[4 * i] + sums[4 * i + 1] + sums[4 * i + 2] + sums[4 * i + 3]


@kernel(_INT, _INT, _PRODUCTS, _I32_1D, _CODES_3D, _F32_2D, _F32_2D)
def multiply(
    first: int, last: int, products: I64, tokens: I32, q: U64, scale: F32, group_sum: F32
) -> None:
    """Tasks of a list of products: each is a chunk of row blocks times a tile of tokens.

    Pair i reads row tokens[i] of the activations, or row i where `tokens` is empty.
    """
    q8 = q.view(np.int8)
    units, groups = scale.shape[1], group_sum.shape[1]
    code = np.empty((4, units * 8), np.uint64)
    code8 = code.view(np.uint8)
    spread = np.empty(units * 8, np.uint64)
    sums = np.empty(units * 64, np.int32)
    halves = np.empty(units * 16, np.int32)
    s = np.empty((groups, ROW_BLOCK), np.float32)
    o = np.empty((groups, ROW_BLOCK), np.float32)
    t = np.empty(ROW_BLOCK, np.float32)
    y = np.empty(ROW_BLOCK, np.float32)
    p = 0
    for task in range(first, last):
        while p + 1 < products.shape[0] and products[p + 1, TASK] <= task:
            p += 1
        m = products[p]
        rows, group_units = m[ROWS], m[GROUP_UNITS]
        tiles = _ceil_div(m[COUNT], TOKEN_TILE)
        tile = (task - m[TASK]) % tiles * TOKEN_TILE
        chunk = (task - m[TASK]) // tiles * CHUNK_BLOCKS
        out = numba.carray(pointer(m[OUT]), (m[COUNT], rows), np.float32)
        for block in range(chunk, min(chunk + CHUNK_BLOCKS, _ceil_div(rows, ROW_BLOCK))):
            _unpack(m, block, code, spread)
            _scales(m, block, s, o)
            for i in range(tile, min(tile + TOKEN_TILE, m[COUNT])):
                row = tokens[m[FIRST] + i] if tokens.size else m[FIRST] + i
                _dots(code8, q8, row, sums, halves)
                for r in range(ROW_BLOCK):
                    y[r] = _ZERO
                for g in range(groups):
                    for r in range(ROW_BLOCK):
                        t[r] = _ZERO
                    for u in range(g * group_units, min((g + 1) * group_units, units)):
                        for r in range(ROW_BLOCK):
                            dot = np.float32(halves[16 * u + r] + halves[16 * u + 8 + r])
                            t[r] += scale[row, u] * dot
                    for r in range(ROW_BLOCK):
                        y[r] = (y[r] + s[g, r] * t[r]) + o[g, r] * group_sum[row, g]
                for r in range(min(ROW_BLOCK, rows - block * ROW_BLOCK)):
                    out[i, block * ROW_BLOCK + r] = y[r]


def workspace_bytes(units: int, groups: int) -> int:
    """Bytes of the arrays that `multiply` makes for itself."""
    return units * (4 * 64 + 64 + 64 * 4 + 16 * 4) + groups * 2 * ROW_BLOCK * 4


@kernel(array_out(types.int64, 2), returns=_INT)
def number_tasks(products: I64) -> int:
    """Number the tasks of a list of products; returns how many there are."""
    total = 0
    for m in products:
        m[TASK] = total
        chunks = _ceil_div(_ceil_div(m[ROWS], ROW_BLOCK), CHUNK_BLOCKS)
        total += chunks * _ceil_div(m[COUNT], TOKEN_TILE)
    return total


@helper
def _describe(
    m: I64,
    segments: U64,
    offsets: I64,
    level: int,
    ahead: int,
    rows: int,
    cols: int,
    group_units: int,
) -> None:
    """Fill in the matrix of a product: segments [levels], offsets [steps, 2]."""
    last = min(level + ahead, LEVELS - 1)
    for step in range(last + 1):
        m[step] = np.int64(segments[max(step - ahead, 0)]) + offsets[step, 1]
    padded_rows = _ceil_div(rows, ROW_BLOCK) * ROW_BLOCK
    m[EXPONENT] = np.int64(segments[0]) + offsets[0, 0]
    m[STEP] = m[EXPONENT] + _ceil_div(padded_rows, PART_ALIGN) * PART_ALIGN
    groups = _ceil_div(_ceil_div(cols, UNIT), group_units)
    if last == 0:
        steps = 2 * padded_rows * groups
        m[SHIFT] = m[STEP] + _ceil_div(steps, PART_ALIGN) * PART_ALIGN
    elif last < LEVELS - 1:
        m[SHIFT] = np.int64(segments[last - ahead]) + offsets[last, 0]
    m[LEVEL] = last
    m[ROWS] = rows
    m[COLS] = cols
    m[UNITS] = _ceil_div(cols, UNIT)
    m[GROUP_UNITS] = group_units
    m[GROUPS] = groups


@kernel(
    *(array_out(types.int64, 1), array_in(types.uint64, 1), array_in(types.int64, 3)),
    *(_INT, _INT, _INT, _INT, _INT, _INT),
)
def describe_matrix(
    m: I64,
    segments: U64,
    offsets: I64,
    index: int,
    level: int,
    ahead: int,
    rows: int,
    cols: int,
    group_units: int,
) -> None:
    """Fill in a product's matrix: number `index` of the record at these segments."""
    _describe(m, segments, offsets[:, index], level, ahead, rows, cols, group_units)


@kernel(
    *(types.Array(types.int64, 2, "A"), array_in(types.uint64, 2), array_in(types.int64, 3)),
    *(_I32_1D, _I32_1D, _INT, _INT, _INT, _INT, _INT, _F32_2D),
)
def describe_jobs(
    products: I64,
    segments: U64,
    offsets: I64,
    levels: I32,
    first_pair: I32,
    index: int,
    ahead: int,
    rows: int,
    cols: int,
    group_units: int,
    out: F32,
) -> None:
    """Fill in a product a job: matrix `index` of its record times its pairs; out [pairs, rows]."""
    by_index = offsets[:, index]
    for j in range(levels.shape[0]):
        m, first = products[j], np.int64(first_pair[j])
        _describe(m, segments[j], by_index, levels[j], ahead, rows, cols, group_units)
        m[FIRST] = first
        m[COUNT] = first_pair[j + 1] - first
        m[OUT] = out.ctypes.data + first * rows * 4


@kernel(
    *(array_in(types.int64, 1), _CODES_3D),
    *(array_out(types.int8, 2), array_out(types.int32, 3)),
)
def accumulate(m: I64, q: U64, codes: I8, dots: I32) -> None:
    """Integer dots of a matrix, before any scale: int32 [n, padded rows, units].

    codes int8 [n, units * 32] are the activations' in the order of the columns.
    """
    q8 = q.view(np.int8)
    units = m[UNITS]
    for i in range(q.shape[0]):
        for u in range(units):
            for c in range(UNIT):
                v, f, j = c // 16, c // 4 % 4, c % 4
                codes[i, u * UNIT + c] = q8[i, f, 64 * u + 32 * v + j]
    code = np.empty((4, units * 8), np.uint64)
    spread = np.empty(units * 8, np.uint64)
    sums = np.empty(units * 64, np.int32)
    halves = np.empty(units * 16, np.int32)
    for block in range(_ceil_div(m[ROWS], ROW_BLOCK)):
        _unpack(m, block, code, spread)
        for i in range(q.shape[0]):
            _dots(code.view(np.uint8), q8, i, sums, halves)
            for u in range(units):
                for r in range(ROW_BLOCK):
                    dot = halves[16 * u + r] + halves[16 * u + 8 + r]
                    dots[i, block * ROW_BLOCK + r, u] = dot


@kernel(array_in(types.int64, 1), _I64_1D, array_out(types.float32, 2))
def decode_rows(m: I64, ids: I64, out: F32) -> None:
    """Rows `ids` of a matrix, decoded: float32 [n, cols]."""
    units, groups = m[UNITS], m[GROUPS]
    code = np.empty((4, units * 8), np.uint64)
    code8 = code.view(np.uint8)
    spread = np.empty(units * 8, np.uint64)
    s = np.empty((groups, ROW_BLOCK), np.float32)
    o = np.empty((groups, ROW_BLOCK), np.float32)
    for i in range(ids.shape[0]):
        block, r = ids[i] // ROW_BLOCK, ids[i] % ROW_BLOCK
        _unpack(m, block, code, spread)
        _scales(m, block, s, o)
        for c in range(m[COLS]):
            u, v, f, j = c // UNIT, c // 16 % 2, c // 4 % 4, c % 4
            g = u // m[GROUP_UNITS]
            value = np.float32(code8[f, 64 * u + 32 * v + 4 * r + j])
            out[i, c] = s[g, r] * value + o[g, r]
