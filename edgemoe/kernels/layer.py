"""A decoder layer without its experts, in one native call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..errors import KernelError
from ..types import F32, I32, ModelConfig
from . import dispatch
from .attention import KVPlace
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


class Batch:
    """n tokens on their way through a model's layers: what DecoderLayer reads and writes, all of it
    made, checked and handed to the backend once, not in each layer.

    x: float32 [n, hidden], the residual stream. cos, sin: float32 [n, head_dim / 2]. rows: of each
    sequence its next position and how many of the n rows are its own.

    Raises:
        KernelError: arrays that do not fit, or rows that do not add up to n.
    """

    def __init__(
        self,
        config: ModelConfig,
        x: F32,
        cos: F32,
        sin: F32,
        rows: Sequence[tuple[int, int]],
    ) -> None:
        n, slots, half = len(x), config.num_experts_per_tok, config.head_dim // 2
        check("x", x, np.float32, None, config.hidden_size)
        check("cos", cos, np.float32, n, half)
        check("sin", sin, np.float32, n, half)
        if not rows or any(start < 0 or count < 1 for start, count in rows):
            raise KernelError("rows: expected positions of at least 0, and a token or more at each")
        if sum(count for _, count in rows) != n:
            raise KernelError(f"rows: expected {n} in all")
        self.x = x
        self.h = np.empty_like(x)
        self.ids = np.empty((n, slots), np.int32)
        self.gates = np.empty((n, slots), np.float32)
        self.mlp = self.mlp_gate = _NONE
        if config.dense_layers or config.shared_expert_intermediate_size:
            self.mlp = np.empty_like(x)
            self.mlp_gate = np.empty((n, 1), np.float32)
        out = self.h, self.ids, self.gates, self.mlp, self.mlp_gate
        self.native = dispatch.native.Batch(x, cos, sin, *out, rows)


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
        self, pool: Pool, batch: Batch, add: F32 | None, places: Sequence[KVPlace]
    ) -> Routed:
        """Run the layer up to its experts, in place on batch.x, to which `add` is added first.

        add: float32 [n, hidden] or None; places: where the keys and values of each sequence of the
        batch lie. Returns arrays of the batch, which the next layer overwrites.

        Raises:
            KernelError: a batch or places of another model, or no room for the batch's rows.
        """
        try:
            done = self._native.run(pool, batch.native, add, [p.native for p in places])
        except TypeError:  # of `add`, as everything else was checked when it was made
            done = False
        if not done:
            if add is not None:
                check("add", add, np.float32, *batch.x.shape)
            raise KernelError(
                "a batch or places that do not fit this layer: expected a batch of this model, and "
                "for each of its sequences a place of this model with room for its rows"
            )
        return Routed(
            batch.h,
            batch.ids if self._routes else None,
            batch.gates if self._routes else None,
            batch.mlp if self._mlp else None,
            batch.mlp_gate if self._gated else None,
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
