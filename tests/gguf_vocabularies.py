"""Small vocabularies as GGUF metadata, made the same on every machine, and texts that try them.

Merges are learnt from the texts without cutting them into words first, so tokens run across every
border there is: a pre-tokenizer that cuts differently gives different ids.
"""

from __future__ import annotations

import functools
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf

Metadata = dict[str, Any]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

TEXTS = [
    "",
    " ",
    "\n",
    "\t",
    "   ",
    "a",
    "Once upon a time, there was a little dog.  It said: \"I'm here, don't you see?\"\n",
    " leading, trailing  ",
    "one  two   three    four\t\tfive \t six",
    "line\nline\n\nline\n\n\nline\r\nline\r\n\r\nline\rline",
    "end of line  \n  start of line\n \n",
    "we've WE'VE we'll I'M you're He'd it'S 's 'S '' ' s don't'll can't",
    "1 12 123 1234 12345 1234567890 3.14 1,000,000 2026-11-23 v1.0.2 x86_64 7up",
    "١٢٣٤ ½½ ⅧⅨ 三十 ²³",
    "CamelCaseWord XMLHttpRequest iPhone aBcD McDonald's ÉtÉ \u01c5x",
    "café naïve Grüße œuvre cafe\u0301 e\u0301e\u0301 \u0301x a\u0308\u0323b",
    "你好，世界！日本語のテキスト 한국어 mixed中文text",  # noqa: RUF001
    "नमस्ते हिन्दी ไทย العربية עברית ქართული",
    "🙂🧙\u200d♀\ufe0f🇫🇷 ok👍🏽! \U00020000\ue000",
    "nbsp\u00a0\u00a0x em\u2003\u2003x ideo\u3000\u3000x nel\u0085x ls\u2028x",
    "ogham\u1680x zero\u200bwidth\u2009\u202f\u205fx",
    "\x00\x01\x02 \x1b[31m \x1c\x1d\x1e\x1f \x7f \ufffd\ufeff",
    '$100+20=120 <x> ^~|`code` a_b {c} [d] \\e/f/ #g @h %i &j *k; l: m? n! (o) "p"',
    "...!!!???---___===+++ -- ... \u2026\u2014\u2013 ...\n\n!?\r\n//\n",
    "=================== ------------------- ................... aaaaaaaaaaaaaaaaaaa",
    "'\u017f \u212a \u0130 \u0131 \ufb01 \u1e9e \u00aa \u00ba \u2460 \u20ac \u00a9 \u2122",
    "\u2581x \u2581\u2581 a\u2581b <0x0A> <0xE4>",
    "<|im_start|>user\nHi <|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|>a<|endoftext|><|endoftext|> b<unk> <think>hm</think><unused0>",
    "<|im_start|<|im_end|>> <|im_end<|im_end|>|> <s>x</s> <think><think>",
    "def f(x):\n    if x > 0:\n        return x**2\n\n\n    # done\n\treturn None;\n}\n",
    "http://example.com/a?b=c&d=e#f user@example.com C:\\dir\\file.txt",
]


@functools.cache
def train(texts: tuple[str, ...], merges: int) -> list[tuple[str, str]]:
    """Byte-pair merges over whole texts, most frequent first, ties by spelling."""
    runs = [list(text) for text in texts]
    learnt: list[tuple[str, str]] = []
    while len(learnt) < merges:
        pairs = Counter(pair for run in runs for pair in pairwise(run))
        for pair in learnt:
            del pairs[pair]
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        learnt.append(best)
        for k, run in enumerate(runs):
            out: list[str] = []
            i = 0
            while i < len(run):
                joined = tuple(run[i : i + 2]) == best
                out.append("".join(best) if joined else run[i])
                i += 1 + joined
            runs[k] = out
    return learnt


def alphabet() -> list[str]:
    """The characters that stand for bytes 0 to 255 in byte-level BPE."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))
    return [chr(b if b in printable else next(rest)) for b in range(256)]


def byte_level(pre: str | None, *, lacking: str = "") -> Metadata:
    """A "gpt2" vocabulary of about 700 tokens; characters `lacking` have no tokens."""
    special = {
        "<|endoftext|>": CONTROL,
        "<|im_start|>": CONTROL,
        "<|im_end|>": NORMAL,  # llama.cpp knows better
        "<unk>": UNKNOWN,
        "<think>": USER_DEFINED,
        "</think>": USER_DEFINED,
        "    ": USER_DEFINED,
        "  ": USER_DEFINED,
        "<unused0>": UNUSED,
        "<|fim_pad|>": CONTROL,
        "": UNUSED,
    }
    spelled = alphabet()
    texts = tuple("".join(spelled[b] for b in text.encode("utf-8")) for text in TEXTS)
    pairs = [
        (a, b)
        for a, b in train(texts, 450)
        if a + b not in special and not set(a + b) & set(lacking)
    ]
    tokens = [c for c in sorted(spelled) if c not in lacking]
    tokens += dict.fromkeys(a + b for a, b in pairs)
    kinds = [NORMAL] * len(tokens)
    bos = len(tokens)
    return {
        "tokenizer.ggml.model": "gpt2",
        **({} if pre is None else {"tokenizer.ggml.pre": pre}),
        "tokenizer.ggml.tokens": [*tokens, *special],
        "tokenizer.ggml.token_type": [*kinds, *special.values()],
        "tokenizer.ggml.merges": [f"{a} {b}" for a, b in pairs],
        "tokenizer.ggml.bos_token_id": bos,
        "tokenizer.ggml.eos_token_id": bos,
    }


def sentencepiece(**flags: bool) -> Metadata:
    """A "llama" vocabulary of about 700 tokens; `flags` are tokenizer.ggml.NAME."""
    texts = tuple("\u2581" + text.replace(" ", "\u2581") for text in TEXTS)
    pieces = dict.fromkeys(a + b for a, b in train(texts, 450))
    # Not NUL: llama.cpp reads a token up to the first one.
    letters = [*map(chr, (*range(1, 32), *range(33, 128))), *"\u2581\u00e9\u4f60"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256]
    special = ["<|im_start|>", "<|im_end|>", "<think>", "  ", "[PAD]"]
    known = [p for p in pieces if set(p) <= set(letters) and p not in (*special, *tokens)]
    tokens += [*known, *letters, *special]
    words = len(known) + len(letters)
    kinds += [*[NORMAL] * words, CONTROL, CONTROL, USER_DEFINED, USER_DEFINED, UNUSED]
    scores = [0.0] * 259 + [-float(i) for i in range(words)] + [-1000.0] * len(special)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.unknown_token_id": 0,
        **{f"tokenizer.ggml.{name}": value for name, value in flags.items()},
    }


def synthetic(size: int = 300) -> Metadata:
    """As shared/bench/synth_gguf.py: byte alphabet, made-up tokens, a merge that makes none."""
    tokens = sorted(alphabet()) + [f"tok{i}" for i in range(256, size)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [NORMAL] * size,
        "tokenizer.ggml.merges": ["\u0100 \u0101"],
        "tokenizer.ggml.bos_token_id": size - 1,
        "tokenizer.ggml.eos_token_id": size - 1,
        "tokenizer.ggml.add_bos_token": False,
    }


def write(path: Path, metadata: Metadata) -> None:
    """A GGUF file of nothing but `metadata`."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
