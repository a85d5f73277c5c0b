#!/usr/bin/env python3
"""Measure experts streamed under ceilings, in rounds: each part in turn, another first each time.

Alone: `edgemoe run` from token 0 ('!') in a cgroup of each --cap, page cache dropped before; beside
it llama.cpp without a cap (--gguf), a plain reader of the store, and a run with all experts
resident. --serial: overlapped against serial, decoding and prefill. --orders: orders of reads, at
batches of 1, 8 and 32 and in prefill. Nothing is compared across rounds but by its ratios.

A table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import simulate
from bench_reader import MIB, plain, prefixes
from routing_trace import Trace, read_trace
from streaming_bound import (
    Passes,
    cap_summary,
    decoding,
    pair_summary,
    passes_of,
    prefilling,
    same,
    spread,
)

from edgemoe.bench.llamacpp import LlamaCpp
from edgemoe.bench.measure import REPACK
from edgemoe.bench.tokens import token_stream
from edgemoe.cpus import BLAS_THREADS
from edgemoe.errors import EdgeMoEError
from edgemoe.kernels import default_threads
from edgemoe.kernels.reader import BLOCK
from edgemoe.layout import align_up
from edgemoe.loader.arena import Arena
from edgemoe.loader.budget import resolve_ceiling
from edgemoe.loader.slots import SegmentSlots
from edgemoe.perfmodel.fit import Wish
from edgemoe.planning import plan
from edgemoe.store import Store
from edgemoe.types import ORDERS, PlaneRef

LEVEL, DEPTH = 4, 8
READ_BYTES = 256 * MIB
"""What the plain reader reads each time."""
Work = dict[Any, Callable[[], Any]]
CHILD = Path(__file__).with_name("streaming_child.py")
BATCHES = (1, 8, 32)
POLICIES = ("worth", "lru", "lfu")

EPILOG = """targets (issue 06): of llama.cpp 0.7 at 3000M, 0.4 at 2200M, 0.25 at 1500M; time / bound
at most 1.18 (1 / 0.85), in --serial 1.11 (1 / 0.9); bytes within 3 % of the simulator's `worth`,
and at most its lru and lfu; prefill at least 0.8 of its limit
  bound   of a token: sum over layers of T_dense + max(missed bytes / plain bandwidth, T_experts),
          and the head; T of the round's resident run (medians over tokens), misses of a traced run
          that reads nothing early, which are the same each time; of a prefill: its times and
          misses summed up by layer
  limit   of a prefill: the longer of the resident one and missed bytes / plain bandwidth
examples:
  bench_streaming.py q7.emoe --gguf q7.gguf --routes olmoe_299.jsonl --capped capped.sh
  bench_streaming.py q7.emoe --routes olmoe_299.jsonl --cap 2200M --serial --capped capped.sh
  bench_streaming.py zipf.emoe --cap 2200M --serial   # without --routes: words' frequencies
  bench_streaming.py q7.emoe --routes olmoe_299.jsonl --cap 1500M --orders | tail -1 | jq .caps
  bench_streaming.py q7.emoe --gguf q7.gguf --routes olmoe_299.jsonl --mean-bits 2.5
