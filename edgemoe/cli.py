"""The command line: what the arguments mean, what `--help` teaches, and how a run ends.

Commands import what they need when they run, so that `edgemoe --help` is immediate. Text goes to
stdout, everything else to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted,
141 the reader of stdout went away.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

import click

from . import __version__
from .cpus import BLAS_THREADS
from .errors import EdgeMoEError
from .terminal.bench import bench
from .terminal.options import LEVEL, early, level, loading, number, sampling, size


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
Examples:
  edgemoe run "Once upon a time"                 the bundled model, offline
  edgemoe convert OLMoE-1B-7B olmoe.emoe         a downloaded checkpoint, once
  edgemoe run olmoe.emoe "Why is the sky blue?" --mem 4G
  edgemoe inspect olmoe.emoe --verify
  edgemoe bench olmoe.emoe --bits 4
""",
)
@click.version_option(__version__, "-V", "--version", message="edgemoe %(version)s")
def cli() -> None:
    """Run Mixture-of-Experts language models with less memory than they need."""


@cli.command(
    short_help="Continue a prompt, or chat.",
    epilog="""\b
Examples:
  edgemoe run "Once upon a time"                 a prompt for the bundled model
  edgemoe run olmoe.emoe "Why is the sky blue?"  a model and a prompt
  edgemoe run olmoe.emoe --mem 4G                an interactive conversation
  cat letter.txt | edgemoe run olmoe.emoe        the prompt from a pipe
  edgemoe run -p tale.emoe                       a prompt that looks like a file
  edgemoe run --json --temp 0 --mem 512M "Hi" | jq .decode_tok_s
""",
)
@click.argument("model_arg", metavar="[MODEL]", required=False)
@click.argument("prompt_arg", metavar="[PROMPT]", required=False)
@click.option("-m", "--model", metavar="MODEL", help="The model, whatever its name looks like.")
@click.option("-p", "--prompt", metavar="TEXT", help="The prompt, whatever it looks like.")
@click.option("--raw", is_flag=True, help="Skip the model's chat template.")
@loading
@click.option(
    "-n",
    "--max-tokens",
    callback=number(1, 2**31 - 1, whole=True),
    metavar="N",
    default="256",
    show_default=True,
    help="Most tokens to generate.",
)
@click.option(
    "-c",
    "--ctx-size",
    callback=number(1, 2**31 - 1, whole=True),
    metavar="N",
    help="Most tokens of prompt and answer together.  [default: what they need, in steps of 256; "
    "interactive 4096; at most the model's]",
)
@sampling
@click.option(
    "--stop",
    multiple=True,
    metavar="TEXT",
    help="End the text before this string; may be given several times.",
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print one JSON object at the end: the text and the figures.",
)
@click.option(
    "--logits-hash",
    is_flag=True,
    help="Print a hash of all logits; equal over threads and batches.",
)
@early
@click.option(
    "--trace",
    metavar="FILE",
    help="Write what was computed, read and waited for, and when: a Chrome trace.",
)
def run(
    model_arg: str | None,
    prompt_arg: str | None,
    model: str | None,
    prompt: str | None,
    **settings: Any,
) -> int:
    """Continue a PROMPT with a MODEL, a store made by `edgemoe convert`.

    A lone argument is the model if it exists or ends in .emoe, .gguf or .safetensors; else it is
    the prompt, and the bundled model answers. Without a prompt it is read from a pipe; on a
    terminal a conversation starts (Ctrl-C ends an answer, Ctrl-D leaves).

    The text is streamed to stdout; everything else, and one line of figures at the end, goes to
    stderr. Sampling defaults are the model's own.
    """
    from .terminal.model_path import require_store, sort_arguments

    which, text = sort_arguments(model_arg, prompt_arg, model, prompt)
    if which is not None:
        require_store(which)
    from .terminal import run as running
    from .terminal.session import RunOptions

    names = ("temperature", "top_k", "top_p", "min_p", "repeat_penalty", "seed")
    given = {name: value for name in names if (value := settings.pop(name)) is not None}
    options = RunOptions(model=which, prompt=text, sampling=given, **settings)
    return running.run(options)


