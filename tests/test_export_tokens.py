"""Tokenizers in exported files: every list, and that they cut text as the original does."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from typing import Any

import pytest
from tiny import byte_tokenizer

from edgemoe.checkpoint.gguf_tokenizer import tokenizer_files
from edgemoe.errors import CheckpointError, UnsupportedError
from edgemoe.export.tokens import tokenizer_metadata
from edgemoe.tokenizer import Tokenizer
from edgemoe.types import ModelConfig

SIZE = 300
CONFIG = ModelConfig(
    "olmoe", SIZE, 64, 1, 4, 4, 16, 2, 1, 32, False, 1e-6, 1e4, 128, False, eos_token_ids=(263,)
)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
TEXTS = [
    "Hello, hello!  It's 1234567 o'clock; they'LL\n\n go \t home.\r\n  end  ",
    "naïve café — 漢字 и кириллица ½ ٣٤ \U0001f642\U0001f642",
    "x=1+2*(3-4)//5 != 'abc' <mark> two  marks<mark><|end|>",
]


def byte_level(*steps: dict[str, Any], **model: Any) -> dict[str, Any]:
    """A tokenizer.json with all bytes, a few merges, and two added tokens."""
    out = byte_tokenizer(96)
    alphabet = sorted(alphabet_of_bytes())
    merges = [["h", "e"], ["l", "l"], ["he", "ll"], ["hell", "o"], ["Ġ", "Ġ"], ["1", "2"]]
    vocab = {c: i for i, c in enumerate(alphabet)}
    vocab |= {a + b: 256 + i for i, (a, b) in enumerate(merges)}
    out["model"] |= {"vocab": vocab, "merges": merges} | model
    out["added_tokens"] = [
        added(262, "<mark>", special=False),
        added(263, "<|end|>"),
    ]
    if steps:
        last = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
        out["pre_tokenizer"] = {
            "type": "Sequence",
            "pretokenizers": [*steps, last | {"trim_offsets": False}],
        }
    return out


def added(i: int, content: str, special: bool = True, **flags: bool) -> dict[str, Any]:
    token = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": content, "special": special} | token | flags


def alphabet_of_bytes() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return list(ByteLevel.alphabet())


def split(pattern: str, **other: Any) -> dict[str, Any]:
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    return step | {"invert": False} | other


def metadata(
    raw: dict[str, Any], config: ModelConfig = CONFIG, **files: bytes
) -> tuple[dict[str, Any], list[str]]:
    named = {name.replace("__", "."): data for name, data in files.items()}
    named["tokenizer.json"] = json.dumps(raw).encode()
    return tokenizer_metadata(named, config, "m")


def refused(raw: dict[str, Any], says: str, kind: type[Exception] = UnsupportedError) -> None:
    with pytest.raises(kind, match=says) as caught:
        metadata(raw)
    assert str(caught.value).startswith("m/tokenizer.json")
    assert "\n" not in str(caught.value)


def same_tokens(raw: dict[str, Any], values: dict[str, Any]) -> None:
    """Texts cut by the original, and by what edgemoe reads out of the key-values."""
    files = tokenizer_files(values, "x")
    one = Tokenizer(json.dumps(raw).encode())
    two = Tokenizer(files["tokenizer.json"])
    for text in TEXTS:
        assert one.encode(text, add_special=False) == two.encode(text, add_special=False)


def test_byte_level_lists() -> None:
    """Tokens, kinds and merges of a byte-level vocabulary, unused ids filled up."""
    raw = byte_level()
    values, notes = metadata(raw)
    assert notes == []
    tokens, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == SIZE
    for text, i in raw["model"]["vocab"].items():
        assert (tokens[i], kinds[i]) == (text, NORMAL)
    assert (tokens[262], kinds[262]) == ("<mark>", USER_DEFINED)
    assert (tokens[263], kinds[263]) == ("<|end|>", CONTROL)
    assert (tokens[264], kinds[299]) == ("[PAD264]", UNUSED)
    merges = ["h e", "l l", "he ll", "hell o", "Ġ Ġ", "1 2"]
    assert values["tokenizer.ggml.merges"] == merges
    assert values["tokenizer.ggml.model"] == "gpt2"
    assert values["tokenizer.ggml.pre"] == "gpt-2"
    assert values["tokenizer.ggml.eos_token_id"] == 263
    assert values["tokenizer.ggml.add_bos_token"] is False
    assert values["tokenizer.ggml.add_eos_token"] is False
    assert not any(key.endswith(("bos_token_id", "chat_template")) for key in values)
    same_tokens(raw, values)


@pytest.mark.parametrize(
    ("steps", "ignore_merges", "name"),
    [
        ([], False, "gpt-2"),
        ([split(GPT2)], False, "gpt-2"),
        ([{"type": "Digits", "individual_digits": True}, split(GPT2)], False, "starcoder"),
        ([split(QWEN2)], False, "qwen2"),
        ([split(QWEN2, behavior="Removed", invert=True)], False, "qwen2"),
        ([split(LLAMA3)], True, "llama-bpe"),
        ([split(LLAMA3)], False, "dbrx"),
    ],
)
def test_pre_tokenizers(steps: list[dict[str, Any]], ignore_merges: bool, name: str) -> None:
    """Recognised as published, and text is cut alike."""
    raw = byte_level(*steps, ignore_merges=ignore_merges)
    values, _ = metadata(raw)
    assert values["tokenizer.ggml.pre"] == name
    same_tokens(raw, values)


def test_what_llama_cpp_has_not() -> None:
    """Each names what it is."""
    refused(byte_level(split(r"\w+|\W+")), r"no pre-tokenizer that cuts text by \\w\+\|\\W\+$")
    refused(byte_level(split(QWEN2), ignore_merges=True), "ignore_merges = True")
    refused(byte_level({"type": "Punctuation", "behavior": "Isolated"}), "Punctuation")
    refused(byte_level(split(GPT2, behavior="MergedWithNext")), "MergedWithNext")
    refused(byte_level() | {"normalizer": {"type": "Lowercase"}}, "normalizer .*Lowercase")
    prefixed = {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}
    refused(byte_level() | {"pre_tokenizer": prefixed | {"trim_offsets": True}}, "add_prefix_space")
    refused(byte_level() | {"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace")
    refused(byte_level(end_of_word_suffix="</w>"), "end_of_word_suffix = </w>")
    wordlevel = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    refused(byte_level() | {"model": wordlevel}, "a WordLevel model")
    refused(
        byte_level() | {"added_tokens": [added(262 + i, f"<{i}>") for i in range(39)]},
        "<38> has id 300",
        CheckpointError,
    )


def test_normalization_to_composed_characters_is_left_to_the_text() -> None:
    values, _ = metadata(byte_level() | {"normalizer": {"type": "NFC"}})
    assert values["tokenizer.ggml.pre"] == "gpt-2"


def template(*parts: str) -> dict[str, Any]:
    ids = {"<|end|>": 263, "<mark>": 262}
    single = [
        {"Sequence": {"id": "A", "type_id": 0}}
        if part == "A"
        else {"SpecialToken": {"id": part, "type_id": 0}}
        for part in parts
    ]
    used = {p: {"id": p, "ids": [ids[p]], "tokens": [p]} for p in parts if p != "A"}
    return {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": used}


def test_tokens_added_to_a_text() -> None:
    """By a template or by tokenizer_config.json; more than llama.cpp can add are refused."""
    end = byte_level() | {"post_processor": template("A", "<|end|>")}
    values, _ = metadata(end, replace(CONFIG, eos_token_ids=()))
    assert values["tokenizer.ggml.eos_token_id"] == 263
    assert values["tokenizer.ggml.add_eos_token"] and not values["tokenizer.ggml.add_bos_token"]
    both = byte_level() | {"post_processor": template("<mark>", "A", "<|end|>")}
    values, _ = metadata(both)
    assert values["tokenizer.ggml.bos_token_id"] == 262
    assert values["tokenizer.ggml.add_eos_token"] and values["tokenizer.ggml.add_bos_token"]
    settings = {"add_bos_token": True, "pad_token": {"content": "<mark>"}}
    values, _ = metadata(
        byte_level(),
        replace(CONFIG, bos_token_id=263),
        tokenizer_config__json=json.dumps(settings).encode(),
    )
    assert values["tokenizer.ggml.bos_token_id"] == 263
    assert values["tokenizer.ggml.add_bos_token"] is True
    assert values["tokenizer.ggml.padding_token_id"] == 262
    two = byte_level() | {"post_processor": template("<mark>", "<mark>", "A")}
    refused(two, r"\[262, 262\] before a text and \[\] after")


def test_ends_of_a_text() -> None:
    """The first is EOS; what llama.cpp does not know by its spelling takes the two other names."""
    raw = byte_level()
    raw["added_tokens"] += [added(264 + i, f"<e{i}>") for i in range(5)]
    raw["added_tokens"] += [added(269, "<|im_end|>")]
    values, notes = metadata(raw, replace(CONFIG, eos_token_ids=(264, 269, 263, 265, 266)))
    ends = {k: v for k, v in values.items() if k.split(".")[-1][:3] in ("eos", "eot", "eom")}
    # <|end|> and <|im_end|> need no name
    assert ends == {
        "tokenizer.ggml.eos_token_id": 264,
        "tokenizer.ggml.eot_token_id": 265,
        "tokenizer.ggml.eom_token_id": 266,
    }
    assert notes == []
    _, notes = metadata(raw, replace(CONFIG, eos_token_ids=(264, 265, 266, 267, 268)))
    assert notes == ["tokens [267, 268] end a text here but not in llama.cpp"]
    _, notes = metadata(byte_level(), replace(CONFIG, eos_token_ids=()))
    assert notes == ["no token is named that ends a text: llama.cpp takes one by a rule of its own"]


def test_added_tokens_that_take_spaces_are_told_of() -> None:
    raw = byte_level()
    raw["added_tokens"][0]["lstrip"] = True
    assert metadata(raw)[1] == [
        "1 added tokens take the spaces around them along; not in llama.cpp"
    ]


def test_merges_as_strings_and_with_spaces() -> None:
    raw = byte_level()
    raw["model"]["merges"] = [" ".join(pair) for pair in raw["model"]["merges"]]
    assert metadata(raw)[0] == metadata(byte_level())[0]
    raw = byte_level()
    raw["model"]["vocab"] |= {"a b": 264, "a bh": 265}
    raw["model"]["merges"].append(["a b", "h"])
    refused(raw, "merges of parts with spaces")


def test_the_unknown_token_of_byte_level_models_stays_special() -> None:
    settings = json.dumps({"unk_token": "<|end|>"}).encode()
    values, _ = metadata(byte_level(), tokenizer_config__json=settings)
    assert values["tokenizer.ggml.unknown_token_id"] == 263
    assert values["tokenizer.ggml.token_type"][263] == CONTROL


def test_chat_template() -> None:
    values, _ = metadata(byte_level(), chat_template__jinja=b"{{ messages }}")
    assert values["tokenizer.chat_template"] == "{{ messages }}"
    settings = json.dumps({"chat_template": "{{ bos_token }}"}).encode()
    values, _ = metadata(byte_level(), tokenizer_config__json=settings)
    assert values["tokenizer.chat_template"] == "{{ bos_token }}"


# Characters that mark spaces


PIECES = ["▁t", "he", "▁the", "▁▁", "in", "▁a", "ing", "▁in", "ere", "er", "re", "the", "▁there"]


def sentencepiece(**changes: Any) -> dict[str, Any]:
    """A tokenizer.json as transformers makes of a SentencePiece model; PIECES in order of score."""
    special = ["<unk>", "<s>", "</s>"]
    letters = [*"▁etainhrg", "é"]
    vocab = {t: i for i, t in enumerate([*special, *(f"<0x{b:02X}>" for b in range(256))])}
    vocab |= {piece: 259 + i for i, piece in enumerate([*PIECES, *letters])}
    merges = [
        [piece[:cut], piece[cut:]]
        for piece in PIECES
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": "<unk>",
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "vocab": vocab,
        "merges": merges,
    }
    prepend = {"type": "Prepend", "prepend": "▁"}
    mark = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    out = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added(i, t) for i, t in enumerate(special)],
        "normalizer": {"type": "Sequence", "normalizers": [prepend, mark]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "ByteFallback"},
        "model": model,
    }
    return out | changes


def merged_by_score(text: str, tokens: list[str], scores: list[float]) -> list[int]:
    """As llama.cpp: of all neighbours that make a token the best, the leftmost first."""
    ids = {t: i for i, t in enumerate(tokens)}
    parts = list(text)
    while True:
        pairs = [
            (-scores[ids[a + b]], i)
            for i, (a, b) in enumerate(itertools.pairwise(parts))
            if a + b in ids
        ]
        if not pairs:
            break
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [
        i
        for part in parts
        for i in ([ids[part]] if part in ids else [ids[f"<0x{b:02X}>"] for b in part.encode()])
    ]


def test_scores_merge_as_the_merges_do() -> None:
    raw = sentencepiece()
    values, notes = metadata(raw)
    assert notes == []
    assert values["tokenizer.ggml.model"] == "llama"
    assert values["tokenizer.ggml.pre"] == "default"
    assert values["tokenizer.ggml.add_space_prefix"] is True
    assert values["tokenizer.ggml.unknown_token_id"] == 0
    kinds = values["tokenizer.ggml.token_type"]
    assert kinds[:4] == [UNKNOWN, CONTROL, CONTROL, BYTE] and kinds[259:262] == [NORMAL] * 3
    tokens, scores = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.scores"]
    assert scores[259 : 259 + len(PIECES)] == [-float(i) for i in range(len(PIECES))]
    assert all(isinstance(score, float) for score in scores)
    tokenizer = Tokenizer(json.dumps(raw).encode())
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choices("  thering aé€", k=30))
        want = tokenizer.encode(text, add_special=False)
        marked = "▁" + text.replace(" ", "▁")
        assert merged_by_score(marked, tokens, scores) == want
    same_tokens(raw, values)


def test_space_prefixes() -> None:
    mark = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    values, _ = metadata(sentencepiece(normalizer=mark))
    assert values["tokenizer.ggml.add_space_prefix"] is False
    for scheme, prefix in (("first", True), ("always", True), ("never", False)):
        step = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
        values, _ = metadata(sentencepiece(normalizer=None, pre_tokenizer=step))
        assert values["tokenizer.ggml.add_space_prefix"] is prefix
    refused(sentencepiece(pre_tokenizer=step | {"split": True}), "Metaspace")
    refused(sentencepiece(normalizer={"type": "NFKC"}), "NFKC")


def test_merges_that_no_scores_stand_for() -> None:
    raw = sentencepiece()
    merges = raw["model"]["merges"]
    raw["model"]["merges"] = [m for m in merges if m != ["▁t", "he"]]
    refused(raw, "▁t and he are never merged")
    raw = sentencepiece()
    again = [m for m in merges if "".join(m) == "▁the"]
    assert len(again) > 1
    raw["model"]["merges"] = [m for m in merges if m != again[0]] + [again[0]]
    refused(raw, "merges into ▁the do not follow one another")
