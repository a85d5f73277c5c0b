"""llama.cpp at the other end of a pipe; needs llama_cpp, and nothing of edgemoe.

Lines of JSON on stdin and stdout. The first line is the job: {"path", "repack", "threads",
"prefill": [...], "decode": [...]}; the answer {"vocab", "version"} comes when the model is loaded.
Each further line asks for a round on an empty context; its answer is {"prefill_s", "steps_s",
"peak_rss_bytes"}. Instead of an answer there may come {"error"}, and the end with it.

Batches, context and settings are those of llama.cpp itself, 512 tokens a batch.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

BATCH = 512


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer

    def answer(**what: Any) -> None:
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    try:
        llama = importlib.import_module("llama_cpp")
    except ImportError as error:
        answer(error=f"it cannot import llama_cpp ({error})", missing=True)
        return
    job = json.loads(sys.stdin.readline())
    quiet = llama.llama_log_callback(lambda *_: None)  # kept: the C side calls it
    llama.llama_log_set(quiet, None)
    llama.llama_backend_init()
    model = _load(llama, job["path"], job["repack"])
    if not model:
        answer(error=f"llama.cpp could not load {job['path']}")
        return
    ctx = _context(llama, model, job["threads"], len(job["prefill"]) + len(job["decode"]))
    if not ctx:
        answer(error="llama.cpp could not make a context: too little memory?")
        return
    vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    answer(vocab=vocab, version=llama.__version__)
    for _ in sys.stdin:
        llama.llama_memory_clear(llama.llama_get_memory(ctx), True)
        decode = _decoder(llama, ctx)
        try:
            answer(**_round(decode, job["prefill"], job["decode"]))
        except RuntimeError as error:
            answer(error=str(error))
            return


def _load(llama: Any, path: str, repack: bool) -> Any:
    params = llama.llama_model_default_params()
    params.n_gpu_layers = 0
    params.use_extra_bufts = repack
    return llama.llama_model_load_from_file(path.encode(), params)


def _context(llama: Any, model: Any, threads: int, tokens: int) -> Any:
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_batch = max(1024, tokens + 8), BATCH
    params.n_threads = params.n_threads_batch = threads
    return llama.llama_init_from_model(model, params)


def _decoder(llama: Any, ctx: Any) -> Callable[[Sequence[int]], None]:
    def decode(tokens: Sequence[int]) -> None:
        array = (llama.llama_token * len(tokens))(*tokens)
        if llama.llama_decode(ctx, llama.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError("llama_decode failed")

    return decode


def _round(
    decode: Callable[[Sequence[int]], None], prompt: Sequence[int], rest: Sequence[int]
) -> dict[str, Any]:
    start = time.perf_counter()
    for first in range(0, len(prompt), BATCH):
        decode(prompt[first : first + BATCH])
    prefill_s = time.perf_counter() - start
    steps_s = []
    for token in rest:
        start = time.perf_counter()
        decode([token])
        steps_s.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024
    return {"prefill_s": prefill_s, "steps_s": steps_s, "peak_rss_bytes": peak * unit}


if __name__ == "__main__":
    main()
