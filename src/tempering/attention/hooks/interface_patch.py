"""Transformers' attention interface, wrapped while anyone needs it and then given back.

Models ask an `AttentionInterface` for their attention function at every call. While a handle or
a probe is at work, what it hands back is wrapped. A tempered module carries its temperature
itself; a module without one gets what it asked for.

The method is replaced on the class, which serves every instance, and on the instances at hand
as well: a model that was compiled before looks, through its guards, at the instance alone, and
would go on without its temperatures.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from tempering.attention.hooks.interface_route import attend
from tempering.attention.hooks.state import STATE
from tempering.attention.logits import observe_with
from tempering.others import check_release

# Reentrant: a forgotten handle may be collected, and so let go, while the lock is held.
_LOCK = threading.RLock()
_USERS = 0
_WRAPPED: list[Any] = []
# What the modules held when they were last read: (what they were, the instances).
_SCANNED: tuple[Any, list[Any]] | None = None
# Its names change without an import.
_MAIN = [sys.modules["__main__"]]
_ORIGINAL: Any = None
# Given the function that the interface hands back and the model's own eager one, what is
# called in place of the first.
Wrap = Callable[[Callable[..., Any], Callable[..., Any]], Callable[..., Any]]
# Thread -> what wraps the attention functions that this thread is handed.
_WATCHERS: dict[int, Wrap] = {}


def acquire() -> None:
    """Wrap what the attention interface hands back, while anyone needs it."""
    global _USERS, _ORIGINAL
    from transformers.modeling_utils import AttentionInterface

    check_release("transformers")
    with _LOCK:
        _USERS += 1
        if _WRAPPED:
            return
        _ORIGINAL = AttentionInterface.get_interface
        _WRAPPED.append(AttentionInterface)
        AttentionInterface.get_interface = _get_interface
        for instance in _instances(AttentionInterface):
            _WRAPPED.append(instance)
            instance.get_interface = types.MethodType(_get_interface, instance)


def release() -> None:
    """Undo `acquire` when the last user leaves."""
    global _USERS

    with _LOCK:
        _USERS -= 1
        if _USERS > 0 or not _WRAPPED:
            return
        interface, *instances = _WRAPPED
        _WRAPPED.clear()
        interface.get_interface = _ORIGINAL
        for instance in instances:
            del instance.get_interface


@contextlib.contextmanager
def watched(wrap: Wrap) -> Iterator[None]:
    """Hand `wrap(function, eager)` to the models that this thread runs, outside any temperature."""
    thread = threading.get_ident()
    before = _WATCHERS.get(thread)
    acquire()
    _WATCHERS[thread] = wrap
    try:
        yield
    finally:
        if before is None:
            del _WATCHERS[thread]
        else:
            _WATCHERS[thread] = before
        release()


def _instances(interface: type) -> list[Any]:
    """The shared instance, and those of models that keep one of their own."""
    global _SCANNED
    # Reading 3,000 modules takes longer than the rest of attaching a profile; whatever was
    # imported since stands last.
    last = next(reversed(sys.modules))
    state = (len(sys.modules), last, sys.modules.get(last))
    if _SCANNED is None or _SCANNED[0] != state:
        _SCANNED = (state, _found(list(sys.modules.values()), interface))
    return list({id(item): item for item in [*_SCANNED[1], *_found(_MAIN, interface)]}.values())


def _found(modules: list[Any], interface: type) -> list[Any]:
    found = (getattr(item, "__dict__", {}).get("ALL_ATTENTION_FUNCTIONS") for item in modules)
    return [item for item in found if item is not None and isinstance(item, interface)]


def _get_interface(self: Any, implementation: str, default: Callable[..., Any]) -> Any:
    function = _ORIGINAL(self, implementation, default)

    def tempered_attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state = getattr(module, STATE, None)
        if state is None:
            return function(module, *args, **kwargs)
        if state.observer is None:
            return attend(function, state, module, *args, **kwargs)
        # The observer stands between the temperature and the softmax.
        observed = observe_with(function, state.observer)
        return attend(observed, state, module, *args, **kwargs)

    if not torch.compiler.is_compiling() and _WATCHERS:
        wrap = _WATCHERS.get(threading.get_ident())
        if wrap is not None:
            return wrap(tempered_attention, default)
    return tempered_attention
