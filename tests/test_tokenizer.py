"""Tokenizer: ids and text equal to the library's and transformers', in pieces that never split."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from edgemoe.errors import CheckpointError, UnsupportedError, UsageError
from edgemoe.tokenizer import Tokenizer

TEXTS = [
    "Once upon a time, there was a cat.",
    "Grüße, naïve café — 你好，世界! 🙂🧙‍♀️ é",  # noqa: RUF001
    "  two spaces\n\n\ttab\r\n trailing ",
    "",
    "\x00\x1b[31m\ufffd",
]


def byte_level(vocab_words: Sequence[str] = ()) -> tokenizers.Tokenizer:
    """Byte-level BPE with the 256 bytes, a few words and two special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)}
    merges = []
    for word in vocab_words:
        for i in range(1, len(word)):
            merges.append((word[:i], word[i]))
            vocab.setdefault(word[: i + 1], len(vocab))
    tok = tokenizers.Tokenizer(models.BPE(vocab, merges))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    tok.add_tokens([AddedToken("<think>"), AddedToken("日本")])
    return tok


def byte_fallback() -> tokenizers.Tokenizer:
    """A Llama-like vocabulary: words with U+2581 for spaces, and a token for every byte."""
    words = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
    words += ["▁", "a", "b", "c", "▁a", "▁ab", "é", "你"]
    merges = [("▁", "a"), ("▁a", "b")]
    model = models.BPE(
        {w: i for i, w in enumerate(words)}, merges, byte_fallback=True, unk_token="<unk>"
    )
    tok = tokenizers.Tokenizer(model)
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = [AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")]
    tok.add_special_tokens(special)
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tok


def wrap(tok: tokenizers.Tokenizer, **kwargs: Any) -> Tokenizer:
    return Tokenizer(tok.to_str().encode(), **kwargs)


def pieces(tok: Tokenizer, ids: Sequence[int]) -> list[str]:
    stream = tok.stream()
    return [*(stream.push(i) for i in ids), stream.flush()]


@pytest.fixture(scope="module")
def stories(shared: Path) -> bytes:
    return (shared / "models/stories-moe/tokenizer.json").read_bytes()


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_round_trip(make: Any, text: str) -> None:
    raw, tok = make(), wrap(make())
    ids = tok.encode(text)
    assert ids == raw.encode(text).ids
    assert tok.decode(ids) == text
    assert "".join(pieces(tok, ids)) == text


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_any_ids_decode_as_the_library_does(make: Any) -> None:
    """Random ids: invalid UTF-8, cut sequences, special and unknown ids, runs of bytes."""
    raw, tok = make(), wrap(make())
    rng = random.Random(7)
    emoji = raw.encode("🙂你é", add_special_tokens=False).ids
    for n in range(600):
        ids = [rng.randrange(raw.get_vocab_size() + 3) for _ in range(rng.randrange(1, 30))]
        if n % 2:
            at = rng.randrange(len(ids))
            ids[at:at] = emoji[: rng.randrange(len(emoji) + 1)]
        expected = raw.decode(ids, skip_special_tokens=True)
        assert tok.decode(ids) == expected
        assert "".join(pieces(tok, ids)) == expected


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_pieces_hold_back_half_characters_and_nothing_else(make: Any) -> None:
    tok = wrap(make())
    ids = tok.encode("a🙂b", add_special=False)
    out = pieces(tok, ids)
    assert all("\ufffd" not in piece for piece in out)
    assert "".join(out) == "a🙂b"
    assert out[-2] == "b" or out[-2] == "🙂b"  # nothing waits for flush
    assert pieces(tok, tok.encode("ab c", add_special=False))[-1] == ""


def test_cut_character_becomes_the_replacement_at_the_end() -> None:
    tok = wrap(byte_level())
    ids = tok.encode("🙂")[:3]
    assert pieces(tok, ids) == ["", "", "", "\ufffd"]


def test_a_stream_starts_anew_after_flush() -> None:
    tok = wrap(byte_fallback())
    stream = tok.stream()
    ids = tok.encode(" ab", add_special=False)
    first = "".join(stream.push(i) for i in ids) + stream.flush()
    assert "".join(stream.push(i) for i in ids) + stream.flush() == first == " ab"


def test_special_tokens_are_no_text_but_added_ones_are() -> None:
    tok = wrap(byte_level())
    ids = tok.encode("<s>hi<think>日本</s>")
    assert tok.token_id("<s>") in ids and tok.token_id("<think>") in ids
    assert tok.decode(ids) == "hi<think>日本"
    assert tok.token_id("nothing") is None
    assert tok.vocab_size == 260
    # An end of text that tokenizer.json does not mark special is none the less no text.
    assert wrap(byte_level(), eos_token_ids=[tok.token_id("<think>")]).decode(ids) == "hi日本"


def test_bos_comes_once_and_only_where_asked_for() -> None:
    bos = wrap(byte_level()).token_id("<s>")
    plain = wrap(byte_level(), bos_token_id=bos).encode("hi")
    assert bos not in plain
    config = {"add_bos_token": True}
    asked = wrap(byte_level(), config=config, bos_token_id=bos)
    assert asked.encode("hi") == [bos, *plain]
    assert asked.encode("<s>hi") == [bos, *plain]
    assert asked.encode("hi", add_special=False) == plain
    assert wrap(byte_level(), config=config).encode("hi") == plain  # the model has none
    by_template = wrap(byte_fallback(), config=config, bos_token_id=1)
    assert by_template.encode("ab").count(1) == 1
    with pytest.raises(CheckpointError, match="add_bos_token must be true or false, not 'yes'"):
        wrap(byte_level(), config={"add_bos_token": "yes"})


def test_saved_truncation_and_padding_do_not_touch_prompts() -> None:
    raw = byte_level()
    raw.enable_truncation(4)
    raw.enable_padding(length=64)
    assert len(wrap(raw).encode("a long prompt")) == len("a long prompt")


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(UsageError, match="not valid UTF-8 at character 2"):
        wrap(byte_level()).encode("ab\udc80")


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff\xfe", b"[" * 100_000, b'{"version": "1.0"}'])
def test_what_is_no_tokenizer_is_refused(data: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be loaded") as caught:
        Tokenizer(data)
    assert "\n" not in str(caught.value)


def test_decoders_that_cannot_be_streamed_are_named() -> None:
    raw = byte_level()
    raw.decoder = decoders.WordPiece()
    with pytest.raises(UnsupportedError, match="decoder 'WordPiece' is not supported"):
        wrap(raw)


def test_metaspace_and_no_decoder() -> None:
    vocab = {w: i for i, w in enumerate(["<unk>", "▁", "a", "b", "▁a"])}
    raw = tokenizers.Tokenizer(models.BPE(vocab, [("▁", "a")], unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    tok = wrap(raw)
    ids = tok.encode("a ab a")
    assert pieces(tok, ids)[:2] == ["a", " a"]
    assert tok.decode(ids) == raw.decode(ids) == "a ab a"
    raw.decoder = None
    assert wrap(raw).decode(ids) == raw.decode(ids)


def test_the_bundled_models_tokenizer(stories: bytes) -> None:
    transformers = pytest.importorskip("transformers")
    tok = Tokenizer(stories, config={"add_bos_token": False}, bos_token_id=0, eos_token_ids=[0])
    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(stories.decode())
    )
    assert tok.vocab_size == 4096
    for text in TEXTS:
        ids = tok.encode(text)
        assert ids == reference.encode(text)
        assert tok.decode([*ids, 0]) == text
    rng = random.Random(1)
    raw = tokenizers.Tokenizer.from_str(stories.decode())
    for _ in range(200):
        ids = [rng.randrange(4096) for _ in range(50)]
        assert "".join(pieces(tok, ids)) == raw.decode(ids)


def test_no_threads_are_started(stories: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(stories)
    code = (
        "import os, sys; from edgemoe.tokenizer import Tokenizer\n"
        "tok = Tokenizer(open(sys.argv[1], 'rb').read())\n"
        "tok.decode(tok.encode('Once upon a time ' * 2000))\n"
        "print(len(os.listdir('/proc/self/task')))"
    )
    if not Path("/proc/self/task").is_dir():
        pytest.skip("counts threads in /proc")
    run = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "/usr/bin:/bin", "OPENBLAS_NUM_THREADS": "1"},
    )
    assert run.stdout.strip() == "1"


def test_vocabulary_keys_are_not_trusted() -> None:
    """A vocabulary may name huge or clashing ids; ids outside it decode to nothing."""
    data = json.loads(byte_level().to_str())
    data["model"]["vocab"]["zz"] = 2**32 - 1
    tok = Tokenizer(json.dumps(data).encode())
    assert tok.decode([2**32 - 1, 2**40, -1]) == "zz"
