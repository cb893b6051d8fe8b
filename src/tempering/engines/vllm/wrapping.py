"""Replacing methods of vLLM once, and telling whether it was done."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any


def registered() -> bool:
    """Whether vLLM has run this plugin in this process."""
    from vllm.v1.worker.worker_base import WorkerBase

    return hasattr(WorkerBase.__init__, "_tempering")


def wrap(owner: type | ModuleType, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace a method by `wrapper(original, self, ...)`; a second time does nothing.

    A module's function is replaced by `wrapper(original, first argument, ...)`.
    """
    original = getattr(owner, name)
    if hasattr(original, "_tempering"):
        return

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, self, *args, **kwargs)

    method._tempering = True  # type: ignore[attr-defined]
    setattr(owner, name, method)
