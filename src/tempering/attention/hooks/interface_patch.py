"""Transformers' attention interface, wrapped while anyone needs it and then given back.

Models ask an `AttentionInterface` for their attention function at every call. While a handle or
an examination is at work, the function that the interface hands back is wrapped: called by a
tempered module, it applies the temperatures that the module carries; called by any other module,
it does what it did before.

The method is replaced on the class, which serves every instance, and on every instance that
exists: the guards of a model that was compiled before look at the instance alone, and would let
it run on without its temperatures.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tempering.attention.hooks.interface_route import attend
from tempering.attention.hooks.ownership import STATE
from tempering.attention.hooks.temperature_state import TemperatureState
from tempering.attention.logits import observe_with
from tempering.others import check_release

# Reentrant: a forgotten handle may be collected, and so released, while the lock is taken.
_LOCK = threading.RLock()
_USERS = 0
# While wrapped: the class, then the instances.
_WRAPPED: list[Any] = []
# When Python's modules were last searched: (which they were, the instances found).
_SEARCHED: tuple[Any, list[Any]] | None = None
# Searched every time: in a notebook its names change without an import.
_MAIN = [sys.modules["__main__"]]
_ORIGINAL: Any = None
# Takes the function that the interface hands back and the model's own eager one; gives the
# function that is called in place of the first.
Wrap = Callable[[Callable[..., Any], Callable[..., Any]], Callable[..., Any]]
# Thread id -> what wraps the attention functions that the interface hands to this thread.
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
    global _SEARCHED
    # Searching 3,000 modules takes longer than the rest of attaching a profile. A module that was
    # imported since the last search stands last.
    last = next(reversed(sys.modules))
    imported = (len(sys.modules), last, sys.modules.get(last))
    if _SEARCHED is None or _SEARCHED[0] != imported:
        _SEARCHED = (imported, _instances_in(list(sys.modules.values()), interface))
    instances = [*_SEARCHED[1], *_instances_in(_MAIN, interface)]
    return list({id(instance): instance for instance in instances}.values())


def _instances_in(modules: list[Any], interface: type) -> list[Any]:
    named = (getattr(item, "__dict__", {}).get("ALL_ATTENTION_FUNCTIONS") for item in modules)
    return [item for item in named if item is not None and isinstance(item, interface)]


def _get_interface(self: Any, implementation: str, default: Callable[..., Any]) -> Any:
    function = _ORIGINAL(self, implementation, default)

    # `module` may be a stand-in for one, with other sinks.
    def tempered_attention(module: Any, *args: Any, **kwargs: Any) -> Any:
        site = getattr(module, STATE, None)
        state = None if site is None else site.current
        if state is None:
            return function(module, *args, **kwargs)
        if type(state) is not TemperatureState:
            raise state.error
        if state.observer is None:
            return attend(function, state, module, *args, **kwargs)
        # The observer is shown the call after it was tempered.
        observed = observe_with(function, state.observer)
        return attend(observed, state, module, *args, **kwargs)

    if not torch.compiler.is_compiling() and _WATCHERS:
        wrap = _WATCHERS.get(threading.get_ident())
        if wrap is not None:
            return wrap(tempered_attention, default)
    return tempered_attention
