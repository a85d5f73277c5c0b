"""Text to token ids and back, on the `tokenizers` library.

The inverse is a stream: ids come one at a time while the model generates, text leaves in pieces
that never split a UTF-8 sequence, and `decode` is that same stream run to its end, so the pieces
of a run always concatenate to its `decode`. Knows nothing about models, prompts or sampling.
"""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .errors import CheckpointError, UnsupportedError, UsageError

# Read by the library when it is first used; its thread pool would count against the memory ceiling
# and take cores from the kernels.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import tokenizers

_WINDOW_DECODERS = frozenset({"Sequence", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"})


def _byte_alphabet() -> dict[str, int]:
    """The 256 printable characters by which byte-level BPE spells bytes (GPT-2's encoder.py)."""
    direct = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = [b for b in range(256) if b not in set(direct)]
    table = {chr(b): b for b in direct}
    table.update({chr(256 + i): b for i, b in enumerate(shifted)})
    return table


_BYTE_OF = _byte_alphabet()


class Tokenizer:
    """A `tokenizer.json`, with the settings of `tokenizer_config.json` that change ids.

    Args:
        data: the bytes of tokenizer.json.
        config: the parsed tokenizer_config.json, or None.
        bos_token_id: the model's first token, where it has one.
        eos_token_ids: the ids that end a text; like all special tokens they are not text.

    Raises:
        CheckpointError: `data` is not a tokenizer.json that the library can load.
        UnsupportedError: its decoder is of a kind whose text cannot be streamed.
    """

    def __init__(
        self,
        data: bytes,
        *,
        config: Mapping[str, Any] | None = None,
        bos_token_id: int | None = None,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        self._tok = _load(data)
        # A saved truncation or padding would silently cut or lengthen prompts.
        self._tok.no_truncation()
        self._tok.no_padding()
        add_bos = (config or {}).get("add_bos_token")
        if not isinstance(add_bos, (bool, type(None))):
            raise CheckpointError(
                f"tokenizer_config.json: add_bos_token must be true or false, not {add_bos!r}"
            )
        self._prepend = bos_token_id if add_bos else None
        added = self._tok.get_added_tokens_decoder()
        special = {i for i, token in added.items() if token.special} | set(eos_token_ids)
        self._special = frozenset(special if bos_token_id is None else special | {bos_token_id})
        self._byte_level = _is_byte_level(self._tok)
        fallback = () if self._byte_level else (f"<0x{b:02X}>" for b in range(256))
        ids = (self._tok.token_to_id(token) for token in fallback)
        self._byte_ids = frozenset(i for i in ids if i is not None)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; a model's vocabulary may be padded beyond it."""
        return int(self._tok.get_vocab_size(with_added_tokens=True))

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that stand for no text."""
        return self._special

    def encode(
        self, text: str, add_special: bool = True, *, parse_special: bool = True
    ) -> list[int]:
        """Ids of `text`.

        With `add_special` the ids that the post-processor of tokenizer.json adds come with it, and
        a BOS first where tokenizer_config.json says `add_bos_token` (never two). A chat template
        writes its own, so rendered conversations are encoded without. A special token spelled in
        `text` is that token, or plain text like any other where `parse_special` is off.

        Raises:
            UsageError: `text` holds lone surrogates, that is, bytes that were not UTF-8.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError(
                f"the text is not valid UTF-8 at character {error.start}: re-encode it"
            ) from None
        self._tok.encode_special_tokens = not parse_special
        ids = [int(i) for i in self._tok.encode(text, add_special_tokens=add_special).ids]
        if add_special and self._prepend is not None and ids[:1] != [self._prepend]:
            ids.insert(0, self._prepend)
        return ids

    def first_special(self) -> int | None:
        """The id that `encode` puts before a text, None where it puts none."""
        whole, bare = self.encode("a"), self.encode("a", add_special=False)
        return whole[0] if whole[: len(bare)] != bare else None

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`: special tokens and ids outside the vocabulary give none, invalid UTF-8
        becomes U+FFFD."""
        stream = self.stream()
        pieces = [stream.push(i) for i in ids]
        return "".join(pieces) + stream.flush()

    def token_id(self, token: str) -> int | None:
        """Id of the token spelled `token`, None where there is none."""
        found = self._tok.token_to_id(token)
        return None if found is None else int(found)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of text a token stands for; none for special tokens and unknown ids.

        In vocabularies that mark spaces the mark counts as the space it stands for.
        """
        if token_id in self._special or not 0 <= token_id < 1 << 32:
            return b""
        token = self._tok.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level:
            return _token_bytes(token)
        if token_id in self._byte_ids:
            return bytes([int(token[3:5], 16)])
        return str(token).replace("\u2581", " ").encode("utf-8")

    def stream(self) -> TextStream:
        """A fresh decoder of ids that come one at a time."""
        return TextStream(self)


class TextStream:
    """Turns ids into text pieces as they come.

    A piece is withheld while its last character may still change: in the middle of a UTF-8
    sequence, and, for vocabularies with byte-fallback tokens, inside a run of these, because one
    invalid byte makes the library replace the whole run. `flush` gives what is left.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes, often empty, never half a character."""
        tok = self._tokenizer
        if token_id in tok.special_ids or not 0 <= token_id < 1 << 32:
            return ""
        token = tok._tok.id_to_token(token_id)
        if token is None:
            return ""
        if tok._byte_level:
            return self._utf8.decode(_token_bytes(token))
        self._pending.append(token_id)
        return "" if token_id in tok._byte_ids else self._take()

    def flush(self) -> str:
        """The rest of the text; the stream then starts anew."""
        rest = self._utf8.decode(b"", final=True)
        if self._pending:
            rest += self._take()
        self._utf8.reset()
        self._context = []
        return rest

    def _take(self) -> str:
        # Decoders such as Metaspace and Strip treat the first token of a text differently, so the
        # last tokens go in again and what they give is cut off.
        decode = self._tokenizer._tok.decode
        before = decode(self._context, skip_special_tokens=True) if self._context else ""
        text = decode(self._context + self._pending, skip_special_tokens=True)
        self._context, self._pending = self._pending, []
        return str(text[len(before) :])


def _token_bytes(token: str) -> bytes:
    """Bytes a token stands for; a token with a character outside the alphabet is plain text."""
    try:
        return bytes(_BYTE_OF[c] for c in token)
    except KeyError:
        return token.encode("utf-8")


def _load(data: bytes) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(data.decode("utf-8"))
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a Rust panic is not an Exception
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"tokenizer.json cannot be loaded ({reason}): get it anew from the model's publisher"
        ) from None


def _is_byte_level(tok: tokenizers.Tokenizer) -> bool:
    """Whether text is bytes spelled in the byte alphabet; raises where it cannot be streamed."""
    if tok.decoder is None:
        return False
    root = json.loads(tok.decoder.__getstate__())
    parts = root["decoders"] if root["type"] == "Sequence" else [root]
    kinds = [str(part["type"]) for part in parts]
    if kinds == ["ByteLevel"]:
        return True
    for kind in kinds:
        if kind not in _WINDOW_DECODERS:
            raise UnsupportedError(
                f"tokenizer.json: decoder {kind!r} is not supported "
                "(ByteLevel, Metaspace and byte-fallback sequences are)"
            )
    return False
