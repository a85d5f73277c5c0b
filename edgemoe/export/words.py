"""How a tokenizer.json cuts text before BPE, as llama.cpp names it.

Its behaviours are those of edgemoe/checkpoint/gguf_tokenizer_pre.py; published files spell some of
them differently.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..checkpoint.gguf_tokenizer_pre import PRE_TOKENIZERS
from ..errors import UnsupportedError, shown

_GPT2 = PRE_TOKENIZERS["gpt-2"].patterns[0]
_SUFFIX = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"

_PUBLISHED: Mapping[tuple[str, ...], str] = {
    (rf"{_SUFFIX}|{_LEAD}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",): "qwen2",
    (
        rf"{_SUFFIX}|{_LEAD}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
        rf"|{_SPACES}",
    ): "qwen35",
    (
        rf"{_SUFFIX}|{_LEAD}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",
    ): "dbrx llama-bpe",
    (
        rf"{_LEAD}{_UPPER}*{_LOWER}+{_SUFFIX}?|{_LEAD}{_UPPER}+{_LOWER}*{_SUFFIX}?"
        rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",
    ): "gpt-4o",
    (
        rf"{_LEAD}{_UPPER}*{_LOWER}+|{_LEAD}{_UPPER}+{_LOWER}*"
        rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",
    ): "tekken",
}
"""Expressions as model publishers write them -> names, apart by ignore_merges."""

_LACKING = re.compile(r"\[(\\x\{[0-9A-F]{4}\})+\]")
_MARK = "\u2581"


def pre_tokenizer_name(raw: Mapping[str, Any], ignore_merges: bool, where: str) -> str:
    """The name in llama.cpp of how a byte-level tokenizer.json cuts text into words.

    Raises:
        UnsupportedError: llama.cpp has no such way, or the text is changed before.
    """
    for normalizer in _flat(raw.get("normalizer"), "normalizers"):
        # llama.cpp composes no characters; nor do its own converted files of models that want it
        if normalizer.get("type") != "NFC":
            raise _refusal(where, "normalizer", normalizer)
    steps = list(_flat(raw.get("pre_tokenizer"), "pretokenizers"))
    if steps and steps[-1].get("behavior") == "Removed" and _LACKING.fullmatch(_regex(steps[-1])):
        steps.pop()  # bytes that have no token give none: llama.cpp needs no telling
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space", True):
        raise _refusal(where, "pre_tokenizer", raw.get("pre_tokenizer"))
    patterns = tuple(pattern for step in steps for pattern in _patterns(step, where))
    names = _PUBLISHED.get(patterns, "").split()
    names += [name for name, pre in PRE_TOKENIZERS.items() if pre.patterns == patterns]
    for name in names:
        if PRE_TOKENIZERS[name].ignore_merges == ignore_merges:
            return name
    if names:
        raise UnsupportedError(
            f"{where}: ignore_merges = {ignore_merges} cannot be exported: llama.cpp's {names[0]}"
            f" pre-tokenizer has {not ignore_merges}"
        )
    by = shown(" then ".join(patterns))
    raise UnsupportedError(f"{where}: llama.cpp has no pre-tokenizer that cuts text by {by}")


def space_prefix(raw: Mapping[str, Any], where: str) -> bool:
    """Whether a tokenizer.json that marks spaces puts one before a text.

    Raises:
        UnsupportedError: it changes or cuts text in another way than llama.cpp.
    """
    prefix = False
    for normalizer in _flat(raw.get("normalizer"), "normalizers"):
        if normalizer == {"type": "Prepend", "prepend": _MARK}:
            prefix = True
        elif normalizer != {"type": "Replace", "pattern": {"String": " "}, "content": _MARK}:
            raise _refusal(where, "normalizer", normalizer)
    for step in _flat(raw.get("pre_tokenizer"), "pretokenizers"):
        scheme = step.get("prepend_scheme", "always")
        whole = step.get("split") is False and step.get("replacement") == _MARK
        if step.get("type") != "Metaspace" or not whole:
            raise _refusal(where, "pre_tokenizer", step)
        prefix = prefix or scheme != "never"
    return prefix


def _flat(part: Any, children: str) -> Iterator[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, sequences taken apart."""
    if part is None:
        return
    if part.get("type") == "Sequence":
        for child in part[children]:
            yield from _flat(child, children)
    else:
        yield part


def _patterns(step: Mapping[str, Any], where: str) -> Iterator[str]:
    """The expressions by which a step cuts."""
    kind = step.get("type")
    if kind == "ByteLevel":
        if step.get("use_regex", True):
            yield _GPT2
    elif kind == "Digits":
        yield r"\p{N}" if step.get("individual_digits") else r"\p{N}+"
    elif kind == "Split" and _regex(step) and _cuts_all(step):
        yield _regex(step).replace("\r", r"\r").replace("\n", r"\n")
    else:
        raise _refusal(where, "pre_tokenizer", step)


def _regex(step: Mapping[str, Any]) -> str:
    pattern = step.get("pattern")
    return str(pattern.get("Regex", "")) if isinstance(pattern, dict) else ""


def _cuts_all(step: Mapping[str, Any]) -> bool:
    """Whether the matches become pieces; the known expressions leave nothing between them."""
    return (step.get("behavior"), bool(step.get("invert"))) in (
        ("Isolated", False),
        ("Removed", True),
    )


def _refusal(where: str, part: str, value: Any) -> UnsupportedError:
    return UnsupportedError(
        f"{where}: {part} {shown(value)} cannot be exported: llama.cpp has none like it"
    )
