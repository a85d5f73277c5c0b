"""Reading a header that may be damaged or hostile.

Everything that follows from the model's shape is recomputed and compared, so that a header that
passes cannot send a reader outside the file, and the runtime can trust every shape it finds.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

from ..errors import ChecksumError, StoreError, shown
from ..kernels import crc32c
from ..layout import PART_ALIGN, align_up
from ..types import ModelConfig, QuantSpec
from .checks import (
    FLOATS,
    LISTS,
    MODEL_KEYS,
    check_ahead,
    check_complete,
    check_config,
    check_metadata,
    check_quant,
    check_section_name,
    check_section_size,
    show,
)
from .file import as_bytes, read_exactly
from .header import (
    DATA_START,
    MAX_HEADER,
    VERSION,
    ExpertsEntry,
    Header,
    SectionEntry,
    Superblock,
    TensorEntry,
    check_bulk,
    layer_layouts,
    make_entry,
    newest_superblock,
    tensor_shapes,
)

MAX_INT = 1 << 62
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


def read_bytes(fd: int, offset: int, size: int, where: str) -> bytes:
    """A run of a file; StoreError where it cannot be read."""
    data = bytearray(size)
    read_exactly(fd, memoryview(data), offset, where)
    return bytes(data)


@contextlib.contextmanager
def _naming(where: str) -> Iterator[None]:
    """Put the file's name before the message of a StoreError that lacks it."""
    try:
        yield
    except StoreError as exc:
        if str(exc).startswith(where):
            raise
        raise type(exc)(f"{where}: {exc}") from None


def load_header(fd: int, where: str) -> tuple[Superblock, Header]:
    """Newest superblock and header of an open file, checked against each other and its length."""
    with _naming(where):
        size = os.fstat(fd).st_size
        blocks = read_bytes(fd, 0, min(size, DATA_START), where).ljust(DATA_START, b"\0")
        block = newest_superblock(blocks)
        if block.file_length > size:
            raise StoreError(
                f"truncated: {size} of {block.file_length} bytes are there; copy or convert "
                "it again"
            )
        end = block.header_offset + block.header_length
        if not block.header_length <= MAX_HEADER or end != block.file_length:
            raise StoreError(
                f"the superblock puts a header of {block.header_length} bytes at byte "
                f"{block.header_offset} of {block.file_length}"
            )
        raw = read_bytes(fd, block.header_offset, block.header_length, where)
        if crc32c(as_bytes(raw)) != block.header_crc32c:
            raise ChecksumError("the header is damaged; copy or convert it again")
        return block, parse_header(raw, block)


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
            raise StoreError(f"{where}.name: there are two sections {name}")
        sections[name] = _extent(item, where, name)
        check_section_size(name, sections[name].size)
    header = Header(
        config=config,
        quant=quant,
        experts=_parse_experts(_list(top, "experts", "the header"), config, quant),
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
            raise StoreError(f"the header has the key {shown(twice, 80)} twice in one object")
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
        raise StoreError(f"the header is not sound JSON: {shown(reason)}") from None


def _check_keys(obj: Any, keys: Iterable[str], where: str) -> None:
    if not isinstance(obj, dict):
        raise StoreError(f"{where} must be an object")
    unknown = sorted(set(obj).difference(keys))
    if unknown:
        raise StoreError(f"{where} has an unknown key {shown(unknown[0], 80)}")
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
        raise StoreError(f"{where}.{key} is {show(value)}, must be an integer {low}..{high}")
    return value


def _string(obj: Any, key: str, where: str) -> str:
    value = _member(obj, key, where)
    if not isinstance(value, str):
        raise StoreError(f"{where}.{key} is {show(value)}, must be a string")
    return value


def _list(obj: Any, key: str, where: str) -> list[Any]:
    value = _member(obj, key, where)
    if not isinstance(value, list):
        raise StoreError(f"{key} is {show(value)}, must be a list")
    return value


def _extent(obj: Any, where: str, name: str) -> SectionEntry:
    return SectionEntry(
        name,
        _int(obj, "offset", where),
        _int(obj, "size", where),
        _int(obj, "crc32c", where, 0, 0xFFFFFFFF),
    )


def _parse_model(raw: Any) -> ModelConfig:
    _check_keys(raw, MODEL_KEYS, "model")
    values = dict(raw)
    for key in LISTS:
        items = _list(raw, key, "model")
        if any(type(v) is not int for v in items):
            raise StoreError(f"model.{key} must be a list of integers")
        values[key] = tuple(items)
    for key in FLOATS:
        if type(values[key]) is int:
            values[key] = float(values[key])
    return ModelConfig(**values)


def _parse_quant(raw: Any) -> QuantSpec:
    levels = _list(raw, "levels", "quant")
    return QuantSpec(
        tuple(levels), _int(raw, "group_size", "quant"), _int(raw, "max_level", "quant")
    )


def _parse_experts(
    items: list[Any], config: ModelConfig, quant: QuantSpec
) -> tuple[ExpertsEntry, ...]:
    if len(items) != len(config.moe_layers):
        raise StoreError(f"experts has {len(items)} entries, must have {len(config.moe_layers)}")
    offsets = [_int(item, "offset", f"experts[{i}]") for i, item in enumerate(items)]
    ahead = [_int(item, "ahead", f"experts[{i}]") for i, item in enumerate(items)]
    layouts = layer_layouts(config, quant, check_ahead(ahead, config))
    return tuple(map(ExpertsEntry, offsets, ahead, layouts))


def _parse_tensors(
    items: list[Any], config: ModelConfig, quant: QuantSpec
) -> dict[str, TensorEntry]:
    shapes = tensor_shapes(config)
    out: dict[str, TensorEntry] = {}
    for i, item in enumerate(items):
        name = _string(item, "name", f"tensors[{i}]")[:200]
        if name in out:
            raise StoreError(f"tensors[{i}]: there are two tensors {shown(name)}")
        out[name] = make_entry(shapes, quant, name, _int(item, "offset", f"tensors[{i}]"))
    check_complete(shapes, out)
    return out


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
        return f"{where} is {show(got)}, must be {show(want)}"
    return next((text for text in found if text), "")


def _check_regions(header: Header, superblock: Superblock) -> None:
    at, size = superblock.header_offset, superblock.header_length
    end = 0
    parts = [part for part in header.regions() if part[1]]  # an empty part lies nowhere
    for offset, length, alignment, what in sorted([*parts, (at, size, PART_ALIGN, "header")]):
        want = align_up(end, alignment)
        if offset != want:
            raise StoreError(
                f"{what} begins at byte {offset}, must at {want}: parts overlap or leave a hole"
            )
        end = offset + length
    if end != superblock.file_length:
        raise StoreError(f"the parts end at byte {end}, the file at {superblock.file_length}")
