"""Which backend runs, its instruction set and threads; what a call checks of an array."""

from __future__ import annotations

import os
import warnings
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import cpus
from ..errors import EdgeMoEError, KernelError, UsageError

_BUILD_NATIVE = "build it with a C compiler at hand (pip install .)"
_INSTALL_NUMBA = "install numba (pip install 'edgemoe[numba]')"


def _choose_backend() -> ModuleType:
    """The native extension, or the numba module that has the same functions (_native.pyi)."""
    choice = os.environ.get("EDGEMOE_BACKEND", "")
    if choice not in ("", "native", "numba"):
        raise UsageError(f"EDGEMOE_BACKEND={choice}: must be native or numba")
    if choice != "numba":
        try:
            from .. import _native

            return _native
        except ImportError as exc:
            missing = f"the native extension cannot be imported ({exc})"
    if choice == "native":
        raise EdgeMoEError(f"EDGEMOE_BACKEND=native: {missing}: {_BUILD_NATIVE}")
    try:
        from .. import numba_backend
    except (ImportError, OSError) as exc:
        if choice == "numba":
            raise EdgeMoEError(
                f"EDGEMOE_BACKEND=numba: numba cannot be imported ({exc}): {_INSTALL_NUMBA}"
            ) from None
        raise EdgeMoEError(
            f"{missing}, nor can numba: {_BUILD_NATIVE}, or {_INSTALL_NUMBA}"
        ) from None
    if choice != "numba":
        # explicit, so that the line printed is this one alone, without the source of the caller
        text = f"{missing}: using numba, which is slower; {_BUILD_NATIVE}"
        warnings.warn_explicit(text, RuntimeWarning, "edgemoe", 1)
    return numba_backend


if TYPE_CHECKING:
    from .. import _native

    native = _native
else:
    native = _choose_backend()

Pool = native.Pool
MAX_THREADS = 1024


_DTYPES: dict[type, np.dtype[Any]] = {
    t: np.dtype(t) for t in (np.float32, np.int8, np.uint8, np.int32, np.int64, np.uint64)
}


def check(what: str, array: NDArray[Any], dtype: type, *shape: int | None) -> None:
    """Raise KernelError unless `array` is C-contiguous, of this dtype and shape (None: any)."""
    if (
        type(array) is np.ndarray
        and array.dtype is _DTYPES.get(dtype)
        and (array.shape == shape or _fits(array.shape, shape))
        and array.flags.c_contiguous
    ):
        return  # as nearly always, some times a token
    if not isinstance(array, np.ndarray):
        raise KernelError(f"{what}: expected a numpy array, got {type(array).__name__}")
    if array.dtype != dtype:
        raise KernelError(f"{what}: expected dtype {np.dtype(dtype)}, got {array.dtype}")
    if not _fits(array.shape, shape):
        wanted = tuple("any" if s is None else s for s in shape)
        raise KernelError(f"{what}: expected shape {wanted}, got {array.shape}")
    if not array.flags.c_contiguous:
        raise KernelError(f"{what}: expected a C-contiguous array, got strides {array.strides}")


def _fits(got: tuple[int, ...], shape: tuple[int | None, ...]) -> bool:
    if len(got) != len(shape):
        return False
    for size, want in zip(got, shape, strict=True):
        if size != want and want is not None:
            return False
    return True


def backend() -> str:
    """Name of the backend in use: "native" or "numba"."""
    return "numba" if native.__name__.endswith("numba_backend") else "native"


def fused() -> bool:
    """Whether the backend runs a layer up to its experts, and a mixture of them, in one call each:
    DecoderLayer and Mixture. Elsewhere they are the kernels that they are made of."""
    return hasattr(native, "Layer")


def isa_names() -> list[str]:
    """Instruction sets this build and machine can run, best first."""
    return native.isa_names()


def isa() -> str:
    """Name of the instruction set in use."""
    return native.isa()


def set_isa(name: str) -> None:
    """Use the named instruction set from now on, in the whole process."""
    if not native.set_isa(name):
        raise UsageError(
            f"EDGEMOE_ISA={name}: not available here; the {backend()} backend has "
            f"{', '.join(isa_names())} on this machine"
        )


if os.environ.get("EDGEMOE_ISA"):
    set_isa(os.environ["EDGEMOE_ISA"])


def default_threads() -> int:
    """Performance cores that this process may use, its CPU quota counted (cpus.py)."""
    return min(cpus.usable(), MAX_THREADS)


def new_pool(threads: int) -> Pool:
    """A pool of `threads` workers, the calling thread included."""
    if not 1 <= threads <= MAX_THREADS:
        raise UsageError(f"threads must be between 1 and {MAX_THREADS}, got {threads}")
    return native.Pool(threads)


def crc32c(data: NDArray[np.uint8], seed: int = 0) -> int:
    """CRC-32C of a uint8 array; `seed` is the CRC of the bytes before it."""
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or not data.flags.c_contiguous:
        raise KernelError("crc32c: expected a C-contiguous uint8 array")
    return native.crc32c(data, seed)
