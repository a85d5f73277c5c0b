"""A text as both sides score it: the same bytes, the same tokens, the same windows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgemoe.checkpoint import Checkpoint
from edgemoe.errors import UsageError, shown
from edgemoe.evaluate import Window, windows
from edgemoe.terminal.evaluate import read_text
from edgemoe.tokenizer import Tokenizer

from .work import Work, identity, say


@dataclass(frozen=True)
class ScoredText:
    """name: for file names. path: the text as it is scored. digest: of its windows' tokens.

    scored_bytes: UTF-8 bytes of the scored tokens.
    """

    name: str
    path: Path
    digest: str
    windows: list[Window]
    scored_bytes: int

    def figures(self) -> dict[str, str | int]:
        """What results say of the text, and what tells whether two of them are of the same."""
        return {
            "text": self.name,
            "windows": len(self.windows),
            "ctx": len(self.windows[0].tokens),
            "tokens": sum(len(w.targets) for w in self.windows),
            "digest": self.digest,
        }


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer:
    """The checkpoint's tokenizer.

    Raises:
        CheckpointError: it has none.
    """
    checkpoint.require_tokenizer()
    settings = checkpoint.files.get("tokenizer_config.json")
    return Tokenizer(
        checkpoint.files["tokenizer.json"],
        config=None if settings is None else json.loads(settings),
        bos_token_id=checkpoint.config.bos_token_id,
        eos_token_ids=checkpoint.config.eos_token_ids,
    )


def markers_of(checkpoint: Checkpoint) -> list[str]:
    """How the tokenizer spells its special tokens, such as <|endoftext|>."""
    checkpoint.require_tokenizer()
    added = json.loads(checkpoint.files["tokenizer.json"]).get("added_tokens") or []
    return [token["content"] for token in added if token.get("special")]


def without_markers(text: str, markers: Sequence[str]) -> tuple[str, int]:
    """The text without the lines that hold a marker, and how many those were."""
    lines = text.splitlines(keepends=True)
    kept = [line for line in lines if not any(marker in line for marker in markers)]
    return "".join(kept), len(lines) - len(kept)


def head(text: str, size: int) -> str:
    """The first `size` bytes of a text, whole characters."""
    return text.encode()[:size].decode("utf-8", errors="ignore")


def prepare(checkpoint: Checkpoint, source: Path, work: Work, *, size: int, ctx: int) -> ScoredText:
    """The first `size` bytes of a text in windows of `ctx` tokens, lines with markers left out.

    llama-perplexity reads a marker such as <|endoftext|> as plain text, which no model has seen
    that way: lines that hold one are dropped for both sides, and said to be.

    Raises:
        UsageError: the text cannot be read or is shorter than a window.
    """
    markers = markers_of(checkpoint)

    def make(out: Path) -> None:
        text, dropped = without_markers(read_text(str(source)), markers)
        if dropped:
            say(f"{source.name}: {dropped} lines dropped that hold one of {', '.join(markers)}")
        out.write_bytes(head(text, size).encode())

    name = f"{source.stem}-{size}"
    key = {"source": identity(source), "size": size, "markers": markers}
    path = work.product(f"{name}.txt", key, make).path
    tokenizer = tokenizer_of(checkpoint)
    ids = tokenizer.encode(read_text(str(path)), add_special=False, parse_special=False)
    bos = tokenizer.first_special()
    try:
        todo = windows(ids if bos is None else [bos, *ids], ctx, ctx, bos)
    except UsageError as exc:
        raise UsageError(f"{shown(source)}: {exc}") from None
    digest = hashlib.sha256(b"".join(w.tokens.tobytes() for w in todo)).hexdigest()[:16]
    count = sum(len(tokenizer.token_bytes(int(t))) for w in todo for t in w.targets)
    return ScoredText(name, path, digest, todo, count)
