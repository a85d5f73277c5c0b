#!/usr/bin/env python3
"""Perplexity of a GGUF model in llama.cpp, for comparison with `edgemoe eval`; one JSON line.

    edgemoe export edgemoe/data/default.emoe default.gguf --type f16
    scripts/llamacpp_perplexity.py default.gguf text.txt --chunks 40
    edgemoe eval edgemoe/data/default.emoe --text text.txt --chunks 40 --bits 8 --json

What is computed is llama.cpp's tools/perplexity: windows of --ctx tokens that do not overlap, a BOS
in place of the first token of each where the vocabulary adds one, the second half scored.

Needs llama-cpp-python (pip install 'edgemoe[llamacpp]'; built from source, a quarter of an hour on
2 cores) and numpy, not edgemoe.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np


def parser() -> argparse.ArgumentParser:
    """Command line."""
    p = argparse.ArgumentParser(description="Perplexity of a GGUF model in llama.cpp.")
    p.add_argument("model", type=Path, metavar="FILE.gguf")
    p.add_argument("text", type=Path, metavar="TEXT", help="UTF-8")
    p.add_argument("--ctx", type=int, default=512, metavar="N", help="tokens of a window")
    p.add_argument("--chunks", type=int, metavar="N", help="stop after so many windows")
    p.add_argument(
        "--parse-special",
        action="store_true",
        help="take <|endoftext|> and the like in the text as the tokens they spell, not as text",
    )
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    return p


def tokenize(vocab: Any, text: bytes, special: bool) -> np.ndarray[Any, Any]:
    """Ids of the whole text, with what the vocabulary adds."""
    room = len(text) + 8
    out = (llama_cpp.llama_token * room)()
    count = llama_cpp.llama_tokenize(vocab, text, len(text), out, room, True, special)
    if count < 0:
        sys.exit(f"llama_tokenize returned {count}")
    return np.array(out[:count], np.int64)


def nll(ctx: Any, batch: Any, tokens: np.ndarray[Any, Any], vocab: int) -> np.ndarray[Any, Any]:
    """-ln p of the tokens of a window's second half, float64."""
    first, n = len(tokens) // 2, len(tokens)
    for i, token in enumerate(tokens.tolist()):
        batch.token[i], batch.pos[i] = token, i
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        batch.logits[i] = i >= first
    batch.n_tokens = n
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(ctx), True)
    if llama_cpp.llama_decode(ctx, batch):
        sys.exit("llama_decode failed")
    rows = np.ctypeslib.as_array(llama_cpp.llama_get_logits(ctx), (n - first, vocab))[:-1]
    out = np.empty(len(rows))
    for i, (row, target) in enumerate(zip(rows, tokens[first + 1 :], strict=True)):
        z = row.astype(np.float64)
        z -= z.max()
        out[i] = math.log(np.exp(z).sum()) - z[target]
    return out


def main() -> None:
    """Load, tokenize, score, print."""
    args = parser().parse_args()
    start = time.monotonic()
    quiet = llama_cpp.llama_log_callback(lambda *_: None)  # kept: the C side calls it
    llama_cpp.llama_log_set(quiet, None)
    llama_cpp.llama_backend_init()
    settings = llama_cpp.llama_model_default_params()
    settings.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(os.fsencode(args.model), settings)
    if not model:
        sys.exit(f"llama.cpp cannot load {args.model}")
    vocab = llama_cpp.llama_model_get_vocab(model)
    size = llama_cpp.llama_vocab_n_tokens(vocab)
    # llama.cpp drops one newline at the end of the file, and so does `edgemoe eval`
    text = args.text.read_bytes().removesuffix(b"\n")
    ids = tokenize(vocab, text, args.parse_special)
    if len(ids) < args.ctx:
        sys.exit(f"{args.text} has {len(ids)} tokens, less than a window of {args.ctx}")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = args.ctx
    params.n_threads = params.n_threads_batch = args.threads
    ctx = llama_cpp.llama_init_from_model(model, params)
    batch = llama_cpp.llama_batch_init(args.ctx, 0, 1)
    windows = ids[: len(ids) // args.ctx * args.ctx].reshape(-1, args.ctx)[: args.chunks]
    if llama_cpp.llama_vocab_get_add_bos(vocab):
        windows[:, 0] = llama_cpp.llama_vocab_bos(vocab)
    scores = np.concatenate([nll(ctx, batch, window, size) for window in windows])
    ppl = math.exp(scores.mean())
    figures = {
        "ppl": ppl,
        "ppl_se": ppl * float(scores.std(ddof=1)) / math.sqrt(len(scores)),
        "tokens": len(scores),
        "windows": len(windows),
        "ctx": args.ctx,
        "text_tokens": len(ids),
        "model": str(args.model),
        "text": str(args.text),
        "seconds": time.monotonic() - start,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
