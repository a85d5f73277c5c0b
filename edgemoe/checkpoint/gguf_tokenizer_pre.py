"""How llama.cpp cuts text into words before byte-level BPE: tokenizer.ggml.pre -> expressions.

Every name stands for the behaviour of llama.cpp (src/llama-vocab.cpp at 0c1e57098), written for
the regular expressions of the `tokenizers` library (Oniguruma). The two differ in the characters
they know: llama.cpp's tables are Unicode 15, so a letter or digit that came later is one only here.
"""

from __future__ import annotations

from typing import NamedTuple


class PreTokenizer(NamedTuple):
    """What follows from tokenizer.ggml.pre.

    Attributes:
        patterns: applied one after the other, each to the pieces the one before it left; every
            match and every stretch between matches becomes a piece.
        ignore_merges: a piece that is a token as a whole is taken without looking at the merges.
        add_bos: BOS comes first unless tokenizer.ggml.add_bos_token says otherwise.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_GPT2 = (
    r"'s|'t|'re|'ve|'m|'ll|'d"
    r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)  # fmt: skip
# Spelled out because (?i:'s) would take the long s as well.
_SUFFIX = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _cl100k(digits: str, *, letter: str = r"\p{L}", marks: str = "") -> str:
    """Words with one leading sign, digits by `digits`, signs with the line ends after them."""
    return (
        rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?{letter}+|{digits}"
        rf"| ?[^\s\p{{L}}{marks}\p{{N}}]+[\r\n]*|{_SPACES}"
    )


def _cased(digits: str, suffix: str) -> str:
    """Words that begin anew at an ASCII capital after an ASCII small letter."""
    upper, lower, lead = r"[\p{L}&&[^a-z]]", r"[\p{L}&&[^A-Z]]", r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{lead}{upper}*{lower}+{suffix}|{lead}{upper}+{lower}*{suffix}"
        rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


_WHOLE = PreTokenizer((_GPT2,))
_SINGLE_DIGITS = PreTokenizer((r"\p{N}", _GPT2))
_LLAMA3 = _cl100k(r"\p{N}{1,3}")
_QWEN2 = PreTokenizer((_cl100k(r"\p{N}"),))
_PUNCTUATION = r"[\p{P}$+<=>^~|]+"

_FAMILIES: tuple[tuple[str, PreTokenizer], ...] = (
    ("gpt-2 gpt2 olmo mpt phi-2 exaone4 jais trillion a.x-4.0 mellum gigachat", _WHOLE),
    ("starcoder refact command-r smollm codeshell exaone minerva-7b", _SINGLE_DIGITS),
    (
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
        PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True),
    ),
    ("dbrx smaug-bpe", PreTokenizer((_LLAMA3,))),
    ("qwen2 deepseek-r1-qwen stablelm2 hunyuan megrez kormo f2llmv2", _QWEN2),
    ("qwen35", PreTokenizer((_cl100k(r"\p{N}", letter=r"[\p{L}\p{M}]", marks=r"\p{M}"),))),
    ("gpt-4o llama4", PreTokenizer((_cased(r"\p{N}{1,3}", rf"(?:{_SUFFIX})?"),))),
    ("tekken", PreTokenizer((_cased(r"\p{N}", ""),), ignore_merges=True, add_bos=True)),
    ("falcon", PreTokenizer((r"[\p{P}$+<=>^~|`]+", _GPT2, "[0-9]{3}"))),
    ("default", PreTokenizer((_PUNCTUATION, _GPT2, r"\p{N}+", "[0-9]{3}"))),
    (
        "deepseek-coder",
        PreTokenizer(
            (
                r"[\r\n]",
                r"\s?\p{L}+",
                r"\s?\p{P}+",
                r"[\x{0800}-\x{9FA5}\x{AC00}-\x{D7FF}&&\S]+",
                r"\p{N}",
            )
        ),
    ),
)

PRE_TOKENIZERS = {name: pre for names, pre in _FAMILIES for name in names.split()}
"""By the value of tokenizer.ggml.pre; a file without one is "default"."""
