"""A decoder layer without its experts, in one native call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..errors import KernelError
from ..types import F32, I32, ModelConfig
from . import dispatch
from .attention import KVPlace, check_place
from .dispatch import Pool, check
from .products import NestedMatrix


class Routed(NamedTuple):
    """What a layer's feed-forward part needs of n tokens.

    h: float32 [n, hidden], the normed residual stream. ids int32, gates float32 [n, k]: each
    token's experts and their weights, None in a dense layer. mlp: float32 [n, hidden], what a dense
    layer's MLP or the expert that all tokens share gives; mlp_gate: float32 [n, 1], the latter's.
    """

    h: F32
    ids: I32 | None
    gates: F32 | None
    mlp: F32 | None
    mlp_gate: F32 | None


_NONE = np.empty((0, 0), np.float32)
_NO_IDS = np.empty((0, 0), np.int32)


class DecoderLayer:
    """Layer `index` of a model, made of nested matrices: model.dense_part in one call.

    floats: float32 tensors by name: input_norm, post_norm, q_norm, k_norm, q_bias, k_bias, v_bias,
    o_bias, router, shared_router. matrices: q, k, v, o and, of an MLP, gate, up, down. What a layer
    does not have is left out.

    Raises:
        KernelError: a tensor is missing, or shapes do not fit each other.
    """

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        floats: Mapping[str, F32],
        matrices: Mapping[str, NestedMatrix],
    ) -> None:
        self._hidden, self._d = config.hidden_size, config.head_dim
        self._kv_heads, self._slots = config.num_key_value_heads, config.num_experts_per_tok
        self._routes, self._gated = "router" in floats, "shared_router" in floats
        self._mlp = "gate" in matrices
        self._matrices = dict(matrices)  # native points into the memory that they keep
        _check_tensors(config, floats, self._matrices)
        multiplier = config.attention_multiplier
        everything = index in config.full_attention_layers
        self._native = dispatch.native.Layer(
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            0 if everything else config.sliding_window or 0,
            config.head_dim**-0.5 if multiplier is None else multiplier,
            config.rms_norm_eps,
            config.clip_qkv or 0.0,
            config.residual_multiplier,
            config.num_experts_per_tok,
            config.norm_topk_prob,
            dict(floats),
            {name: m.native for name, m in matrices.items()},
        )

    def __call__(
        self,
        pool: Pool,
        x: F32,
        add: F32 | None,
        cos: F32,
        sin: F32,
        places: Sequence[tuple[KVPlace, int]],
    ) -> Routed:
        """Run the layer up to its experts, in place on x, to which `add` is added first.

        x, add: float32 [n, hidden]; cos, sin: float32 [n, head_dim / 2]; places: where the keys and
        values of each sequence of the batch lie and how many rows are its own, n in all.
        """
        n, half = len(x), self._d // 2
        check("x", x, np.float32, None, self._hidden)
        if add is not None and add.shape != x.shape:
            raise KernelError(f"add: expected shape {x.shape}, got {add.shape}")
        if cos.shape != (n, half) or sin.shape != (n, half):
            raise KernelError(f"cos, sin: expected shape {(n, half)}, got {cos.shape}, {sin.shape}")
        spans, rows = [], 0
        for place, count in places:
            layout = place.layout
            if (layout.kv_heads, layout.head_dim) != (self._kv_heads, self._d):
                raise KernelError("the keys and values of another model's layer")
            check_place(place, count)
            spans.append((place.data, layout.kind, place.start, count))
            rows += count
        if rows != n:
            raise KernelError(f"places: expected {n} rows in all")
        h = np.empty_like(x)
        ids, gates, mlp, mlp_gate = _NO_IDS, _NONE, _NONE, _NONE
        if self._routes:
            ids = np.empty((n, self._slots), np.int32)
            gates = np.empty((n, self._slots), np.float32)
        if self._mlp:
            mlp = np.empty_like(x)
        if self._gated:
            mlp_gate = np.empty((n, 1), np.float32)
        add = _NONE if add is None else add
        self._native.run(pool, x, add, cos, sin, spans, h, ids, gates, mlp, mlp_gate)
        return Routed(
            h,
            ids if self._routes else None,
            gates if self._routes else None,
            mlp if self._mlp else None,
            mlp_gate if self._gated else None,
        )


def _check_tensors(
    config: ModelConfig, floats: Mapping[str, F32], matrices: Mapping[str, NestedMatrix]
) -> None:
    hidden, d = config.hidden_size, config.head_dim
    wide, narrow = config.num_attention_heads * d, config.num_key_value_heads * d
    shapes = {
        "q": (wide, hidden),
        "k": (narrow, hidden),
        "v": (narrow, hidden),
        "o": (hidden, wide),
    }
    if "gate" in matrices:
        rows = matrices["gate"].layout.rows
        shapes |= {"gate": (rows, hidden), "up": (rows, hidden), "down": (hidden, rows)}
    for name in sorted(set(shapes) ^ set(matrices)):
        raise KernelError(f"matrix {name}: {'unknown' if name in matrices else 'missing'}")
    for name, shape in shapes.items():
        layout = matrices[name].layout
        if (layout.rows, layout.cols) != shape:
            got = (layout.rows, layout.cols)
            raise KernelError(f"matrix {name}: expected shape {shape}, got {got}")
    qk = {"head": (d, d), "full": (wide, narrow), "none": (0, 0)}[config.qk_norm]
    vectors = {
        "input_norm": (hidden,),
        "post_norm": (hidden,),
        "q_norm": qk[:1],
        "k_norm": qk[1:],
        "q_bias": (wide,),
        "k_bias": (narrow,),
        "v_bias": (narrow,),
        "o_bias": (hidden,),
        "router": (config.num_experts, hidden),
        "shared_router": (1, hidden),
    }
    for name, value in floats.items():
        if name not in vectors:
            raise KernelError(f"tensor {name}: unknown")
        check(name, value, np.float32, *vectors[name])
    for name in ("input_norm", "post_norm"):
        if name not in floats:
            raise KernelError(f"tensor {name}: missing")
    if not ("router" in floats or "gate" in matrices):
        raise KernelError("a layer has neither a router nor an MLP")
