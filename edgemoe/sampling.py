"""From logits to the next token id.

The steps and their order are those of llama.cpp's default chain:
repeat penalty, top-k, top-p, min-p, temperature, draw.
The three cuts therefore look at the distribution before the temperature flattens it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .errors import CheckpointError, EdgeMoEError, UnsupportedError, UsageError
from .types import F32, I64

REPEAT_WINDOW = 64
"""How many of the last tokens (prompt included) the repeat penalty looks back on, as llama.cpp."""

MAX_SEED = 2**64 - 1


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn; the defaults are greedy and change nothing.

    temperature: divides the logits, 0 to 100; 0 takes the likeliest token and draws nothing.
    top_k: keep the k likeliest tokens; 0 keeps all.
    top_p: keep the likeliest tokens until their probabilities sum to it, above 0 to 1; 1 keeps all.
    min_p: drop tokens less likely than this share of the likeliest, 0 to 1; 0 keeps all.
    repeat_penalty: logits of the last REPEAT_WINDOW tokens are divided by it where positive and
        multiplied by it where negative (CTRL, Keskar et al. 2019), above 0 to 100; 1 does nothing.
    seed: 0 to 2**64 - 1; equal seeds draw equal texts. None takes fresh entropy.

    Raises:
        UsageError: a value is outside its range; the message names it and the range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, 0.0, 100.0)
        _integer("top_k", self.top_k, 0, 2**31 - 1)
        _number("top_p", self.top_p, 0.0, 1.0, above=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repeat_penalty", self.repeat_penalty, 0.0, 100.0, above=True)
        if self.seed is not None:
            _integer("seed", self.seed, 0, MAX_SEED)


def _number(name: str, value: Any, low: float, high: float, *, above: bool = False) -> None:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool)
    if ok and math.isfinite(value) and low <= value <= high and not (above and value == low):
        return
    start = f"above {low:g}" if above else f"from {low:g}"
    raise UsageError(f"{name} must be a number {start} to {high:g}, not {value!r}")


def _integer(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
        return
    raise UsageError(f"{name} must be a whole number from {low} to {high}, not {value!r}")


class Sampler:
    """Draws ids for one sequence; holds the random state, so one sampler a sequence."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self._rng = np.random.Generator(np.random.PCG64(params.seed))

    def sample(self, logits: F32, recent: Sequence[int] = ()) -> int:
        """The next id.

        Args:
            logits: float32 [vocab]; left as it is. -inf excludes a token.
            recent: ids so far, prompt included, latest last.

        Raises:
            EdgeMoEError: the logits hold NaN or +inf, or exclude every token.
        """
        p = self.params
        top = float(logits.max())
        if not math.isfinite(top):
            raise EdgeMoEError(
                f"the model's logits are not finite (largest: {top}): the weights are damaged or "
                "the model does not work at this bit-width"
            )
        if p.repeat_penalty != 1.0 and len(recent):
            logits = logits.copy()
            seen = np.unique(np.asarray(recent[-REPEAT_WINDOW:], np.int64))
            x = logits[seen]
            factor = np.float32(p.repeat_penalty)
            logits[seen] = np.where(x > 0, x / factor, x * factor)
        if p.temperature == 0.0:
            return int(logits.argmax())  # the lowest id among equals
        ids = _candidates(logits, p)
        kept = logits[ids].astype(np.float64)
        # The maximum goes first, so that a tiny temperature cannot overflow.
        with np.errstate(over="ignore"):
            weights = np.exp((kept - kept[0]) / p.temperature)
        steps = np.cumsum(weights)
        drawn = np.searchsorted(steps, self._rng.random() * steps[-1], side="right")
        return int(ids[min(int(drawn), len(ids) - 1)])


def _candidates(logits: F32, p: SamplingParams) -> I64:
    """Ids that survive top-k, top-p and min-p, likeliest first, lowest id first among equals."""
    vocab = len(logits)
    ids = np.arange(vocab)
    if 0 < p.top_k < vocab:
        kth = np.partition(logits, vocab - p.top_k)[vocab - p.top_k]
        above = np.flatnonzero(logits > kth)
        equal = np.flatnonzero(logits == kth)[: p.top_k - len(above)]
        ids = np.union1d(above, equal)
    weights = np.exp(logits[ids].astype(np.float64) - float(logits[ids].max()))
    probs = weights / weights.sum()
    if p.top_p < 1.0:
        # All tokens below this sum to less than 1 - top_p, so none of them is needed: sorting the
        # few others gives the same set as sorting the whole vocabulary.
        few = probs >= (1.0 - p.top_p) / len(probs)
        ids, probs = ids[few], probs[few]
    order = np.argsort(-probs, kind="stable")
    ids, probs = ids[order], probs[order]
    if p.top_p < 1.0:
        keep = int(np.searchsorted(np.cumsum(probs), p.top_p, side="left")) + 1
        ids, probs = ids[:keep], probs[:keep]
    if p.min_p > 0.0:
        ids = ids[probs >= p.min_p * probs[0]]
    return ids.astype(np.int64, copy=False)


_FROM_CONFIG = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}

# Settings that change which token comes next and that are not implemented, with the values at
# which they do nothing. Everything else a generation_config.json may hold (lengths, cache and
# output options, token ids) has no part in sampling.
_OFF: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "penalty_alpha": (None, 0, 0.0),
    "typical_p": (None, 1, 1.0),
    "epsilon_cutoff": (None, 0, 0.0),
    "eta_cutoff": (None, 0, 0.0),
    "top_h": (None,),
    "diversity_penalty": (None, 0, 0.0),
    "encoder_repetition_penalty": (None, 1, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None, []),
    "force_words_ids": (None, []),
    "constraints": (None, []),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "sequence_bias": (None, {}, []),
    "exponential_decay_length_penalty": (None,),
    "guidance_scale": (None, 1, 1.0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "watermarking_config": (None,),
    "dola_layers": (None,),
}


def from_generation_config(config: Mapping[str, Any]) -> SamplingParams:
    """The sampling a model's generation_config.json asks for.

    As transformers: `do_sample` false or absent is greedy; an absent or null setting is off.

    Raises:
        CheckpointError: a value is of the wrong type or out of range.
        UnsupportedError: it asks for a way of choosing tokens that edgemoe does not have.
    """
    where = "generation_config.json"
    for key, off in _OFF.items():
        value = config.get(key)
        if not any(value == v for v in off):
            raise UnsupportedError(
                f"{where}: {key} = {value!r} is not supported; remove it from the checkpoint"
            )
    do_sample = config.get("do_sample")
    if not isinstance(do_sample, (bool, type(None))):
        raise CheckpointError(f"{where}: do_sample must be true or false, not {do_sample!r}")
    given = {
        ours: config[theirs]
        for theirs, ours in _FROM_CONFIG.items()
        if config.get(theirs) is not None
    }
    try:
        params = SamplingParams(**{"temperature": 1.0, **given})
    except UsageError as error:
        # The message begins with our name of the setting.
        ours, _, rest = str(error).partition(" ")
        theirs = next(key for key, name in _FROM_CONFIG.items() if name == ours)
        raise CheckpointError(f"{where}: {theirs} {rest}") from None
    return params if do_sample else replace(params, temperature=0.0)