"""


def fenced(text: str) -> dict[str, int]:
    """What capped.sh says: peak of the cgroup in MiB, and processes that were killed."""
    found = re.search(r"^capped: rc=\d+ limit=\S+ peak_mb=(\d+) oom_kill (\d+)", text, re.M)
    return {"peak_mib": int(found[1]), "kills": int(found[2])} if found else {}


def pieces(prefix: Sequence[PlaneRef], chunk: int) -> list[list[PlaneRef]]:
    """The reads, of `chunk` bytes at most, of segments that lie one behind the other."""
    first, end = prefix[0].offset, align_up(prefix[-1].offset + prefix[-1].size, BLOCK)
    return [[PlaneRef(at, min(chunk, end - at), 0)] for at in range(first, end, chunk)]


class Bench:
    """One store, measured in other processes; see the options for all of `args`."""

    def __init__(self, args: argparse.Namespace, stack: ExitStack) -> None:
        self.args = args
        self.notes: list[str] = []
        self._trace_at = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "trace.json"
        self.routes: Trace | None = read_trace(args.routes) if args.routes else None
        self.store = stack.enter_context(Store.open(args.store))
        self._memory = Arena(READ_BYTES + 64 * BLOCK).take(READ_BYTES, BLOCK)
        self._memory[:] = 1
        self._fd = os.open(args.store, os.O_RDONLY | os.O_DIRECT)
        stack.callback(os.close, self._fd)
        self._rng = np.random.default_rng(0)
        self._fence = self._usable(args.capped)
        self._llama = self._start_llama(stack) if args.gguf and not args.only else {}

    def note(self, text: str) -> None:
        """Say something once, and in the JSON."""
        if text not in self.notes:
            self.notes.append(text)
            print(f"note: {text}", flush=True)

    def _usable(self, script: Path | None) -> list[str]:
        if script is None:
            self.note("no --capped: memory is not limited from outside")
            return []
        tried = subprocess.run([script, "1G", "true"], capture_output=True, text=True, check=False)
        if tried.returncode or not fenced(tried.stderr):
            why = (tried.stderr.strip().splitlines() or ["no word"])[-1]
            self.note(f"{script} does not work here ({why}): memory is not limited from outside")
            return []
        return [str(script)]

    def _start_llama(self, stack: ExitStack) -> dict[str, LlamaCpp]:
        fed = token_stream(self.store.config.vocab_size, self.args.tokens, self._steps)
        sides = {}
        for name in self.args.repack or REPACK:
            sides[name] = LlamaCpp(
                self.args.llama_python, self.args.gguf, threads=self.args.threads,
                repack=REPACK[name], tokens=fed, prompt_tokens=1,
            )  # fmt: skip
            stack.enter_context(sides[name]).round()
        return sides

    @property
    def _steps(self) -> int | None:
        return None if self.routes is None else len(self.routes.routes)

    def bandwidth(self) -> float:
        """Bytes a second of a plain reader of whole experts in random order."""
        units = prefixes(self.store, LEVEL)
        count = READ_BYTES // max(sum(p[0].size for p in pieces(u, MIB)) for u in units)
        picked = [units[i] for i in self._rng.permutation(len(units))[:count]]
        todo = [piece for unit in picked for piece in pieces(unit, MIB)]
        begun = time.perf_counter()
        plain(self._fd, todo, self._memory, DEPTH)
        return sum(piece[0].size for piece in todo) / (time.perf_counter() - begun)

    def llama(self) -> dict[str, float]:
        """Tokens a second by setting; the first token is the prompt."""
        return {n: (self.args.tokens - 1) / s.round().decode_s for n, s in self._llama.items()}

    def _start(self, cap: str | None, command: Sequence[str]) -> tuple[dict[str, Any], str]:
        """The JSON that a command ends with, and its stderr; page cache dropped before."""
        os.sync()
        try:
            Path("/proc/sys/vm/drop_caches").write_text("3")
        except OSError as error:
            self.note(f"the page cache cannot be dropped ({error.strerror}): files may be in it")
        fence = [*self._fence, cap] if self._fence and cap else []
        done = subprocess.run(
            [*fence, sys.executable, *command], capture_output=True, text=True, check=False,
            env={**os.environ, **dict.fromkeys(BLAS_THREADS, "1")},
        )  # fmt: skip
        if done.returncode:
            raise EdgeMoEError(" | ".join(done.stderr.strip().splitlines()[-2:]) or "no word")
        return json.loads(done.stdout.splitlines()[-1]), done.stderr

    def run(self, cap: str, *more: str) -> dict[str, Any]:
        """`edgemoe run` under a cap: its statistics, and the cgroup's."""
        main = "import sys; from edgemoe.cli import main; sys.exit(main())"
        said, stderr = self._start(cap, [
            "-I", "-c", main, "run", self.args.store, "!", "--raw", "--temp", "0",
            *self._levels(), "--mem", cap, "-n", str(self.args.tokens),
            "-t", str(self.args.threads), "--json", *more,
            *(() if self.args.look_ahead else ("--no-look-ahead",)),
            *(("--preload",) if self.args.preload else ()),
        ])  # fmt: skip
        if said["prompt_tokens"] != 1 or said["generated_tokens"] != self.args.tokens:
            raise EdgeMoEError("the model does not go on from one token ('!') to the end: see -n")
        return said | fenced(stderr)

    def _levels(self) -> list[str]:
        args = self.args
        if args.mean_bits is None:
            return ["--bits", str(LEVEL), "--exact"]
        price = [] if args.read_price is None else ["--read-price", str(args.read_price)]
        return ["--mean-bits", str(args.mean_bits), *price]

    def feed(self, cap: str | None, **job: Any) -> dict[str, Any]:
        """streaming_child.py under a cap; None: with all experts resident."""
        job = {"prefill": False, "batch": 1, "tokens": self.args.tokens, "streaming": {}} | job
        job |= {"store": self.args.store, "mem": cap or "auto", "steps": self._steps}
        # What a step misses is told by its reads: none may begin before it.
        job["streaming"] = {"look_ahead": False, **job["streaming"]}
        levels: dict[str, Any] = {"bits": LEVEL, "exact": True}
        if self.args.mean_bits is not None:
            levels = {"mean_bits": self.args.mean_bits, "read_price": self.args.read_price}
        job |= {"threads": self.args.threads, "trace": job.get("trace"), "levels": levels}
        said, _ = self._start(cap, [str(CHILD), json.dumps(job)])
        if said["streamed"] == (cap is None):
            raise EdgeMoEError(
                f"{cap}: all experts fit, so nothing is streamed: give a smaller --cap" if cap
                else "not all experts fit in 70 % of what is free now: the bound cannot be told"
            )  # fmt: skip
        return said

    def traced(self, work: Callable[..., dict[str, Any]]) -> tuple[dict[str, Any], Passes]:
        """What some work that takes the path of a trace says, and its passes."""
        said = work(str(self._trace_at))
        return said, passes_of(json.loads(self._trace_at.read_text())["traceEvents"])

    def resident(self, **job: Any) -> tuple[dict[str, Any], Passes]:
        """A run with all experts resident."""
        return self.traced(lambda path: self.feed(None, trace=path, **job))

    def fits(self) -> bool:
        """Whether a run with all experts resident is possible; a note where it is not."""
        ceiling, wish = resolve_ceiling("auto"), Wish(bits=LEVEL, exact=True)
        chosen = plan(self.store, wish, ceiling, self.args.tokens, self.args.threads, "f16")
        if chosen.streamed:
            self.note(f"not all experts fit in {ceiling >> 20} MiB: no resident run, so no bound")
        return not chosen.streamed

    def in_turn(self, work: Work) -> list[dict[Any, Any]]:
        """What each gives, in every round, which each begins in turn."""
        out = []
        for i in range(self.args.rounds):
            names = list(work)
            cut = i % len(names)
            out.append({name: work[name]() for name in names[cut:] + names[:cut]})
            print(f"round {i + 1} of {self.args.rounds}", file=sys.stderr, flush=True)
        return out


