"""Canonical tensor names and shapes, and how the files of a model family call them.

Canonical names are the ones a store uses: "embed", "lm_head", "norm" and "layers.{i}.{role}".
Experts have no canonical names; they are addressed as (layer, expert, part).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, TypeAlias

from ..types import ModelConfig

ExpertPart: TypeAlias = Literal["gate", "up", "down"]
EXPERT_PARTS: tuple[ExpertPart, ...] = ("gate", "up", "down")

LLAMA_ROLES: Mapping[str, str] = MappingProxyType(
    {
        "input_norm": "input_layernorm.weight",
        "post_norm": "post_attention_layernorm.weight",
        "q": "self_attn.q_proj.weight",
        "k": "self_attn.k_proj.weight",
        "v": "self_attn.v_proj.weight",
        "o": "self_attn.o_proj.weight",
        "q_bias": "self_attn.q_proj.bias",
        "k_bias": "self_attn.k_proj.bias",
        "v_bias": "self_attn.v_proj.bias",
        "o_bias": "self_attn.o_proj.bias",
        "q_norm": "self_attn.q_norm.weight",
        "k_norm": "self_attn.k_norm.weight",
        "router": "mlp.gate.weight",
        "gate": "mlp.gate_proj.weight",
        "up": "mlp.up_proj.weight",
        "down": "mlp.down_proj.weight",
        "shared_router": "mlp.shared_expert_gate.weight",
        "shared_gate": "mlp.shared_expert.gate_proj.weight",
        "shared_up": "mlp.shared_expert.up_proj.weight",
        "shared_down": "mlp.shared_expert.down_proj.weight",
    }
)
"""Role in a layer -> name under the layer's prefix, as most families write it."""


@dataclass(frozen=True)
class TensorNames:
    """What a family's files call their tensors.

    `roles` maps the role of a canonical layer tensor to the name after `layer_prefix`.
    `expert` names gate, up and down of one expert stored apart ([I, H], [I, H], [H, I]);
    `packed` names gate_up [E, 2I, H] (gate rows first) and down [E, H, I] of a whole layer.
    All of these follow `layer_prefix`; `{layer}` and `{expert}` are filled in.
    """

    embed: str = "model.embed_tokens.weight"
    lm_head: str = "lm_head.weight"
    norm: str = "model.norm.weight"
    layer_prefix: str = "model.layers.{layer}."
    roles: Mapping[str, str] = field(default_factory=lambda: LLAMA_ROLES)
    expert: Mapping[ExpertPart, str] = field(
        default_factory=lambda: {
            "gate": "mlp.experts.{expert}.gate_proj.weight",
            "up": "mlp.experts.{expert}.up_proj.weight",
            "down": "mlp.experts.{expert}.down_proj.weight",
        }
    )
    packed: tuple[str, str] = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")

    def dense(self, canonical: str) -> str:
        """Name in the files of a canonical non-expert tensor."""
        if canonical in ("embed", "lm_head", "norm"):
            return str(getattr(self, canonical))
        _, layer, role = canonical.split(".")
        return self.layer_prefix.format(layer=layer) + self.roles[role]

    def expert_part(self, layer: int, expert: int, part: ExpertPart) -> str:
        """Name in the files of one matrix of one expert that is stored apart."""
        return self.layer_prefix.format(layer=layer) + self.expert[part].format(expert=expert)

    def packed_pair(self, layer: int) -> tuple[str, str]:
        """Names in the files of a layer's packed gate_up and down."""
        prefix = self.layer_prefix.format(layer=layer)
        return prefix + self.packed[0], prefix + self.packed[1]


def dense_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every non-expert tensor of a model, by canonical name, in forward order.

    Matrices are [outputs, inputs]; "embed" and "lm_head" are [vocab_size, hidden_size].
    """
    hidden = config.hidden_size
    q_rows = config.num_attention_heads * config.head_dim
    kv_rows = config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embed": (config.vocab_size, hidden)}
    dense = frozenset(config.dense_layers)
    for i in range(config.num_hidden_layers):
        layer: dict[str, tuple[int, ...]] = {
            "input_norm": (hidden,),
            "q": (q_rows, hidden),
            "k": (kv_rows, hidden),
            "v": (kv_rows, hidden),
            "o": (hidden, q_rows),
        }
        layer |= {f"{name}_bias": layer[name][:1] for name in config.biases}
        if config.qk_norm == "head":
            layer |= {"q_norm": (config.head_dim,), "k_norm": (config.head_dim,)}
        elif config.qk_norm == "full":
            layer |= {"q_norm": (q_rows,), "k_norm": (kv_rows,)}
        layer["post_norm"] = (hidden,)
        if i in dense:
            inter = config.intermediate_size
            layer |= {"gate": (inter, hidden), "up": (inter, hidden), "down": (hidden, inter)}
        else:
            layer["router"] = (config.num_experts, hidden)
            shared = config.shared_expert_intermediate_size
            if shared:
                layer |= {"shared_router": (1, hidden), "shared_gate": (shared, hidden)}
                layer |= {"shared_up": (shared, hidden), "shared_down": (hidden, shared)}
        shapes |= {f"layers.{i}.{role}": shape for role, shape in layer.items()}
    shapes["norm"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head"] = (config.vocab_size, hidden)
    return shapes


def is_nested(canonical: str) -> bool:
    """Whether a store keeps this tensor as nested segments; if not, it stays float32.

    Norms, biases and routers are float32 (DESIGN, decision 6); every other matrix is nested.
    """
    role = canonical.rsplit(".", 1)[-1]
    return not role.endswith(("norm", "_bias", "router"))
