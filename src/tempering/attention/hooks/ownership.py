"""Whose temperatures a call sees: those of its own thread or asyncio task, and nobody else's.

A tempered module carries a `Site` as its attribute `_tempering`; a module without one is left
alone, so models never share state. The site keeps the temperatures of every handle, and a
`TemperatureState` for each combination of handles that some thread or task runs with. A
context variable says which handles are one's own, so what is started with a copy of the
context (an asyncio task, `asyncio.to_thread`, `contextvars.copy_context().run`) has them too.

A thread that has set nothing on a model where another thread has can't be known to want that
temperature or none: it is refused. One that has tempered the model itself, and has removed
its handles, is known to want none.
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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tempering.attention.hooks.state import TemperatureState
from tempering.attention.layout import AttentionLayer
from tempering.errors import RefusedError, TemperingError

STATE = "_tempering"

# Reentrant: a forgotten hold may be collected, and so let go, while the lock is held.
LOCK = threading.RLock()
_NUMBERS = itertools.count(1)
_HOLDS: weakref.WeakValueDictionary[int, Hold] = weakref.WeakValueDictionary()
_SCOPE: ContextVar[Scope | None] = ContextVar("tempering", default=None)


class _Thread(threading.local):
    """Keeps the holds that a thread has taken: forgotten, they act until the thread ends."""

    def __init__(self) -> None:
        self.holds: list[Hold] = []


_THREAD = _Thread()


def _task() -> Any:
    try:
        return asyncio.current_task()
    except RuntimeError:  # no event loop runs in this thread
        return None


class Hold:
    """The claim of one handle: by whom, and on which modules.

    moves: whether any of its temperatures differs from 1; while none does, nobody can tell.
    private: what others run is neither tempered nor refused for its sake (the self-check).
    """

    def __init__(self, modules: Iterable[nn.Module], *, private: bool = False) -> None:
        self.number = next(_NUMBERS)
        self.private, self.moves, self.active = private, False, True
        self.modules = [weakref.ref(module) for module in modules]
        self.thread = threading.current_thread().name
        task = _task()
        self.task = None if task is None else weakref.ref(task)
        self.scopes: weakref.WeakSet[Scope] = weakref.WeakSet()
        self.releases: list[Callable[[], Any]] = []
        self.home = _THREAD.holds
        _HOLDS[self.number] = self

    def enter(self) -> None:
        """Join what this thread or task sees."""
        with LOCK:
            scope = _joined(_SCOPE.get())
            before = scope or Scope(())
            modules = (ref() for ref in self.modules)
            known = {*before.known, *(module for module in modules if module is not None)}
            self.home.append(self)
            _SCOPE.set(Scope((*before.holds, self), known, plain=before.plain))

    def release(self) -> None:
        """Give the modules back, wherever this is called; doing it twice is harmless."""
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
    def ours(self) -> bool:
        """Whether the thread that took it may go on with it: no other task of it runs on."""
        task = None if self.task is None else self.task()
        return task is None or task.done() or task is _task()

    @property
    def owner(self) -> str:
        """Words for messages."""
        return f"thread '{self.thread}'" + ("" if self.task is None else ", in a task of its own")


class Scope:
    """The holds that one context sees.

    known: the modules that it has held. plain: whether nothing else may join, or be refused.
    """

    def __init__(
        self, holds: tuple[Hold, ...], known: Iterable[nn.Module] = (), *, plain: bool = False
    ) -> None:
        self.holds = tuple(hold for hold in holds if hold.active)
        self.key = tuple(hold.number for hold in self.holds)
        self.known = weakref.WeakSet(known)
        self.plain = plain
        for hold in self.holds:
            hold.scopes.add(self)

    def drop(self, hold: Hold) -> None:
        self.holds = tuple(other for other in self.holds if other is not hold)
        self.key = tuple(other.number for other in self.holds)


def _joined(scope: Scope | None) -> Scope | None:
    """The scope of this context, with what its thread holds from elsewhere.

    A notebook runs each cell in a task of its own: what a task leaves behind is its thread's.
    """
    if scope is not None and scope.plain:
        return scope
    own = () if scope is None else scope.holds
    more = [h for h in _THREAD.holds if h.active and h not in own and h.ours]
    if not more:
        return scope
    holds = sorted((*own, *more), key=lambda hold: hold.number)
    scope = Scope(tuple(holds), () if scope is None else scope.known)
    _SCOPE.set(scope)
    return scope


def _of_backward() -> Scope | None:
    """In a thread of autograd's: the scope of the thread that called backward()."""
    if torch._C._current_graph_task_id() == -1 or not torch._C._is_key_in_tls("context"):
        return None
    context = torch._C._get_obj_in_tls("context")
    return None if context is None else context.get(_SCOPE)


@contextlib.contextmanager
def untempered() -> Iterator[None]:
    """What this thread runs inside is untempered, whoever holds what."""
    before = _SCOPE.get()
    _SCOPE.set(Scope((), plain=True))
    try:
        yield
    finally:
        _SCOPE.set(before)


@dataclass(eq=False)
class Part:
    """What one handle gives one module.

    calls: those of combinations with handles that are gone.
    """

    layer: AttentionLayer
    temperature: Tensor
    rule: Any = None
    calls: int = 0


@dataclass(frozen=True, eq=False)
class Trouble:
    """Found in place of a state: why this call can't be made."""

    error: TemperingError


@dataclass(frozen=True, eq=False)
class Outside:
    """Found in place of a state: the profile has no temperature for what attends here.

    entered: whether running the module is trouble already, or only a softmax in it.
    """

    error: TemperingError
    entered: bool