def replayed(bench: Bench, routes: Trace, used: Mapping[str, Any]) -> dict[str, Any]:
    """A run's misses beside the simulator's, for as many tokens and bytes of rooms.

    used: what streaming_child.py says of decoding.
    """
    slots = SegmentSlots(bench.store, used["cache_bytes"])
    capacity = slots.capacity(used["cache_bytes"])
    slots.close()
    tokens = used["passes"]
    fed = Trace(routes.routes[np.arange(tokens) % len(routes.routes)], [])
    how = argparse.Namespace(
        store=bench.args.store, level=LEVEL, order="johnson", bandwidth=1.0, compute_ms=1.0, skip=0
    )
    model = simulate.model_of(how, fed.routes)
    out: dict[str, Any] = {"capacity_bytes": capacity, "real": used["missed_bytes"] / tokens}
    for name in POLICIES:
        out[name] = simulate.replay(model, fed, name, capacity, how)["bytes_read_per_token"]
    return out | {"real_of_worth": out["real"] / out["worth"]}


def shown(figures: Mapping[str, float], digits: int = 2) -> str:
    return " / ".join(f"{figures[name]:.{digits}f}" for name in ("p10", "median", "p90"))


def alone(bench: Bench) -> dict[str, Any]:
    """`edgemoe run` at each cap, its bound, llama.cpp and the simulator."""
    caps = bench.args.cap
    traces = {}
    texts = []
    for cap in caps:
        said, traces[cap] = bench.traced(
            lambda path, cap=cap: bench.run(
                cap,
                "--trace",
                path,
                "--no-look-ahead",  # as in `feed`
            )
        )
        texts.append(said["text"])
    work: Work = {"bandwidth": bench.bandwidth, "llama": bench.llama}
    if bench.fits():
        work["compute"] = bench.resident
    rounds = bench.in_turn(work | {cap: partial(bench.run, cap) for cap in caps})
    same("the tokens", texts + [r[cap]["text"] for r in rounds for cap in caps])
    for r in rounds:
        r["compute"] = decoding(r["compute"][1]) if "compute" in r else None
    out: dict[str, Any] = {"caps": {}}
    print("cap    tok/s (p10 / median / p90)   of llama.cpp         time / bound   MiB/token  hits")
    for cap in caps:
        found = cap_summary([{**r, "run": r[cap]} for r in rounds], traces[cap].missed)
        out["caps"][cap] = found
        print(
            f"{cap:>6} {shown(found['tok_s']):>21} "
            f"{shown(found['of_llama']) if 'of_llama' in found else 'not measured':>22} "
            f"{shown(found['time_of_bound']) if 'time_of_bound' in found else 'not measured':>20} "
            f"{found['bytes_read_per_token'] / MIB:10.1f}"
            f"{100 * found['hit_rate']:5.0f} %  kills {found.get('kills', 'not counted')}"
        )
    if bench.routes and bench.args.mean_bits is None:
        print("cap    MB missed a token: real  simulated: worth    lru    lfu  real / worth")
        for cap in caps:
            found = replayed(bench, bench.routes, bench.feed(cap))
            out["caps"][cap]["misses"] = found
            print(
                f"{cap:>6} {found['real'] / 1e6:22.1f} {found['worth'] / 1e6:17.1f} "
                f"{found['lru'] / 1e6:6.1f} {found['lfu'] / 1e6:6.1f} "
                f"{found['real_of_worth']:12.3f}"
            )
    out["bandwidth"] = spread(r["bandwidth"] for r in rounds)
    out["llama_tok_s"] = {n: spread(r["llama"][n] for r in rounds) for n in rounds[0]["llama"]}
    out["rounds"] = [
        {k: v._asdict() if k == "compute" and v else v for k, v in r.items()} for r in rounds
    ]
    for r in out["rounds"]:
        r["compute"] = {k: float(np.sum(v)) for k, v in (r["compute"] or {}).items()}
    return out


