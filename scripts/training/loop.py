"""The training loop: schedule, gradients, progress, checkpoints that continue exactly."""

from __future__ import annotations

import math
import pickle
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .data import U16, Corpus, batches
from .evaluate import HeldOut
from .files import write_atomic
from .model import CausalLM
from .shape import Shape

STATE_FILE = "train_state.pt"
BUDGET = ("tokens", "minutes")
"""The settings a continuation may change: they move the schedule's end."""
EVAL_WINDOWS = 48
"""Windows of each held-out text scored while training; the end scores all of them."""


@dataclass(frozen=True)
class Recipe:
    """What decides the result of a run, beside the text and the machine's arithmetic.

    batch: windows a step. tokens, minutes: the schedule ends at whichever comes first; with
    minutes alone the result depends on the machine's speed.
    """

    shape: Shape
    seed: int
    batch: int
    tokens: int | None
    minutes: float | None
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    beta2: float
    clip: float
    aux_coefficient: float
    dropout: float
    story_share: float | None

    def __post_init__(self) -> None:
        for name in ("batch", "tokens", "minutes", "learning_rate", "clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive, not {value}")
        for name in ("warmup_steps", "weight_decay", "aux_coefficient", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, but is {getattr(self, name)}")
        for name in ("beta2", "dropout", "story_share"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, not {value}")


@dataclass
class Progress:
    """Where a run stands; seconds are of training, over all its sittings."""

    step: int = 0
    seconds: float = 0.0


class Stop(Exception):
    """The run was asked to stop; its state is on disk."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


def learning_rate(recipe: Recipe, step: int, share: float) -> float:
    """Linear warm-up by steps, then half a cosine that is zero where `share` (of the budget
    spent, 0 to 1) is one."""
    warm = min(1.0, (step + 1) / max(1, recipe.warmup_steps))
    return recipe.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW that decays matrices only: norms and nothing else are vectors here."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, recipe.beta2), fused=True)


class Trainer:
    """One run in `out`: a new one, or the continuation of the one whose state lies there.

    Raises:
        ValueError: the state in `out` belongs to another recipe.
    """

    def __init__(
        self,
        recipe: Recipe,
        corpus: Corpus,
        held_out: HeldOut,
        out: Path,
        *,
        device: torch.device,
        threads: int,
        log: Callable[[str], None] = print,
    ) -> None:
        self.recipe, self.corpus, self.held_out, self.out = recipe, corpus, held_out, out
        self.device, self.log = device, log
        self.progress = Progress()
        torch.manual_seed(recipe.seed)
        self.model = CausalLM(recipe.shape, recipe.dropout)
        self.model.initialise(torch.Generator().manual_seed(recipe.seed))
        self.model.to(device).train()
        self.optimizer = make_optimizer(self.model, recipe)
        # Two workers with half a batch each never wait for each other within a step, which
        # two threads within each product do. Dropout would draw in the workers' order.
        self.workers = 1
        if device.type == "cpu" and not recipe.dropout:
            self.workers = max(w for w in range(1, threads + 1) if recipe.batch % w == 0)
        self.worker_threads = max(1, threads // self.workers)
        self.pool = ThreadPoolExecutor(
            self.workers, initializer=torch.set_num_threads, initargs=(self.worker_threads,)
        )
        if (out / STATE_FILE).exists():
            self._load()

    def precision(self) -> AbstractContextManager[object]:
        """bfloat16 products on CUDA, plain float32 elsewhere."""
        if self.device.type == "cuda":
            return torch.autocast("cuda", torch.bfloat16)
        return nullcontext()

    @property
    def tokens_per_step(self) -> int:
        return self.recipe.batch * self.recipe.shape.context

    def spent(self) -> float:
        """Share of the budget that is gone, by tokens or by time, whichever is more."""
        shares = [0.0]
        if self.recipe.tokens is not None:
            steps = max(1, self.recipe.tokens // self.tokens_per_step)
            shares.append(self.progress.step / steps)
        if self.recipe.minutes is not None:
            shares.append(self.progress.seconds / (60 * self.recipe.minutes))
        return max(shares)

    def gradients(self, windows: U16) -> tuple[Tensor, Tensor]:
        """Sets .grad of every parameter from windows [batch, context + 1]; returns the mean cross
        entropy in nats and the mean balancing loss."""
        ids = torch.from_numpy(windows.astype(np.int64)).to(self.device, non_blocking=True)
        parameters = list(self.model.parameters())

        def one(part: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
            with self.precision():
                loss, balance = self.model(part[:, :-1], part[:, 1:])
                total = loss + self.recipe.aux_coefficient * balance
            return loss.detach(), balance.detach(), torch.autograd.grad(total, parameters)

        if self.workers == 1:
            results = [one(ids)]
        else:
            results = list(self.pool.map(one, ids.chunk(self.workers)))
        losses, balances, grads = zip(*results, strict=True)
        for parameter, *parts in zip(parameters, *grads, strict=True):
            total = parts[0]
            for part in parts[1:]:
                total = total.add_(part)
            parameter.grad = total.div_(len(parts)) if len(parts) > 1 else total
        return torch.stack(losses).mean(), torch.stack(balances).mean()

    def step(self, windows: U16) -> tuple[Tensor, Tensor, Tensor]:
        """One update; returns loss, balancing loss and the gradient's norm, on the device."""
        rate = learning_rate(self.recipe, self.progress.step, self.spent())
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss, balance = self.gradients(windows)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        return loss, balance, norm

    def run(
        self, *, save_minutes: float = 5.0, eval_minutes: float = 5.0, log_seconds: float = 15.0
    ) -> None:
        """Trains to the end of the budget and leaves the last state in `out`.

        Raises:
            Stop: SIGINT or SIGTERM came; the state was written after the step it came in.
            FloatingPointError: the loss is no longer a number.
        """
        caught: list[int] = []

        def note(number: int, _frame: FrameType | None) -> None:
            caught.append(number)

        before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._run(caught, save_minutes, eval_minutes, log_seconds)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.pool.shutdown()

    def _run(
        self, caught: list[int], save_minutes: float, eval_minutes: float, log_seconds: float
    ) -> None:
        stream = batches(
            self.corpus,
            window=self.recipe.shape.context,
            batch=self.recipe.batch,
            story_share=self.recipe.story_share,
            seed=self.recipe.seed,
            skip=self.progress.step * self.recipe.batch,
        )
        start = time.monotonic() - self.progress.seconds
        logged = saved = evaluated = time.monotonic()
        losses: list[Tensor] = []
        while self.spent() < 1:
            loss, balance, norm = self.step(next(stream))
            losses.append(loss)
            now = time.monotonic()
            self.progress.seconds = now - start
            if now - logged >= log_seconds or self.spent() >= 1:
                mean = float(torch.stack(losses).mean())
                if not math.isfinite(mean):
                    raise FloatingPointError(
                        f"the loss became {mean} at step {self.progress.step}: "
                        "lower --learning-rate and start again"
                    )
                rate = len(losses) * self.tokens_per_step / (now - logged)
                self._report(mean, float(balance), float(norm), rate)
                losses, logged = [], now
            if caught or now - saved >= 60 * save_minutes:
                self.save()
                saved = now
            if caught:
                raise Stop(caught[0])
            if now - evaluated >= 60 * eval_minutes and self.held_out.ids:
                self._evaluate()
                evaluated = logged = time.monotonic()
                losses = []
        self.save()

    def _report(self, loss: float, balance: float, norm: float, tokens_per_second: float) -> None:
        done = self.progress.step * self.tokens_per_step
        lr = self.optimizer.param_groups[0]["lr"]
        spent = self.spent()
        left = self.progress.seconds * (1 / spent - 1) if spent else math.inf
        self.log(
            f"step {self.progress.step}  {done / 1e6:.2f} M tokens  loss {loss:.4f}  "
            f"balance {balance:.3f}  gradient {norm:.2f}  lr {lr:.2e}  "
            f"{tokens_per_second:,.0f} tokens/s  ETA {max(0.0, left) / 60:.1f} min"
        )

    def _evaluate(self) -> None:
        scores = self.held_out.scores(self.model, self.precision(), EVAL_WINDOWS)
        text = "  ".join(f"{name} {s.bits_per_byte:.4f}" for name, s in scores.items())
        self.log(f"held-out bits per byte (first {EVAL_WINDOWS} windows): {text}")

    def save(self) -> None:
        """Everything a rerun needs to continue exactly, under one name, whole or not at all."""
        state: dict[str, Any] = {
            "recipe": asdict(self.recipe),
            "progress": asdict(self.progress),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        self.out.mkdir(parents=True, exist_ok=True)
        with write_atomic(self.out / STATE_FILE) as file:
            torch.save(state, file)

    def _load(self) -> None:
        path = self.out / STATE_FILE
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path} is damaged: remove it to start anew") from error
        mine, theirs = asdict(self.recipe), state["recipe"]
        changed = [k for k in mine if k not in BUDGET and theirs.get(k) != mine[k]]
        if changed:
            other = [f"{k} {theirs.get(k)!r} -> {mine[k]!r}" for k in changed]
            raise ValueError(
                f"{path} is of a run with other settings ({', '.join(other)}): "
                "repeat its settings to continue it, or choose another --out"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and "cuda_rng" in state:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        done = self.progress.step * self.tokens_per_step
        self.log(f"continuing at step {self.progress.step}, {done / 1e6:.2f} M tokens")
