"""A profile in force on a model: the handle that changes it and gives the model back."""

from __future__ import annotations

import types
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tempering.attention.control import layer_rule
from tempering.attention.examining.layout_of import examined
from tempering.attention.examining.structure import first_floating, submodule, walk
from tempering.attention.hooks import interface_patch, interface_route, softmax_route
from tempering.attention.layout import Layout
from tempering.attention.limits import check_values
from tempering.attention.profiles.fingerprint import Walked
from tempering.attention.profiles.profile import Profile, rules_for
from tempering.errors import ProfileError, RefusedError


class Tempering:
    """A profile in force on a model: a handle with `.remove()`, and a context manager.

    `.update(profile)` changes the temperatures in place, also of a compiled model, without
    recompiling.
    """

    def __init__(self, model: nn.Module, plan: Layout, profiles: Sequence[Profile]) -> None:
        self._model = weakref.ref(model)
        self._layout = plan
        self._modules = [submodule(model, layer.name) for layer in plan.layers]
        self._active = False
        rows = _stack(profiles, plan)
        interface_patch.acquire()
        # Also when the model and its forgotten handle are thrown away together.
        self._releases = [weakref.finalize(self, interface_patch.release)]
        if any(layer.route == "softmax" for layer in plan.layers):
            softmax_route.acquire()
            self._releases.append(weakref.finalize(self, softmax_route.release))
        for release in self._releases:
            release.atexit = False
        self._active = True
        try:
            for module, layer, temperature in zip(self._modules, plan.layers, rows, strict=True):
                _attach(module, layer).set(self, temperature)
            self._set_rules(self._rules_of(profiles))
        except BaseException:
            self.remove()
            raise

    def update(self, profile: Profile | Sequence[Profile]) -> None:
        """Change the temperatures of this handle in place."""
        self._require_active()
        profiles = as_profiles(profile)
        model = self._model()
        if model is not None:
            walked = walk(model)
            if examined(model, None, walked[0]).layout != self._layout:
                raise RefusedError(
                    f"{type(model).__name__} was changed since this handle was attached; remove "
                    "it and call tempered(model, profile) anew"
                )
            check_profiles(profiles, model, self._layout, walked)
        rules = self._rules_of(profiles)
        for module, own in rules:
            layer_rule.check_attach(self, getattr(module, interface_route.STATE), own)
        self.set_rows(_stack(profiles, self._layout))
        self._set_rules(rules)

    def _rules_of(self, profiles: Sequence[Profile]) -> list[tuple[nn.Module, Sequence[Any]]]:
        """Each module with the rule of every row of the batch."""
        rules = [rules_for(profile, self._layout) for profile in profiles]
        return list(zip(self._modules, zip(*rules, strict=True), strict=True))

    def _set_rules(self, rules: list[tuple[nn.Module, Sequence[Any]]]) -> None:
        for module, own in rules:
            layer_rule.attach(self, module, getattr(module, interface_route.STATE), own)

    def rules(self) -> dict[str, list[layer_rule.RuleCount]]:
        """For each layer with rules: how often each acted, and how often T was at its bounds."""
        self._require_active()
        states = {
            layer.name: getattr(module, interface_route.STATE)
            for layer, module in zip(self._layout.layers, self._modules, strict=True)
        }
        return {
            name: list(state.rule.counts.values())
            for name, state in states.items()
            if state.rule_owner is self
        }

    def set_rows(self, rows: Iterable[Tensor]) -> None:
        """Set Float[Tensor, "rows heads"] for each layer; gradients flow to those that need one.

        Raises ProfileError for other shapes and TemperatureError for other values than a
        Profile may hold; nothing is changed then.
        """
        self._require_active()
        rows, layers = list(rows), self._layout.layers
        if len(rows) != len(layers):
            raise ProfileError(f"{len(rows)} layers were given, the model has {len(layers)}")
        states = [getattr(module, interface_route.STATE) for module in self._modules]
        for state, layer, row in zip(states, layers, rows, strict=True):
            if row.ndim != 2 or len(row) == 0 or row.shape[1] != layer.heads:
                raise ProfileError(
                    f"{layer.name}: temperatures have shape [rows, {layer.heads}]; "
                    f"this has {tuple(row.shape)}"
                )
            check_values(row, layer.name)
            state.combined(self, row)
        for state, row in zip(states, rows, strict=True):
            state.set(self, row)

    def calls(self) -> dict[str, int]:
        """How often each layer's temperature acted since the first handle was attached."""
        self._require_active()
        return {
            layer.name: getattr(module, interface_route.STATE).calls
            for layer, module in zip(self._layout.layers, self._modules, strict=True)
        }

    def remove(self) -> None:
        """Give the model back as it was before this handle; doing it twice is harmless."""
        if not self._active:
            return
        self._active = False
        for module in self._modules:
            _detach(module, self)
        for release in self._releases:
            release()

    def _require_active(self) -> None:
        if not self._active:
            raise RefusedError("this handle was removed; call tempered(model, profile) anew")

    def __enter__(self) -> Tempering:
        self._require_active()
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def as_profiles(profile: Any) -> list[Profile]:
    profiles = list(profile) if isinstance(profile, Iterable) else [profile]
    if not profiles or not all(isinstance(item, Profile) for item in profiles):
        raise ProfileError(
            "give a Profile, or a sequence of them with one for each row of the batch; "
            f"this is {type(profile).__name__} of {[type(p).__name__ for p in profiles][:3]}"
        )
    return profiles


