"""Model families: what a config.json or a GGUF's metadata means, what the tensors are called.

A family is one small file with a `FAMILY`; adding one means writing that file and listing it here.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ..errors import CheckpointError, UnsupportedError, shown
from . import granitemoe, mixtral, olmoe, qwen2_moe, qwen3_moe
from .common import ConfigReader
from .family import Family, GgufForm
from .gguf import GgufReader
from .gguf_names import gguf_experts, gguf_lone_expert, gguf_name
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
    "GgufForm",
    "GgufReader",
    "TensorNames",
    "dense_shapes",
    "find_family",
    "find_gguf_form",
    "gguf_experts",
    "gguf_lone_expert",
    "gguf_name",
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


def find_gguf_form(metadata: Mapping[str, Any], where: str) -> GgufForm:
    """How to read a GGUF with this metadata.

    Raises:
        CheckpointError: there is no general.architecture, or it is not a string.
        UnsupportedError: no family of that architecture; the message lists those there are.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise CheckpointError(
            f"{where}: general.architecture is {shown(architecture)}; it must be a string that"
            " names the model's architecture"
        )
    forms = {f.gguf.architecture: f.gguf for f in FAMILIES.values() if f.gguf is not None}
    if architecture not in forms:
        known = ", ".join(sorted(forms))
        raise UnsupportedError(
            f"{where}: architecture {shown(architecture)} is not supported; supported: {known}"
        )
    return forms[architecture]
