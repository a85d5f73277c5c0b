"""A llama_cpp that computes nothing: a step takes as long as FAKE_LLAMA says, and is written down.

Tests put a copy named llama_cpp.py on the path of the child of `edgemoe bench --vs llama.cpp`.
FAKE_LLAMA is JSON: "log" (a file; each line one batch, the first one the process id), "vocab",
"fail" (after so many batches), "seconds" a batch with repacking "on" and "off".
"""

from __future__ import annotations

import ctypes
import json
import os
import time
from types import SimpleNamespace
from typing import Any

__version__ = "0"
llama_token = ctypes.c_int32
_SETTINGS: dict[str, Any] = json.loads(os.environ["FAKE_LLAMA"])
_state = {"seconds": 0.0, "batches": 0}


def _log(**what: Any) -> None:
    with open(f"{_SETTINGS['log']}.{os.getpid()}", "a") as file:
        file.write(json.dumps(what) + "\n")


def llama_log_callback(function: Any) -> Any:
    return function


def llama_log_set(callback: Any, data: None) -> None:
    print("a library may print")


def llama_backend_init() -> None:
    pass


def llama_model_default_params() -> Any:
    return SimpleNamespace(n_gpu_layers=-1, use_extra_bufts=True)


def llama_model_load_from_file(path: bytes, params: Any) -> Any:
    repack = "on" if params.use_extra_bufts else "off"
    _state["seconds"] = _SETTINGS.get("seconds", {}).get(repack, 0.0)
    _log(path=path.decode(), repack=repack, gpu=params.n_gpu_layers)
    return path if os.path.exists(path) else None


def llama_context_default_params() -> Any:
    return SimpleNamespace()


def llama_init_from_model(model: Any, params: Any) -> Any:
    _log(**vars(params))
    return model


def llama_model_get_vocab(model: Any) -> Any:
    return model


def llama_vocab_n_tokens(vocab: Any) -> int:
    count: int = _SETTINGS["vocab"]
    return count


def llama_get_memory(ctx: Any) -> Any:
    return ctx


def llama_memory_clear(memory: Any, data: bool) -> None:
    _log(clear=data)


def llama_batch_get_one(array: Any, count: int) -> list[int]:
    return list(array)[:count]


def llama_decode(ctx: Any, batch: list[int]) -> int:
    _state["batches"] += 1
    _log(batch=batch)
    time.sleep(_state["seconds"])
    return int(_state["batches"] > _SETTINGS.get("fail", 1 << 30))
