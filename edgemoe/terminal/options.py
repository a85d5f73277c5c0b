"""Options that several commands take, and callbacks that check what is given for them.

The command line imports this before it knows the command: nothing here imports NumPy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def size(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """A callback that takes memory sizes and leaves them as they are; auto only where that is the
    default."""
    if value is None:
        return None
    from ..loader.budget import parse_size

    try:
        parsed = parse_size(value)
    except UsageError as error:
        raise click.BadParameter(str(error)) from None
    if parsed is None and param.default != "auto":
        raise click.BadParameter(f"must be a size such as 512M, 8G, 8GB or 8GiB, not {value}")
    return value


def rate(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """A callback that takes MB (10^6 bytes) a second and gives bytes a second."""
    megabytes = number(0, 1_000_000, above=True)(ctx, param, value)
    return None if megabytes is None else megabytes * 1e6


def early(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of what is read before it is asked for."""
    options = [
        click.option(
            "--look-ahead/--no-look-ahead",
            default=True,
            show_default=True,
            help="Where experts are streamed: read what the next layer will probably want, while "
            "such guesses prove right.",
        ),
        click.option(
            "--preload",
            is_flag=True,
            help="Where experts are streamed: fill the memory for them before the first token, "
            "which comes later for it, as the others come sooner.",
        ),
    ]
    return _with(options, command)


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
            "--cache",
            callback=size,
            metavar="SIZE",
            help="Memory for experts alone, for experiments; --mem holds all the same.  "
            "[default: what --mem leaves]",
        ),
        click.option(
            "--bits",
            callback=level,
            metavar=LEVEL,
            help="Bits of the experts.  [default: the most at which all fit, else 4, streamed]",
        ),
        click.option(
            "--mean-bits",
            callback=number(2, 8),
            metavar="X",
            help="Bits of the experts on average: each token gets each of its experts at as many "
            "as it gains from. Instead of --bits and --exact.",
        ),
        click.option(
            "--prefill-mean-bits",
            callback=number(2, 8),
            metavar="X",
            help="The same for the tokens of a prompt.  [default: as --mean-bits]",
        ),
        click.option(
            "--read-price",
            callback=number(1, 1e9),
            metavar="X",
            help="With --mean-bits: how many times as much bits have to gain that are not in "
            "memory; 1 takes no account of it.  [default: 8]",
        ),
        click.option(
            "--dense-bits",
            callback=level,
            metavar=LEVEL,
            help="Bits of all other matrices.  [default: 8 with --bits 8, else 6]",
        ),
        click.option(
            "--exact",
            is_flag=True,
            help="Every expert at --bits, or at the store's most; never fewer bits to make it fit: "
            "what does not fit is read when it is needed.",
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
        click.option(
            "--io-limit",
            callback=rate,
            metavar="MB/S",
            help="Read no faster than so many 10^6 bytes a second, to study slow disks.",
        ),
    ]
    return _with(options, command)


def sampling(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that choose among the tokens a model finds likely (sampling.py checks them too)."""
    options = [
        click.option(
            "--temp",
            "temperature",
            callback=number(0, 100),
            metavar="X",
            help="Temperature; 0 always takes the likeliest token.",
        ),
        click.option(
            "--top-k",
            callback=number(0, 2**31 - 1, whole=True),
            metavar="N",
            help="Draw from the N likeliest tokens; 0 from all.",
        ),
        click.option(
            "--top-p",
            callback=number(0, 1, above=True),
            metavar="X",
            help="Draw from the likeliest tokens that sum to this probability.",
        ),
        click.option(
            "--min-p",
            callback=number(0, 1),
            metavar="X",
            help="Drop tokens below this share of the likeliest one's probability.",
        ),
        click.option(
            "--repeat-penalty",
            callback=number(0, 100, above=True),
            metavar="X",
            help="Above 1 makes the last 64 tokens less likely.",
        ),
        click.option(
            "--seed",
            callback=number(0, 2**64 - 1, whole=True),
            metavar="N",
            help="Equal seeds give equal texts.  [default: a fresh one, printed]",
        ),
    ]
    return _with(options, command)


def _with(options: Sequence[Callable[..., Any]], command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(options):
        command = option(command)
    return command
