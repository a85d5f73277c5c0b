"""What is open until it is closed, and is closed at the end of a `with`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import TypeVar

_C = TypeVar("_C", bound="Closing")


class Closing(ABC):
    """Base of whatever has a `close` that may be called twice."""

    @abstractmethod
    def close(self) -> None:
        """Let go of what is held; twice is fine."""

    def __enter__(self: _C) -> _C:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
