"""The forward of a tempered module: it finds its temperatures, and must have used them.

While a module is held, its `forward` is wrapped. What runs inside is attention that must meet
its temperature: a forward that ends without one tempered call (it took softmax under a name of
its own, or by another way than when it was examined) is an error at that moment.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tempering.attention.hooks.ownership import LOCK, STATE, Hold, Outside, Part, Site
from tempering.attention.hooks.softmax_route import Running
from tempering.attention.hooks.state import TemperatureState
from tempering.attention.layout import AttentionLayer
from tempering.errors import ArchitectureError


def hold(module: nn.Module, owner: Hold, given: Part | Outside) -> Site:
    """Give a module what a hold has for it; `owner.release` takes it back."""
    with LOCK:
        site = getattr(module, STATE, None)
        if site is None:
            site = Site(module, _forward_tempered, _place(module))
            site.inner = own_forward(module)
            setattr(module, STATE, site)
            # A bound method, so that a deep copy of the model binds it to the copy.
            module.forward = types.MethodType(_forward_tempered, module)
        if isinstance(given, Part):
            site.parts[owner.number] = given
        else:
            site.outside[owner.number] = given
        return site


def own_forward(module: nn.Module) -> Any:
    """The `forward` that an instance has of its own, or None: as if it were not held."""
    forward = module.__dict__.get("forward")
    if getattr(forward, "__func__", None) is not _forward_tempered:
        return forward
    # A copy of a tempered model has our method and no site: there is nothing inside.
    site = module.__dict__.get(STATE)
    return None if site is None else site.inner


@contextlib.contextmanager
def held(
    module: nn.Module, layer: AttentionLayer
) -> Iterator[Callable[[Tensor], TemperatureState]]:
    """Temper one module for this thread alone: gives a function that sets T[rows, heads]."""
    owner = Hold([module], private=True)
    try:
        site = hold(module, owner, Part(layer, torch.ones(1, layer.heads, dtype=torch.float64)))
        owner.enter()

        def temper(temperature: Tensor) -> TemperatureState:
            site.set(owner.number, temperature)
            state = site.find()
            assert isinstance(state, TemperatureState)
            return state

        yield temper
    finally:
        owner.release()


def _forward_tempered(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    site = getattr(module, STATE, None)
    if site is None:
        inner = module.__dict__.get("forward")
        if inner is None or getattr(inner, "__func__", None) is _forward_tempered:
            # A deep copy: its forward came along, its temperatures did not.
            return type(module).forward(module, *args, **kwargs)
        return inner(*args, **kwargs)  # given back since this was looked up
    state = site.here
    if state is None:
        return _inner(site, module, args, kwargs)
    if type(state) is TemperatureState:
        with Running(state) as running:
            output = _inner(site, module, args, kwargs)
        if not running.met:
            raise _unmet(state, module)
        return output
    if isinstance(state, Outside) and not state.entered:
        with Running(state):
            return _inner(site, module, args, kwargs)
    raise state.error


def _inner(site: Site, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the module would run untempered."""
    if site.inner is not None:
        return site.inner(*args, **kwargs)
    return type(module).forward(module, *args, **kwargs)


def _unmet(state: TemperatureState, module: nn.Module) -> ArchitectureError:
    return ArchitectureError(
        f"{state.layer.name} ({type(module).__name__}) ran without meeting its temperature: it "
        "attends by another way than when it was examined, or calls torch.softmax or "
        "scaled_dot_product_attention under a name of its own (import torch.nn.functional as F, "
        "and call F.softmax), so this forward can't be controlled exactly"
    )


# A pickled method is looked up by name in the module that is loaded: its own forward, there.
_forward_tempered.__name__ = "forward"


def _place(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a module computes, and float64 for a model that does (else float32)."""
    tensor = _first_floating(module)
    if tensor is None:
        return torch.device("cpu"), torch.float32
    # Weights that accelerate keeps elsewhere come to a device when they are used.
    device = torch.device("cpu") if tensor.is_meta else tensor.device
    return device, torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _first_floating(module: nn.Module) -> Tensor | None:
    """The first parameter that is a real number, in the order of `parameters`."""
    stack = [module]
    while stack:
        one = stack.pop()
        for value in one._parameters.values():
            if value is not None and value.is_floating_point():
                return value
        stack.extend(item for item in reversed(one._modules.values()) if item is not None)
    return None
