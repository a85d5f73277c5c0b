"""The vocabulary and merges of a tokenizer.json whose model is BPE, checked.

Source: huggingface/tokenizers, models/bpe; ggml-org/llama.cpp, src/llama-vocab.cpp
(llm_tokenizer_spm) for what scores do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..checkpoint.gguf_tokenizer_vocab import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from ..errors import CheckpointError, UnsupportedError, shown

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class Bpe:
    """What a GGUF file says of a vocabulary.

    Attributes:
        tokens: spelling of every id of the model; kinds: NORMAL ... BYTE of each. ids: the inverse.
        merges: pairs of spellings, the first to be merged first.
        byte_fallback: characters without a token are spelled by tokens of their bytes.
        ignore_merges: a word that is a token is taken as it is.
        unknown: id of the token for what has no other.
        notes: what of added tokens llama.cpp does not do.
    """

    tokens: list[str]
    kinds: list[int]
    ids: dict[str, int]
    merges: list[tuple[str, str]]
    byte_fallback: bool
    ignore_merges: bool
    unknown: int | None
    notes: tuple[str, ...]


def read_bpe(
    raw: Mapping[str, Any],
    size: int,
    unknown: str,
    token_id: Callable[[str], int | None],
    where: str,
) -> Bpe:
    """The BPE model of a parsed tokenizer.json (one that the tokenizers library loads).

    Args:
        size: tokens of the model; ids without a spelling become unused ones.
        unknown: the unknown token where the model itself names none; may be empty.
        token_id: id of a spelling; the library gives added tokens other ids than the file says
            where these leave gaps.

    Raises:
        UnsupportedError: another kind of model, or one with options that llama.cpp lacks.
        CheckpointError: the vocabulary is larger than the model's.
    """
    model = raw["model"]
    _check_options(model, where)
    fallback = bool(model.get("byte_fallback"))
    spelled: dict[int, str] = {i: text for text, i in model["vocab"].items()}
    kinds = dict.fromkeys(spelled, NORMAL)
    if fallback:
        kinds |= {i: BYTE for i, text in spelled.items() if _BYTE_TOKEN.fullmatch(text)}
    strips = 0
    for token in raw.get("added_tokens") or ():
        i = token_id(token["content"])
        if i is not None:
            spelled[i] = token["content"]
            kinds[i] = CONTROL if token.get("special") else USER_DEFINED
            strips += any(token.get(side) for side in ("lstrip", "rstrip", "single_word"))
    if beyond := [i for i in spelled if not 0 <= i < size]:
        raise CheckpointError(
            f"{where}: token {shown(spelled[beyond[0]])} has id {beyond[0]}, but the model has"
            f" {size} tokens"
        )
    taken = set(spelled.values())
    for i in range(size):
        if i not in spelled:
            spelled[i] = _free_name(f"[PAD{i}]", taken)
            kinds[i] = UNUSED
    tokens = [spelled[i] for i in range(size)]
    ids = {text: i for i, text in enumerate(tokens)}
    if len(ids) != size:
        twice = next(text for i, text in enumerate(tokens) if ids[text] != i)
        raise UnsupportedError(f"{where}: two tokens are spelled {shown(twice)}; llama.cpp has one")
    unknown_id = ids.get(model.get("unk_token") or unknown)
    if unknown_id is not None and fallback:  # byte-level models name one that they never use
        kinds[unknown_id] = UNKNOWN
    notes: tuple[str, ...] = ()
    if strips:
        notes = (f"{strips} added tokens take the spaces around them along; not in llama.cpp",)
    return Bpe(
        tokens=tokens,
        kinds=[kinds[i] for i in range(size)],
        ids=ids,
        merges=_merges(model, where),
        byte_fallback=fallback,
        ignore_merges=bool(model.get("ignore_merges")),
        unknown=unknown_id,
        notes=notes,
    )


def _check_options(model: Mapping[str, Any], where: str) -> None:
    kind = model.get("type", "BPE")
    if kind != "BPE":
        raise UnsupportedError(f"{where}: a {shown(kind)} model cannot be exported, only BPE can")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise UnsupportedError(
                f"{where}: {option} = {shown(model[option])} cannot be exported: llama.cpp has no"
                " such option"
            )


def _merges(model: Mapping[str, Any], where: str) -> list[tuple[str, str]]:
    """Pairs, of files that write them as such and of those that write "LEFT RIGHT"."""
    out = []
    for merge in model["merges"]:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if len(parts) != 2 or " " in parts[0] + parts[1]:
            raise UnsupportedError(f"{where}: merges of parts with spaces cannot be exported")
        out.append((parts[0], parts[1]))
    return out


def _free_name(name: str, taken: set[str]) -> str:
    while name in taken:
        name = f"[{name}]"
    taken.add(name)
    return name


def merge_scores(bpe: Bpe, where: str) -> list[float]:
    """A score for each token by which llama.cpp merges in the order of the merges.

    It merges any two neighbours that together are a token, the token of the highest score first.
    That is BPE if all merges into one token follow one another, and no such pair lacks its merge.

    Raises:
        UnsupportedError: these merges are not like that.
    """
    rank: dict[str, int] = {}
    last = ""
    for left, right in bpe.merges:
        made = left + right
        if made != last and made in rank:
            raise UnsupportedError(
                f"{where}: the merges into {shown(made)} do not follow one another, so no scores"
                " stand for them in llama.cpp"
            )
        rank.setdefault(made, len(rank))
        last = made
    pairs = set(bpe.merges)
    plain = {t for t, kind in zip(bpe.tokens, bpe.kinds, strict=True) if kind == NORMAL}
    for token in plain:
        for cut in range(1, len(token)):
            pair = token[:cut], token[cut:]
            if pair not in pairs and pair[0] in plain and pair[1] in plain:
                raise UnsupportedError(
                    f"{where}: {shown(pair[0])} and {shown(pair[1])} are never merged, but their"
                    f" sum is a token, which llama.cpp would take"
                )
    lowest = len(rank)
    return [
        -float(rank.get(token, lowest)) if kind == NORMAL else 0.0
        for token, kind in zip(bpe.tokens, bpe.kinds, strict=True)
    ]
