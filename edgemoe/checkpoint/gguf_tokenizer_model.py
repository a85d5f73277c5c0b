"""tokenizer.json of the two kinds of vocabulary that MoE models in GGUF files have.

Plain data only; the `tokenizers` library reads it at run time. The algorithms it has to agree with
are llm_tokenizer_bpe and llm_tokenizer_spm of llama.cpp's src/llama-vocab.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import CheckpointError, UnsupportedError, shown
from .gguf_tokenizer_pre import PreTokenizer
from .gguf_tokenizer_vocab import CONTROL, MATCHED, UNKNOWN, Vocabulary

Json = dict[str, Any]

_SPACE = "\u2581"
_BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
# The characters byte-level BPE spells bytes with (GPT-2's encoder.py).
_DIRECT = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_ALPHABET = [chr(c) for c in (*_DIRECT, *range(256, 512 - len(_DIRECT)))]
_MOST_SPLITS = 1 << 28
"""Characters cut out of SentencePiece tokens to find their halves; Mixtral's takes 2 million."""


def byte_level(
    vocab: Vocabulary, merges: Sequence[str], pre: PreTokenizer, *, add_eos: bool, where: str
) -> Json:
    """tokenizer.json of byte-level BPE.

    Args:
        merges: "LEFT RIGHT" each, in order of rank; of two alike the first counts. One that makes
            no token of the vocabulary is left out, as it changes no other word.

    Raises:
        CheckpointError: a merge is not two tokens, or one that makes no token is needed by another.
    """
    pairs: dict[tuple[str, str], None] = {}
    for rank, merge in enumerate(merges):
        # The first character may be a space: some vocabularies spell it so.
        cut = merge.find(" ", 1)
        if not 0 < cut < len(merge) - 1:
            raise CheckpointError(
                f"{where}: merge {rank} is {shown(merge, 60)}, not two tokens with a space between"
            )
        pairs.setdefault((merge[:cut], merge[cut + 1 :]))
    ids = vocab.ids
    kept = [[a, b] for a, b in pairs if a in ids and b in ids and a + b in ids]
    if len(kept) < len(pairs):
        parts = {part for pair in pairs if "".join(pair) in ids for part in pair}
        for a, b in pairs:
            if a + b not in ids and a + b in parts:
                raise CheckpointError(
                    f"{where}: the merges make {shown(a + b, 60)}, which is not in the vocabulary"
                )
    steps: list[Json] = [_split({"Regex": pattern}, "Isolated") for pattern in pre.patterns]
    steps.append(
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    )
    missing = [c for c in _ALPHABET if c not in ids]
    if missing:
        # Bytes without a token give none, but still keep apart what stands before and after them.
        pattern = "".join(rf"\x{{{ord(c):04X}}}" for c in missing)
        steps.append(_split({"Regex": f"[{pattern}]"}, "Removed"))
    return _document(
        vocab,
        kept,
        normalizer=None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": steps},
        decoder=steps[len(pre.patterns)],
        ignore_merges=pre.ignore_merges,
        add_eos=add_eos,
    )


def sentencepiece(vocab: Vocabulary, *, space_prefix: bool, add_eos: bool, where: str) -> Json:
    """tokenizer.json of BPE by scores, over characters, with tokens for single bytes.

    llama.cpp joins whichever two neighbours make the token of the highest score, the leftmost first
    where scores are equal. Merges have distinct ranks, so every way of making a token becomes a
    merge of its own, in order of score. Two differences remain: tokens of equal score, which
    SentencePiece does not make, are joined in order of id; and a character that has no token of its
    own is spelled in bytes even where a longer token contains it.

    Raises:
        CheckpointError: there are no scores.
        UnsupportedError: a byte has no token, or the tokens are too long to be looked through.
    """
    if vocab.scores is None:
        raise CheckpointError(f"{where}: tokenizer.ggml.scores is missing")
    lacking = [token for token in _BYTE_TOKENS if token not in vocab.ids]
    if lacking:
        raise UnsupportedError(
            f"{where}: the vocabulary has no {lacking[0]}: only SentencePiece vocabularies with "
            "all 256 byte tokens are supported"
        )
    if sum(len(token) ** 2 for token in vocab.tokens) > _MOST_SPLITS:
        raise UnsupportedError(f"{where}: the tokens are too long for a SentencePiece vocabulary")
    return _document(
        vocab,
        _merges_by_score(vocab.tokens, vocab.ids, vocab.scores),
        normalizer=_sequence("normalizers", _escape(space_prefix)),
        pre_tokenizer=None,
        decoder=_sequence("decoders", _unescape(space_prefix)),
        byte_fallback=True,
        add_eos=add_eos,
    )


def _merges_by_score(
    tokens: Sequence[str], ids: dict[str, int], scores: Sequence[float]
) -> list[list[str]]:
    merges = []
    for token in sorted(tokens, key=lambda token: (-scores[ids[token]], ids[token])):
        for cut in range(len(token) - 1, 0, -1):
            if token[:cut] in ids and token[cut:] in ids:
                merges.append([token[:cut], token[cut:]])
    return merges


def _escape(space_prefix: bool) -> list[Json]:
    replace: Json = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    return [{"type": "Prepend", "prepend": _SPACE}, replace] if space_prefix else [replace]


def _unescape(space_prefix: bool) -> list[Json]:
    steps: list[Json] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if space_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return steps


def _sequence(name: str, parts: list[Json]) -> Json:
    return {"type": "Sequence", name: parts}


def _split(pattern: Json, behavior: str) -> Json:
    return {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": False}


def _document(
    vocab: Vocabulary,
    merges: list[list[str]],
    *,
    normalizer: Json | None,
    pre_tokenizer: Json | None,
    decoder: Json,
    add_eos: bool,
    ignore_merges: bool = False,
    byte_fallback: bool = False,
) -> Json:
    added = [
        {
            "id": i,
            "content": vocab.tokens[i],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind in (CONTROL, UNKNOWN),
        }
        for i, kind in enumerate(vocab.kinds)
        if kind in MATCHED
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": _eos_template(vocab) if add_eos else None,
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": byte_fallback,
            "ignore_merges": ignore_merges,
            "vocab": vocab.ids,
            "merges": merges,
        },
    }


def _eos_template(vocab: Vocabulary) -> Json:
    """A post-processor that puts EOS after every text."""
    token = vocab.spelling(vocab.eos)
    end = {"SpecialToken": {"id": token, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [first, end],
        "pair": [first, second, end],
        "special_tokens": {token: {"id": token, "ids": [vocab.eos], "tokens": [token]}},
    }
