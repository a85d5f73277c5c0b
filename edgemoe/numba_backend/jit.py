"""Compilation: on the first call, for one signature, kept on disk where a place for it is found."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import numba
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

# Never fastmath: no reassociation and no fused multiply-add, or results would differ from the
# native core's. The numpy error model leaves out the checks for division by zero.
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": False}

# No directory for it can be written (RuntimeError), the disk is full, or what lies there is broken.
_UNUSABLE_CACHE = (RuntimeError, OSError, EOFError, pickle.UnpicklingError)

_F = TypeVar("_F", bound=Callable[..., Any])


def helper(function: _F) -> _F:
    """Decorator of functions that kernels call: compiled into each of their callers."""
    out: _F = numba.njit(**_OPTIONS)(function)
    return out


def array_in(dtype: Any, ndim: int) -> Any:
    """The type of an array argument that is only read; writable arrays are accepted too."""
    return types.Array(dtype, ndim, "C", readonly=True)


def array_out(dtype: Any, ndim: int) -> Any:
    """The type of an array argument that is written."""
    return types.Array(dtype, ndim, "C")


def _pointer(typingctx: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


pointer = intrinsic(_pointer)
"""int64 address -> pointer, inside kernels, for numba.carray."""


class Kernel:
    """A function that is compiled when it is first called, without the GIL while it runs.

    One signature each, so that there is one compiled version whatever arrays come; any other dtype,
    rank or memory order is a TypeError, and nothing is ever copied.

    numba keeps the machine code in a __pycache__ beside the source or, where that cannot be
    written, in the user's cache directory (NUMBA_CACHE_DIR names another). Where neither can be
    used each process compiles anew. What is kept holds as long as the kernel's own file does
    not change: so kernels use helpers of their own file, and of others only `pointer`.
    """

    every: ClassVar[list[Kernel]] = []
    _lock = threading.Lock()

    def __init__(self, function: Callable[..., Any], signature: Any) -> None:
        self._function, self._signature = function, signature
        self._compiled: Any = None
        Kernel.every.append(self)

    def compiled(self) -> Any:
        """The compiled function."""
        with Kernel._lock:
            if self._compiled is None:
                try:
                    build = numba.njit(self._signature, cache=True, **_OPTIONS)
                    self._compiled = build(self._function)
                except _UNUSABLE_CACHE:
                    self._compiled = numba.njit(self._signature, **_OPTIONS)(self._function)
        return self._compiled

    def __call__(self, *args: Any) -> Any:
        return (self._compiled or self.compiled())(*args)


def kernel(*arguments: Any, returns: Any = types.void) -> Callable[[Callable[..., Any]], Kernel]:
    """Decorator that makes a Kernel of a function with these argument types."""

    def decorate(function: Callable[..., Any]) -> Kernel:
        return Kernel(function, returns(*arguments))

    return decorate
