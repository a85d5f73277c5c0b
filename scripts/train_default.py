#!/usr/bin/env python3
"""Trains a small MoE language model (Qwen3-MoE architecture) on simple stories, for edgemoe.

    scripts/train_default.py --minutes 12 --out models/default            # a GPU, or the CPU
    scripts/train_default.py --preset quality --minutes 12 --out models/quality
    scripts/train_default.py --eval ../shared/models/stories-moe

The output directory is a Hugging Face checkpoint: `edgemoe convert` and transformers read it.
Stop it (Ctrl-C, SIGTERM) and run the same command again: it continues exactly where it stopped
(--minutes counts the time of both; another --minutes or --tokens moves the end).
Needs torch, numpy, tokenizers and safetensors.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

# Idle OpenMP threads must sleep: on shared cores spinning ones take the time of working ones.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from training.data import load_corpus
from training.evaluate import HELD_OUT, SIDE_NOTE, HeldOut, Score
from training.export import read_checkpoint, write_checkpoint
from training.loop import Recipe, Stop, Trainer
from training.shape import MIB, PRESETS, STORE_LIMIT, Shape

REPOSITORY = Path(__file__).resolve().parents[1]
CORPUS = REPOSITORY.parent / "shared" / "corpus"


def parser() -> argparse.ArgumentParser:
    """Command line; the defaults of sizes are the preset's."""
    p = argparse.ArgumentParser(
        description="Train a small MoE language model of the Qwen3-MoE architecture.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = p.add_argument
    add("--eval", type=Path, metavar="DIR", help="only score this checkpoint on the held-out texts")
    add("--out", type=Path, metavar="DIR", help="checkpoint directory (models/PRESET if not given)")
    add("--preset", choices=sorted(PRESETS), default="default", help="sizes of the model")
    add("--text", type=Path, default=CORPUS / "train_simple.txt", help="training text")
    add("--heldout", type=Path, default=CORPUS / "heldout", help="directory of held-out texts")
    add("--cache", type=Path, default=REPOSITORY / "models" / "cache", help="tokenized text")
    add("--minutes", type=float, help="time budget: the schedule ends with it")
    add("--tokens", type=float, help="token budget, e.g. 2e8: the schedule ends with it")
    add("--seed", type=int, default=0, help="decides weights, data order and dropout")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to train")
    add("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    add("--batch", type=int, help="windows a step (8 on the CPU, 128 on CUDA if not given)")
    add("--learning-rate", type=float, default=2e-3, help="peak of the schedule")
    add("--warmup-steps", type=int, default=100, help="steps of linear warm-up")
    add("--weight-decay", type=float, default=0.1, help="of matrices")
    add("--beta2", type=float, default=0.98, help="AdamW's second decay rate")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--aux-coefficient", type=float, default=0.01, help="weight of the balancing loss")
    add("--dropout", type=float, default=0.0, help="of the residual branches")
    add(
        "--story-share",
        type=float,
        help="share of tokens from short documents, which are repeated for it (as in the text)",
    )
    # Measured after 1.3 M tokens, tokens 2-8 of 160 held-out stories: 0.20 bits per byte with
    # <|endoftext|> before them, 0.77 without; tokens 2-32: 0.79 and 0.93.
    add("--add-bos", action=argparse.BooleanOptionalAction, default=True, help="add_bos_token")
    add("--save-minutes", type=float, default=5.0, help="minutes between saved states")
    add("--eval-minutes", type=float, default=5.0, help="minutes between held-out scores")
    add("--log-seconds", type=float, default=15.0, help="seconds between progress lines")
    for field in fields(Shape):
        kind = float if field.type == "float" else int
        option = "--" + field.name.replace("_", "-")
        add(option, type=kind, help="size in place of the preset's", default=argparse.SUPPRESS)
    return p


def say(line: str) -> None:
    print(time.strftime("%H:%M:%S", time.gmtime()), line, flush=True)


def print_scores(scores: dict[str, Score]) -> None:
    for name, s in scores.items():
        say(f"{name}: perplexity {s.perplexity:.2f}, {s.bits_per_byte:.4f} bits per byte")


def evaluate(directory: Path, heldout: Path, device: torch.device) -> None:
    """Scores a checkpoint in float32 on the held-out texts, wikitext beside them."""
    model, tokenizer = read_checkpoint(directory)
    held_out = HeldOut(tokenizer, heldout, (*HELD_OUT, SIDE_NOTE))
    if not held_out.ids:
        raise FileNotFoundError(f"{heldout}: none of {', '.join(HELD_OUT)} is here")
    print_scores(held_out.scores(model.to(device)))


def keep_freed_memory() -> None:
    """Makes glibc reuse large freed blocks: each fresh mapping costs page faults every step."""
    if platform.libc_ver()[0] == "glibc":
        mmap_threshold, trim_threshold = -3, -1  # malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, 1 << 30)


def train(args: argparse.Namespace, shape: Shape, device: torch.device) -> None:
    """Trains, or continues, and writes the checkpoint directory."""
    out = args.out or REPOSITORY / "models" / args.preset
    if args.preset == "default" and shape.store_bytes > STORE_LIMIT:
        size = shape.store_bytes / MIB
        raise ValueError(f"as a store this model takes about {size:.1f} MiB, at most 32 may ship")
    recipe = Recipe(
        shape=shape,
        seed=args.seed,
        batch=(128 if device.type == "cuda" else 8) if args.batch is None else args.batch,
        tokens=None if args.tokens is None else int(args.tokens),
        minutes=args.minutes,
        learning_rate=args.learning_rate,
        warmup_steps=args.warmup_steps,
        weight_decay=args.weight_decay,
        beta2=args.beta2,
        clip=args.clip,
        aux_coefficient=args.aux_coefficient,
        dropout=args.dropout,
        story_share=args.story_share,
    )
    corpus = load_corpus(args.text, shape.vocab_size, args.cache)
    say(
        f"{shape.parameters / 1e6:.1f} M parameters, {shape.active_parameters / 1e6:.2f} M active, "
        f"about {shape.store_bytes / MIB:.1f} MiB as a store; {len(corpus.ids) / 1e6:.1f} M tokens "
        f"of text; {device}, seed {args.seed}"
    )
    held_out = HeldOut(corpus.tokenizer, args.heldout)
    if not held_out.ids:
        say(f"{args.heldout} has none of {', '.join(HELD_OUT)}: nothing is scored")
    trainer = Trainer(
        recipe,
        corpus,
        held_out,
        out,
        device=device,
        threads=max(1, args.threads),
        log=say,
    )
    trainer.run(
        save_minutes=args.save_minutes,
        eval_minutes=args.eval_minutes,
        log_seconds=args.log_seconds,
    )
    write_checkpoint(out, trainer.model, corpus.tokenizer, args.aux_coefficient, args.add_bos)
    say(f"wrote {out}: {trainer.progress.step * trainer.tokens_per_step / 1e6:.2f} M tokens")
    if held_out.ids:
        print_scores(held_out.scores(trainer.model))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line (sys.argv's if none is given); returns the exit status."""
    p = parser()
    args = p.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: torch sees no CUDA device")
    if not args.eval and args.minutes is None and args.tokens is None:
        p.error("give a budget: --minutes, --tokens or both")
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    torch.set_num_threads(max(1, args.threads))
    sizes = {f.name: getattr(args, f.name) for f in fields(Shape) if hasattr(args, f.name)}
    try:
        if args.eval:
            evaluate(args.eval, args.heldout, device)
        else:
            train(args, replace(PRESETS[args.preset], **sizes), device)
    except Stop as stop:
        say(f"{stop}: saved; the same command continues")
        return 128 + stop.signal_number
    except (OSError, ValueError, FloatingPointError) as error:
        print(f"train_default: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
