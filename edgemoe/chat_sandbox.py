"""Where chat templates run: Jinja's immutable sandbox, on fuel.

Templates come with a checkpoint from anyone, so they are untrusted programs. Every loop round,
call, filter, operator, container and piece of output costs some fuel, more where it makes more
data. What ends when the fuel does, and how much memory it can have taken by then, depends on the
template and the conversation, not on the machine.

Rendering follows transformers (utils/chat_template_utils.py): same environment settings, same
extra filter and functions.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, cast

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

FUEL = 16 * 1024 * 1024
FUEL_PER_INPUT = 64
"""Fuel of one rendering: FUEL + FUEL_PER_INPUT a character of the conversation. A unit is about a
byte of data made; a step costs STEP, so 16 Mi are a quarter of a million steps, about a second."""

STEP = 64
DEADLINE_S = 10.0
"""A backstop for steps that are slow for their size."""

_NODE = 32
# Filters and methods whose result can be as large as the product of their arguments; that of all
# others is at most as large as the sum.
_GROWING = frozenset(
    {
        *("center", "ljust", "rjust", "zfill", "expandtabs", "indent", "wordwrap", "urlize"),
        *("replace", "translate", "join", "format", "format_map", "tojson", "to_bytes"),
        *("batch", "slice", "round", "sum"),
    }
)
# Filters that look at a container, not into what it holds.
_SHALLOW = frozenset({"length", "count", "first", "last", "default", "d", "items", "attr"})
_WIDE_PERCENT = re.compile(r"%[^%a-zA-Z]*?(\*|\d{5})")
_WIDE_BRACES = re.compile(r"\{[^{}]*(\{|\d{5})")


class OutOfFuel(Exception):
    """The template does not end within its fuel."""


class Refusal(Exception):
    """The template called raise_exception."""


class Meter:
    """Fuel left in the rendering at hand."""

    def __init__(self) -> None:
        self.left = 0
        self._ends = 0.0

    def fill(self, fuel: int) -> None:
        self.left = fuel
        self._ends = time.monotonic() + DEADLINE_S

    def spend(self, amount: int) -> None:
        self.left -= amount
        if self.left < 0 or time.monotonic() > self._ends:
            self.left = -1
            raise OutOfFuel

    def weight(self, value: Any) -> int:
        """Size of a value written out in full, counting shared parts as often as they appear."""
        total, todo = 0, [value]
        while todo:
            item = todo.pop()
            if isinstance(item, (str, bytes)):
                total += _NODE + len(item)
            elif isinstance(item, int):
                total += _NODE + item.bit_length() // 8
            else:
                total += _NODE
                if isinstance(item, Namespace):
                    item = object.__getattribute__(item, "_Namespace__attrs")
                if isinstance(item, Mapping):
                    todo.extend(item.keys())
                    todo.extend(item.values())
                elif isinstance(item, (list, tuple, set, frozenset)):
                    todo.extend(item)
            if total > self.left:
                raise OutOfFuel
        return total

    def charge(self, value: Any) -> Any:
        """Pay for one step that made `value`, and hand it on."""
        self.spend(STEP + self.weight(value))
        return value

    def foresee(self, name: str, values: Iterable[Any]) -> None:
        """Stop an operation whose result could be more than the fuel left, before it runs."""
        if name in _SHALLOW:
            return
        growing = name in _GROWING
        bound = 1
        for v in values:
            if isinstance(v, (str, bytes)):
                # Taken apart, a string becomes an object a character.
                size = len(v) if growing else _NODE * len(v)
            elif isinstance(v, (list, tuple, dict, Namespace)):
                size = self.weight(v)
            else:
                size = abs(v) if growing and isinstance(v, int) else 1
            bound = bound * max(1, size) if growing else bound + size
        if bound > self.left:
            raise OutOfFuel
        if name in ("format", "format_map"):
            for v in values:
                if isinstance(v, str) and (_WIDE_PERCENT.search(v) or _WIDE_BRACES.search(v)):
                    raise OutOfFuel


class _MeteredSyntax(NodeTransformer):
    """Puts the meter where the environment has no hook: literals, comparisons, loops, macros."""

    def _paid(self, node: nodes.Node) -> nodes.Expr:
        return nodes.Filter(
            cast(nodes.Expr, node), " charge", [], [], None, None, lineno=node.lineno
        )

    def _wrap(self, node: nodes.Expr) -> nodes.Expr:
        self.generic_visit(node)
        # A tuple may be the target of a loop or an assignment.
        return node if getattr(node, "ctx", "load") == "store" else self._paid(node)

    visit_List = visit_Tuple = visit_Dict = _wrap

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        self.generic_visit(node)
        node.expr = self._paid(node.expr)
        for operand in node.ops:
            operand.expr = self._paid(operand.expr)
        return node

    def visit_Test(self, node: nodes.Test) -> nodes.Test:
        self.generic_visit(node)
        node.node = self._paid(node.node)
        node.args = [self._paid(arg) for arg in node.args or ()]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(parts, " concat", [], [], None, None, lineno=node.lineno)

    def _tick(self, node: Any) -> Any:
        self.generic_visit(node)
        step = self._paid(nodes.Const(None, lineno=node.lineno))
        node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
        if isinstance(node, nodes.For) and node.test is not None:
            node.test = self._paid(node.test)
        return node

    visit_For = visit_Macro = visit_CallBlock = _tick


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training; here it is its content."""

    tags = {"generation"}  # noqa: RUF012, the base class declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


