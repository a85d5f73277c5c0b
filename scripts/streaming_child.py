"""Feed tokens to a model once, in a process of its own: bench_streaming.py starts it for every run.

The argument is a job in JSON, the answer one line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import edgemoe
from edgemoe.bench.tokens import token_stream
from edgemoe.errors import EdgeMoEError
from edgemoe.model import Span
from edgemoe.types import Streaming


def fed(job: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds, passes, a checksum of logits, and traffic of a job.

    job: `tokens` for each of `batch` sequences, one by one, or with `prefill` a prompt of one; with
    `steps` tokens 0, 1, 2 ... modulo it, else words' frequencies. `store`, `mem`, `threads` as
    edgemoe.load, and what else it takes in `levels`; `streaming` fields of types.Streaming; `trace`
    a path or None.
    """
    prefill, batch, tokens = job["prefill"], job["batch"], job["tokens"]
    trace = None if job["trace"] is None else Path(job["trace"])
    with edgemoe.load(
        job["store"],
        mem=job["mem"],
        **job["levels"],
        ctx_size=tokens,
        threads=job["threads"],
        streaming=Streaming(**job["streaming"], trace=trace),
        sequences=batch,
    ) as model:
        ids = token_stream(model.config.vocab_size, batch * tokens, job["steps"])
        rows = ids.reshape(batch, tokens)
        caches = [model.new_cache() for _ in range(batch)]
        chunk = model.plan.prefill_chunk if prefill else 1
        seconds, checksum = [], 0
        for first in range(0, tokens, chunk):
            part = rows[:, first : first + chunk]
            begun = time.perf_counter()
            if prefill:
                span = Span(caches[0], part.size)
                logits = model.forward(part[0].tolist(), [span], [part.size - 1])
            else:
                logits = model.step(part[:, 0].tolist(), caches)
            seconds.append(time.perf_counter() - begun)
            # Of a prefill the last chunk's: how many there are depends on the memory.
            checksum = zlib.crc32(logits.tobytes(), 0 if prefill else checksum)
        used = model.usage()
        return {
            # Of decoding, the first token is the prompt, with nothing in memory.
            "seconds": sum(seconds if prefill else seconds[1:]),
            "passes": len(seconds),
            "logits": checksum,
            "streamed": model.plan.streamed,
            "cache_bytes": used.cache_bytes,
            **asdict(used.traffic),
        }


if __name__ == "__main__":
    try:
        # Traffic counts with NumPy's integers too.
        print(json.dumps(fed(json.loads(sys.argv[1])), default=int))
    except EdgeMoEError as exc:
        raise SystemExit(f"error: {exc}") from None
