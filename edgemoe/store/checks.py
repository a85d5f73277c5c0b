"""What a store can hold: checks of a header's values, the same for the writer and the reader."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterable, Sequence
from typing import Any

from ..errors import StoreError, shown
from ..layout import UNIT
from ..types import ModelConfig, QuantSpec

MAX_EXPERTS = 1 << 20
MAX_SECTION = 256 << 20

_INTS = {
    "vocab_size": (1, 1 << 24),
    "hidden_size": (1, 1 << 20),
    "num_hidden_layers": (1, 1024),
    "num_attention_heads": (1, 1 << 20),
    "num_key_value_heads": (1, 1 << 20),
    "head_dim": (1, 1 << 20),
    "num_experts": (1, 1 << 16),
    "num_experts_per_tok": (1, 1 << 16),
    "moe_intermediate_size": (1, 1 << 20),
    "intermediate_size": (0, 1 << 20),
    "max_position_embeddings": (1, 1 << 31),
    "sliding_window": (1, 1 << 31),
    "shared_expert_intermediate_size": (0, 1 << 20),
    "bos_token_id": (0, 1 << 31),
}
FLOATS = {
    "rms_norm_eps": 1.0,
    "rope_theta": 1e15,
    "clip_qkv": 1e30,
    "embedding_multiplier": 1e6,
    "residual_multiplier": 1e6,
    "attention_multiplier": 1e6,
    "logits_scaling": 1e6,
}
_BOOLS = ("norm_topk_prob", "tie_word_embeddings", "attention_bias", "qkv_bias")
_OPTIONAL = ("clip_qkv", "sliding_window", "bos_token_id", "attention_multiplier")
_LAYER_LISTS = ("dense_layers", "full_attention_layers")
LISTS = (*_LAYER_LISTS, "eos_token_ids")
MODEL_KEYS = tuple(f.name for f in dataclasses.fields(ModelConfig))


def show(value: object) -> str:
    """A value of a header for a message: short, on one line, never the whole of a container."""
    if isinstance(value, (dict, list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return shown(repr(value), 60)


def check_config(config: ModelConfig) -> ModelConfig:
    """The same config, if a store can hold such a model.

    Raises:
        StoreError: a field has the wrong type, is out of range or contradicts another.
    """
    values = {key: getattr(config, key) for key in MODEL_KEYS}

    def bad(key: str, must: str) -> StoreError:
        return StoreError(f"model.{key} is {show(values[key])}, must be {must}")

    for key, (low, high) in _INTS.items():
        value = values[key]
        if value is None and key in _OPTIONAL:
            continue
        if type(value) is not int or not low <= value <= high:
            raise bad(key, f"an integer {low}..{high}")
    for key, most in FLOATS.items():
        value = values[key]
        if value is None and key in _OPTIONAL:
            continue
        if type(value) is not float or not 0 <= value <= most:
            raise bad(key, f"a number 0..{most:g}")
    for key in _BOOLS:
        if type(values[key]) is not bool:
            raise bad(key, "true or false")
    if not isinstance(config.model_type, str) or not config.model_type.isidentifier():
        raise bad("model_type", "a name")
    if config.qk_norm not in ("none", "head", "full"):
        raise bad("qk_norm", "none, head or full")
    if config.num_attention_heads % config.num_key_value_heads:
        raise bad("num_key_value_heads", f"a divisor of {config.num_attention_heads}")
    if config.num_experts_per_tok > config.num_experts:
        raise bad("num_experts_per_tok", f"at most {config.num_experts}")
    layers = range(config.num_hidden_layers)
    for key in _LAYER_LISTS:
        listed = values[key]
        if len(listed) > len(layers) or list(listed) != sorted({i for i in listed if i in layers}):
            raise bad(key, f"ascending layer numbers below {config.num_hidden_layers}")
    if not config.logits_scaling:
        raise bad("logits_scaling", "positive")
    if config.dense_layers and not config.intermediate_size:
        raise bad("intermediate_size", "positive, because there are dense layers")
    if len(config.moe_layers) * config.num_experts > MAX_EXPERTS:
        raise bad("num_experts", f"such that a model has at most {MAX_EXPERTS}")
    if any(type(i) is not int or not 0 <= i <= 1 << 31 for i in config.eos_token_ids):
        raise bad("eos_token_ids", "token ids")
    return config


def check_quant(quant: QuantSpec) -> QuantSpec:
    """The same spec, if the format can hold it: levels rise by 1 or 2 bits and end at 8.

    Raises:
        StoreError: it cannot.
    """
    levels = quant.levels
    sound = (
        bool(levels)
        and all(type(b) is int for b in levels)
        and all(b - a in (1, 2) for a, b in zip((0, *levels), levels, strict=False))
        and levels[-1] == 8
    )
    if not sound:
        raise StoreError(
            f"quant.levels is {show(levels)}, must rise from 0 in steps of 1 or 2 bits up to 8"
        )
    if type(quant.max_level) is not int or quant.max_level not in levels:
        raise StoreError(
            f"quant.max_level is {show(quant.max_level)}, must be one of {show(levels)}"
        )
    if quant.group_size % UNIT or not UNIT <= quant.group_size <= 4096:
        raise StoreError(
            f"quant.group_size is {quant.group_size}, must be a multiple of {UNIT} up to 4096"
        )
    return quant


def check_ahead(ahead: Sequence[int], config: ModelConfig) -> Sequence[int]:
    """The same columns that are a level ahead, one number a layer with experts, if they can be.

    Raises:
        StoreError: they cannot: whole units of 32, or all columns of down.
    """
    width = config.moe_intermediate_size
    if len(ahead) != len(config.moe_layers):
        raise StoreError(f"ahead has {len(ahead)} entries, must have {len(config.moe_layers)}")
    for i, count in enumerate(ahead):
        if not (0 <= count <= width and (count % UNIT == 0 or count == width)):
            raise StoreError(
                f"experts[{i}].ahead is {show(count)}, must be a multiple of {UNIT} below {width}, "
                f"or {width}"
            )
    return ahead


def check_section_name(name: str) -> str:
    """The same name, if a section may have it: 1 to 200 printable ASCII characters."""
    if not (0 < len(name) <= 200 and name.isascii() and name.isprintable()):
        raise StoreError(f"a section is named {show(name)}: 1 to 200 printable ASCII characters")
    return name


def check_section_size(name: str, size: int) -> None:
    """Raise StoreError for a section that a reader could not be asked to hold."""
    if size > MAX_SECTION:
        raise StoreError(f"section {name} has {size} bytes, at most {MAX_SECTION} are allowed")


def check_metadata(metadata: Any) -> dict[str, str]:
    """The same mapping, if it maps strings to strings that UTF-8 can hold."""
    if not isinstance(metadata, dict):
        raise StoreError("metadata must be an object")
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise StoreError(f"metadata[{show(key)}] must be a string")
        try:
            (key + value).encode()
        except UnicodeEncodeError:
            raise StoreError(f"metadata[{show(key)}] is not valid Unicode") from None
    return metadata


def check_complete(needed: Iterable[str], present: Container[str]) -> None:
    """Raise StoreError if a part that the model needs is not among those present."""
    missing = [name for name in needed if name not in present]
    if missing:
        raise StoreError(f"{len(missing)} parts of the model are missing, first {missing[0]}")
