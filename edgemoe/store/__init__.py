"""The store: one file that holds a model as nested segments (docs/FORMAT.md).

`Store` reads it, `StoreWriter` makes it, `replace_section` exchanges one section of a finished one.
`layer` is everywhere the layer's number in the model, as in ModelConfig.moe_layers; a level index
counts QuantSpec.levels. All sizes and offsets are bytes.

    file.py     files that appear whole or not at all; reads and writes that finish or say why
    header.py   superblocks and the header's JSON
    checks.py   what values a header may hold
    parse.py    reading a header that may be damaged or hostile
    reader.py, writer.py, replace.py
"""

from __future__ import annotations

from .header import SectionEntry, TensorEntry, tensor_shapes
from .reader import Store
from .replace import replace_section
from .writer import RecordWriter, StoreWriter, expert_name

__all__ = [
    "RecordWriter",
    "SectionEntry",
    "Store",
    "StoreWriter",
    "TensorEntry",
    "expert_name",
    "replace_section",
    "tensor_shapes",
]
