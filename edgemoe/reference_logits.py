"""The reference side of an evaluation: a checkpoint run in float32, its distributions kept on disk.

Of every scored position the TOP likeliest tokens and the probability of all others together are
kept; the others enter the divergence as one. What that leaves out shows in `mean_rest`: keeping 512
of 4,096 tokens lost 1.3 % of a mean divergence of 0.013 at a rest of 0.009, and 1,024 lost 0.5 %.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from . import kernels
from .checkpoint import open_checkpoint
from .cpu_attn.kv_cache import KVCache
from .errors import OutputError
from .evaluate import ReferenceRows, Window
from .model import Span, forward
from .types import F32, I64
from .weights import FloatExperts, from_checkpoint

TOP = 4096
CHUNK = 128
_VERSION = b"edgemoe-reference-2"


def cache_directory() -> Path:
    """Where reference distributions are kept: $XDG_CACHE_HOME/edgemoe/reference."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "edgemoe" / "reference"


def float_runner(checkpoint: str | os.PathLike[str], threads: int) -> Callable[..., Iterator[F32]]:
    """A runner (evaluate.Runner) of a checkpoint in float32, all of it in memory."""
    opened = open_checkpoint(checkpoint)
    weights, experts = from_checkpoint(opened), FloatExperts(opened)
    pool = kernels.new_pool(threads)

    def run(tokens: I64, first: int) -> Iterator[F32]:
        cache = KVCache(opened.config, len(tokens))
        for at in range(0, len(tokens), CHUNK):
            part = tokens[at : at + CHUNK]
            want = np.arange(max(first - at, 0), len(part))
            logits = forward(weights, experts, pool, part, [Span(cache, len(part))], want)
            if len(want):
                yield logits

    return run


def reference_rows(
    checkpoint: str | os.PathLike[str],
    todo: Sequence[Window],
    threads: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[ReferenceRows]:
    """The reference's distributions for every window; from the cache where they are there."""
    path = cache_directory() / f"{_key(Path(checkpoint), todo)}.npz"
    counts = [len(w.targets) for w in todo]
    known = _load(path, counts)
    if known is not None:
        return known
    run = float_runner(checkpoint, threads)
    out = []
    for i, window in enumerate(todo):
        logits = np.concatenate(list(run(window.tokens, window.first)))[: len(window.targets)]
        out.append(ReferenceRows.of(logits, window.targets, TOP))
        if progress is not None:
            progress(i + 1, len(todo))
    _save(path, out)
    return out


def mean_rest(rows: Sequence[ReferenceRows]) -> float:
    """Mean probability of the tokens that were not kept one by one."""
    return float(np.concatenate([r.rest for r in rows]).mean())


def _key(checkpoint: Path, todo: Sequence[Window]) -> str:
    digest = hashlib.sha256(_VERSION)
    for file in sorted(p for p in checkpoint.iterdir() if p.is_file()):
        stat = file.stat()
        digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    digest.update((checkpoint / "config.json").read_bytes())
    for window in todo:
        digest.update(f"{window.first} {TOP}".encode())
        digest.update(window.tokens.tobytes())
    return digest.hexdigest()[:32]


def _load(path: Path, counts: Sequence[int]) -> list[ReferenceRows] | None:
    try:
        with np.load(path, allow_pickle=False) as data:
            ids, logp, rest, true = (data[k] for k in ("ids", "logp", "rest", "true"))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None  # not there, or not whole: it is made again
    if len(ids) != sum(counts):
        return None
    rows = ReferenceRows(ids, logp, rest, true)
    ends = np.cumsum(counts)
    return [rows.rows(int(e) - n, int(e)) for e, n in zip(ends, counts, strict=True)]


def _save(path: Path, rows: Sequence[ReferenceRows]) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez(
                file,
                ids=np.concatenate([r.ids for r in rows]),
                logp=np.concatenate([r.logp for r in rows]),
                rest=np.concatenate([r.rest for r in rows]),
                true=np.concatenate([r.true_logp for r in rows]),
            )
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as exc:
        temporary.unlink(missing_ok=True)
        raise OutputError(f"cannot keep the reference in {path.parent}: {exc.strerror}") from None
