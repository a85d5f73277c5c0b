"""Options that several commands take, and callbacks that check what is given for them.

The command line imports this before it knows the command: nothing here imports NumPy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from ..errors import UsageError

# types.LEVELS; importing it here would cost the import of NumPy
_LEVELS = ("2", "3", "4", "6", "8")
LEVEL = "{" + ",".join(_LEVELS) + "}"


def number(
    low: float, high: float, *, whole: bool = False, above: bool = False
) -> Callable[[click.Context, click.Parameter, str | None], float | None]:
    """A callback that takes numbers from `low` to `high`, and answers others with the range.

    whole: only whole numbers. above: `low` itself is too low.
    """

    def check(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
        if value is None:
            return None
        try:
            number: float = int(value) if whole else float(value)
        except ValueError:
            number = float("nan")
        if low <= number <= high and not (above and number == low):
            return number
        kind = "a whole number" if whole else "a number"
        start = f"above {low}" if above else f"from {low}"
        raise click.BadParameter(f"must be {kind} {start} to {high}, not {value}")

    return check


def level(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """A callback that takes the bit-widths of a store."""
    if value is None or value in _LEVELS:
        return None if value is None else int(value)
    allowed = ", ".join(_LEVELS[:-1]) + f" or {_LEVELS[-1]}"
    raise click.BadParameter(f"must be {allowed}, not {value}")


def size(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """A callback that takes memory sizes and leaves them as they are."""
    from ..loader.budget import parse_size

    try:
        parse_size(value)
    except UsageError as error:
        raise click.BadParameter(str(error)) from None
    return value


def loading(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of every command that loads a store."""
    options = [
        click.option(
            "--mem",
            callback=size,
            metavar="SIZE",
            default="auto",
            show_default=True,
            help="Ceiling on all memory: 512M, 8G, 8GB, 8GiB; auto takes 70 % of what is free.",
        ),
        click.option(
            "--bits",
            callback=level,
            metavar=LEVEL,
            help="Bits of the experts.  [default: the most that fit]",
        ),
        click.option(
            "--dense-bits",
            callback=level,
            metavar=LEVEL,
            help="Bits of all other matrices.  [default: 8 with --bits 8, else 6]",
        ),
        click.option(
            "-t",
            "--threads",
            callback=number(1, 1024, whole=True),
            metavar="N",
            help="Threads that compute.  [default: the performance cores this process may use]",
        ),
        click.option(
            "--kv-type",
            type=click.Choice(("f16", "int8")),
            default="f16",
            show_default=True,
            help="What keys and values are kept as; int8 takes half the memory.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command
