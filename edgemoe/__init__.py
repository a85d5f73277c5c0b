"""edgemoe: Mixture-of-Experts language models on machines with less memory than the model needs.

    with edgemoe.load("model.emoe", mem="8G", bits=4) as model:
        for piece in model.stream("Once upon a time", max_tokens=64):
            print(piece, end="", flush=True)

Public names are imported on first use, so that `import edgemoe` alone stays cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import Completion, Model, load
    from .errors import (
        CheckpointError,
        ChecksumError,
        EdgeMoEError,
        KernelError,
        MemoryBudgetError,
        OutputError,
        StoreError,
        UnsupportedError,
        UsageError,
    )
    from .generation import Generation
    from .mwq.convert import convert
    from .sampling import SamplingParams
    from .types import ModelConfig, RunPlan, Stats, Streaming

__version__ = "0.1.0"

_HOME = {
    "load": "engine",
    "Model": "engine",
    "Generation": "generation",
    "Completion": "engine",
    "convert": "mwq.convert",
    "SamplingParams": "sampling",
    "ModelConfig": "types",
    "RunPlan": "types",
    "Stats": "types",
    "Streaming": "types",
    "EdgeMoEError": "errors",
    "UsageError": "errors",
    "CheckpointError": "errors",
    "UnsupportedError": "errors",
    "StoreError": "errors",
    "ChecksumError": "errors",
    "MemoryBudgetError": "errors",
    "OutputError": "errors",
    "KernelError": "errors",
}

__all__ = [
    "CheckpointError",
    "ChecksumError",
    "Completion",
    "EdgeMoEError",
    "Generation",
    "KernelError",
    "MemoryBudgetError",
    "Model",
    "ModelConfig",
    "OutputError",
    "RunPlan",
    "SamplingParams",
    "Stats",
    "StoreError",
    "Streaming",
    "UnsupportedError",
    "UsageError",
    "__version__",
    "convert",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'edgemoe' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
