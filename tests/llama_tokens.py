"""Run by tests/test_gguf_tokenizer.py with the Python that has llama_cpp: llama.cpp's own tokens.

Reads a job as JSON on stdin: {"path": a GGUF file, "texts": [...]}. Writes to stdout {"ids":
[[...], ...], "plain": [[...], ...], "ends": [...], "bos": id, "add_bos": bool, "add_eos": bool}:
`ids` with what the tokenizer adds and with special tokens spelled in a text parsed, `plain` with
neither.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import llama_cpp


def tokens(vocab: Any, text: str, special: bool) -> list[int]:
    data = text.encode("utf-8")
    room = len(data) + 8
    out = (llama_cpp.llama_token * room)()
    count = llama_cpp.llama_tokenize(vocab, data, len(data), out, room, special, special)
    if count < 0:
        raise RuntimeError(f"llama_tokenize returned {count}")
    return list(out[:count])


def main() -> None:
    job = json.load(sys.stdin)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # llama.cpp logs every load
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(job["path"].encode(), params)
    if not model:
        raise SystemExit(f"llama.cpp cannot load {job['path']}")
    vocab = llama_cpp.llama_model_get_vocab(model)
    size = llama_cpp.llama_vocab_n_tokens(vocab)
    result = {
        "ids": [tokens(vocab, text, True) for text in job["texts"]],
        "plain": [tokens(vocab, text, False) for text in job["texts"]],
        "ends": [i for i in range(size) if llama_cpp.llama_vocab_is_eog(vocab, i)],
        "bos": llama_cpp.llama_vocab_bos(vocab),
        "add_bos": bool(llama_cpp.llama_vocab_get_add_bos(vocab)),
        "add_eos": bool(llama_cpp.llama_vocab_get_add_eos(vocab)),
    }
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