def check_profiles(
    profiles: Sequence[Profile], model: nn.Module, plan: Layout, walked: Walked
) -> None:
    made_for = {(item.model or {}).get("fingerprint"): item for item in profiles}
    for item in made_for.values():
        item.check_model(model, walked)
    for item in profiles:
        item.resolve(plan, rules=True)


def _stack(profiles: Sequence[Profile], plan: Layout) -> list[Tensor]:
    """For each layer, Float[Tensor, "rows heads"] over the profiles."""
    resolved = [profile.resolve(plan, rules=True) for profile in profiles]
    return [torch.stack(rows) for rows in zip(*resolved, strict=True)]


def _attach(module: nn.Module, layer: Any) -> interface_route.TemperatureState:
    state = module.__dict__.get(interface_route.STATE)
    if state is None:
        state = interface_route.TemperatureState(layer, *_place(module))
        module.__dict__[interface_route.STATE] = state
        if layer.route == "softmax":
            inner = module.__dict__.get("forward")
            # A copy of a tempered model has our method and no state: there is nothing inside.
            state.inner = None if getattr(inner, "__func__", None) is _forward_tempered else inner
            # A bound method, so that a deep copy of the model binds it to the copy.
            module.forward = types.MethodType(_forward_tempered, module)
    return state


def _detach(module: nn.Module, owner: object) -> None:
    state = module.__dict__.get(interface_route.STATE)
    if state is None:
        return
    layer_rule.detach(owner, state)
    state.drop(owner)
    if state.parts:
        return
    del module.__dict__[interface_route.STATE]
    if state.layer.route == "softmax":
        if state.inner is None:
            del module.forward
        else:
            module.forward = state.inner


def _forward_tempered(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    state = getattr(module, interface_route.STATE, None)
    if state is None:  # a deep copy: its forward came along, its temperatures did not
        return type(module).forward(module, *args, **kwargs)
    inner = state.inner
    with interface_route.TemperedSoftmax(state):
        if inner is not None:
            return inner(*args, **kwargs)
        return type(module).forward(module, *args, **kwargs)


# A pickled method is looked up by name in the module that is loaded: its own forward, there.
_forward_tempered.__name__ = "forward"
# So that a look at what a model is made of sees past it.
_forward_tempered.is_tempered = True  # type: ignore[attr-defined]


def _place(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a module computes, and float64 for a model that does (else float32)."""
    tensor = first_floating(module)
    if tensor is None:
        return torch.device("cpu"), torch.float32
    # Weights that accelerate keeps elsewhere come to a device when they are used.
    device = torch.device("cpu") if tensor.is_meta else tensor.device
    return device, torch.float64 if tensor.dtype == torch.float64 else torch.float32
