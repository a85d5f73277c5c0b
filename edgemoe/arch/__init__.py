"""Model families: what a config.json means and what the tensors are called.

A family is one small file with a `FAMILY`; adding one means writing that file and listing it here.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ..errors import CheckpointError, UnsupportedError, shown
from . import granitemoe, mixtral, olmoe, qwen2_moe, qwen3_moe
from .common import ConfigReader, Family
from .tensors import EXPERT_PARTS, ExpertPart, TensorNames, dense_shapes, is_nested

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        module.FAMILY.model_type: module.FAMILY
        for module in (granitemoe, mixtral, olmoe, qwen2_moe, qwen3_moe)
    }
)
"""Supported `model_type` -> family."""

__all__ = [
    "EXPERT_PARTS",
    "FAMILIES",
    "ConfigReader",
    "ExpertPart",
    "Family",
    "TensorNames",
    "dense_shapes",
    "find_family",
    "is_nested",
]


def find_family(raw: Mapping[str, Any], where: str = "config.json") -> Family:
    """The family that the `model_type` of a parsed config.json names.

    Raises:
        CheckpointError: there is no `model_type`, or it is not a string.
        UnsupportedError: no family of that name; the message lists those there are.
    """
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(
            f"{where}: model_type is {shown(model_type)}; it must be a string that names the"
            " model family"
        )
    family = FAMILIES.get(model_type)
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise UnsupportedError(
            f"{where}: model_type {shown(model_type)} is not supported; supported: {known}"
        )
    return family
