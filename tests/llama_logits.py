"""Run by the llama.cpp tests with a Python that has llama_cpp: its own logits.

Reads a job as JSON on stdin: {"path": a GGUF file, "ids": [[...], ...], "out": a .npy file}. Writes
the logits after each token of each sequence (all of one length n), float32 [sequences, n, vocab],
to `out`; attention keeps its keys and values in float32.
"""

from __future__ import annotations

import json
import os
import sys

import llama_cpp
import numpy as np

F32 = 0  # ggml's number of the type


def main() -> None:
    job = json.load(sys.stdin)
    if not os.environ.get("EDGEMOE_LLAMA_LOG"):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # llama.cpp logs every load
    ids = job["ids"]
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        job["path"].encode(), llama_cpp.llama_model_default_params()
    )
    if not model:
        raise SystemExit(f"llama.cpp cannot load {job['path']}")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = len(ids[0])
    params.type_k = params.type_v = F32
    params.flash_attn_type = 0
    params.n_threads = params.n_threads_batch = 1
    ctx = llama_cpp.llama_init_from_model(model, params)
    batch = llama_cpp.llama_batch_init(len(ids[0]), 0, 1)
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    out = []
    for sequence in ids:
        for i, token in enumerate(sequence):
            batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        batch.n_tokens = len(sequence)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(ctx), True)
        if llama_cpp.llama_decode(ctx, batch):
            raise SystemExit("llama_decode failed")
        shape = len(sequence), vocab
        out.append(np.ctypeslib.as_array(llama_cpp.llama_get_logits(ctx), shape).copy())
    np.save(job["out"], np.stack(out))


if __name__ == "__main__":
    main()
