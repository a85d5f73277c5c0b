"""Files made of a GGUF's tokenizer: what the run time finds in them, and what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from gguf_vocabularies import TEXTS, Metadata, byte_level, sentencepiece

from edgemoe.chat import ChatTemplate
from edgemoe.checkpoint.gguf_tokenizer import tokenizer_files
from edgemoe.errors import CheckpointError, UnsupportedError
from edgemoe.sampling import SamplingParams, from_generation_config
from edgemoe.tokenizer import Tokenizer


def gguf(base: Metadata | None = None, **values: Any) -> Metadata:
    """`base`, or a byte-level vocabulary, with tokenizer.ggml.NAME = value; None takes it out."""
    out = dict(byte_level("qwen2") if base is None else base)
    for name, value in values.items():
        out[f"tokenizer.ggml.{name}"] = value
    return {key: value for key, value in out.items() if value is not None}


def parsed(metadata: Metadata, name: str) -> dict[str, Any]:
    out: dict[str, Any] = json.loads(tokenizer_files(metadata, "m.gguf")[name])
    return out


def run_time(metadata: Metadata) -> Tokenizer:
    files = tokenizer_files(metadata, "m.gguf")
    generation = json.loads(files["generation_config.json"])
    return Tokenizer(
        files["tokenizer.json"],
        config=json.loads(files["tokenizer_config.json"]),
        bos_token_id=generation.get("bos_token_id"),
        eos_token_ids=generation["eos_token_id"],
    )


def spellings(metadata: Metadata) -> set[str]:
    """Ends of generation by spelling."""
    ids = parsed(metadata, "generation_config.json").get("eos_token_id", [])
    return {metadata["tokenizer.ggml.tokens"][i] for i in ids}


def with_tokens(**kinds: int) -> Metadata:
    """The byte-level vocabulary without end tokens, and `kinds` by spelling after it."""
    base = byte_level("gpt-2")
    first = base["tokenizer.ggml.bos_token_id"]
    tokens, types = (base[f"tokenizer.ggml.{name}"][:first] for name in ("tokens", "token_type"))
    return gguf(
        base,
        tokens=[*tokens, *kinds],
        token_type=[*types, *kinds.values()],
        bos_token_id=None,
        eos_token_id=None,
    )


@pytest.mark.parametrize(
    "metadata", [byte_level("gpt-2"), byte_level("llama-bpe"), sentencepiece()]
)
def test_text_comes_back(metadata: Metadata) -> None:
    tokenizer, marked = run_time(metadata), "<0x00>" in metadata["tokenizer.ggml.tokens"]
    for text in TEXTS:
        if marked and ("  " in text or "<think>" in text):
            continue  # a space is put before what follows a token found in the text
        # SentencePiece vocabularies spell a space and U+2581 alike.
        same = text.replace("\u2581", " ") if marked else text
        ids = tokenizer.encode(text, parse_special=False)
        assert tokenizer.decode(ids) == same
        pieces = tokenizer.stream()
        assert "".join(map(pieces.push, ids)) + pieces.flush() == same


def test_control_tokens_are_no_text_and_user_defined_ones_are() -> None:
    tokenizer = run_time(gguf())
    ids = tokenizer.encode("<|im_start|><think>a</think><unk><|im_end|>")
    assert len(ids) == 6
    assert tokenizer.decode(ids) == "<think>a</think>"
    # Four spaces are a token of their own: the longest comes first.
    runs = tokenizer.encode("a" + " " * 7 + "b")
    assert [tokenizer.token_bytes(i) for i in runs] == [b"a", b"    ", b"  ", b" ", b"b"]


def test_bytes_without_a_token_give_none_and_join_nothing() -> None:
    metadata = byte_level("gpt-2", lacking="l")
    metadata["tokenizer.ggml.merges"] += ["e o", "Hell o"]
    metadata["tokenizer.ggml.tokens"] += ["eo"]
    metadata["tokenizer.ggml.token_type"] += [1]
    tokenizer = run_time(metadata)
    assert tokenizer.decode(tokenizer.encode("Hello")) == "Heo"
    assert tokenizer.token_id("eo") not in tokenizer.encode("Hello")
    assert tokenizer.token_id("eo") in tokenizer.encode("Heo")


@pytest.mark.parametrize(
    ("metadata", "bos", "eos"),
    [
        (byte_level("qwen2"), False, False),
        (byte_level("llama-bpe"), True, False),
        (byte_level("tekken"), True, False),
        (gguf(byte_level("llama-bpe"), add_bos_token=False), False, False),
        (gguf(add_bos_token=True, add_eos_token=True, eos_token_id=9), True, True),
        (sentencepiece(), True, False),
        (sentencepiece(add_bos_token=False, add_eos_token=True), False, True),
    ],
)
def test_what_comes_before_and_after_a_text(metadata: Metadata, bos: bool, eos: bool) -> None:
    config = parsed(metadata, "tokenizer_config.json")
    ends = parsed(metadata, "generation_config.json")
    tokenizer = run_time(metadata)
    plain = tokenizer.encode("Hi", add_special=False)
    expected = [ends["bos_token_id"]] * bos + plain + ends["eos_token_id"][:1] * eos
    assert tokenizer.encode("Hi") == expected
    assert tokenizer.encode("") == [ends["bos_token_id"]] * bos + ends["eos_token_id"][:1] * eos
    assert tokenizer.token_id(config["bos_token"]) == ends["bos_token_id"]
    assert tokenizer.token_id(config["eos_token"]) == ends["eos_token_id"][0]


def test_sentencepiece_ids_have_defaults_and_byte_level_ones_have_none() -> None:
    config = parsed(sentencepiece(), "tokenizer_config.json")
    assert (config["bos_token"], config["eos_token"], config["unk_token"]) == (
        "<s>",
        "</s>",
        "<unk>",
    )
    bare = with_tokens()
    assert "generation_config.json" not in tokenizer_files(bare, "m.gguf")
    assert not parsed(bare, "tokenizer_config.json").keys() & {"bos_token", "eos_token"}
    absent = gguf(sentencepiece(), bos_token_id=0xFFFFFFFF, padding_token_id=0xFFFFFFFF)
    assert parsed(absent, "tokenizer_config.json")["bos_token"] == "<s>"


def test_ends_of_generation_by_id_and_by_spelling() -> None:
    assert spellings(gguf()) == {"<|endoftext|>", "<|im_end|>", "<|fim_pad|>"}
    assert (
        parsed(gguf(), "generation_config.json")["eos_token_id"][0]
        == (gguf()["tokenizer.ggml.eos_token_id"])
    )
    assert spellings(gguf(eot_token_id=0, eom_token_id=1)) >= {"!", '"'}
    assert spellings(with_tokens(**{"<|eot_id|>": 3, "<|file_sep|>": 1, "<PRE>": 3})) == {
        "<|eot_id|>",
        "<|file_sep|>",
    }
    one_of_two = with_tokens(**{"<|repo_name|>": 1, "<reponame>": 1})
    assert spellings(one_of_two) == {"<|repo_name|>"}
    assert spellings(gguf(one_of_two, fim_rep_token_id=5)) == {"&"}


def test_end_of_a_message_is_no_end_where_calls_and_returns_are() -> None:
    harmony = with_tokens(**{"<|end|>": 3, "<|call|>": 3, "<|return|>": 3, "<|channel|>": 3})
    assert spellings(harmony) == {"<|call|>", "<|return|>"}
    tokenizer = run_time(harmony)
    assert (
        tokenizer.decode(tokenizer.encode("<|channel|>a<|end|><|return|>")) == "<|channel|>a<|end|>"
    )
    assert spellings(with_tokens(**{"<|end|>": 3, "<|call|>": 3})) == {"<|end|>", "<|call|>"}
    normal = with_tokens(**{"</s>": 3, "<|tool_response>": 3})
    assert spellings(normal) == {"<|tool_response>"}
    assert run_time(normal).decode(run_time(normal).encode("</s>")) == "</s>"


def test_chat_template_sees_the_spellings_of_bos_and_eos() -> None:
    source = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    metadata = gguf(sentencepiece())
    assert "chat_template.jinja" not in tokenizer_files(metadata, "m.gguf")
    metadata["tokenizer.chat_template"] = source
    metadata["tokenizer.chat_template.tool_use"] = "{{ 'not this one' }}"
    metadata["tokenizer.chat_templates"] = ["tool_use"]
    files = tokenizer_files(metadata, "m.gguf")
    assert files["chat_template.jinja"] == source.encode()
    settings = json.loads(files["tokenizer_config.json"])
    template = ChatTemplate.from_files(files["chat_template.jinja"], settings)
    assert template is not None
    assert template.render([{"role": "user", "content": "Hi"}]) == "<s>Hi</s>"


def test_sampling_that_the_file_recommends() -> None:
    def sampling(**values: Any) -> SamplingParams:
        general = {f"general.sampling.{name}": value for name, value in values.items()}
        return from_generation_config(parsed(gguf() | general, "generation_config.json"))

    assert sampling() == SamplingParams()
    assert sampling(temp=0.6000000238418579, top_k=20, top_p=0.949999988079071, min_p=0.0) == (
        SamplingParams(temperature=0.6, top_k=20, top_p=0.95)
    )
    assert sampling(temp=0.0, penalty_repeat=1.5).temperature == 0
    assert sampling(top_k=40) == SamplingParams(temperature=1.0, top_k=40)
    assert sampling(mirostat=0, xtc_probability=0.0) == SamplingParams()
    for name in ("mirostat", "xtc_probability"):
        with pytest.raises(UnsupportedError, match=rf"general\.sampling\.{name} is set"):
            sampling(**{name: 1})
    for bad in ("hot", float("nan"), True, [1]):
        with pytest.raises(CheckpointError, match=r"general\.sampling\.temp must be a number"):
            sampling(temp=bad)


def refused(metadata: Metadata, message: str, kind: type[CheckpointError]) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        tokenizer_files(metadata, "m.gguf")
    text = str(caught.value)
    assert type(caught.value) is kind
    assert text.startswith("m.gguf: ") and text.isprintable() and len(text) < 600


@pytest.mark.parametrize("model", ["bert", "t5", "rwkv", "plamo2", "none", "no_vocab", "new\nline"])
def test_other_models_are_unsupported(model: str) -> None:
    refused(gguf(model=model), "gpt2 .* and llama .* are supported", UnsupportedError)


def test_other_pre_tokenizers_are_unsupported_and_the_known_ones_listed() -> None:
    refused(gguf(pre="kimi-k2"), "is kimi-k2; supported are .*llama-bpe.*qwen2", UnsupportedError)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": None}, "model is missing"),
        ({"model": 7}, "model must be a string, not 7"),
        ({"pre": ["qwen2"]}, "pre must be a string"),
        ({"tokens": None}, "tokens is missing or empty"),
        ({"tokens": []}, "tokens is missing or empty"),
        ({"tokens": "abc"}, "tokens must be a list of strings"),
        ({"tokens": ["a", 1]}, "tokens must be a list of strings"),
        ({"tokens": ["a", "b\n", "b\n"], "token_type": None}, r"has 'b\\n' twice, as 1 and 2"),
        ({"tokens": ["a", "b"]}, "token_type has .* entries for 2 tokens"),
        ({"token_type": 1}, "token_type must be a list of integers"),
        ({"token_type": [1.0]}, "token_type must be a list of integers"),
        ({"token_type": [True]}, "token_type must be a list of integers"),
        ({"merges": None}, "merges is missing"),
        ({"merges": ["a b", 5]}, "merges must be a list of strings"),
        ({"merges": ["ab"]}, "merge 0 is ab, not two tokens"),
        ({"merges": ["a b", "ab "]}, "merge 1 is ab , not two tokens"),
        ({"merges": [""]}, "merge 0 is , not two tokens"),
        ({"merges": ["X Y", "XY Z"]}, None),
        ({"bos_token_id": 1 << 20}, "bos_token_id is 1048576, but the tokens are 0 to"),
        ({"eos_token_id": -7}, "eos_token_id is -7"),
        ({"eos_token_id": "2"}, "eos_token_id is 2, but"),
        ({"eot_token_id": True}, "eot_token_id is True"),
        ({"add_bos_token": 1}, "add_bos_token must be true or false, not 1"),
        ({"add_bos_token": True, "bos_token_id": None}, "bos_token_id is missing, but"),
        ({"add_eos_token": True, "eos_token_id": None}, "eos_token_id is missing, but"),
        ({"scores": [1.0]}, "scores has 1 entries"),
    ],
)
def test_inconsistent_metadata_is_refused(values: dict[str, Any], message: str | None) -> None:
    metadata = gguf(**values)
    if message is None:
        tokenizer_files(metadata, "m.gguf")  # merges of what is no token change nothing
    else:
        refused(metadata, message, CheckpointError)


def test_a_merge_that_makes_no_token_is_refused_where_another_needs_it() -> None:
    metadata = gguf(merges=["X Y", "XY Z"])
    metadata["tokenizer.ggml.tokens"] += ["XYZ"]
    metadata["tokenizer.ggml.token_type"] += [1]
    refused(metadata, "the merges make XY, which is not in the vocabulary", CheckpointError)


def test_the_first_of_two_equal_merges_counts() -> None:
    base = with_tokens(xy=1, yz=1)
    merges = ["x y", "y z", "x y"]
    files = [tokenizer_files(gguf(base, merges=m), "m.gguf") for m in (merges, merges[:2])]
    assert files[0] == files[1]
    assert len(Tokenizer(files[0]["tokenizer.json"]).encode("xyz")) == 2


@pytest.mark.parametrize(
    ("values", "message", "kind"),
    [
        ({"scores": None}, "scores is missing", CheckpointError),
        ({"scores": "high"}, "scores must be a list of numbers", CheckpointError),
        ({"add_space_prefix": "yes"}, "add_space_prefix must be true or false", CheckpointError),
    ],
)
def test_bad_sentencepiece_metadata(values: dict[str, Any], message: str, kind: Any) -> None:
    refused(gguf(sentencepiece(), **values), message, kind)


def test_sentencepiece_vocabularies_that_cannot_be_had() -> None:
    base = sentencepiece()
    tokens, scores = base["tokenizer.ggml.tokens"], base["tokenizer.ggml.scores"]
    no_byte = ["<byte 10>" if token == "<0x0A>" else token for token in tokens]
    refused(gguf(base, tokens=no_byte), "the vocabulary has no <0x0A>", UnsupportedError)
    endless = [*tokens[:-1], "a" * (1 << 15)]
    refused(gguf(base, tokens=endless), "the tokens are too long", UnsupportedError)
    for bad in (float("nan"), float("-inf")):
        refused(gguf(base, scores=[*scores[:-1], bad]), "not a finite number", CheckpointError)


def test_token_types_out_of_range_are_refused() -> None:
    kinds = gguf()["tokenizer.ggml.token_type"]
    refused(gguf(token_type=[*kinds[:-1], 9]), "token_type is 9 for token", CheckpointError)
    tokenizer_files(gguf(token_type=[*kinds[:-1], 0]), "m.gguf")


def test_random_values_are_refused_or_loaded() -> None:
    """Whatever the metadata holds: files that load, or one error of ours."""
    rng = random.Random(3)
    bases = [gguf(), gguf(sentencepiece())]
    junk: list[Any] = [
        None,
        "",
        "a b",
        "\x00",
        0,
        -1,
        1 << 40,
        1.5,
        float("nan"),
        True,
        [],
        [1],
        ["a"],
    ]
    for _ in range(150):
        metadata = dict(rng.choice(bases))
        for key in rng.sample(sorted(metadata), rng.randrange(1, 3)):
            value = metadata[key]
            if isinstance(value, list) and rng.random() < 0.8:
                value = list(value)
                for _ in range(rng.randrange(1, 4)):
                    value[rng.randrange(len(value))] = rng.choice([*junk, value[0], value[-1]])
                metadata[key] = value
            else:
                metadata[key] = rng.choice(junk)
        try:
            files = tokenizer_files(metadata, "m.gguf")
        except CheckpointError as error:
            assert str(error).isprintable()
        else:
            Tokenizer(files["tokenizer.json"]).encode("Any text \x00 at all.")


def test_the_bundled_models_tokenizer(shared: Path) -> None:
    """Its vocabulary and merges through GGUF metadata encode as its own tokenizer.json does."""
    data = (shared / "models/stories-moe/tokenizer.json").read_bytes()
    model = json.loads(data)["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] + [1] * (len(tokens) - 1),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
    }
    ours, original = run_time(metadata), tokenizers.Tokenizer.from_str(data.decode())
    heldout = [
        path.read_bytes()[:100_000].decode("utf-8", "ignore")
        for path in (shared / "corpus/heldout").iterdir()
    ]
    for text in TEXTS + heldout:
        assert ours.encode(text) == original.encode(text).ids
