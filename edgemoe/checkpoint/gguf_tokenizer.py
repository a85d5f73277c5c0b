"""Tokenizer, end-of-text ids and chat template of a GGUF file, as the files a checkpoint has.

Text becomes the tokens that llama.cpp makes of it, whether special tokens spelled in it are parsed
or not. Known differences, beside those that gguf_tokenizer_pre and gguf_tokenizer_model name:
where two special tokens overlap in a text the leftmost is taken, llama.cpp takes the longest; no
second BOS is put before a text that begins with one; a byte-level vocabulary that names no BOS or
EOS has none, llama.cpp takes token 11; spaces after the special tokens of models called "phi-3"
stay.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..errors import UnsupportedError, shown
from .gguf_tokenizer_model import byte_level, sentencepiece
from .gguf_tokenizer_pre import PRE_TOKENIZERS, PreTokenizer
from .gguf_tokenizer_vocab import Metadata, Vocabulary, read_vocabulary

_MODEL = "tokenizer.ggml.model"
_PRE = "tokenizer.ggml.pre"
_SPM_DEFAULTS = {"bos": 1, "eos": 2, "unk": 0}
_SAMPLING = "general.sampling."
_SAMPLING_NAMES = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


class _Source(NamedTuple):
    vocab: Vocabulary
    pre: PreTokenizer | None  # None: SentencePiece
    add_bos: bool
    add_eos: bool


def tokenizer_files(metadata: Mapping[str, Any], where: str) -> dict[str, bytes]:
    """What a Hugging Face directory would hold beside the weights.

    Args:
        metadata: key-values of a GGUF file as plain Python values.
        where: the file as messages call it.

    Returns:
        tokenizer.json, tokenizer_config.json, and where there is anything to say
        generation_config.json and chat_template.jinja.

    Raises:
        CheckpointError: the metadata has no tokenizer, or an inconsistent one.
        UnsupportedError: its model or pre-tokenizer is not implemented.
    """
    keys = Metadata(metadata, where)
    source = _read(keys)
    vocab = source.vocab
    if source.pre is None:
        prefix = keys.flag("add_space_prefix")
        document = sentencepiece(
            vocab, space_prefix=prefix is not False, add_eos=source.add_eos, where=where
        )
    else:
        merges = keys.strings("merges")
        if merges is None:
            raise keys.fault("tokenizer.ggml.merges", "is missing")
        document = byte_level(vocab, merges, source.pre, add_eos=source.add_eos, where=where)
    named = {
        "bos_token": vocab.spelling(vocab.bos),
        "eos_token": vocab.spelling(vocab.eos),
        "unk_token": vocab.spelling(vocab.unk),
        "pad_token": vocab.spelling(vocab.pad),
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: token for name, token in named.items() if token is not None},
        "add_bos_token": source.add_bos,
        "add_eos_token": source.add_eos,
        "clean_up_tokenization_spaces": False,
    }
    files = {"tokenizer.json": _json(document), "tokenizer_config.json": _json(config)}
    generation = _generation(keys, vocab)
    if generation:
        files["generation_config.json"] = _json(generation)
    template = keys.text("tokenizer.chat_template")
    if template:
        files["chat_template.jinja"] = template.encode("utf-8")
    return files


def _read(keys: Metadata) -> _Source:
    model = keys.text(_MODEL)
    if model is None:
        raise keys.fault(_MODEL, "is missing: the file has no tokenizer")
    if model not in ("gpt2", "llama"):
        raise UnsupportedError(
            f"{keys.where}: {_MODEL} is {shown(model, 60)}; gpt2 (byte-level BPE) and llama"
            " (SentencePiece BPE) are supported"
        )
    pre = _pre_tokenizer(keys) if model == "gpt2" else None
    vocab = read_vocabulary(keys, _SPM_DEFAULTS if pre is None else {})
    add_bos, add_eos = keys.flag("add_bos_token"), keys.flag("add_eos_token")
    if add_bos is None:
        add_bos = pre is None or pre.add_bos
    for name, asked, token in (("bos", add_bos, vocab.bos), ("eos", add_eos, vocab.eos)):
        if asked and token is None:
            raise keys.fault(
                f"tokenizer.ggml.{name}_token_id",
                f"is missing, but the tokenizer adds {name.upper()} to every text",
            )
    return _Source(vocab, pre, add_bos, bool(add_eos))


def _pre_tokenizer(keys: Metadata) -> PreTokenizer:
    name = keys.text(_PRE) or "default"
    try:
        return PRE_TOKENIZERS[name]
    except KeyError:
        raise UnsupportedError(
            f"{keys.where}: {_PRE} is {shown(name, 60)}; supported are "
            + ", ".join(sorted(PRE_TOKENIZERS))
        ) from None


def _generation(keys: Metadata, vocab: Vocabulary) -> dict[str, Any]:
    """generation_config.json: special ids, and the sampling the file recommends if it does."""
    out: dict[str, Any] = {}
    if vocab.bos is not None:
        out["bos_token_id"] = vocab.bos
    if vocab.ends:
        out["eos_token_id"] = list(vocab.ends)
    for name in ("mirostat", "xtc_probability"):
        if _number(keys, name):
            raise UnsupportedError(f"{keys.where}: {_SAMPLING}{name} is set; it is not supported")
    sampling = {theirs: _number(keys, ours) for ours, theirs in _SAMPLING_NAMES.items()}
    given = {name: value for name, value in sampling.items() if value is not None}
    if given:
        out["do_sample"] = given.get("temperature", 1.0) > 0
        if given.get("temperature") == 0:
            del given["temperature"]
    return out | given


def _number(keys: Metadata, name: str) -> float | int | None:
    value = keys.values.get(_SAMPLING + name)
    if value is None:
        return None
    if type(value) not in (int, float) or not math.isfinite(value):
        raise keys.fault(_SAMPLING + name, f"must be a number, not {shown(value, 60)}")
    # Files hold float32: 0.6 comes as 0.6000000238418579.
    return value if isinstance(value, int) else float(f"{value:.7g}")


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8")
