"""Where exported weights come from: a store, decoded, or a checkpoint, as it is.

Both give any run of rows of any matrix as float32 and hold no more than that run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeAlias

import numpy as np

from ..arch import EXPERT_PARTS, ExpertPart
from ..checkpoint import Checkpoint, open_checkpoint
from ..errors import ChecksumError, StoreError, UsageError, shown
from ..layout import RecordLayout
from ..mwq.packing import decode_rows
from ..store import Store
from ..store.file import crc_of_file, read_exactly
from ..store.header import MAGIC
from ..types import F32, U8, ModelConfig, PlaneRef

Key: TypeAlias = "str | tuple[int, int, ExpertPart]"
"""A tensor that is no expert's, by canonical name, or (layer, expert, part)."""

_TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


class Source(Protocol):
    """A model whose weights can be read piece by piece.

    Attributes:
        where: the source, for messages.
        name: what the model is called.
        config: of the model.
        files: tokenizer files, by name.
    """

    where: str
    name: str
    config: ModelConfig
    files: Mapping[str, bytes]

    def rows(self, key: Key, first: int, stop: int) -> F32:
        """Rows [first, stop) of a matrix, float32; `first` is a multiple of 8."""
        ...

    def whole(self, name: str) -> F32:
        """A norm, a bias or a router, float32, in its own shape."""
        ...


@contextmanager
def open_source(path: str | os.PathLike[str], bits: int | None) -> Iterator[Source]:
    """The store or checkpoint at `path`.

    Args:
        bits: level at which a store's experts are decoded; None: its highest.

    Raises:
        StoreError: a store that cannot be opened. CheckpointError: a checkpoint that cannot, or
            has no tokenizer. UsageError: `bits` for a checkpoint, or a level the store lacks.
    """
    if _is_store(path):
        with Store.open(path) as store:
            yield StoreSource(store, bits)
        return
    if bits is not None and os.path.exists(path):
        raise UsageError(f"{shown(path)} is a checkpoint: --bits chooses a level of a store")
    yield CheckpointSource(open_checkpoint(path))


def _is_store(path: str | os.PathLike[str]) -> bool:
    if os.fspath(path).endswith(".emoe"):
        return True
    try:
        if not os.path.isfile(path):
            return False
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except (OSError, ValueError):
        return False  # opening it as a checkpoint says why


class CheckpointSource:
    """A checkpoint as a Source."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        checkpoint.require_tokenizer()
        self._checkpoint = checkpoint
        self.where = shown(checkpoint.path)
        self.name = os.path.basename(os.path.abspath(checkpoint.path)).removesuffix(".gguf")
        self.config = checkpoint.config
        self.files: Mapping[str, bytes] = checkpoint.files

    def rows(self, key: Key, first: int, stop: int) -> F32:
        if isinstance(key, str):
            return self._checkpoint.tensor(key, rows=(first, stop))
        layer, expert, part = key
        return self._checkpoint.expert_matrix(layer, expert, part, rows=(first, stop))

    def whole(self, name: str) -> F32:
        return self._checkpoint.tensor(name)


class StoreSource:
    """A store as a Source: experts at one level, all else at the highest.

    Every segment is compared with its checksum before anything of it is used.
    """

    def __init__(self, store: Store, bits: int | None) -> None:
        self._store = store
        self.where = shown(store.path)
        self.name = store.metadata.get("source") or os.path.basename(store.path)
        self.config = store.config
        self.files: Mapping[str, bytes] = {
            n: store.section(n) for n in _TEXT_FILES if n in store.sections
        }
        if "tokenizer.json" not in self.files:
            raise StoreError(f"{self.where} has no tokenizer.json; convert it again")
        levels = store.quant.expert_levels
        if bits is not None and bits not in levels:
            have = ", ".join(map(str, levels))
            raise UsageError(f"{self.where} has no {bits}-bit experts; it has {have}")
        self._expert_level = len(levels) - 1 if bits is None else levels.index(bits)
        self._verified: Key | None = None

    def rows(self, key: Key, first: int, stop: int) -> F32:
        if isinstance(key, str):
            layout, refs, matrix = self._tensor(key)
        else:
            layout, refs, matrix = self._expert(*key)
        record: Key = key if isinstance(key, str) else (key[0], key[1], "gate")
        if record != self._verified:
            self._verify(record, refs)
            self._verified = record

        def read(level_index: int, offset: int, size: int) -> U8:
            out = np.empty(size, np.uint8)
            start = refs[level_index].offset + offset
            read_exactly(self._store.fileno(), out.data, start, self.where)
            return out

        return decode_rows(layout, len(refs) - 1, matrix, first, stop, read)

    def whole(self, name: str) -> F32:
        return self._store.read_f32(name)

    def _tensor(self, name: str) -> tuple[RecordLayout, Sequence[PlaneRef], int]:
        layout = self._store.tensors[name].layout
        if layout is None:
            raise UsageError(f"{self.where}: tensor {name} is float32, not nested")
        return layout, self._store.tensor_segments(name), 0

    def _expert(
        self, layer: int, expert: int, part: ExpertPart
    ) -> tuple[RecordLayout, Sequence[PlaneRef], int]:
        refs = [self._store.expert_segment(layer, expert, i) for i in range(self._expert_level + 1)]
        return self._store.expert_layout(layer), refs, EXPERT_PARTS.index(part)

    def _verify(self, record: Key, refs: Sequence[PlaneRef]) -> None:
        fd = self._store.fileno()
        for ref in refs:
            if crc_of_file(fd, ref.offset, ref.size, self.where) != ref.crc32c:
                what = record if isinstance(record, str) else "layer {} expert {}".format(*record)
                raise ChecksumError(
                    f"{self.where}: {what} is damaged (byte {ref.offset}, {ref.size} bytes);"
                    " copy or convert it again"
                )
