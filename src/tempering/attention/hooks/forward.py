"""The forward of a tempered module: it finds the module's temperature, and must have used it.

While a handle holds a module, its `forward` is wrapped. Attention code that runs inside must meet
the temperature. A forward that ends without having met it (the code calls softmax under a name of
its own, or attends by another way than when it was examined) raises an error at that moment.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tempering.attention.hooks.dividing import with_hard_mask
from tempering.attention.hooks.ownership import LOCK, STATE, Hold
from tempering.attention.hooks.site import LayerPart, OutsideProfile, Site
from tempering.attention.hooks.softmax_route import Running
from tempering.attention.hooks.temperature_state import Placement, TemperatureState
from tempering.attention.layout import AttentionLayer
from tempering.errors import ArchitectureError


def hold_module(
    module: nn.Module,
    hold: Hold,
    part: LayerPart | OutsideProfile,
    placement: Placement | None = None,
) -> Site:
    """Put the part of a hold in force on a module; `hold.release` takes it back.

    placement: that of the module, if it is known already.
    """
    with LOCK:
        fields = module.__dict__
        site = fields.get(STATE)
        if site is None:
            site = Site(module, _forward_tempered, placement or placement_of(module))
            site.inner = own_forward(module)
            fields[STATE] = site
            # A bound method, so that a deep copy of the model binds it to the copy.
            fields["forward"] = types.MethodType(_forward_tempered, module)
        if isinstance(part, LayerPart):
            site.parts[hold.number] = part
        else:
            site.outside[hold.number] = part
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
def module_tempered(
    module: nn.Module, layer: AttentionLayer
) -> Iterator[Callable[[Tensor], TemperatureState]]:
    """Temper one module for this thread alone: gives a function that sets T[rows, heads]."""
    hold = Hold([module], private=True)
    ones = torch.ones(1, layer.heads, dtype=torch.float64)
    try:
        site = hold_module(module, hold, LayerPart(layer, ones))
        hold.enter()

        def temper(temperature: Tensor) -> TemperatureState:
            site.set(hold.number, temperature)
            state = site.find()
            assert isinstance(state, TemperatureState)
            return state

        yield temper
    finally:
        hold.release()


def _forward_tempered(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    site = getattr(module, STATE, None)
    if site is None:
        inner = module.__dict__.get("forward")
        if inner is None or getattr(inner, "__func__", None) is _forward_tempered:
            # A deep copy: our forward was copied with it, the temperatures were not.
            return type(module).forward(module, *args, **kwargs)
        return inner(*args, **kwargs)  # another thread released the module after we were called
    state = site.current
    if state is None:
        return _forward_inside(site, module, args, kwargs)
    if type(state) is TemperatureState:
        if state.layer.soft_mask is not None and state.uniform != 1.0:
            args, kwargs = with_hard_mask(state.layer.soft_mask, args, kwargs)
        with Running(state) as running:
            output = _forward_inside(site, module, args, kwargs)
        if not running.met:
            raise _unmet(state, module)
        return output
    if isinstance(state, OutsideProfile) and not state.entered:
        with Running(state):
            return _forward_inside(site, module, args, kwargs)
    raise state.error


def _forward_inside(
    site: Site, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
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


# A pickled method is looked up by its name in the module that is loaded: its own forward there.
_forward_tempered.__name__ = "forward"


def placement_of(module: nn.Module) -> Placement:
    """The device where a module computes; float64 for a module that does, else float32."""
    weights = _first_floating(module)
    if weights is None:
        return torch.device("cpu"), torch.float32
    # Weights that accelerate keeps elsewhere come to a device when they are used.
    device = torch.device("cpu") if weights.is_meta else weights.device
    return device, torch.float64 if weights.dtype == torch.float64 else torch.float32


def _first_floating(module: nn.Module) -> Tensor | None:
    """The first floating-point parameter, in the order of `parameters`."""
    stack = [module]
    while stack:
        part = stack.pop()
        for value in part._parameters.values():
            if value is not None and value.is_floating_point():
                return value
        stack.extend(child for child in reversed(part._modules.values()) if child is not None)
    return None
