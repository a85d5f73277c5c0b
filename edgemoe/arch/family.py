"""What a family file says of its models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..types import ModelConfig
from .gguf import GgufGraph, GgufReader
from .tensors import TensorNames


@dataclass(frozen=True)
class GgufForm:
    """How a family's GGUF files are read.

    architecture: their general.architecture. parse: gives the ModelConfig. graph: what llama.cpp
    computes. paired_rows: rows of q and k (and of their biases) stand in the order of RoPE over
    neighbours: within a head, row j of its first half is followed by row j of its second.
    """

    architecture: str
    parse: Callable[[GgufReader], ModelConfig]
    graph: GgufGraph
    paired_rows: bool = False


@dataclass(frozen=True)
class Family:
    """A model family: how its config.json is read and what its tensors are called.

    `parse_config(raw, where)` takes the parsed config.json and how messages call that file.
    `gguf` says the same of GGUF files; None: there are none of this family.
    """

    model_type: str
    parse_config: Callable[[Mapping[str, Any], str], ModelConfig]
    names: TensorNames
    gguf: GgufForm | None = None
