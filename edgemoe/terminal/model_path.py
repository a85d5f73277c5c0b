"""From what a user typed for a model to the path of a store, or an error that says what to do."""

from __future__ import annotations

import os
import re
import shlex
import stat
from pathlib import Path

from ..errors import StoreError, UsageError, shown

MODEL_SUFFIXES = (".emoe", ".gguf", ".safetensors")
"""A lone argument that ends in one of these is meant as a model."""

_ORG_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def looks_like_model(argument: str) -> bool:
    """Whether a lone argument is a model rather than a prompt."""
    return argument.endswith(MODEL_SUFFIXES) or os.path.exists(argument)


def refuse_hub_name(name: str) -> None:
    """Raise UsageError where `name` is ORG/NAME of a model hub and no path."""
    if not os.path.exists(name) and _ORG_NAME.fullmatch(name) and not _is_model_file(name):
        local = name.rpartition("/")[2]
        raise UsageError(
            f"{name} is not a file here, and this version downloads nothing: hf download {name} "
            f"--local-dir {local} && edgemoe convert {local} {local}.emoe, then run {local}.emoe"
        )


def require_store(path: str) -> None:
    """Check that `path` may be a store, as far as its kind and first bytes tell.

    Raises:
        StoreError: it does not exist, or it is a checkpoint or GGUF file: the message then holds
            the command that converts it.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        hint = " (a prompt is forced with -p)" if path.endswith(MODEL_SUFFIXES) else ""
        raise StoreError(f"{shown(path)}: cannot open the model: {reason}{hint}") from None
    where = Path(path)
    if stat.S_ISDIR(mode):
        if (where / "config.json").exists() or any(where.glob("*.safetensors")):
            raise _is_checkpoint("a checkpoint", where)
        if gguf := sorted(where.glob("*.gguf")):
            raise _is_checkpoint("a directory with GGUF files", gguf[0])
        raise StoreError(
            f"{shown(path)} is a directory without config.json: neither a store nor a checkpoint"
        )
    if where.name.endswith((".safetensors", ".safetensors.index.json")):
        raise _is_checkpoint("part of a checkpoint", where.parent)
    if where.suffix == ".gguf" or (stat.S_ISREG(mode) and _begins_with(where, b"GGUF")):
        raise _is_checkpoint("a GGUF file", where)


def _is_model_file(name: str) -> bool:
    return name.endswith(MODEL_SUFFIXES)


def _is_checkpoint(kind: str, source: Path) -> StoreError:
    name = source.resolve().name.removesuffix(".gguf") or "model"
    command = f"edgemoe convert {shlex.quote(str(source))} {shlex.quote(name + '.emoe')}"
    return StoreError(f"{shown(source)} is {kind}, not a store; convert it once: {command}")


def _begins_with(path: Path, magic: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(magic)) == magic
    except OSError:
        return False  # opening it as a store will say why
