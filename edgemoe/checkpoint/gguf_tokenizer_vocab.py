"""The vocabulary of a GGUF file: tokens, their kinds, and which of them mean something.

Kinds and end-of-generation tokens are decided as llama.cpp does (llama_vocab::impl::load in
src/llama-vocab.cpp at 0c1e57098): partly from ids and types in the file, partly from spellings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..errors import CheckpointError, shown

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Values of tokenizer.ggml.token_type; 0 is "undefined" and treated as NORMAL."""

MATCHED = frozenset({UNKNOWN, CONTROL, USER_DEFINED})
"""Kinds whose spelling is found in text before it is cut into words."""

_PREFIX = "tokenizer.ggml."
_NO_TOKEN = 0xFFFFFFFF  # -1, as old files write it

_ENDS = """<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn>
    <|endoftext|> </s> <|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos>
    <turn|> <|tool_response> <\uff5cend\u2581of\u2581sentence\uff5c> [e~["""
# Fill-in-the-middle tokens become control tokens; those of _ENDING_ROLES also end a generation.
_ROLES: Mapping[str, str] = {
    "fim_pre": "<|fim_prefix|> <fim-prefix> <fim_prefix> <\uff5cfim\u2581begin\uff5c> <PRE> "
    "\u2581<PRE> <|code_prefix|> <|prefix|>",
    "fim_suf": "<|fim_suffix|> <fim-suffix> <fim_suffix> <\uff5cfim\u2581hole\uff5c> <SUF> "
    "\u2581<SUF> <|code_suffix|> <|suffix|>",
    "fim_mid": "<|fim_middle|> <fim-middle> <fim_middle> <\uff5cfim\u2581end\uff5c> <MID> "
    "\u2581<MID> <|code_middle|> <|middle|>",
    "fim_pad": "<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD]",
    "fim_rep": "<|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>",
    "fim_sep": "<|file_sep|>",
}
_ENDING_ROLES = ("fim_pad", "fim_rep", "fim_sep")
_OLD_NAMES = {"fim_pre": "prefix", "fim_suf": "suffix", "fim_mid": "middle"}
# Channel marks of gpt-oss: control tokens by type, but part of the text.
_RENDERED = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")


