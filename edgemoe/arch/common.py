"""Reading config.json strictly: what every family shares."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ..errors import CheckpointError, UnsupportedError, shown
from ..types import ModelConfig
from .inert import ADVICE, FIXED_KEYS, INERT_KEYS

MAX_SIZE = 1 << 20
MAX_LAYERS = 1024
MAX_EXPERTS = 1 << 16
MAX_VOCAB = 1 << 24
MAX_CONTEXT = 1 << 31


class ConfigReader:
    """Takes typed, range-checked values out of a parsed config.json and remembers which.

    Every method raises CheckpointError, naming the key and the value, where the value has the
    wrong type, is out of range or is missing without a default, and UnsupportedError where it is
    sound but asks for something that is not implemented. `prefix` goes before keys in messages.
    """

    inert: Collection[str] = INERT_KEYS
    fixed: Mapping[str, tuple[Any, ...]] = FIXED_KEYS

    def __init__(self, raw: Mapping[str, Any], where: str, prefix: str = "") -> None:
        self.raw = raw
        self.where = where
        self.prefix = prefix
        self._seen: set[str] = set()

    def skip(self, key: str) -> None:
        """Accept the key whatever its value: it has no effect in this configuration."""
        self._seen.add(key)

    def has(self, key: str) -> bool:
        """Whether the key is present and not null."""
        return self.raw.get(key) is not None

    def bad(self, key: str, need: str) -> CheckpointError:
        """The error for a value of the wrong type or range."""
        name = self.prefix + key
        if key not in self.raw:
            return CheckpointError(f"{self.where}: {name} is missing; it must be {need}")
        value = shown(repr(self.raw[key]))
        return CheckpointError(f"{self.where}: {name} is {value}; it must be {need}")

    def unsupported(self, key: str) -> UnsupportedError:
        """The error for a sound value that asks for something not implemented."""
        value = shown(repr(self.raw[key]))
        advice = ADVICE.get(key, "a model that needs it cannot be run")
        name = self.prefix + key
        return UnsupportedError(f"{self.where}: {name} = {value} is not supported; {advice}")

    def integer(self, key: str, *, least: int = 1, most: int, default: int | None = None) -> int:
        """An integer in [least, most]; null or absent gives `default`, an error without one."""
        self._seen.add(key)
        value = self.raw.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not least <= value <= most:
            raise self.bad(key, f"an integer from {least} to {most}")
        return value

    def size(self, key: str) -> int:
        """The length of an axis: an integer from 1 to 2^20."""
        return self.integer(key, most=MAX_SIZE)

    def optional_integer(self, key: str, *, least: int = 0, most: int) -> int | None:
        """An integer in [least, most], or None where the key is null or absent."""
        self._seen.add(key)
        return self.integer(key, least=least, most=most) if self.has(key) else None

    def number(self, key: str, *, most: float, default: float) -> float:
        """A finite number in (0, most]; null or absent gives `default`."""
        value = self.optional_number(key, most=most)
        return default if value is None else value

    def optional_number(self, key: str, *, most: float) -> float | None:
        """A finite number in (0, most], or None where the key is null or absent."""
        self._seen.add(key)
        value = self.raw.get(key)
        if value is None:
            return None
        if type(value) not in (int, float) or not 0 < value <= most:
            raise self.bad(key, f"a number above 0, at most {most:g}")
        return float(value)

    def flag(self, key: str, *, default: bool) -> bool:
        """true or false; null or absent gives `default`."""
        self._seen.add(key)
        value = self.raw.get(key)
        if value is None:
            return default
        if type(value) is not bool:
            raise self.bad(key, "true or false")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """Token ids from an id, a list of ids or null, each once, in the order given."""
        self._seen.add(key)
        value = self.raw.get(key)
        listed = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(i) is int and 0 <= i < MAX_CONTEXT for i in listed):
            raise self.bad(key, "a token id, a list of token ids or null")
        return tuple(dict.fromkeys(listed))

    def only(self, key: str, *allowed: Any) -> None:
        """The key may be absent or have one of the values `allowed`."""
        self._seen.add(key)
        if key in self.raw and not _is_one_of(self.raw[key], allowed):
            raise self.unsupported(key)

    def one_of(self, first: str, second: str, *, most: int) -> int:
        """A positive integer that goes by two names; where both are given they must agree."""
        self._seen |= {first, second}
        if not self.has(first):
            # A file with neither is told of the name it most likely should have.
            return self.integer(second if self.has(second) else first, most=most)
        value = self.integer(first, most=most)
        if self.has(second) and self.integer(second, most=most) != value:
            raise self.bad(second, f"equal to {first} ({value})")
        return value

    def finish(self) -> None:
        """Refuse keys nobody asked for, unless they are known to change nothing."""
        for key in self.raw:
            if key in self._seen or key in self.inert:
                continue
            if key in self.fixed:
                self.only(key, *self.fixed[key])
            else:
                name, value = shown(self.prefix + key), shown(repr(self.raw[key]))
                raise UnsupportedError(
                    f"{self.where}: unknown key {name} = {value}; edgemoe cannot tell what"
                    " it changes: remove it if the model computes the same without it"
                )


def _is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    """Equality that tells false from 0 and true from 1, but not 1 from 1.0."""
    return any(isinstance(value, bool) is isinstance(a, bool) and value == a for a in allowed)


def base_config(
    keys: ConfigReader,
    *,
    model_type: str,
    expert_size_key: str,
    rms_norm_eps: float,
    max_position_embeddings: int,
    rope_theta: float = 10000.0,
) -> ModelConfig:
    """The ModelConfig that the keys common to all families spell.

    Args:
        keys: reader of the config; the family reads its own keys after this and calls `finish`.
        expert_size_key: key that holds the width of one expert.
        rms_norm_eps, max_position_embeddings, rope_theta: what transformers takes where the key
            is absent.
    """
    hidden = keys.size("hidden_size")
    heads = keys.size("num_attention_heads")
    kv_heads = keys.integer("num_key_value_heads", most=MAX_SIZE, default=heads)
    if heads % kv_heads:
        raise keys.bad("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    if not keys.has("head_dim") and hidden % heads:
        raise keys.bad("num_attention_heads", f"a divisor of hidden_size ({hidden})")
    head_dim = keys.integer("head_dim", most=MAX_SIZE, default=hidden // heads)
    if head_dim % 2 or heads * head_dim > MAX_SIZE:
        raise CheckpointError(
            f"{keys.where}: head_dim is {head_dim} with {heads} heads; it must be even and the"
            f" heads together at most {MAX_SIZE} wide"
        )
    experts = keys.one_of("num_experts", "num_local_experts", most=MAX_EXPERTS)
    per_tok = keys.integer("num_experts_per_tok", most=experts)
    return ModelConfig(
        model_type=model_type,
        vocab_size=keys.integer("vocab_size", most=MAX_VOCAB),
        hidden_size=hidden,
        num_hidden_layers=keys.integer("num_hidden_layers", most=MAX_LAYERS),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        num_experts=experts,
        num_experts_per_tok=per_tok,
        moe_intermediate_size=keys.size(expert_size_key),
        norm_topk_prob=keys.flag("norm_topk_prob", default=False),
        rms_norm_eps=keys.number("rms_norm_eps", most=1.0, default=rms_norm_eps),
        rope_theta=plain_rope_theta(keys, rope_theta),
        max_position_embeddings=keys.integer(
            "max_position_embeddings", most=MAX_CONTEXT, default=max_position_embeddings
        ),
        tie_word_embeddings=keys.flag("tie_word_embeddings", default=False),
        bos_token_id=keys.optional_integer("bos_token_id", most=MAX_CONTEXT),
        eos_token_ids=keys.token_ids("eos_token_id"),
    )


def plain_rope_theta(keys: ConfigReader, default: float) -> float:
    """The base of plain RoPE, from `rope_theta` or transformers 5's `rope_parameters`.

    Anything but plain RoPE is unsupported. Values given in two places must agree.
    """
    found: list[float] = []
    top = keys.optional_number("rope_theta", most=1e15)
    if top is not None:
        found.append(top)
    for key in ("rope_parameters", "rope_scaling"):
        keys.skip(key)
        value = keys.raw.get(key)
        if value is None:
            continue
        if not isinstance(value, dict):
            raise keys.bad(key, "an object or null")
        plain = all(
            inner is None
            or name == "rope_theta"
            or (name in ("rope_type", "type") and inner == "default")
            or (name in ("partial_rotary_factor", "factor") and _is_one_of(inner, (1,)))
            for name, inner in value.items()
        )
        if not plain:
            raise keys.unsupported(key)
        inner = ConfigReader(value, f"{keys.where}: {key}")
        theta = inner.optional_number("rope_theta", most=1e15)
        if theta is not None:
            found.append(theta)
    if len(set(found)) > 1:
        values = ", ".join(f"{theta:g}" for theta in found)
        raise CheckpointError(
            f"{keys.where}: rope_theta is given more than once and differs ({values});"
            " remove the wrong one"
        )
    return found[0] if found else default


def dense_layers(keys: ConfigReader, layers: int) -> tuple[int, ...]:
    """Layers with a plain MLP, by `mlp_only_layers` and `decoder_sparse_step`, ascending.

    Source: transformers, Qwen3MoeDecoderLayer: layer i has experts where it is not listed and
    (i + 1) is a multiple of the step.
    """
    step = keys.integer("decoder_sparse_step", most=MAX_LAYERS, default=1)
    keys.skip("mlp_only_layers")
    listed = keys.raw.get("mlp_only_layers") or []
    if not isinstance(listed, list) or not all(type(i) is int and 0 <= i < layers for i in listed):
        raise keys.bad("mlp_only_layers", f"a list of layer indices below {layers}")
    only = frozenset(listed)
    dense = tuple(i for i in range(layers) if i in only or (i + 1) % step)
    if len(dense) == layers:
        raise UnsupportedError(
            f"{keys.where}: decoder_sparse_step {step} and mlp_only_layers leave no layer with"
            " experts; only mixture-of-experts models can be run"
        )
    return dense


def sliding_window(keys: ConfigReader, layers: int) -> int | None:
    """Attention window of all layers, None without one; it counts only with use_sliding_window."""
    used = keys.flag("use_sliding_window", default=False)
    window = keys.optional_integer("sliding_window", most=MAX_CONTEXT)
    from_layer = keys.optional_integer("max_window_layers", most=MAX_CONTEXT)
    keys.only("layer_types", None, ["full_attention"] * layers)
    if not used or window is None:
        return None
    if window == 0:
        raise keys.bad("sliding_window", "at least 1 where use_sliding_window is true")
    # transformers 4 let only the layers from max_window_layers on slide, 5 lets all of them.
    if from_layer:
        raise keys.unsupported("max_window_layers")
    if keys.has("layer_types"):
        raise keys.unsupported("layer_types")
    return window


def windows_by_layer(keys: ConfigReader, layers: int) -> tuple[int | None, tuple[int, ...]]:
    """(attention window, layers that see everything in spite of it), by `layer_types`.

    The window counts only with use_sliding_window. Without `layer_types` the versions of
    transformers disagree on which layers slide, so that is refused.
    """
    used = keys.flag("use_sliding_window", default=False)
    window = keys.optional_integer("sliding_window", most=MAX_CONTEXT)
    keys.skip("max_window_layers")
    if not used or not window:
        keys.only("layer_types", None, ["full_attention"] * layers)
        return None, ()
    keys.skip("layer_types")
    types = keys.raw.get("layer_types")
    if types is None:
        raise keys.unsupported("use_sliding_window")
    kinds = ("sliding_attention", "full_attention")
    if not isinstance(types, list) or len(types) != layers or any(t not in kinds for t in types):
        raise keys.bad("layer_types", f"a list of {layers} of {' and '.join(kinds)}")
    return window, tuple(i for i, t in enumerate(types) if t == "full_attention")
