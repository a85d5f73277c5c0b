"""The only importer of the two backends: checks arrays, then calls kernels.

Every function takes C-contiguous arrays of exactly the stated dtype and shape; anything else raises
KernelError, and nothing is ever copied or converted. Reduction orders are fixed (native/edgemoe.h):
outputs are the same bits for any thread count, batch, instruction set and backend.

EDGEMOE_BACKEND=native|numba forces a backend; the default is native, and numba where the extension
cannot be imported. EDGEMOE_ISA=scalar|avx2 forces an instruction set of the native one; the default
is the best this machine has.
"""

from __future__ import annotations

from .attention import KVPlace, attention, kv_write, stream_read
from .conversion import GGML_BLOCKS, dequantize, nest_rows, pack_rows, quantize_rows
from .dispatch import (
    MAX_THREADS,
    Pool,
    backend,
    crc32c,
    default_threads,
    fused,
    isa,
    isa_names,
    new_pool,
    set_isa,
)
from .floats import gated_add, rmsnorm, rope, route, silu_mul
from .layer import Batch, DecoderLayer, Routed
from .mixture import Mixture, MixtureParts
from .peak import int8_peak
from .products import (
    AT_ONCE_PAIRS,
    MAX_GROUP_SIZE,
    NestedMatrix,
    accumulate,
    combine,
    decode_rows,
    experts,
    linear,
    linear_f32,
    scratch_bytes,
)

__all__ = [
    "AT_ONCE_PAIRS",
    "GGML_BLOCKS",
    "MAX_GROUP_SIZE",
    "MAX_THREADS",
    "Batch",
    "DecoderLayer",
    "KVPlace",
    "Mixture",
    "MixtureParts",
    "NestedMatrix",
    "Pool",
    "Routed",
    "accumulate",
    "attention",
    "backend",
    "combine",
    "crc32c",
    "decode_rows",
    "default_threads",
    "dequantize",
    "experts",
    "fused",
    "gated_add",
    "int8_peak",
    "isa",
    "isa_names",
    "kv_write",
    "linear",
    "linear_f32",
    "nest_rows",
    "new_pool",
    "pack_rows",
    "quantize_rows",
    "rmsnorm",
    "rope",
    "route",
    "scratch_bytes",
    "set_isa",
    "silu_mul",
    "stream_read",
]
