"""Held-out bits per byte, as shared/models/README.md measures stories-moe."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from .data import END, END_ID
from .model import CausalLM

WINDOW = 512
FIRST_BYTES = 200_000
HELD_OUT = ("tinystories_heldout.txt", "children_heldout.txt")
SIDE_NOTE = "wikitext2_wiki.test.raw"


@dataclass(frozen=True)
class Score:
    """Perplexity a token and bits a byte over the scored tokens of one text."""

    perplexity: float
    bits_per_byte: float


def token_bytes(tokenizer: Tokenizer) -> torch.Tensor:
    """int64 [vocab]: bytes of text each token of a byte-level tokenizer stands for."""
    sizes = torch.zeros(tokenizer.get_vocab_size(), dtype=torch.int64)
    for token, index in tokenizer.get_vocab().items():
        sizes[index] = len(token)  # byte-level BPE spells a byte as one character
    return sizes


def held_out_ids(tokenizer: Tokenizer, path: Path, first_bytes: int = FIRST_BYTES) -> torch.Tensor:
    """int64 ids of the first bytes of a text, each document (blank or not) after END_ID."""
    text = path.read_bytes()[:first_bytes].decode("utf-8", errors="ignore")
    parts = text.split(END)
    if len(parts) == 1:  # wikitext has no documents, and is scored without a first END
        return torch.tensor(tokenizer.encode(text).ids)
    ids: list[int] = []
    for part in parts:
        ids += [END_ID, *tokenizer.encode(part.removeprefix("\n")).ids]
    return torch.tensor(ids)


def score(
    model: CausalLM,
    ids: torch.Tensor,
    sizes: torch.Tensor,
    precision: AbstractContextManager[object] | None = None,
) -> Score:
    """Windows of 512 tokens that overlap by half; only the second half of each is scored.

    Raises:
        ValueError: there is less than one window of text.
    """
    starts = np.arange(0, len(ids) - WINDOW + 1, WINDOW // 2)
    if not len(starts):
        raise ValueError(f"a held-out text needs at least {WINDOW} tokens, this one has {len(ids)}")
    device = model.model.embed_tokens.weight.device
    windows = ids[torch.from_numpy(starts[:, None] + np.arange(WINDOW))]
    scored = windows[:, WINDOW // 2 :]
    nats = 0.0
    was_training = model.training
    model.eval()
    with torch.no_grad(), precision or nullcontext():
        for part in windows.split(8 if device.type == "cpu" else 64):
            part = part.to(device)
            hidden, _ = model.model(part)
            hidden = hidden[:, WINDOW // 2 - 1 : -1]
            logits = F.linear(hidden, model.model.embed_tokens.weight).float()
            target = part[:, WINDOW // 2 :]
            nats += F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum").item()
    model.train(was_training)
    total_bytes = int(sizes[scored].sum())
    return Score(math.exp(nats / scored.numel()), nats / math.log(2) / total_bytes)


class HeldOut:
    """The held-out texts, tokenized once; texts that are not there are left out."""

    def __init__(
        self, tokenizer: Tokenizer, directory: Path, names: tuple[str, ...] = HELD_OUT
    ) -> None:
        self.sizes = token_bytes(tokenizer)
        self.ids = {
            name.removesuffix(".txt"): held_out_ids(tokenizer, directory / name)
            for name in names
            if (directory / name).is_file()
        }

    def scores(
        self,
        model: CausalLM,
        precision: AbstractContextManager[object] | None = None,
        windows: int | None = None,
    ) -> dict[str, Score]:
        """Score of each text, or of about its first `windows` windows."""
        last = None if windows is None else (windows + 1) * WINDOW // 2
        return {
            name: score(model, ids[:last], self.sizes, precision) for name, ids in self.ids.items()
        }
