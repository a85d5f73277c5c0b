#!/usr/bin/env python3
"""Check that `--mem` holds: run, bench and eval of a store under ceilings, watched from outside.

Every command is run with a short and a long prompt under every ceiling. Its peak is VmHWM and page
tables from /proc, summed over its processes, read every 20 ms. What has to be true:

    it ends well, not killed, and neither this peak nor the one it reports is above the ceiling
    or it refuses and names a floor: there it ends well, and 2 MiB below it refuses

With --capped each command is in a memory cgroup of its ceiling too. The last line is one JSON
object; the exit code is 1 if something was not true.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import string
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from edgemoe.errors import EdgeMoEError, UsageError
from edgemoe.loader.budget import parse_size, status_bytes
from edgemoe.opened import open_model

MIB = 1 << 20
CAPS = "1000M,1500M,2200M,3000M,5000M"
COMMANDS = ("run", "bench", "eval")
POLL_S = 0.02
BELOW_MIB = 4
"""What a floor may be too high by."""
FLOOR = re.compile(r"give --mem (\d+)M or more")
KILLS = re.compile(r"^capped: .* oom_kill (\d+)", re.MULTILINE)


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description="Check that ceilings on memory hold, and that floors that are named are right.",
        epilog="examples: check_ceilings.py olmoe.emoe --capped capped.sh\n"
        "          check_ceilings.py olmoe.emoe --caps 300M --lengths 16 --commands run,eval",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("store")
    p.add_argument("--caps", default=CAPS, metavar="SIZES", help=f"ceilings (default {CAPS})")
    p.add_argument("--commands", default=",".join(COMMANDS), metavar="NAMES", help="of edgemoe")
    p.add_argument("--lengths", default="16,4000", metavar="N,N", help="tokens of prompts")
    p.add_argument("--bits", default="4", help="of the experts (default 4)")
    p.add_argument(
        "--capped",
        metavar="FILE",
        help="a program that runs `FILE LIMIT COMMAND...` in a memory cgroup and prints "
        '"capped: ... oom_kill N" to stderr at the end (default: no cgroup)',
    )
    args = p.parse_args()
    args.commands = args.commands.split(",")
    if unknown := set(args.commands) - set(COMMANDS):
        p.error(f"--commands must be of {', '.join(COMMANDS)}, not {', '.join(sorted(unknown))}")
    try:
        args.lengths = [int(n) for n in args.lengths.split(",")]
        args.caps = [(parse_size(size) or 0) // MIB for size in args.caps.split(",")]
    except (ValueError, UsageError) as exc:
        p.error(f"--lengths are numbers and --caps sizes: {exc}")
    if min(args.lengths) < 4 or min(args.caps) < 1:
        p.error("--lengths must be at least 4 and --caps at least 1M")
    return args


@dataclass(frozen=True)
class Outcome:
    """Of one command. seen, stated: peak bytes from outside and of its own figures, None where it
    gave none."""

    mem_mib: int
    code: int
    kills: int
    seconds: float
    seen: int
    stated: int | None
    message: str

    @property
    def well(self) -> bool:
        """It did what it was asked to, under its ceiling."""
        peaks = (self.seen, self.stated or 0)
        done = self.code == 0 and self.kills == 0 and self.stated is not None
        return done and max(peaks) <= self.mem_mib * MIB

    @property
    def floor(self) -> int | None:
        """MiB that it named when it refused; None if it did not refuse."""
        found = FLOOR.search(self.message)
        return int(found[1]) if found and self.code == 1 and self.kills == 0 else None


def text_of(store: str, tokens: int) -> str:
    """Letters and digits that are so many tokens, or one less, of a store's vocabulary."""
    opened = open_model(store)
    try:
        text = "".join(random.Random(0).choices(string.ascii_letters + string.digits, k=8 * tokens))
        low, high = 1, len(text)
        while low < high:
            middle = (low + high + 1) // 2
            if len(opened.tokenizer.encode(text[:middle])) <= tokens:
                low = middle
            else:
                high = middle - 1
        return text[:low]
    finally:
        opened.close()


def command_line(name: str, args: argparse.Namespace, tokens: int, text: Path) -> list[str]:
    """An `edgemoe` command that takes so many tokens, without its ceiling."""
    edgemoe = [sys.executable, "-m", "edgemoe.cli", name]
    common = ["--bits", args.bits, "--json"]
    if name == "run":
        prompt = ["-p", text.read_text(), "--raw", "-n", "8", "--temp", "0"]
        return [*edgemoe, "-m", args.store, *prompt, *common]
    if name == "bench":
        return [*edgemoe, args.store, "-p", str(tokens), "-n", "8", "--rounds", "1", *common]
    window = ["--ctx", str(tokens), "--chunks", "1"]
    return [*edgemoe, args.store, "--text", f"{text}.twice", *window, *common]


