"""Reading a header that may be damaged or hostile.

Everything that follows from the model's shape is recomputed and compared, so that a header that
passes cannot send a reader outside the file, and the runtime can trust every shape it finds.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any, NoReturn

from .errors import StoreError
from .layout import PART_ALIGN, UNIT, align_up
from .store_header import (
    VERSION,
    Header,
    SectionEntry,
    Superblock,
    TensorEntry,
    check_bulk,
    make_entry,
    tensor_shapes,
)
from .types import ModelConfig, QuantSpec

MAX_INT = 1 << 62

_INTS = {
    "vocab_size": (1, 1 << 24),
    "hidden_size": (1, 1 << 20),
    "num_hidden_layers": (1, 1024),
    "num_attention_heads": (1, 1 << 14),
    "num_key_value_heads": (1, 1 << 14),
    "head_dim": (2, 1 << 16),
    "num_experts": (1, 1 << 16),
    "num_experts_per_tok": (1, 1 << 16),
    "moe_intermediate_size": (1, 1 << 20),
    "intermediate_size": (0, 1 << 20),
    "max_position_embeddings": (1, 1 << 31),
    "sliding_window": (1, 1 << 31),
    "bos_token_id": (0, 1 << 31),
}
_FLOATS = {"rms_norm_eps": (0.0, 1.0), "rope_theta": (1e-6, 1e15), "clip_qkv": (1e-6, 1e30)}
_BOOLS = ("norm_topk_prob", "tie_word_embeddings", "attention_bias")
_OPTIONAL = ("clip_qkv", "sliding_window", "bos_token_id")
_MODEL_KEYS = tuple(f.name for f in dataclasses.fields(ModelConfig))
_TOP_KEYS = (
    "format",
    "version",
    "model",
    "quant",
    "experts",
    "tensors",
    "crc_table",
    "sections",
    "dead",
    "metadata",
)


def parse_header(raw: bytes, superblock: Superblock) -> Header:
    """The header in these bytes, checked against itself and the file's length.

    Raises:
        StoreError: it breaks the format; the message names the field.
    """
    check_bulk(raw)
    top = _load_json(raw)
    _check_keys(top, _TOP_KEYS, "the header")
    if top["format"] != "edgemoe-store" or top["version"] != VERSION:
        raise StoreError(f"the header is not an edgemoe-store header of version {VERSION}")
    config = check_config(_parse_model(top["model"]))
    quant = check_quant(_parse_quant(top["quant"]))
    sections = {}
    for i, item in enumerate(_list(top, "sections", "the header")):
        where = f"sections[{i}]"
        name = check_section_name(_string(item, "name", where))
        if name in sections:
            raise StoreError(f"{where}.name: there are two sections {name!r}")
        sections[name] = _extent(item, where, name)
    header = Header(
        config=config,
        quant=quant,
        experts_offset=_int(top["experts"], "offset", "experts"),
        tensors=_parse_tensors(_list(top, "tensors", "the header"), config, quant),
        crc_table=_extent(top["crc_table"], "crc_table", "crc_table"),
        sections=sections,
        dead=_parse_dead(_list(top, "dead", "the header")),
        metadata=check_metadata(top["metadata"]),
    )
    difference = _difference(top, header.to_json(), "")
    if difference:
        raise StoreError(difference)
    if header.crc_table.size != 4 * header.checksum_count:
        raise StoreError(
            f"crc_table.size is {header.crc_table.size}, must be {4 * header.checksum_count}"
        )
    _check_regions(header, superblock)
    return header


def _load_json(raw: bytes) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            twice = Counter(k for k, _ in pairs).most_common(1)[0][0]
            raise StoreError(f"the header has the key {twice[:80]!r} twice in one object")
        return out

    def constant(text: str) -> NoReturn:
        raise StoreError(f"the header holds {text}, which is not JSON")

    def integer(text: str) -> int:
        if len(text) > 20:
            raise StoreError(f"the header holds an integer of {len(text)} digits")
        return int(text)

    try:
        return json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=unique,
            parse_constant=constant,
            parse_int=integer,
        )
    except (ValueError, RecursionError) as exc:
        reason = "nested too deeply" if isinstance(exc, RecursionError) else str(exc)
        raise StoreError(f"the header is not sound JSON: {reason[:200]}") from None


def _check_keys(obj: Any, keys: Iterable[str], where: str) -> None:
    if not isinstance(obj, dict):
        raise StoreError(f"{where} must be an object")
    unknown = sorted(set(obj).difference(keys))
    if unknown:
        raise StoreError(f"{where} has an unknown key {unknown[0][:80]!r}")
    missing = [k for k in keys if k not in obj]
    if missing:
        raise StoreError(f"{where} lacks the key {missing[0]!r}")


def _member(obj: Any, key: str, where: str) -> Any:
    if not isinstance(obj, dict) or key not in obj:
        raise StoreError(f"{where} must be an object with the key {key!r}")
    return obj[key]


def _int(obj: Any, key: str, where: str, low: int = 0, high: int = MAX_INT) -> int:
    value = _member(obj, key, where)
    if type(value) is not int or not low <= value <= high:
        raise StoreError(f"{where}.{key} is {_show(value)}, must be an integer {low}..{high}")
    return value


def _string(obj: Any, key: str, where: str) -> str:
    value = _member(obj, key, where)
    if not isinstance(value, str):
        raise StoreError(f"{where}.{key} is {_show(value)}, must be a string")
    return value


def _list(obj: Any, key: str, where: str) -> list[Any]:
    value = _member(obj, key, where)
    if not isinstance(value, list):
        raise StoreError(f"{key} is {_show(value)}, must be a list")
    return value


def _extent(obj: Any, where: str, name: str) -> SectionEntry:
    return SectionEntry(
        name,
        _int(obj, "offset", where),
        _int(obj, "size", where),
        _int(obj, "crc32c", where, 0, 0xFFFFFFFF),
    )


def _show(value: object) -> str:
    text = repr(value) if not isinstance(value, (dict, list)) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


def _parse_model(raw: Any) -> ModelConfig:
    _check_keys(raw, _MODEL_KEYS, "model")
    values = dict(raw)
    for key in ("dense_layers", "eos_token_ids"):
        items = _list(raw, key, "model")
        if any(type(v) is not int for v in items):
            raise StoreError(f"model.{key} must be a list of integers")
        values[key] = tuple(items)
    for key in _FLOATS:
        if type(values[key]) is int:
            values[key] = float(values[key])
    return ModelConfig(**values)


def check_config(config: ModelConfig) -> ModelConfig:
    """The same config, if a store can hold such a model.

    Raises:
        StoreError: a field has the wrong type, is out of range or contradicts another.
    """
    values = {key: getattr(config, key) for key in _MODEL_KEYS}

    def bad(key: str, must: str) -> StoreError:
        return StoreError(f"model.{key} is {_show(values[key])}, must be {must}")

    for key, (low, high) in _INTS.items():
        value = values[key]
        if value is None and key in _OPTIONAL:
            continue
        if type(value) is not int or not low <= value <= high:
            raise bad(key, f"an integer {low}..{high}")
    for key, (least, most) in _FLOATS.items():
        value = values[key]
        if value is None and key in _OPTIONAL:
            continue
        if type(value) is not float or not math.isfinite(value) or not least <= value <= most:
            raise bad(key, f"a number {least}..{most}")
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
    dense = config.dense_layers
    if len(dense) > len(layers) or list(dense) != sorted({i for i in dense if i in layers}):
        raise bad("dense_layers", f"ascending layer numbers below {config.num_hidden_layers}")
    if dense and not config.intermediate_size:
        raise bad("intermediate_size", "positive, because there are dense layers")
    if any(type(i) is not int or not 0 <= i <= 1 << 31 for i in config.eos_token_ids):
        raise bad("eos_token_ids", "token ids")
    return config


def _parse_quant(raw: Any) -> QuantSpec:
    levels = _list(raw, "levels", "quant")
    return QuantSpec(tuple(levels), _int(raw, "group_size", "quant"))


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
            f"quant.levels is {_show(levels)}, must rise from 0 in steps of 1 or 2 bits up to 8"
        )
    if quant.group_size % UNIT or not UNIT <= quant.group_size <= 4096:
        raise StoreError(
            f"quant.group_size is {quant.group_size}, must be a multiple of {UNIT} up to 4096"
        )
    return quant


def check_section_name(name: str) -> str:
    """The same name, if a section may have it: 1 to 200 printable ASCII characters."""
    if not (0 < len(name) <= 200 and name.isascii() and name.isprintable()):
        raise StoreError(f"a section is named {_show(name)}: 1 to 200 printable ASCII characters")
    return name


def check_metadata(metadata: Any) -> dict[str, str]:
    """The same mapping, if it maps strings to strings that UTF-8 can hold."""
    if not isinstance(metadata, dict):
        raise StoreError("metadata must be an object")
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise StoreError(f"metadata[{_show(key)}] must be a string")
        try:
            (key + value).encode()
        except UnicodeEncodeError:
            raise StoreError(f"metadata[{_show(key)}] is not valid Unicode") from None
    return metadata


def _parse_tensors(
    items: list[Any], config: ModelConfig, quant: QuantSpec
) -> dict[str, TensorEntry]:
    shapes = tensor_shapes(config)
    out: dict[str, TensorEntry] = {}
    for i, item in enumerate(items):
        name = _string(item, "name", f"tensors[{i}]")[:200]
        if name in out:
            raise StoreError(f"tensors[{i}]: there are two tensors {name!r}")
        out[name] = make_entry(shapes, quant, name, _int(item, "offset", f"tensors[{i}]"))
    check_complete(config, out)
    return out


def check_complete(config: ModelConfig, names: dict[str, TensorEntry]) -> None:
    """Raise StoreError if a tensor that this model needs is not among `names`."""
    missing = [name for name in tensor_shapes(config) if name not in names]
    if missing:
        raise StoreError(f"{len(missing)} of the model's tensors are missing, first {missing[0]!r}")


def _parse_dead(items: list[Any]) -> tuple[tuple[int, int], ...]:
    out = []
    for i, item in enumerate(items):
        sound = isinstance(item, list) and len(item) == 2
        if not sound or any(type(v) is not int or not 0 <= v <= MAX_INT for v in item):
            raise StoreError(f"dead[{i}] must be [offset, size]")
        out.append((item[0], item[1]))
    return tuple(out)


def _difference(got: Any, want: Any, where: str) -> str:
    """First place where two JSON values differ, as a message; "" where they are equal."""
    if isinstance(want, dict):
        _check_keys(got, list(want), where or "the header")
        found = (_difference(got[k], want[k], f"{where}.{k}" if where else k) for k in want)
    elif isinstance(want, list) and isinstance(got, list) and len(got) == len(want):
        pairs = enumerate(zip(got, want, strict=True))
        found = (_difference(g, w, f"{where}[{i}]") for i, (g, w) in pairs)
    else:
        same_type = type(got) is type(want) or (type(got) is int and type(want) is float)
        if same_type and got == want:
            return ""
        return f"{where} is {_show(got)}, must be {_show(want)}"
    return next((text for text in found if text), "")


def _check_regions(header: Header, superblock: Superblock) -> None:
    at, size = superblock.header_offset, superblock.header_length
    end = 0
    for offset, length, alignment, what in sorted(
        [*header.regions(), (at, size, PART_ALIGN, "header")]
    ):
        want = align_up(end, alignment)
        if offset != want:
            raise StoreError(
                f"{what} begins at byte {offset}, must at {want}: parts overlap or leave a hole"
            )
        end = offset + length
    if end != superblock.file_length:
        raise StoreError(f"the parts end at byte {end}, the file at {superblock.file_length}")