def serial(bench: Bench) -> dict[str, Any]:
    """Overlapped against serial, decoding and a prefill, and the bound of both."""
    kinds: dict[str, dict[str, Any]] = {
        "decode": {"tokens": bench.args.tokens},
        "prefill": {"tokens": bench.args.prompt, "prefill": True},
    }
    work: Work = {"bandwidth": bench.bandwidth}
    missed = {}
    for kind, job in kinds.items():
        work[kind] = partial(bench.resident, **job)
        for cap in bench.args.cap:
            _, passes = bench.traced(lambda path, a=cap, j=job: bench.feed(a, trace=path, **j))
            missed[cap, kind] = passes.missed
            for name, overlap in (("overlapped", True), ("serial", False)):
                how = {"overlap": overlap}
                work[cap, kind, name] = partial(bench.feed, cap, streaming=how, **job)
    rounds = bench.in_turn(work)
    out: dict[str, Any] = {"caps": {cap: {} for cap in bench.args.cap}}
    print("cap    what      tok/s      serial / overlapped     possible   time / bound   of limit")
    for cap, kind in missed:
        runs = [{n: r[cap, kind, n] for n in ("overlapped", "serial")} for r in rounds]
        said = [run["logits"] for pair in runs for run in pair.values()]
        same(f"the logits of {kind} at {cap}", [*said, *(r[kind][0]["logits"] for r in rounds)])
        prefill = kind == "prefill"
        each = [
            {n: run["seconds"] for n, run in pair.items()}
            | {"resident": r[kind][0]["seconds"], "bandwidth": r["bandwidth"]}
            | {"compute": (prefilling if prefill else decoding)(r[kind][1])}
            for r, pair in zip(rounds, runs, strict=True)
        ]
        read = missed[cap, kind]
        read = read.sum(0, keepdims=True) if prefill else read[1:]
        tokens = kinds[kind]["tokens"] - (not prefill)
        found = out["caps"][cap][kind] = pair_summary(each, read, tokens, prefill)
        limit = f"{shown(found['of_limit']):>20}" if prefill else ""
        print(
            f"{cap:>6} {kind:<8}{found['tok_s']['median']:7.2f} {shown(found['gain']):>22} "
            f"{found['possible_gain']['median']:10.2f} {shown(found['time_of_bound']):>20}{limit}"
        )
    return out | {"bandwidth": spread(r["bandwidth"] for r in rounds)}