@cli.command(
    short_help="Make a store from a checkpoint.",
    epilog="""\b
Examples:
  hf download allenai/OLMoE-1B-7B-0924 --local-dir OLMoE-1B-7B
  edgemoe convert OLMoE-1B-7B olmoe.emoe
  edgemoe convert OLMoE-1B-7B olmoe.emoe --force   replace an older olmoe.emoe
  edgemoe convert Qwen3-30B-A3B-Q4_K_M.gguf qwen3.emoe
  edgemoe convert Qwen3-30B-A3B qwen3.emoe --max-level 4   17 GB in place of 32
  edgemoe convert OLMoE-1B-7B olmoe.emoe --calib books.txt   quantized for such text
""",
)
@click.argument("src", metavar="SRC")
@click.argument("out", metavar="OUT")
@click.option(
    "--max-level",
    type=click.Choice(["4", "6", "8"]),
    help="Most bits of an expert that are kept.  [default: as many as the source has]",
)
@click.option(
    "--calib",
    metavar="FILE",
    multiple=True,
    help="Text like what the model will see: better low levels, more time. May be repeated.",
)
@click.option("--force", is_flag=True, help="Replace OUT if it is a store already.")
def convert(src: str, out: str, max_level: str | None, calib: tuple[str, ...], force: bool) -> int:
    """Make OUT, a store, from SRC, a Hugging Face checkpoint directory or a GGUF file.

    Of a GGUF in parts give any part; those of types F32, F16, BF16, Q8_0, Q6_K, Q5_K, Q4_K, Q3_K,
    Q2_K, Q5_1, Q5_0, Q4_1, Q4_0, IQ4_NL and MXFP4 can be read, with tokenizer and chat template.

    The store holds every weight at 2, 3, 4, 6 and 8 bits at once; experts stop at --max-level, by
    default at what the source has: 4 bits of a Q4_K_M file, 8 of a checkpoint. Memory stays below
    1 GB whatever the size; with --calib, which runs the model over up to 128k tokens, below 2 GB.
    OUT appears when it is complete: an interrupted conversion leaves nothing.
    """
    from .terminal import convert as converting

    return converting.run(
        src, out, max_level=int(max_level) if max_level else None, force=force, calib=calib
    )


@cli.command(
    short_help="Measure what --mean-bits goes by.",
    epilog="""\b
Examples:
  edgemoe calibrate olmoe.emoe --text books.txt
  edgemoe run olmoe.emoe "Hi" --mean-bits 3
""",
)
@click.argument("store", metavar="STORE")
@click.option(
    "--text",
    metavar="FILE",
    required=True,
    help="UTF-8 text like what the model will see; --tokens of it are used, from all of it.",
)
@click.option(
    "--tokens",
    callback=number(64, 2**31 - 1, whole=True),
    metavar="N",
    default="4096",
    show_default=True,
    help="Of the text, at most.",
)
@click.option(
    "--mem",
    callback=size,
    metavar="SIZE",
    default="auto",
    show_default=True,
    help="Ceiling on all memory; experts that do not fit are streamed.",
)
@click.option(
    "-t",
    "--threads",
    callback=number(1, 1024, whole=True),
    metavar="N",
    help="Threads that compute.  [default: the performance cores this process may use]",
)
def calibrate(store: str, text: str, tokens: int, mem: str, threads: int | None) -> int:
    """Measure how much an error of each layer's experts costs, and write it into STORE.

    Every layer in turn is read at the lowest level, all others at the highest, and the text's next
    tokens are compared: as many passes over it as the model has layers with experts, and one. With
    --mean-bits layers whose errors cost more get more bits then. Nothing else of STORE changes, and
    a calibration that is stopped changes nothing.
    """
    from .terminal import calibrate as calibrating
    from .terminal.model_path import require_store

    require_store(store)
    return calibrating.run(store, text, tokens=tokens, mem=mem, threads=threads)


