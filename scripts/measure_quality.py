#!/usr/bin/env python3
"""How good quantized experts are, and beside whom: llama.cpp, D2MoE, levels quantized alone.

    M=../shared/models/stories-moe  T=../shared/corpus/heldout/tinystories_heldout.txt
    C=../shared/corpus/train_simple.txt
    scripts/measure_quality.py llamacpp $M --bin llama/bin --calibration $C --text $T --work q
    scripts/measure_quality.py levels $M --calibration $C --text $T --work q
    scripts/measure_quality.py means $M --calibration $C --text $T --work q
    scripts/measure_quality.py verdict q/levels.json q/llamacpp.json --plot quality.svg
    scripts/measure_quality.py nested $M --calibration $C --text $T --work q
    scripts/measure_quality.py ratio a.npz b.npz
    scripts/measure_quality.py d2moe $M --calibration $C --text $T --work q

What takes long is kept in --work: a run that was stopped goes on where it was when the same command
is given again. Results are tables for people, then one line of JSON, which --work keeps too.
Texts are cut as llama.cpp does: windows of 512 tokens, the second half scored. Divergences are in
nats. Needs edgemoe and numpy; `llamacpp` also llama.cpp's programs (scripts/quality/llamacpp.py
says how to build them).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from quality import baseline, levels, llamacpp, means, plot, ratio, tables, verdict
from quality.d2moe import DAMP
from quality.scored_text import ScoredText, prepare
from quality.stores import CalibrationText, converted
from quality.work import Work

from edgemoe import kernels
from edgemoe.checkpoint import Checkpoint, open_checkpoint
from edgemoe.errors import EdgeMoEError, UsageError, shown
from edgemoe.terminal.evaluate_output import terminable
from edgemoe.types import LEVELS

Result = dict[str, Any]


def parser() -> argparse.ArgumentParser:
    """Command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")

    add = _measuring(commands, "llamacpp", run_llamacpp, "what llama.cpp's types lose")
    add("--bin", type=Path, required=True, metavar="DIR", help="llama.cpp's programs")
    _calibration(add, "for the importance matrix")
    add("--types", default=",".join(llamacpp.TYPES), metavar="A,B", help="types to make")
    add("--threads", type=int, default=kernels.default_threads(), metavar="N")

    add = _measuring(commands, "levels", run_levels, "what each level of a store loses")
    _calibration(add, "to convert with; nearest codes if not given", required=False)
    _store(add)
    add("--levels", type=_levels, default=(), metavar="2,3", help="all the store has if not given")

    add = _measuring(commands, "means", run_means, "levels that differ, beside one for all")
    _calibration(add, "to convert with; nearest codes if not given", required=False)
    _store(add)
    add("--means", type=_means, default=(2.5, 3.0, 3.5), metavar="2.5,3", help="2.5,3,3.5")

    add = _command(commands, "verdict", run_verdict, "our levels against llama.cpp's types")
    add("levels", type=Path, metavar="LEVELS.json", help="what `levels` made")
    add("llamacpp", type=Path, metavar="LLAMACPP.json", help="what `llamacpp` made")
    add("--plot", type=Path, metavar="FILE.svg", help="draw divergence against bits")

    add = _measuring(commands, "nested", run_nested, "nested levels against each quantized alone")
    _calibration(add, "to convert with")
    add("--levels", type=_levels, default=LEVELS, metavar="2,3", help="2,3,4,6,8 if not given")

    add = _command(commands, "ratio", run_ratio, "ratio of two saved sets of divergences, paired")
    add("first", type=Path, metavar="A.npz", help="scores that another command left in --work")
    add("second", type=Path, metavar="B.npz", help="of the same text")

    add = _measuring(commands, "d2moe", run_d2moe, "D2MoE's quantization beside a store's")
    _calibration(add, "for the Hessians, and to convert with")
    _store(add)
    add("--damp", type=float, default=DAMP, metavar="X", help=f"of the Hessians' diagonal ({DAMP})")
    return p


_Add = Callable[..., Any]


def _command(commands: Any, name: str, run: Callable[..., Result], what: str) -> _Add:
    p = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
    p.set_defaults(run=run)
    add: _Add = p.add_argument
    return add


def _measuring(commands: Any, name: str, run: Callable[..., Result], what: str) -> _Add:
    """A command that takes a checkpoint and a text."""
    add = _command(commands, name, run, what)
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="the unquantized model")
    add("--text", type=Path, required=True, metavar="FILE", help="held-out text to score")
    add("--bytes", type=int, default=250_000, metavar="N", help="of it, from its start (250000)")
    add("--ctx", type=int, default=512, metavar="N", help="tokens of a window (512)")
    add("--work", type=Path, required=True, metavar="DIR", help="where all that is made is kept")
    return add


def _calibration(add: _Add, use: str, required: bool = True) -> None:
    add("--calibration", type=Path, required=required, metavar="FILE", help=f"text {use}")
    size = 2_000_000
    add("--calibration-bytes", type=int, default=size, metavar="N", help=f"of it ({size})")


def calibration(args: argparse.Namespace) -> CalibrationText | None:
    """The text to calibrate on, if there is one."""
    if args.calibration is None:
        return None
    return CalibrationText(args.calibration, args.calibration_bytes)


