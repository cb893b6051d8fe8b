"""What a tempered module carries: the temperatures of every handle, and which of them apply here.

A module keeps one `TemperatureState` for each combination of handles that some thread or task runs
it with. A thread that has set no temperature on a model which another thread has tempered may want
that temperature or none: it is refused. A thread that has tempered the model before, and removed
its handles, wants none.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tempering.attention.hooks.ownership import (
    LOCK,
    SCOPE,
    STATE,
    Hold,
    Scope,
    holds_numbered,
    scope_of_backward,
    with_holds_of_thread,
)
from tempering.attention.hooks.temperature_state import Inverse, Placement, TemperatureState
from tempering.attention.layout import AttentionLayer
from tempering.errors import RefusedError, TemperingError

# Above so many entries, a site forgets those of scopes that hold other models as well; they are
# found again when they are used. A bound on memory, far above what nested handles need.
_MOST_STATES = 64


@dataclass(eq=False)
class LayerPart:
    """The part of one handle in the temperature of one module.

    inverse: 1/T, if it is computed already. scale: of the heads' outputs, if the profile has any.
    calls: how often the part acted in combinations with handles that are removed.
    """

    layer: AttentionLayer
    temperature: Tensor
    rule: Any = None
    inverse: Inverse | None = None
    scale: Tensor | None = None
    calls: int = 0


@dataclass(frozen=True, eq=False)
class RefusedCall:
    """Stands for a state where this thread or task can't be told which temperature it wants."""

    error: TemperingError


@dataclass(frozen=True, eq=False)
class OutsideProfile:
    """Stands for the state of a module that attends, and for which the profile has no temperature.

    entered: whether running the module at all is an error, or only a softmax in it.
    """

    error: TemperingError
    entered: bool


Current = TemperatureState | RefusedCall | OutsideProfile | None


class _ReadAnew(dict[Any, Current]):
    """Reads `site.current` by a method of C that calls back to Python.

    So torch.compile takes the property for a plain attribute, and reads it anew at every call,
    in the thread and context of that call: a compiled model sees its caller's temperatures.
    """

    def __missing__(self, site: Site) -> Current:
        return site.find()


class Site:
    """What a tempered module carries as its attribute `_tempering`.

    current: what this thread or task is to run the module with (`find`).
    inner: the `forward` that the instance had of its own, if any; wrapper: the function that
    stands in its place meanwhile. parts, outside: by the number of a hold, its temperature for the
    module, or why it has none. states: by the numbers of the holds that a scope sees.
    """

    current = property(_ReadAnew().__getitem__)

    def __init__(
        self, module: nn.Module, wrapper: Callable[..., Any], placement: Placement
    ) -> None:
        self.module, self.wrapper, self.placement = weakref.ref(module), wrapper, placement
        self.inner: Callable[..., Any] | None = None
        self.parts: dict[int, LayerPart] = {}
        self.outside: dict[int, OutsideProfile] = {}
        self.states: dict[tuple[int, ...], TemperatureState] = {}

    # A deep copy or a pickle of a tempered model is an untempered model.
    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(None), ())

    def find(self) -> Current:
        """What this thread or task is to run the module with; None for its own forward."""
        scope = SCOPE.get()
        if scope is not None:
            state = self.states.get(scope.key)
            if state is not None:
                return state
        return self._search(scope)

    def _search(self, scope: Scope | None) -> Current:
        with LOCK:
            scope = with_holds_of_thread(scope) or scope_of_backward()
            seen = [] if scope is None else [n for n in scope.key if n in self.parts]
            if scope is not None and seen:
                return self._state(scope.key, tuple(seen))
            if scope is not None and scope.plain:
                return None
            for hold in () if scope is None else scope.holds:
                if hold.moves and hold.number in self.outside:
                    return self.outside[hold.number]
            others = [
                hold for hold in holds_numbered(self.parts) if hold.moves and not hold.private
            ]
            if not others or (scope is not None and self.module in scope.known):
                return None
            layer = self.parts[others[0].number].layer
            return RefusedCall(RefusedError(_refusal(layer.name, others[0])))

    def _state(self, key: tuple[int, ...], numbers: tuple[int, ...]) -> TemperatureState:
        """The state of a scope; `numbers`: the holds in it that have a part in this module."""
        if len(self.states) > _MOST_STATES:
            self.states = {k: s for k, s in self.states.items() if k == tuple(s.parts)}
        state = self.states.get(numbers)
        if state is None:
            first = self.parts[numbers[0]]
            inverse = first.inverse if len(numbers) == 1 else None
            first.inverse = None  # the state changes it in place
            state = TemperatureState(first.layer, *self.placement, inverse)
            for number in numbers:
                part = self.parts[number]
                if part.rule is not None:
                    part.rule.join(state, number)
                if inverse is None:
                    state.set(number, part.temperature)
                else:
                    state.parts[number] = part.temperature
                if part.scale is not None:
                    state.set_scale(number, part.scale)
            around = self.states.get(numbers[:-1])
            if around is not None:
                state.observer, state.trial = around.observer, around.trial
            self.states[numbers] = state
        self.states[key] = state
        return state

    def states_of(self, number: int) -> list[TemperatureState]:
        """The states that a hold has a part in."""
        states = {id(state): state for state in list(self.states.values())}
        return [state for state in states.values() if number in state.parts]

    def check(self, number: int, temperature: Tensor) -> None:
        """Raise what `set` would, and change nothing."""
        for state in self.states_of(number):
            state.combined(number, temperature)

    def set(self, number: int, temperature: Tensor) -> None:
        """Change the temperature that a hold gives, for every thread and task that sees it."""
        part = self.parts[number]
        part.temperature, part.inverse = temperature, None
        for state in self.states_of(number):
            state.set(number, temperature)

    def set_scale(self, number: int, scale: Tensor | None) -> None:
        """Change the output scales that a hold gives, if any."""
        self.parts[number].scale = scale
        for state in self.states_of(number):
            state.set_scale(number, scale)

    def set_rule(self, number: int, rule: Any) -> None:
        """Change the rule that a hold gives, if any."""
        self.parts[number].rule = rule
        for state in self.states_of(number):
            if state.rule_owner == number:
                state.rule, state.rule_owner = None, None
            if rule is not None:
                rule.join(state, number)

    def calls(self, number: int) -> int:
        """How often the temperature of a hold acted."""
        return self.parts[number].calls + sum(state.calls for state in self.states_of(number))

    def drop(self, number: int) -> None:
        """Forget a hold; with the last one, the module is as it was."""
        self.parts.pop(number, None)
        for state in self.states_of(number):
            for other in self.parts.keys() & state.parts.keys():
                self.parts[other].calls += state.calls
        self.states = {key: s for key, s in list(self.states.items()) if number not in s.parts}
        self.outside.pop(number, None)
        module = self.module()
        if self.parts or self.outside or module is None:
            return
        fields = module.__dict__
        if getattr(fields.get("forward"), "__func__", None) is not self.wrapper:
            return  # another library has wrapped our forward meanwhile, and still calls it
        # The forward goes first: a thread that is about to call it still finds the site.
        if self.inner is None:
            del fields["forward"]
        else:
            fields["forward"] = self.inner
        del fields[STATE]


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
    current = None if site is None else site.find()
    if current is None or isinstance(current, TemperatureState):
        return current
    raise current.error


def is_held(module: nn.Module) -> bool:
    """Whether any handle, of any thread, holds the module."""
    site = getattr(module, STATE, None)
    return site is not None and bool(site.parts)