class _SafeNamespace(Namespace):
    """Jinja's namespace without underscore names, which reach into the interpreter."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # As in Jinja, so that `namespace(self=...)` works.
        self, rest = args[0], args[1:]
        attrs = dict(*rest, **kwargs)
        for name in attrs:
            _check_attribute(name)
        Namespace.__init__(self, attrs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: Any) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} is not allowed")


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "**", "%"])

    def __init__(self) -> None:
        self.meter = meter = Meter()

        @jinja2.pass_context
        def finalize(context: Context, value: Any) -> Any:
            # Taking the context keeps the compiler from evaluating outputs outside the meter.
            return meter.charge(value)

        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"],
            optimized=False,
            finalize=finalize,
        )
        self.filters["tojson"] = _tojson
        self.filters = {name: self._metered(name, f) for name, f in self.filters.items()}
        self.filters[" charge"] = meter.charge
        self.filters[" concat"] = self._concat
        del self.globals["lipsum"]
        self.globals.update(
            raise_exception=_raise_exception,
            strftime_now=_strftime_now,
            namespace=_SafeNamespace,
            dict=_new_dict,
        )

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_MeteredSyntax().visit(source), *args, **kwargs)

    def _metered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = self._known(name, args, kwargs)
            return self.meter.charge(function(*args, **kwargs))

        return run

    def _known(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], *owner: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of operation `name`, once its result is known to be within the fuel."""
        if name in _GROWING:
            args = tuple(self._materialised(a) for a in args)
            kwargs = {k: self._materialised(v) for k, v in kwargs.items()}
        self.meter.foresee(name, [*owner, *args, *kwargs.values()])
        return args, kwargs

    def _materialised(self, value: Any) -> Any:
        """A lazy sequence as a list, paid for item by item; anything else as it is."""
        if isinstance(value, (range, Iterator)):
            return [self.meter.charge(item) for item in value]
        return value

    def _concat(self, parts: Sequence[Any]) -> str:
        self.meter.charge(parts)
        return "".join(map(str, parts))

    def concat(self, parts: Iterable[str]) -> str:
        """Join of output pieces, of a macro, of a set block or of the whole text."""
        kept = []
        for piece in parts:
            self.meter.spend(_NODE + len(piece))
            kept.append(piece)
        return "".join(kept)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        meter = self.meter
        if operator == "*":
            for sequence, times in ((left, right), (right, left)):
                if isinstance(times, int) and isinstance(sequence, (str, bytes, list, tuple)):
                    meter.spend(meter.weight(sequence) * max(0, times))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            meter.spend(left.bit_length() * max(0, right))
        elif operator == "%" and isinstance(left, str):
            meter.foresee("format", [left])
        return meter.charge(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        name = str(getattr(__obj, "__name__", ""))
        # Jinja wraps str.format and str.format_map; the string is the wrapped method's owner.
        method = getattr(__obj, "__wrapped__", __obj)
        owner = getattr(method, "__self__", None)
        args, kwargs = __self._known(name, args, kwargs, owner)
        return __self.meter.charge(super().call(__context, __obj, *args, **kwargs))


def _tojson(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML.
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: object = "") -> None:
    raise Refusal(str(message))


def _strftime_now(form: str) -> str:
    if re.search(r"\d{3}", form):
        raise OutOfFuel  # glibc takes "%999999999Y" as a field width
    return datetime.now().strftime(form)


def _new_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)
