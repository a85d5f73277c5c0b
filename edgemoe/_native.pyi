from collections.abc import Sequence
from typing import Any

from .types import F32, I8, I32, I64, U8, U64

class Pool:
    def __init__(self, threads: int) -> None: ...
    @property
    def threads(self) -> int: ...
    @property
    def scratch_bytes(self) -> int: ...

class Matrix:
    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...
    @property
    def level(self) -> int: ...

class Reader:
    def __init__(
        self,
        fd: int,
        engine: str,
        depth: int,
        capacity: int,
        direct: bool,
        chunk: int,
        bytes_per_second: float,
    ) -> None: ...
    def submit(self, memory: U8, reads: U64, priority: int) -> int: ...
    def cancel(self, tag: int) -> tuple[int, bool]: ...
    def cancel_all(self) -> int: ...
    def reprioritise(self, tag: int, priority: int) -> tuple[int, bool]: ...
    def wait(self, tag: int | None, seconds: float) -> tuple[int, int, int, int, int, int, int]: ...
    def stats(self) -> dict[str, Any]: ...
    def close(self) -> None: ...

class Layer:
    def __init__(
        self,
        heads: int,
        kv_heads: int,
        d: int,
        window: int,
        scale: float,
        eps: float,
        clip: float,
        residual: float,
        slots: int,
        normalize: bool,
        floats: dict[str, F32],
        matrices: dict[str, Matrix],
    ) -> None: ...
    def run(self, pool: Pool, batch: Batch, add: F32 | None, places: Sequence[KV]) -> bool: ...

class Batch:
    def __init__(
        self,
        x: F32,
        cos: F32,
        sin: F32,
        h: F32,
        ids: I32,
        weights: F32,
        mlp: F32,
        mlp_gate: F32,
        rows: Sequence[tuple[int, int]],
    ) -> None: ...

class KV:
    def __init__(self, data: U8, kind: int, d: int, capacity: int) -> None: ...

class Mixture:
    def __init__(
        self,
        segments: U64,
        offsets: I64,
        hidden: int,
        intermediate: int,
        ahead: int,
        group_units: int,
    ) -> None: ...
    def run(self, pool: Pool, x: F32, ids: I32, levels: I32, weights: F32, y: F32) -> bool: ...
    def part(
        self,
        pool: Pool,
        x: F32,
        ids: I32,
        levels: I32,
        chosen: Sequence[int],
        done: int,
        position: I32,
        pair_out: F32,
    ) -> int: ...

def isa_names() -> list[str]: ...
def isa() -> str: ...
def set_isa(name: str) -> bool: ...
def crc32c(data: U8, seed: int) -> int: ...
def matrix(
    segments: U64,
    offsets: I64,
    index: int,
    level: int,
    ahead: int,
    rows: int,
    cols: int,
    group_units: int,
) -> Matrix: ...
def linear(pool: Pool, x: F32, w: Sequence[Matrix], y: Sequence[F32]) -> None: ...
def accumulate(pool: Pool, x: F32, w: Matrix, q: I8, scale: F32, out: I32) -> None: ...
def linear_f32(pool: Pool, x: F32, w: F32, y: F32) -> None: ...
def decode_rows(w: Matrix, ids: I64, out: F32) -> None: ...
def rmsnorm(pool: Pool, x: F32, w: F32, eps: float, y: F32) -> None: ...
def silu_mul(gate: F32, up: F32) -> None: ...
def gated_add(y: F32, gate: F32, x: F32) -> None: ...
def rope(pool: Pool, x: F32, cos: F32, sin: F32) -> None: ...
def route(logits: F32, normalize: bool, ids: I32, weights: F32) -> None: ...
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
) -> None: ...
def combine(pool: Pool, pair_out: F32, position: I32, weights: F32, y: F32) -> None: ...
def kv_block_bytes(kind: int, d: int) -> int: ...
def kv_write(pool: Pool, data: U8, kind: int, k: F32, v: F32, start: int) -> None: ...
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
) -> None: ...
def stream_read(pool: Pool, data: U8) -> int: ...
def int8_peak(pool: Pool, seconds: float) -> float: ...
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
) -> bool: ...
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
) -> None: ...
def pack_rows(pool: Pool, codes: U8, levels: I32, planes: Sequence[U8]) -> None: ...
def ggml_blocks() -> dict[str, tuple[int, int]]: ...
def dequantize(pool: Pool, data: U8, type_name: str, out: F32) -> None: ...
def linear_scratch(n: int, cols: int, group_units: int) -> int: ...
def experts_scratch(
    threads: int,
    n: int,
    pairs: int,
    hidden: int,
    intermediate: int,
    ahead: int,
    group_units: int,
) -> int: ...
def mixture_scratch(
    threads: int,
    n: int,
    k: int,
    jobs: int,
    hidden: int,
    intermediate: int,
    ahead: int,
    group_units: int,
    whole: bool,
) -> int: ...
def layer_scratch(
    threads: int,
    n: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    d: int,
    mlp: int,
    experts: int,
    group_units: int,
) -> int: ...
def attention_scratch(threads: int, n: int, heads: int, kv_heads: int, d: int) -> int: ...