def watch(command: list[str], mem_mib: int, capped: str | None) -> Outcome:
    """Run a command under a ceiling and see what it takes."""
    command = [*command, "--mem", f"{mem_mib}M"]
    if capped is not None:
        command = ["bash", capped, f"{mem_mib}M", *command]
    begun, seen = time.perf_counter(), 0
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        while process.poll() is None:
            seen = max(seen, peak_of(process.pid, itself=capped is None))
            time.sleep(POLL_S)
        out.seek(0)
        err.seek(0)
        printed, message = out.read().decode(), err.read().decode(errors="replace")
    kills = KILLS.search(message)
    if capped is not None and kills is None:
        raise SystemExit(f"error: {capped} gave no count of kills: {message.strip()}")
    return Outcome(
        mem_mib,
        process.returncode,
        int(kills[1]) if kills else 0,
        round(time.perf_counter() - begun, 1),
        seen,
        stated_peak(printed) if process.returncode == 0 else None,
        KILLS.sub("", message).strip(),
    )


def peak_of(pid: int, itself: bool) -> int:
    """VmHWM and page tables of a process's descendants, and of itself."""
    found = 0
    try:
        family = [p.pid for p in psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return 0
    for each in [pid, *family] if itself else family:
        try:
            found += status_bytes(each, "VmHWM", "VmPTE")
        except OSError:  # it has ended
            continue
    return found


def stated_peak(printed: str) -> int | None:
    """peak_rss_bytes of what --json printed."""
    try:
        figures: dict[str, Any] = json.loads(printed)
    except ValueError:
        return None
    peak = figures.get("memory", figures).get("peak_rss_bytes")
    return None if peak is None else int(peak)


def check(command: list[str], cap: int, capped: str | None) -> tuple[str, list[Outcome]]:
    """("ok", "refused" or what is wrong) of a command under a ceiling; what it did there, and if it
    refused at the floor and below."""
    first = watch(command, cap, capped)
    if first.floor is None:
        return "ok" if first.well else "BROKEN", [first]
    if first.floor <= cap:
        return "FLOOR NOT ABOVE THE CEILING", [first]
    at = watch(command, first.floor, capped)
    below = watch(command, first.floor - BELOW_MIB, capped)
    if not at.well:
        return "FLOOR TOO LOW", [first, at, below]
    return "refused" if below.floor is not None else "FLOOR TOO HIGH", [first, at, below]


def show(name: str, tokens: int, verdict: str, outcomes: list[Outcome]) -> None:
    for i, each in enumerate(outcomes):
        stated = "-" if each.stated is None else f"{each.stated / MIB:.1f}"
        what = verdict if i == 0 else f"  {'at the floor' if i == 1 else 'below'}: {each.code}"
        print(
            f"{name:6} {tokens:6} {each.mem_mib:6}M {each.seen / MIB:8.1f} {stated:>8} "
            f"{each.kills:5} {each.seconds:7.1f}  {what}",
            flush=True,
        )
        if i == 0 and verdict not in ("ok", "refused"):
            for wrong in outcomes:
                print(f"       at {wrong.mem_mib}M: exit code {wrong.code}, {wrong.message}")


def main() -> int:
    args = options()
    cases = []
    print("           tokens    mem    seen   stated kills seconds  (MiB)")
    with tempfile.TemporaryDirectory() as scratch:
        for tokens in args.lengths:
            text = Path(scratch, f"{tokens}.txt")
            text.write_text(text_of(args.store, tokens))
            Path(f"{text}.twice").write_text(2 * text.read_text())
            for cap in args.caps:
                for name in args.commands:
                    command = command_line(name, args, tokens, text)
                    verdict, outcomes = check(command, cap, args.capped)
                    show(name, tokens, verdict, outcomes)
                    case = {"command": name, "tokens": tokens, "verdict": verdict}
                    cases.append(case | {"outcomes": [asdict(each) for each in outcomes]})
    bad = sum(case["verdict"] not in ("ok", "refused") for case in cases)
    print(json.dumps({"store": args.store, "bits": args.bits, "bad": bad, "cases": cases}))
    return 1 if bad else 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except EdgeMoEError as exc:
        raise SystemExit(f"error: {exc}") from None
