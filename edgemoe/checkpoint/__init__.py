"""A model as it was published: configuration, tokenizer files and weights, checked, as float32.

    checkpoint = open_checkpoint("OLMoE-1B-7B-0924")
    gate, up, down = checkpoint.expert(layer=0, expert=5)

Names and shapes are canonical (edgemoe/arch/tensors.py), whatever the files call them: those of a
Hugging Face directory (huggingface.py) or of a GGUF (gguf_checkpoint.py). Knows nothing of nested
quantization or stores.
"""

from __future__ import annotations

import os
from pathlib import Path

from .. import kernels
from ..errors import CheckpointError, shown
from .base import Checkpoint
from .files import open_regular
from .gguf_checkpoint import GgufCheckpoint
from .gguf_header import MAGIC as GGUF_MAGIC
from .huggingface import HuggingFaceCheckpoint

__all__ = ["Checkpoint", "open_checkpoint"]


def open_checkpoint(
    path: str | os.PathLike[str], *, pool: kernels.Pool | None = None
) -> Checkpoint:
    """Open a Hugging Face directory or a GGUF and check all of it but the weights' values.

    Args:
        path: directory with config.json and model.safetensors, or shards with their index; or a
            .gguf file, of a split one any part.
        pool: threads that dequantize a GGUF; None: one for each CPU this process may use, made when
            the first weights are read.

    Raises:
        CheckpointError: something is missing, damaged or inconsistent; the message says what.
        UnsupportedError: the family, a config value, a tensor, a dtype or a tokenizer is not
            implemented.
    """
    place = Path(path)
    try:
        if place.is_dir():
            return HuggingFaceCheckpoint(_with_config(place))
        if not place.exists():
            raise CheckpointError(
                f"{shown(path)} does not exist; give a checkpoint directory or a GGUF file"
            )
        with open(open_regular(place), "rb") as file:
            head = file.read(8)
        if place.suffix == ".gguf" or head.startswith(GGUF_MAGIC):
            return GgufCheckpoint(place, pool)
        raise _not_a_checkpoint(place, head)
    except OSError as error:
        raise CheckpointError(f"cannot read {shown(place)}: {error.strerror}") from error


def _with_config(path: Path) -> Path:
    """The directory `path`, if it has a config.json; else an error that says what to give."""
    if (path / "config.json").exists():
        return path
    if gguf := sorted(path.glob("*.gguf")):
        raise CheckpointError(
            f"{shown(path)} has GGUF files but no config.json; give the file: {shown(gguf[0])}"
        )
    raise CheckpointError(
        f"{shown(path)} has no config.json; give the directory of a Hugging Face model, or a GGUF"
        " file"
    )


def _not_a_checkpoint(path: Path, head: bytes) -> CheckpointError:
    """The error for a file that is not a GGUF and begins with `head`."""
    if head.startswith(b"EDGEMOE\0"):
        return CheckpointError(f"{shown(path)} is an edgemoe store already; run it as it is")
    if path.suffix == ".safetensors":
        parent = path.absolute().parent
        todo = (
            f"give its directory: {shown(parent)}"
            if (parent / "config.json").exists()
            else "give a directory that also has its config.json and tokenizer.json"
        )
        return CheckpointError(f"{shown(path)} is only weights; {todo}")
    return CheckpointError(
        f"{shown(path)} is neither a directory nor a GGUF file; give the directory of a Hugging"
        " Face model, or a GGUF"
    )