Found = TemperatureState | Trouble | Outside | None


class _Here(dict[Any, Found]):
    """Reads `site.here` by a method of C that calls back to Python.

    So torch.compile takes the property for a plain attribute, and reads it anew at every call,
    in the thread and context of that call: a compiled model sees its caller's temperatures.
    """

    def __missing__(self, site: Site) -> Found:
        return site.find()


class Site:
    """What a tempered module carries.

    inner: the `forward` that the instance had of its own, if any; wrapper: the function that
    stands in its place meanwhile. outside: for each hold, why the module has no temperature.
    """

    here = property(_Here().__getitem__)

    def __init__(
        self, module: nn.Module, wrapper: Callable[..., Any], place: tuple[Any, Any]
    ) -> None:
        self.module, self.wrapper, self.place = weakref.ref(module), wrapper, place
        self.inner: Callable[..., Any] | None = None
        self.parts: dict[int, Part] = {}
        self.outside: dict[int, Outside] = {}
        self.states: dict[tuple[int, ...], TemperatureState] = {}

    # A deep copy or a pickle of a tempered model is an untempered model.
    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(None), ())

    def find(self) -> Found:
        """What this thread or task is to run the module with; None for nothing."""
        scope = _SCOPE.get()
        if scope is not None:
            state = self.states.get(scope.key)
            if state is not None:
                return state
        return self._search(scope)

    def _search(self, scope: Scope | None) -> Found:
        with LOCK:
            scope = _joined(scope) or _of_backward()
            own = [] if scope is None else [n for n in scope.key if n in self.parts]
            if scope is not None and own:
                return self._state(scope.key, tuple(own))
            if scope is not None and scope.plain:
                return None
            for hold in () if scope is None else scope.holds:
                if hold.moves and hold.number in self.outside:
                    return self.outside[hold.number]
            others = [hold for hold in map(_HOLDS.get, list(self.parts)) if hold is not None]
            others = [hold for hold in others if hold.moves and not hold.private]
            if not others or (scope is not None and self.module() in scope.known):
                return None
            layer = self.parts[others[0].number].layer
            return Trouble(RefusedError(_refusal(layer.name, others[0])))

    def _state(self, key: tuple[int, ...], own: tuple[int, ...]) -> TemperatureState:
        if len(self.states) > 64:  # of contexts that hold other models as well
            self.states = {k: s for k, s in self.states.items() if k == tuple(s.parts)}
        state = self.states.get(own)
        if state is None:
            state = TemperatureState(self.parts[own[0]].layer, *self.place)
            for number in own:
                part = self.parts[number]
                if part.rule is not None:
                    part.rule.join(state, number)
                state.set(number, part.temperature)
            around = self.states.get(own[:-1])
            if around is not None:
                state.observer, state.trial = around.observer, around.trial
            self.states[own] = state
        self.states[key] = state
        return state

    def having(self, number: int) -> list[TemperatureState]:
        """The states that a hold has a part in."""
        states = {id(state): state for state in list(self.states.values())}
        return [state for state in states.values() if number in state.parts]

    def check(self, number: int, temperature: Tensor) -> None:
        """Raise what `set` would, and change nothing."""
        for state in self.having(number):
            state.combined(number, temperature)

    def set(self, number: int, temperature: Tensor) -> None:
        """Change the temperature that a hold gives, for all who share it."""
        self.parts[number].temperature = temperature
        for state in self.having(number):
            state.set(number, temperature)

    def set_rule(self, number: int, rule: Any) -> None:
        """Change the rule that a hold gives, if any."""
        self.parts[number].rule = rule
        for state in self.having(number):
            if state.rule_owner == number:
                state.rule, state.rule_owner = None, None
            if rule is not None:
                rule.join(state, number)

    def calls(self, number: int) -> int:
        """How often the temperature of a hold acted."""
        return self.parts[number].calls + sum(state.calls for state in self.having(number))

    def drop(self, number: int) -> None:
        """Forget a hold; with the last one, the module is as it was."""
        for state in self.having(number):
            for other in state.parts:
                if other != number and other in self.parts:
                    self.parts[other].calls += state.calls
        self.states = {key: s for key, s in list(self.states.items()) if number not in s.parts}
        self.parts.pop(number, None)
        self.outside.pop(number, None)
        module = self.module()
        if self.parts or self.outside or module is None:
            return
        if getattr(module.__dict__.get("forward"), "__func__", None) is not self.wrapper:
            return  # something was put around it meanwhile, and calls it
        # First the forward, so that who is about to call the wrapper still finds the site.
        if self.inner is None:
            del module.forward
        else:
            module.forward = self.inner
        delattr(module, STATE)


def _refusal(layer: str, other: Hold) -> str:
    return (
        f"{layer} is tempered by {other.owner}, and this thread or task has set no temperature "
        "on the model, so it can't be known whether it should have that one. Temper the model "
        "here too, with Profile.neutral(model) for none; or start the work with the setter's "
        "context: Thread(target=contextvars.copy_context().run, args=(function, ...))"
    )


def state_of(module: nn.Module) -> TemperatureState | None:
    """The state that this thread or task runs a module with; raises where it is refused."""
    site = getattr(module, STATE, None)
    found = None if site is None else site.find()
    if found is None or isinstance(found, TemperatureState):
        return found
    raise found.error


def is_held(module: nn.Module) -> bool:
    """Whether any handle, of any thread, holds the module."""
    site = getattr(module, STATE, None)
    return site is not None and bool(site.parts)