@cli.command(
    "eval",
    short_help="Measure how good a store is.",
    epilog="""\b
Examples:
  edgemoe eval olmoe.emoe --text wiki.test.raw --bits 4      perplexity at 4 bits
  edgemoe eval olmoe.emoe --text a.txt --ref OLMoE-1B-7B     and the distance from the original
  edgemoe eval olmoe.emoe --text a.txt --ref OLMoE-1B-7B --bits 3 --versus 4
  edgemoe eval olmoe.emoe --lambada lambada_test.jsonl --piqa piqa_valid.jsonl
""",
)
@click.argument("store", metavar="STORE")
@click.option("--text", "texts", metavar="FILE", multiple=True, help="UTF-8 text; may be repeated.")
@click.option(
    "--lambada", metavar="FILE", help='Predict last words: lines of {"text": ...}; as lm-eval does.'
)
@click.option(
    "--piqa",
    metavar="FILE",
    help='Choose solutions: lines of {"goal", "sol1", "sol2"}; NAME-labels.lst beside NAME.jsonl.',
)
@click.option(
    "--limit",
    callback=number(1, 2**31 - 1, whole=True),
    metavar="N",
    help="Take the first N questions of each file.",
)
@loading
@click.option(
    "--versus", callback=level, metavar=LEVEL, help="Compare with these bits, paired by window."
)
@click.option(
    "--ref",
    metavar="CHECKPOINT|FILE.gguf",
    help="What the store was made of, run in float32; under --mem, layer by layer where it must.",
)
@click.option(
    "--ctx",
    callback=number(4, 2**31 - 1, whole=True),
    metavar="N",
    default="512",
    show_default=True,
    help="Tokens of a window.",
)
@click.option(
    "--stride",
    callback=number(1, 2**31 - 1, whole=True),
    metavar="N",
    help="Tokens between window starts; ctx/2 scores every token once.  [default: ctx]",
)
@click.option(
    "--chunks",
    callback=number(1, 2**31 - 1, whole=True),
    metavar="N",
    help="Stop after so many windows.",
)
@click.option(
    "--parse-special",
    is_flag=True,
    help="Take <|endoftext|> and the like in a text as the tokens they spell, not as text.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def evaluate(**settings: Any) -> int:
    """Measure STORE: perplexity and bits per byte of texts, each with its standard error, and the
    accuracy on LAMBADA and PIQA, with 95 % intervals.

    Windows and scored tokens are llama.cpp's: windows of --ctx tokens that do not overlap, the
    second half scored. With --ref also KL divergence from the reference, its 99th percentile, the
    share of tokens both put first, and the RMS change of the true token's probability; the
    reference's side is kept on disk, so a sweep over levels runs it once.
    """
    from .terminal import evaluate as evaluating
    from .terminal.model_path import require_store

    require_store(settings["store"])
    return evaluating.run(evaluating.EvalOptions(**settings))


@cli.command(
    short_help="Make a GGUF file for llama.cpp.",
    epilog="""\b
Examples:
  edgemoe export olmoe.emoe olmoe-q8_0.gguf --type q8_0
  edgemoe export OLMoE-1B-7B olmoe-f16.gguf          straight from the checkpoint
  edgemoe export olmoe.emoe olmoe-3.gguf --bits 3    what 3-bit experts compute
""",
)
@click.argument("src", metavar="SRC")
@click.argument("out", metavar="OUT")
@click.option(
    "--type",
    "type_",
    type=click.Choice(("f16", "q8_0")),
    default="f16",
    show_default=True,
    help="Of the matrices: float16, or 8 bits with a scale for every 32 weights.",
)
@click.option(
    "--bits",
    callback=level,
    metavar=LEVEL,
    help="Write the experts of a store as they are at these bits.  [default: its highest]",
)
@click.option("--force", is_flag=True, help="Replace OUT if it is a GGUF file already.")
def export(src: str, out: str, type_: str, bits: int | None, force: bool) -> int:
    """Make OUT, a GGUF file that llama.cpp runs, from SRC, a store or a checkpoint.

    It computes the same model, tokenizer and chat template included; what llama.cpp cannot compute
    is refused by name. Memory stays below 1 GB whatever the size. OUT appears when it is complete:
    an interrupted export leaves nothing.
    """
    from .terminal import export as exporting

    return exporting.run(
        src, out, type="q8_0" if type_ == "q8_0" else "f16", bits=bits, force=force
    )


@cli.command(
    short_help="Say what a store holds.",
    epilog="""\b
Examples:
  edgemoe inspect olmoe.emoe                     sizes, and bits a weight at each level
  edgemoe inspect olmoe.emoe --verify            read all of it and compare the checksums
  edgemoe inspect olmoe.emoe --json | jq .levels
""",
)
@click.argument("store", metavar="STORE")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--verify", is_flag=True, help="Read the whole file; exit code 1 if it is damaged.")
def inspect(store: str, as_json: bool, verify: bool) -> int:
    """Say what STORE holds: architecture, sizes by part and level, checksums.

    Bits per weight are those of the file: scales, offsets and padding are counted.
    """
    from .terminal import inspect

    return inspect.run(store, as_json=as_json, verify=verify)


cli.add_command(bench)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: this process's); returns the exit code."""
    # Before NumPy is imported: its thread pools would count against the memory ceiling.
    os.environ.update(dict.fromkeys(BLAS_THREADS, "1"))
    args = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        code = _dispatch(args)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except KeyboardInterrupt:  # while an error was told
        return 128 + signal.SIGINT
    except BrokenPipeError:
        _forget_stdout()
        return 128 + signal.SIGPIPE
    except OSError as error:  # the last of stdout could not be written
        _forget_stdout()
        return _failed(f"cannot write the output: {error.strerror or error}", 1)


def _dispatch(args: list[str]) -> int:
    try:
        with cli.make_context("edgemoe", args) as ctx:
            code: Any = cli.invoke(ctx)
            return code if isinstance(code, int) else 0
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.ClickException as error:
        return _failed(error.format_message(), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        print("edgemoe: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        raise
    except EdgeMoEError as error:
        return _failed(str(error), error.exit_code)
    except MemoryError:
        return _failed("out of memory: give a lower --mem, or close other programs", 1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _failed(f"{where}{error.strerror or error}", 1)
    except Exception as error:
        return _failed(
            f"internal error, please report it: {type(error).__name__}: {error} "
            "(EDGEMOE_DEBUG=1 shows where)",
            1,
        )


def _failed(message: str, code: int) -> int:
    """Say what went wrong, in one printable line."""
    if os.environ.get("EDGEMOE_DEBUG") == "1" and sys.exc_info()[1] is not None:
        import traceback

        traceback.print_exc()
    line = " ".join(message.split())
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    print(f"edgemoe: error: {line}", file=sys.stderr)
    return code


def _forget_stdout() -> None:
    """Keep the interpreter from writing to a broken stdout once more when it ends."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except OSError:
        sys.stdout = None


if __name__ == "__main__":
    sys.exit(main())