class Metadata(NamedTuple):
    """Key-values of a GGUF file with checked access; every method raises CheckpointError."""

    values: Mapping[str, Any]
    where: str

    def fault(self, key: str, what: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {key} {what}")

    def text(self, key: str) -> str | None:
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            raise self.fault(key, f"must be a string, not {shown(value, 60)}")
        return value

    def flag(self, name: str) -> bool | None:
        """tokenizer.ggml.NAME, true or false."""
        value = self.values.get(_PREFIX + name)
        if value is not None and not isinstance(value, bool):
            raise self.fault(_PREFIX + name, f"must be true or false, not {shown(value, 60)}")
        return value

    def strings(self, name: str) -> list[str] | None:
        """tokenizer.ggml.NAME, a list of strings."""
        value = self.values.get(_PREFIX + name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(type(item) is str for item in value):
            raise self.fault(_PREFIX + name, "must be a list of strings")
        return value

    def numbers(self, name: str, count: int, kinds: tuple[type, ...]) -> list[Any] | None:
        """tokenizer.ggml.NAME, a number of one of the types `kinds` for each of `count` tokens."""
        value = self.values.get(_PREFIX + name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(type(item) in kinds for item in value):
            what = "numbers" if float in kinds else "integers"
            raise self.fault(_PREFIX + name, f"must be a list of {what}")
        if len(value) != count:
            raise self.fault(_PREFIX + name, f"has {len(value)} entries for {count} tokens")
        return value

    def token_id(self, name: str, count: int) -> int | None:
        """tokenizer.ggml.NAME_token_id, below `count`; None where it is missing or -1."""
        key = f"{_PREFIX}{name}_token_id"
        value = self.values.get(key)
        if value is None or (type(value) is int and value in (-1, _NO_TOKEN)):
            return None
        if type(value) is not int or not 0 <= value < count:
            raise self.fault(key, f"is {shown(value, 60)}, but the tokens are 0 to {count - 1}")
        return value


@dataclass(frozen=True)
class Vocabulary:
    """Checked tokens of a file.

    Attributes:
        tokens: spelling by id; an empty one is named [EMPTY_<id>].
        ids: the inverse.
        kinds: NORMAL ... BYTE by id, after what spellings override.
        scores: by id, None where the file has none.
        bos, eos, unk, pad: ids the file names, or the defaults of its tokenizer.
        ends: all tokens that end a generation, `eos` first.
    """

    tokens: list[str]
    ids: dict[str, int]
    kinds: list[int]
    scores: list[float] | None
    bos: int | None
    eos: int | None
    unk: int | None
    pad: int | None
    ends: tuple[int, ...]

    def spelling(self, token_id: int | None) -> str | None:
        """The token's text; None for None."""
        return None if token_id is None else self.tokens[token_id]


def read_vocabulary(metadata: Metadata, defaults: Mapping[str, int]) -> Vocabulary:
    """The tokens of a file; `defaults` are the ids of "bos", "eos", "unk" where it names none.

    llama.cpp has defaults for byte-level vocabularies too (11 for BOS and EOS), which suit one old
    model and would end a text at a comma in most: pass none for these.

    Raises:
        CheckpointError: a list is missing, of the wrong type or length, an id is out of range, a
            token appears twice or a score is not a number.
    """
    tokens = metadata.strings("tokens")
    if not tokens:
        raise metadata.fault(_PREFIX + "tokens", "is missing or empty: it has no tokenizer")
    count = len(tokens)
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) != count:
        twice = next(i for i, token in enumerate(tokens) if ids[token] != i)
        what = f"has {shown(tokens[twice], 60)} twice, as {twice} and {ids[tokens[twice]]}"
        raise metadata.fault(_PREFIX + "tokens", what)
    kinds = metadata.numbers("token_type", count, (int,)) or [NORMAL] * count
    if not all(0 <= kind <= BYTE for kind in kinds):
        odd = next(i for i, kind in enumerate(kinds) if not 0 <= kind <= BYTE)
        what = f"is {shown(kinds[odd], 60)} for token {odd}, known types are 0 to {BYTE}"
        raise metadata.fault(_PREFIX + "token_type", what)
    scores = metadata.numbers("scores", count, (float, int))
    if scores is not None and not all(map(math.isfinite, scores)):
        raise metadata.fault(_PREFIX + "scores", "has an entry that is not a finite number")
    named = {name: _token_id(metadata, name, count) for name in ("eot", "eom", *_ROLES)}
    for name in ("bos", "eos", "unk", "pad"):
        key = {"unk": "unknown", "pad": "padding"}.get(name, name)
        default = defaults.get(name, count)
        found = metadata.token_id(key, count)
        named[name] = default if found is None and default < count else found
    kinds = kinds.copy()
    ends = _apply_spellings(tokens, ids, kinds, named)
    used = {name: named[name] for name in ("bos", "eos", "unk", "pad")}
    return Vocabulary(tokens, ids, kinds, scores, ends=ends, **used)


def _token_id(metadata: Metadata, name: str, count: int) -> int | None:
    found = metadata.token_id(name, count)
    if found is None and name in _OLD_NAMES:
        found = metadata.token_id(_OLD_NAMES[name], count)
    return found


def _apply_spellings(
    tokens: list[str], ids: dict[str, int], kinds: list[int], named: dict[str, int | None]
) -> tuple[int, ...]:
    """Override `kinds` of tokens known by their spelling; returns the ends of generation."""
    for role, spellings in _ROLES.items():
        if named[role] is None:
            named[role] = next((ids[s] for s in spellings.split() if s in ids), None)
            if (by_spelling := named[role]) is not None:
                kinds[by_spelling] = CONTROL
    ends = {named[role] for role in _ENDING_ROLES}
    for spelling in ids.keys() & _ENDS.split():
        kinds[ids[spelling]] = CONTROL
        ends.add(ids[spelling])
    for spelling in _RENDERED:
        if spelling in ids:
            kinds[ids[spelling]] = USER_DEFINED
    ends |= {named[name] for name in ("eos", "eot", "eom")}
    found = {tokens[i] for i in ends if i is not None}
    calls = "<|call|>" in found or "<|calls|>" in found
    if "<|end|>" in found and calls and ("<|flush|>" in found or "<|return|>" in found):
        # Here it ends one message of several, not the turn.
        ends.remove(ids["<|end|>"])
        kinds[ids["<|end|>"]] = USER_DEFINED
    if "</s>" in found and found & {"<|tool_response>", "<|plamo:eos|>"}:
        ends.remove(ids["</s>"])
        kinds[ids["</s>"]] = NORMAL
    return tuple(sorted((i for i in ends if i is not None), key=lambda i: (i != named["eos"], i)))