def _store(add: _Add) -> None:
    add("--store", type=Path, metavar="FILE.emoe", help="converted in --work if not given")


def _levels(text: str) -> tuple[int, ...]:
    out = tuple(sorted({int(word) for word in text.split(",")}))
    if not set(out) <= set(range(1, 9)):
        raise argparse.ArgumentTypeError(f"levels are from 1 to 8, not {text}")
    return out


def _means(text: str) -> tuple[float, ...]:
    out = tuple(sorted({float(word) for word in text.split(",")}))
    if not all(2 <= mean <= 8 for mean in out):
        raise argparse.ArgumentTypeError(f"means are from 2 to 8 bits, not {text}")
    return out


def opened(args: argparse.Namespace) -> tuple[Checkpoint, Work, ScoredText]:
    """The model, the work directory and the text of a measuring command."""
    checkpoint, work = open_checkpoint(args.checkpoint), Work(args.work)
    return checkpoint, work, prepare(checkpoint, args.text, work, size=args.bytes, ctx=args.ctx)


def finished(work: Work, name: str, text: ScoredText, figures: Mapping[str, Any]) -> Result:
    """A result with its text, also written to NAME.json and NAME-TEXT.json of the directory."""
    out = {"command": name, "text": text.figures(), **figures}
    for file in (f"{name}.json", f"{name}-{text.name}.json"):
        (work.directory / file).write_text(json.dumps(out) + "\n")
    return out


def run_llamacpp(args: argparse.Namespace) -> Result:
    checkpoint, work, text = opened(args)
    types = args.types.split(",")
    programs = llamacpp.Programs(args.bin, args.threads)
    size = args.calibration_bytes
    found = llamacpp.measure(checkpoint, programs, args.calibration, size, text, work, types)
    print(tables.losses(found, "type"))
    return finished(work, "llamacpp", text, {"types": found})


def run_levels(args: argparse.Namespace) -> Result:
    checkpoint, work, text = opened(args)
    store = args.store or converted(checkpoint, work, calibration(args))
    found = levels.measure(checkpoint, store, text, work, args.levels)
    print(tables.losses(found, "level"))
    return finished(work, "levels", text, {"store": str(store), "levels": found})


def run_means(args: argparse.Namespace) -> Result:
    checkpoint, work, text = opened(args)
    store = args.store or converted(checkpoint, work, calibration(args))
    found = means.measure(checkpoint, store, text, work, args.means)
    print(tables.losses(found["levels"], "level"))
    print(tables.means(found["means"]))
    print(tables.by_gate(found["means"], found["bits"]))
    return finished(work, "means", text, {"store": str(store), **found})


def run_verdict(args: argparse.Namespace) -> Result:
    ours, theirs = _read(args.levels, "levels"), _read(args.llamacpp, "llamacpp")
    found = verdict.judge(ours, theirs)
    print(tables.verdicts(found))
    if args.plot is not None:
        curve = [(f"{r['level']} bits", verdict.Point.of(r)) for r in ours["levels"]]
        marks = [(r["type"], verdict.Point.of(r)) for r in theirs["types"]]
        title = f"{ours['text']['text']}, {ours['text']['tokens']} tokens"
        args.plot.write_text(plot.svg(curve, marks, title))
    passed = sum(v["passed"] for v in found)
    return {"command": "verdict", "text": ours["text"], "passed": passed, "verdicts": found}


def _read(path: Path, command: str) -> Result:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as exc:
        raise UsageError(f"{shown(path)}: cannot be read as a result: {exc}") from None
    if not isinstance(found, dict) or found.get("command") != command:
        raise UsageError(f"{shown(path)} is not what `{command}` made")
    return found


def run_nested(args: argparse.Namespace) -> Result:
    checkpoint, work, text = opened(args)
    source = CalibrationText(args.calibration, args.calibration_bytes)
    found = ratio.measure(checkpoint, source, args.levels, text, work)
    print(tables.ratios(found))
    return finished(work, "nested", text, {"levels": found})


def run_ratio(args: argparse.Namespace) -> Result:
    found = ratio.of_files(args.first, args.second)
    return {"command": "ratio", "first": str(args.first), "second": str(args.second), **found}


def run_d2moe(args: argparse.Namespace) -> Result:
    checkpoint, work, text = opened(args)
    store = args.store or converted(checkpoint, work, calibration(args))
    source = CalibrationText(args.calibration, args.calibration_bytes)
    known = baseline.calibrate(checkpoint, source, args.ctx, work)
    found = baseline.measure(checkpoint, store, known, text, work, args.damp)
    for side in found.values():
        print(tables.losses(side, "variant" if side is found["d2moe"] else "level"))
    return finished(work, "d2moe", text, {"store": str(store), **found})


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line (sys.argv's if none is given); returns the exit status."""
    args = parser().parse_args(arguments)
    try:
        with terminable():
            print(json.dumps(args.run(args)))
    except (EdgeMoEError, OSError) as error:
        print(f"measure_quality: error: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, EdgeMoEError) else 1
    except KeyboardInterrupt:
        print("measure_quality: stopped; the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
