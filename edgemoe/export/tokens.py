"""A tokenizer.json as the key-values by which a GGUF file describes a tokenizer.

Two kinds are written: byte-level BPE ("gpt2": tokens, merges, and the name of the expressions that
cut text into words) and BPE on characters with a fallback to bytes ("llama": tokens and scores).

Source: ggml-org/llama.cpp, src/llama-vocab.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..chat import ChatTemplate
from ..checkpoint.files import parse_object
from ..checkpoint.gguf_tokenizer_vocab import NORMAL, Metadata, read_vocabulary
from ..errors import UnsupportedError
from ..tokenizer import Tokenizer
from ..types import ModelConfig
from .bpe import Bpe, merge_scores, read_bpe
from .file import Value
from .words import pre_tokenizer_name, space_prefix

_PREFIX = "tokenizer.ggml."
_ID = _PREFIX + "{}_token_id"


def tokenizer_metadata(
    files: Mapping[str, bytes], config: ModelConfig, where: str
) -> tuple[dict[str, Value], list[str]]:
    """All tokenizer.* key-values, and what of the tokenizer they do not carry, a sentence each.

    Args:
        files: tokenizer.json and, where they exist, tokenizer_config.json, chat_template.jinja.
        where: the source, for messages.

    Raises:
        CheckpointError: the files are damaged. UnsupportedError: llama.cpp has no such tokenizer.
    """
    where = f"{where}/tokenizer.json"
    raw = parse_object(files["tokenizer.json"], where)
    settings: dict[str, Any] = {}
    if "tokenizer_config.json" in files:
        settings = parse_object(files["tokenizer_config.json"], f"{where[:-5]}_config.json")
    tokenizer = Tokenizer(
        files["tokenizer.json"],
        config=settings,
        bos_token_id=config.bos_token_id,
        eos_token_ids=config.eos_token_ids,
    )
    unknown = _content(settings, "unk_token")
    bpe = read_bpe(raw, config.vocab_size, unknown, tokenizer.token_id, where)
    out: dict[str, Value] = {}
    if bpe.byte_fallback:
        out[_PREFIX + "model"] = "llama"
        out[_PREFIX + "pre"] = "default"
        out[_PREFIX + "add_space_prefix"] = space_prefix(raw, where)
        out[_PREFIX + "scores"] = merge_scores(bpe, where)
    else:
        out[_PREFIX + "model"] = "gpt2"
        out[_PREFIX + "pre"] = pre_tokenizer_name(raw, bpe.ignore_merges, where)
        out[_PREFIX + "merges"] = [f"{left} {right}" for left, right in bpe.merges]
    out[_PREFIX + "tokens"] = bpe.tokens
    out[_PREFIX + "token_type"] = bpe.kinds
    notes = list(bpe.notes)
    before, after = _added(tokenizer, bpe)
    if len(before) > 1 or len(after) > 1:
        raise UnsupportedError(
            f"{where} puts tokens {before} before a text and {after} after it; llama.cpp adds one"
            " at either end"
        )
    out[_PREFIX + "add_bos_token"] = bool(before)
    out[_PREFIX + "add_eos_token"] = bool(after)
    bos = before[0] if before else config.bos_token_id
    named = {"bos": bos, "unknown": bpe.unknown}
    named["padding"] = bpe.ids.get(_content(settings, "pad_token"))
    for role, i in named.items():
        if i is not None and i < config.vocab_size:
            out[_ID.format(role)] = i
    out |= _ends(out, list(dict.fromkeys([*after, *config.eos_token_ids])), notes, where)
    template = ChatTemplate.from_files(files.get("chat_template.jinja"), settings)
    if template is not None:
        out["tokenizer.chat_template"] = template.source
    return out, notes


def _ends(
    values: Mapping[str, Value], ends: list[int], notes: list[str], where: str
) -> dict[str, Value]:
    """Names for the tokens that end a text: there are three, and llama.cpp knows some without."""
    if not ends:
        notes.append("no token is named that ends a text: llama.cpp takes one by a rule of its own")
        return {}
    out: dict[str, Value] = {_ID.format("eos"): ends[0]}
    known = read_vocabulary(Metadata({**values, **out}, where), {}).ends
    rest = [i for i in ends if i not in known]
    out |= {_ID.format(role): i for role, i in zip(("eot", "eom"), rest, strict=False)}
    if len(rest) > 2:
        notes.append(f"tokens {rest[2:]} end a text here but not in llama.cpp")
    return out


def _added(tokenizer: Tokenizer, bpe: Bpe) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer puts before and after a text, by trying."""
    plain = zip(bpe.tokens, bpe.kinds, strict=True)
    text = next((token for token, kind in plain if kind == NORMAL and token.isalnum()), "")
    alone, full = tokenizer.encode(text, add_special=False), tokenizer.encode(text)
    for at in range(len(full) - len(alone) + 1):
        if full[at : at + len(alone)] == alone:
            return full[:at], full[at + len(alone) :]
    return full, []


def _content(settings: Mapping[str, Any], name: str) -> str:
    """The spelling of a token that tokenizer_config.json names; empty where there is none."""
    token = settings.get(name)
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""
