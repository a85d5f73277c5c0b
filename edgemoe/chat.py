"""Chat templates: a conversation to the text the model was trained to answer.

Rendering follows transformers (utils/chat_template_utils.py): same environment settings, same
extra filter and functions, same variables.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from .chat_sandbox import FUEL, FUEL_PER_INPUT, OutOfFuel, Refusal, TemplateEnvironment
from .errors import CheckpointError, UsageError

MAX_SOURCE = 256 * 1024
"""Characters a template may have; the longest published ones have about 30,000."""

_WAY_OUT = "run without it (--raw), or get a fixed one from the model's publisher"


class ChatTemplate:
    """A compiled template.

    Args:
        source: the Jinja text.
        bos_token, eos_token: what the template sees under these names; None leaves one undefined.

    Raises:
        CheckpointError: `source` is not a template.
    """

    def __init__(
        self, source: str, bos_token: str | None = None, eos_token: str | None = None
    ) -> None:
        if len(source) > MAX_SOURCE:
            raise CheckpointError(
                f"chat template has {len(source)} characters, at most {MAX_SOURCE} are allowed"
            )
        self.source = source
        self._env = TemplateEnvironment()
        self._lock = threading.Lock()
        tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._tokens = {k: v for k, v in tokens.items() if v is not None}
        try:
            self._template = self._env.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(
                f"chat template, line {error.lineno}: {_one_line(error.message)}; {_WAY_OUT}"
            ) from None
        except (jinja2.TemplateError, SyntaxError, RecursionError, MemoryError) as error:
            raise CheckpointError(
                f"chat template does not compile ({_describe(error)}); {_WAY_OUT}"
            ) from None

    @classmethod
    def from_files(
        cls, jinja: bytes | None, tokenizer_config: Mapping[str, Any] | None
    ) -> ChatTemplate | None:
        """The template of a checkpoint, None where it has none.

        `chat_template.jinja` comes before the entry of tokenizer_config.json, which is a string or,
        for several templates, a list of {"name", "template"} of which "default" is taken.
        """
        config = tokenizer_config or {}
        if jinja is not None:
            try:
                source: Any = jinja.decode("utf-8")
            except UnicodeDecodeError as error:
                raise CheckpointError(f"chat_template.jinja is not UTF-8: {error.reason}") from None
        else:
            source = config.get("chat_template")
        if isinstance(source, list):
            named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
            source = named.get("default", "")
        if source is None or source == "":
            return None
        if not isinstance(source, str):
            raise CheckpointError("tokenizer_config.json: chat_template is not a string")
        return cls(source, _token(config, "bos_token"), _token(config, "eos_token"))

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation, BOS and turn markers included.

        Args:
            messages: e.g. [{"role": "user", "content": "Hello"}]; plain JSON data.
            add_generation_prompt: end with the opening of the assistant's turn.

        Raises:
            UsageError: the template refuses this conversation, or it is not JSON data.
            CheckpointError: the template fails, or does not end within its limits.
        """
        try:
            text = json.dumps(messages)
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(f"messages are not plain JSON data: {_describe(error)}") from None
        # One rendering at a time: the meter belongs to the environment.
        with self._lock:
            self._env.meter.fill(FUEL + FUEL_PER_INPUT * len(text))
            try:
                return self._template.render(
                    messages=json.loads(text),
                    tools=None,
                    documents=None,
                    add_generation_prompt=add_generation_prompt,
                    **self._tokens,
                )
            except Refusal as refusal:
                raise UsageError(
                    f"the chat template refuses this conversation: {_one_line(str(refusal))}"
                ) from None
            except OutOfFuel:
                raise CheckpointError(
                    f"chat template does not end, or makes too much text; {_WAY_OUT}"
                ) from None
            except Exception as error:
                raise CheckpointError(
                    f"chat template fails ({_describe(error)}); {_WAY_OUT}"
                ) from None


def _token(config: Mapping[str, Any], name: str) -> str | None:
    value = config.get(name)
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())[:300]


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {_one_line(str(error))}"
