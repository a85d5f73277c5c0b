"""Text to training windows: tokenizer, cached token ids, an order that only the seed decides."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from .files import write_atomic

END = "<|endoftext|>"
END_ID = 0
SHORT_BYTES = 2500
"""Documents up to this size count as stories (TinyStories, storybooks); longer ones are books."""

U16 = NDArray[np.uint16]


def split_documents(text: str) -> list[str]:
    """Documents of a text whose documents end with a line `<|endoftext|>`; each ends with its
    own newline, and empty ones are dropped."""
    parts = (part.removeprefix("\n") for part in text.split(END))
    return [part for part in parts if part.strip()]


def train_tokenizer(documents: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of `vocab_size` entries with `<|endoftext|>` as id 0 (GPT-2's splitting)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


@dataclass(frozen=True)
class Corpus:
    """A tokenized text. ids: every document as END_ID and its tokens, one after the other;
    starts: int64 [documents + 1]; short: bool [documents], the documents up to SHORT_BYTES."""

    tokenizer: Tokenizer
    ids: U16
    starts: NDArray[np.int64]
    short: NDArray[np.bool_]


def load_corpus(path: Path, vocab_size: int, cache: Path) -> Corpus:
    """Tokenizer and token ids of a text file, from `cache` where they were made before.

    Raises:
        OSError: the text cannot be read or the cache not be written.
        ValueError: the text is too small for a vocabulary of that size, or has no documents.
    """
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()[:16]
    tokenizer_file = cache / f"tokenizer-{digest}-{vocab_size}.json"
    ids_file = cache / f"tokens-{digest}-{vocab_size}.npz"
    documents = split_documents(data.decode("utf-8"))
    if not documents:
        raise ValueError(f"{path}: no documents in this text")
    if not (tokenizer_file.exists() and ids_file.exists()):
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        tokenizer = train_tokenizer(documents, vocab_size)
        if tokenizer.get_vocab_size() != vocab_size:
            raise ValueError(
                f"{path}: this text yields {tokenizer.get_vocab_size()} tokens, "
                f"not {vocab_size}: choose a smaller --vocab-size"
            )
        encoded = [e.ids for e in tokenizer.encode_batch_fast(documents)]
        lengths = np.array([0] + [len(ids) + 1 for ids in encoded], np.int64)
        ids = np.concatenate([np.array([END_ID, *ids], np.uint16) for ids in encoded])
        cache.mkdir(parents=True, exist_ok=True)
        with write_atomic(ids_file) as file:
            np.savez(file, ids=ids, starts=np.cumsum(lengths))
        with write_atomic(tokenizer_file) as file:
            file.write(tokenizer.to_str(pretty=True).encode())
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    with np.load(ids_file) as arrays:
        ids, starts = arrays["ids"], arrays["starts"]
    short = np.array([len(d.encode()) <= SHORT_BYTES for d in documents])
    return Corpus(tokenizer, ids, starts, short)


def window_cycle(
    corpus: Corpus, window: int, story_share: float | None, seed: int, cycle: int
) -> U16:
    """One pass over the corpus as shuffled windows [n, window + 1]; a window's last token is the
    first of what follows it, so inputs are [:, :-1] and targets [:, 1:].

    Documents are shuffled, joined and cut. `story_share` is the share of tokens that short
    documents have: they are repeated, each time in another order, until they have it (None: every
    document once). The result depends on the arguments alone.
    """
    rng = np.random.default_rng([seed, cycle])
    sizes = np.diff(corpus.starts)
    books, stories = np.flatnonzero(~corpus.short), np.flatnonzero(corpus.short)
    order = [books, stories]
    story_tokens, book_tokens = int(sizes[stories].sum()), int(sizes[books].sum())
    if story_share is not None and story_tokens and book_tokens:
        repeats = book_tokens * story_share / (1 - story_share) / story_tokens
        extra = rng.permutation(stories)[: round(len(stories) * (repeats % 1))]
        order = [books, *[stories] * int(repeats), extra]
    documents = rng.permutation(np.concatenate(order))
    joined = np.concatenate(
        [corpus.ids[corpus.starts[d] : corpus.starts[d + 1]] for d in documents]
    )
    count = (len(joined) - 1) // window
    spare = len(joined) - 1 - count * window
    first = int(rng.integers(spare + 1))  # the cuts fall elsewhere in every cycle
    rows = first + window * rng.permutation(count)
    return joined[rows[:, None] + np.arange(window + 1)]


def batches(
    corpus: Corpus, *, window: int, batch: int, story_share: float | None, seed: int, skip: int
) -> Iterator[U16]:
    """Endless batches [batch, window + 1], the first `skip` windows left out.

    Raises:
        ValueError: the corpus has fewer tokens than one window.
    """
    cycle, held = 0, np.empty((0, window + 1), np.uint16)
    while True:
        while len(held) < batch or skip:
            fresh = window_cycle(corpus, window, story_share, seed, cycle)
            if not len(fresh):
                raise ValueError(f"the text has less than one window of {window} tokens")
            cycle += 1
            dropped = min(skip, len(fresh))
            skip -= dropped
            held = np.concatenate([held, fresh[dropped:]])
        yield held[:batch]
        held = held[batch:]
