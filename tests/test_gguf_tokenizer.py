"""Tokenizers from GGUF metadata give llama.cpp's tokens.

Without llama.cpp the tokens are held to recorded digests of its own. With EDGEMOE_LLAMA_PYTHON=
/path/to/python, the interpreter of an environment that has llama-cpp-python, it is asked itself;
`EDGEMOE_LLAMA_PYTHON=... python tests/test_gguf_tokenizer.py` records anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf_vocabularies as vocabularies
import pytest
from gguf_vocabularies import TEXTS, Metadata

from edgemoe.checkpoint.gguf_tokenizer import tokenizer_files
from edgemoe.tokenizer import Tokenizer

RECORD = Path(__file__).parent / "golden" / "gguf_tokenizer.json"
ASK = Path(__file__).with_name("llama_tokens.py")
ORACLE = os.environ.get("EDGEMOE_LLAMA_PYTHON")
needs_llama = pytest.mark.skipif(
    not ORACLE, reason="set EDGEMOE_LLAMA_PYTHON to a Python that has llama-cpp-python"
)

ONE_OF_A_KIND = (
    *("gpt-2", "refact", "llama-bpe", "dbrx", "qwen2", "qwen35"),
    *("gpt-4o", "tekken", "falcon", "default", "deepseek-coder"),
)
BOTH_ENDS = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
CASES: dict[str, Callable[[], Metadata]] = {
    **{pre: (lambda pre=pre: vocabularies.byte_level(pre)) for pre in ONE_OF_A_KIND},
    "no pre": lambda: vocabularies.byte_level(None),
    "bytes lacking": lambda: vocabularies.byte_level("qwen2", lacking="q!-\u00f0\u0100"),
    "both ends": lambda: vocabularies.byte_level("gpt-2") | BOTH_ENDS,
    "synthetic": vocabularies.synthetic,
    "spm": vocabularies.sentencepiece,
    "spm bare": lambda: vocabularies.sentencepiece(add_space_prefix=False, add_bos_token=False),
    "spm ends": lambda: vocabularies.sentencepiece(add_eos_token=True),
}


class Ours:
    """A tokenizer as the run time makes it of the files of a checkpoint."""

    def __init__(self, metadata: Metadata) -> None:
        self.files = tokenizer_files(metadata, "model.gguf")
        self.config = json.loads(self.files["tokenizer_config.json"])
        self.generation = json.loads(self.files["generation_config.json"])
        self.bos = self.generation.get("bos_token_id")
        self.tokenizer = Tokenizer(
            self.files["tokenizer.json"],
            config=self.config,
            bos_token_id=self.bos,
            eos_token_ids=self.generation["eos_token_id"],
        )

    def expected(self, theirs: Sequence[int]) -> list[int]:
        """llama.cpp's ids, less the second of two BOS: the run time never begins with two."""
        double = self.config["add_bos_token"] and list(theirs[:2]) == [self.bos] * 2
        return list(theirs[1:] if double else theirs)

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        """Ids with special tokens added and parsed, and with neither."""
        encode = self.tokenizer.encode
        return encode(text), encode(text, add_special=False, parse_special=False)


def ask_llama(metadata: Metadata, texts: Sequence[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "vocabulary.gguf"
        vocabularies.write(path, metadata)
        job = json.dumps({"path": str(path), "texts": list(texts)})
        assert ORACLE
        done = subprocess.run([ORACLE, ASK], input=job, capture_output=True, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def digest(ids: Sequence[int], plain: Sequence[int]) -> str:
    return hashlib.sha256(json.dumps([list(ids), list(plain)]).encode()).hexdigest()[:12]


def is_known_difference(case: str, text: str) -> bool:
    """llama.cpp drops bytes 0 and 1 side by side where a merge of the two makes no token."""
    return case == "synthetic" and "\x00\x01" in text


def random_texts(seed: int, count: int) -> list[str]:
    """Runs and mixtures of characters on which pre-tokenizers differ."""
    rng = random.Random(seed)
    parts = [chr(c) for c in range(32, 127)] + [*"\n\r\t\u00a0\u3000\u2003", "'s", "'LL", "  "]
    parts += [
        *"\u00e9\u00df\u03a9\u4f60\uff0c\ud55c\u0301\u0661\u00bd\u2167\u01c5\u00ad\ue000\u2581"
    ]
    parts += ["\U0001f642", "\u200d", "<|im_end|>", "<think>", "<unk>", "12", "aB", "\r\n"]
    return [
        "".join(rng.choice(parts) * rng.choice((1, 1, 1, 2, 5)) for _ in range(rng.randrange(40)))
        for _ in range(count)
    ]


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_llama_cpp_gave(case: str) -> None:
    ours, recorded = Ours(CASES[case]()), json.loads(RECORD.read_text())["cases"][case]
    assert len(recorded["tokens"]) == len(TEXTS)
    for text, want in zip(TEXTS, recorded["tokens"], strict=True):
        if not is_known_difference(case, text):
            ids, plain = ours.encode(text)
            assert digest(ids, plain) == want, (text, ids, plain)
    assert sorted(ours.generation["eos_token_id"]) == recorded["ends"]
    assert ours.config["add_bos_token"] == recorded["add_bos"]
    assert ours.config["add_eos_token"] == recorded["add_eos"]


def test_digests_tell_pre_tokenizers_apart() -> None:
    """Each kind cuts at least one of the texts in a way of its own."""
    cases = json.loads(RECORD.read_text())["cases"]
    for case in ONE_OF_A_KIND:
        for other in ONE_OF_A_KIND:
            alike = cases[case]["tokens"] == cases[other]["tokens"]
            assert alike == (case == other), (case, other)


@needs_llama
@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_llama_cpp_gives(case: str, shared: Path) -> None:
    metadata = CASES[case]()
    texts = [text for text in TEXTS + random_texts(1, 300) if not is_known_difference(case, text)]
    heldout = sorted((shared / "corpus" / "heldout").iterdir())
    texts += [path.read_bytes()[:50_000].decode("utf-8", "ignore") for path in heldout]
    ours, theirs = Ours(metadata), ask_llama(metadata, texts)
    for text, ids, plain in zip(texts, theirs["ids"], theirs["plain"], strict=True):
        assert ours.encode(text) == (ours.expected(ids), plain), text[:200]
    assert sorted(ours.generation["eos_token_id"]) == theirs["ends"]
    assert ours.bos is None or ours.bos == theirs["bos"]


def record() -> None:
    cases = {}
    for case, make in CASES.items():
        metadata = make()
        answer, ours = ask_llama(metadata, TEXTS), Ours(metadata)
        pairs = zip(answer["ids"], answer["plain"], strict=True)
        cases[case] = {
            "tokens": [digest(ours.expected(ids), plain) for ids, plain in pairs],
            **{name: answer[name] for name in ("ends", "add_bos", "add_eos")},
        }
    about = "SHA-256 of llama.cpp's tokens (0c1e57098, llama-cpp-python 0.3.36) of each text"
    RECORD.write_text(json.dumps({"about": about, "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    record()
