"""The interactive prompt of `edgemoe run`: lines in, answers out, history, one conversation."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..engine import Model
from ..errors import UsageError
from ..opened import OpenedModel
from .session import (
    INTERACTIVE_CTX,
    RunOptions,
    choose_sampling,
    load_model,
    note,
    note_idle_settings,
    prompt_ids,
    report,
    speak,
)

HISTORY_LINES = 1000


def converse(opened: OpenedModel, options: RunOptions) -> int:
    """Answer lines from the terminal until Ctrl-D; returns the exit code.

    With a chat template the lines are turns of one conversation; without, each line is a prompt of
    its own. Ctrl-C ends the answer at hand, or clears the line.
    """
    longest = opened.config.max_position_embeddings
    ctx = options.ctx_size or min(longest, INTERACTIVE_CTX)
    note_idle_settings(options, choose_sampling(opened, options))
    with history(), load_model(opened, options, ctx) as model:
        chats = opened.chat_template is not None and not options.raw
        kind = "a conversation" if chats else "every line a prompt of its own"
        note(f"{kind}; Ctrl-C ends an answer, Ctrl-D leaves")
        talk: list[dict[str, str]] = []
        while (line := read_line()) is not None:
            if line.strip():
                turn = {"role": "user", "content": line}
                talk = _answer(opened, model, options, [*talk, turn] if chats else [turn])
    return 0


def _answer(
    opened: OpenedModel,
    model: Model,
    options: RunOptions,
    talk: list[dict[str, str]],
) -> list[dict[str, str]]:
    """Answer the last turn; the conversation as it is to go on."""
    sampling = choose_sampling(opened, options)  # a fresh seed each time, unless one was given
    try:
        ids, kept = fit(opened, talk, options, model.plan.ctx_size)
        generation = model.stream(
            ids,
            max_tokens=options.max_tokens,
            sampling=sampling,
            stop=options.stop,
            logits_hash=options.logits_hash,
        )
        speak(generation)
    except UsageError as error:  # too long, or refused by the template: the user can say it anew
        note(str(error))
        return talk[:-1]
    except KeyboardInterrupt:
        note("interrupted before the first token")
        return talk[:-1]
    report(generation, sampling, logits_hash=options.logits_hash)
    return [*kept, {"role": "assistant", "content": generation.text}]


def fit(
    opened: OpenedModel, talk: list[dict[str, str]], options: RunOptions, ctx_size: int
) -> tuple[list[int], list[dict[str, str]]]:
    """Prompt ids of a conversation and its turns that are left.

    The oldest questions are forgotten, with their answers, and it is said, while less than a
    quarter of the context (or -n, if that is less) would be left for the answer.

    Raises:
        UsageError: the last turn alone does not fit.
    """
    room = min(options.max_tokens, ctx_size // 4)
    kept, forgotten = talk, 0
    ids = prompt_ids(opened, kept, raw=options.raw)
    while len(ids) + room > ctx_size and len(kept) > 2:
        kept, forgotten = kept[2:], forgotten + 1
        ids = prompt_ids(opened, kept, raw=options.raw)
    if len(ids) >= ctx_size:
        raise UsageError(
            f"this turn has {len(ids)} tokens and the context {ctx_size}: shorten it, or start "
            "again with a larger --ctx-size"
        )
    if forgotten:
        turns = "turn was" if forgotten == 1 else f"{forgotten} turns were"
        note(f"the context is full: the oldest {turns} forgotten (see --ctx-size)")
    return ids, kept


def read_line() -> str | None:
    """The next line the user enters; None at the end of input."""
    while True:
        try:
            if sys.stdout.isatty():
                return input("> ")
            # stdout goes elsewhere: it takes the answers only.
            sys.stderr.write("> ")
            sys.stderr.flush()
            return input()
        except EOFError:
            sys.stderr.write("\n")
            return None
        except KeyboardInterrupt:
            sys.stderr.write("\n")
        except UnicodeDecodeError:
            note("that line is not UTF-8")


@contextmanager
def history() -> Iterator[None]:
    """Line editing, with the lines of earlier sessions; kept in $XDG_STATE_HOME/edgemoe/history.

    A convenience: where Python has no readline or the file cannot be used, all else works.
    """
    try:
        import readline
    except ImportError:
        yield
        return
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    path = Path(state) / "edgemoe" / "history"
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(HISTORY_LINES)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            readline.write_history_file(path)
