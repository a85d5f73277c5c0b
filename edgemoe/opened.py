"""A store with what turns text into its tokens and back, before any weight is read."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from .chat import ChatTemplate
from .errors import CheckpointError, StoreError
from .sampling import SamplingParams, from_generation_config
from .store import Store
from .tokenizer import Tokenizer
from .types import ModelConfig


@dataclass(frozen=True)
class OpenedModel:
    """A store with its text side ready: tokenizer, chat template and sampling defaults."""

    path: Path
    store: Store
    config: ModelConfig
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    generation_defaults: SamplingParams

    def close(self) -> None:
        """Close the store's file."""
        self.store.close()


def bundled_path() -> Path:
    """The store that ships with the package."""
    return Path(str(resources.files("edgemoe") / "data" / "default.emoe"))


def open_model(path: str | os.PathLike[str] | None = None) -> OpenedModel:
    """Open a store (None: the bundled one) without reading its weights.

    Raises:
        StoreError: missing, damaged, or without a tokenizer.
        CheckpointError: its tokenizer, template or generation settings cannot be used.
    """
    where = bundled_path() if path is None else Path(path)
    store = Store.open(where)
    try:
        if "tokenizer.json" not in store.sections:
            raise StoreError(f"{where}: the store has no tokenizer; convert its checkpoint again")
        tokenizer_config = _json_section(store, "tokenizer_config.json")
        generation_config = _json_section(store, "generation_config.json")
        template = "chat_template.jinja"
        config = store.config
        return OpenedModel(
            where,
            store,
            config,
            Tokenizer(
                store.section("tokenizer.json"),
                config=tokenizer_config,
                bos_token_id=config.bos_token_id,
                eos_token_ids=config.eos_token_ids,
            ),
            ChatTemplate.from_files(
                store.section(template) if template in store.sections else None, tokenizer_config
            ),
            from_generation_config(generation_config or {}),
        )
    except BaseException:
        store.close()
        raise


def _json_section(store: Store, name: str) -> dict[str, Any] | None:
    if name not in store.sections:
        return None
    try:
        value = json.loads(store.section(name))
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"{store.path}: section {name} is not JSON: {exc}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{store.path}: section {name} is not a JSON object")
    return value