def orders(bench: Bench) -> dict[str, Any]:
    """Orders of reads at several batches and in a prefill: seconds against fifo's."""
    jobs: dict[str, dict[str, Any]] = {
        f"batch {n}": {"batch": n, "tokens": max(bench.args.tokens // n, 8)} for n in BATCHES
    }
    jobs["prefill"] = {"tokens": bench.args.prompt, "prefill": True}
    work: Work = {
        (cap, name, order): partial(bench.feed, cap, streaming={"order": order}, **job)
        for cap in bench.args.cap for name, job in jobs.items() for order in ORDERS
    }  # fmt: skip
    rounds = bench.in_turn(work)
    out: dict[str, Any] = {"caps": {cap: {} for cap in bench.args.cap}}
    print("cap    what      order     seconds   time / fifo's (p10 / median / p90)")
    for cap, name, order in work:
        same(f"the logits of {name}", [r[cap, name, o]["logits"] for r in rounds for o in ORDERS])
        took = np.array([r[cap, name, order]["seconds"] for r in rounds])
        ratio = spread(took / [r[cap, name, "fifo"]["seconds"] for r in rounds])
        found = {"seconds": spread(took), "of_fifo": ratio}
        out["caps"][cap].setdefault(name, {})[order] = found
        median = found["seconds"]["median"]
        print(f"{cap:>6} {name:<10}{order:<9}{median:8.2f}   {shown(ratio, 3)}")
    return out


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("store", help="segments aligned to 4096 bytes; experts of 4 bits are used")
    p.add_argument("--cap", action="append", help="may be repeated (3000M, 2200M, 1500M)")
    p.add_argument("--capped", type=Path, help="capped.sh of ../shared/bench; needs root")
    p.add_argument("--routes", type=Path, help="the trace that the model replays, for the "
                   "simulator; tokens fed are 0, 1, 2 ... modulo its length")  # fmt: skip
    p.add_argument("--gguf", type=Path, help="the same model for llama.cpp")
    p.add_argument("--llama-python", help="with llama_cpp (EDGEMOE_LLAMA_PYTHON, else this one)")
    p.add_argument(
        "--repack", action="append", choices=REPACK, help="of llama.cpp; the best of both"
    )
    p.add_argument("-n", "--tokens", type=int, default=128, help="decoded; all of a batch in "
                   "--orders, and at least 8 a sequence (128)")  # fmt: skip
    p.add_argument("--prompt", type=int, default=512, help="of prefill (512)")
    p.add_argument("--rounds", type=int, default=5, help="(5)")
    p.add_argument(
        "--look-ahead",
        action="store_true",
        help="in what is timed alone; a scripted router (--routes) makes every guess right, which "
        "real ones are not",
    )
    p.add_argument(
        "--preload", action="store_true", help="in what is timed alone; not part of its time"
    )
    p.add_argument("--mean-bits", type=float, help="of experts, instead of 4 for all")
    p.add_argument("--read-price", type=float, help="with --mean-bits, as `edgemoe run` has it")
    p.add_argument("-t", "--threads", type=int, default=default_threads())
    what = p.add_mutually_exclusive_group()
    for mode in (serial, orders):
        what.add_argument(
            f"--{mode.__name__}", dest="only", action="store_const", const=mode, help=mode.__doc__
        )
    args = p.parse_args()
    if args.rounds < 1 or args.tokens < 3 or args.prompt < 1:
        p.error("--rounds and --prompt must be at least 1, -n at least 3")
    args.cap = args.cap or ["3000M", "2200M", "1500M"]
    return args


def main() -> None:
    args = options()
    with ExitStack() as stack:
        bench = Bench(args, stack)
        found = (args.only or alone)(bench)
    said = {"store": args.store, "tokens": args.tokens, "notes": bench.notes}
    print(json.dumps(said | found))


if __name__ == "__main__":
    try:
        main()
    except EdgeMoEError as exc:
        raise SystemExit(f"error: {exc}") from None
