"""A tiny random model with a chat template, and the command line as a user starts it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import tokenizers
from tiny_checkpoints import QWEN3, Array, make_tensors, write_checkpoint
from tokenizers import AddedToken, decoders, models, pre_tokenizers

import edgemoe

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG: dict[str, Any] = QWEN3 | {
    "vocab_size": 264,
    "max_position_embeddings": 32768,
    "bos_token_id": None,
    "eos_token_id": None,
}
FIGURES = re.compile(
    r"edgemoe: \d+ prompt tokens at [\d.]+/s, \d+ generated at [\d.]+/s, first after [\d.]+ s, "
    r"peak [\d.]+ MiB of [\d.]+ [MG]iB, mean bits [\d.]+, ended by [^,]+(, seed \d+)?"
)
"""The line of figures that ends a run."""

COMMAND = [sys.executable, "-W", "error", "-m", "edgemoe.cli"]


def tokenizer_json() -> str:
    """Byte-level, without merges: a token a byte, and the two markers of ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tok = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    markers = ("<|im_start|>", "<|im_end|>")
    tok.add_special_tokens([AddedToken(t, special=True) for t in markers])
    return str(tok.to_str())


def make_checkpoint(
    directory: Path, *, chat: bool = True, tensors: dict[str, Array] | None = None, **config: Any
) -> Path:
    """Write a checkpoint that converts and runs; its text is noise."""
    raw = CONFIG | config
    write_checkpoint(directory, raw, tensors or make_tensors(raw), tokenizer=False)
    (directory / "tokenizer.json").write_text(tokenizer_json())
    settings = {"chat_template": CHATML} if chat else {}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    sampling = {"do_sample": True, "temperature": 0.8, "top_k": 50}
    (directory / "generation_config.json").write_text(json.dumps(sampling))
    return directory


def make_store(directory: Path, **settings: Any) -> Path:
    """The store of `make_checkpoint`, converted here."""
    out = directory / "tiny.emoe"
    edgemoe.convert(make_checkpoint(directory / "tiny", **settings), out)
    return out


def start(*args: object, **settings: Any) -> subprocess.Popen[bytes]:
    """The command line in a process of its own; warnings are errors there."""
    settings.setdefault("stdin", subprocess.DEVNULL)
    settings.setdefault("stdout", subprocess.PIPE)
    settings.setdefault("stderr", subprocess.PIPE)
    settings["env"] = {**os.environ, **settings.get("env", {})}
    return subprocess.Popen([*COMMAND, *map(str, args)], **settings)


def run(*args: object, text: bytes | None = None, **settings: Any) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command line; `text` is its stdin."""
    if text is not None:
        settings["stdin"] = subprocess.PIPE
    with start(*args, **settings) as process:
        out, err = process.communicate(text, timeout=120)
    return process.returncode, (out or b"").decode(), (err or b"").decode()


def fails(*args: object, says: str, code: int = 1, **settings: Any) -> None:
    """Check that a command line fails as a user should see it: one line, no traceback, no text."""
    got, out, err = run(*args, **settings)
    assert got == code, err
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("edgemoe: error: "), err
    assert re.search(says, lines[0]), err
