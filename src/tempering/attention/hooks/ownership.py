"""Whose temperatures a call sees: those of its own thread or asyncio task, and nobody else's.

Each handle makes a `Hold` on the modules that it tempers. A context variable names the holds that
the running code sees (its `Scope`), so what is started with a copy of the context (an asyncio
task, `asyncio.to_thread`, `contextvars.copy_context().run`) sees them too. What a module does with
the holds on it is decided in `site.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

# The attribute by which a held module carries its `Site`; a module without one is left alone.
STATE = "_tempering"

# Reentrant: a forgotten hold may be collected, and so released, while the lock is taken.
LOCK = threading.RLock()
_NUMBERS = itertools.count(1)
_HOLDS: weakref.WeakValueDictionary[int, Hold] = weakref.WeakValueDictionary()
SCOPE: ContextVar[Scope | None] = ContextVar("tempering", default=None)


class _HoldsOfThread(threading.local):
    """Keeps the holds that a thread has taken: a forgotten one acts until its thread ends."""

    def __init__(self) -> None:
        self.holds: list[Hold] = []


_THREAD = _HoldsOfThread()


def _current_task() -> Any:
    try:
        return asyncio.current_task()
    except RuntimeError:  # no event loop runs in this thread
        return None


class Hold:
    """The claim of one handle: who made it, and on which modules.

    moves: whether any of its temperatures differs from 1; while none does, other threads are not
        refused.
    private: other threads are neither tempered nor refused because of it (the self-check).
    """

    def __init__(self, modules: Iterable[nn.Module], *, private: bool = False) -> None:
        self.number = next(_NUMBERS)
        self.private, self.moves, self.active = private, False, True
        self.modules = [weakref.ref(module) for module in modules]
        self.thread = threading.current_thread().name
        task = _current_task()
        self.task = None if task is None else weakref.ref(task)
        self.scopes: weakref.WeakSet[Scope] = weakref.WeakSet()
        self.releases: list[Callable[[], Any]] = []
        self.home = _THREAD.holds
        _HOLDS[self.number] = self

    def enter(self) -> None:
        """Join the scope of this thread or task."""
        with LOCK:
            scope = with_holds_of_thread(SCOPE.get())
            before = scope or Scope(())
            known = {ref for ref in before.known if ref() is not None}.union(self.modules)
            self.home.append(self)
            SCOPE.set(Scope((*before.holds, self), known, plain=before.plain))

    def release(self) -> None:
        """Give the modules back, in whatever thread this is called; a second call does nothing."""
        with LOCK:
            if not self.active:
                return
            self.active = False
            for ref in self.modules:
                module = ref()
                site = None if module is None else getattr(module, STATE, None)
                if site is not None:
                    site.drop(self.number)
            for scope in list(self.scopes):
                scope.drop(self)
            if self in self.home:
                self.home.remove(self)
            for give_back in self.releases:
                give_back()

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.release()

    @property
    def serves_this_task(self) -> bool:
        """Whether its thread may go on with it here: the task that made it is this one or over."""
        task = None if self.task is None else self.task()
        return task is None or task.done() or task is _current_task()

    @property
    def owner(self) -> str:
        """Words for messages."""
        return f"thread '{self.thread}'" + ("" if self.task is None else ", in a task of its own")


class Scope:
    """The holds that one context sees.

    key: their numbers. known: references to the modules that this context has held, now or
    before. plain: whether the code runs untempered, whatever its thread holds (`untempered`).
    """

    def __init__(
        self, holds: tuple[Hold, ...], known: Iterable[Any] = (), *, plain: bool = False
    ) -> None:
        self.holds = tuple(hold for hold in holds if hold.active)
        self.key = tuple(hold.number for hold in self.holds)
        self.known = frozenset(known)
        self.plain = plain
        for hold in self.holds:
            hold.scopes.add(self)

    def drop(self, hold: Hold) -> None:
        self.holds = tuple(other for other in self.holds if other is not hold)
        self.key = tuple(other.number for other in self.holds)


def with_holds_of_thread(scope: Scope | None) -> Scope | None:
    """The scope of this context, joined by what its thread holds from tasks that are over.

    A notebook runs each cell in a task of its own; a handle that one cell made serves the next.
    """
    if scope is not None and scope.plain:
        return scope
    seen = () if scope is None else scope.holds
    more = [
        hold for hold in _THREAD.holds if hold.active and hold not in seen and hold.serves_this_task
    ]
    if not more:
        return scope
    holds = sorted((*seen, *more), key=lambda hold: hold.number)
    scope = Scope(tuple(holds), () if scope is None else scope.known)
    SCOPE.set(scope)
    return scope


def scope_of_backward() -> Scope | None:
    """In a thread of autograd's: the scope of the thread that called backward()."""
    if torch._C._current_graph_task_id() == -1 or not torch._C._is_key_in_tls("context"):
        return None
    context = torch._C._get_obj_in_tls("context")
    return None if context is None else context.get(SCOPE)


def holds_numbered(numbers: Iterable[int]) -> list[Hold]:
    """The holds of these numbers that are still there."""
    return [hold for hold in map(_HOLDS.get, list(numbers)) if hold is not None]


@contextlib.contextmanager
def untempered() -> Iterator[None]:
    """What this thread runs inside is untempered, whoever holds the model."""
    before = SCOPE.get()
    SCOPE.set(Scope((), plain=True))
    try:
        yield
    finally:
        SCOPE.set(before)
