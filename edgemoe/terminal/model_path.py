"""What a user typed for a model: which argument it is, and whether it may be a store.

Imports nothing heavy, so that a wrong name is answered at once.
"""

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


def sort_arguments(
    model_arg: str | None, prompt_arg: str | None, model: str | None, prompt: str | None
) -> tuple[str | None, str | None]:
    """(model, prompt) of the two positional arguments and the values of -m and -p.

    A lone argument is what -m or -p leaves open, else a model if it exists or ends like one, else
    a prompt. None: not given.

    Raises:
        UsageError: one of them was given twice.
    """
    given = [a for a in (model_arg, prompt_arg) if a is not None]
    if len(given) + (model is not None) + (prompt is not None) > 2:
        raise UsageError("more than one model and one prompt were given: put the prompt in quotes")
    if model is not None:
        refuse_hub_name(model)
        return model, given[0] if given else prompt
    if prompt is not None:
        return (given[0] if given else None), prompt
    if len(given) == 2:
        return given[0], given[1]
    if given and (given[0].endswith(MODEL_SUFFIXES) or os.path.exists(given[0])):
        return given[0], None
    return None, (given[0] if given else None)


def refuse_hub_name(name: str) -> None:
    """Raise UsageError where `name` is ORG/NAME of a model hub and no path."""
    if not os.path.exists(name) and _ORG_NAME.fullmatch(name) and not name.endswith(MODEL_SUFFIXES):
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
