"""The layout of a model, found by running it once on a few tokens."""

from __future__ import annotations

import re
import weakref
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from tempering.attention.hooks.ownership import untempered
from tempering.attention.layout import AttentionLayer, Layout, attends
from tempering.errors import ArchitectureError

_CACHE: weakref.WeakKeyDictionary[nn.Module, dict[str, tuple[Layout, Any]]]


_CACHE = weakref.WeakKeyDictionary()


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile(model)`, which shares its modules; else the model."""
    return getattr(model, "_orig_mod", model)


def layout(model: nn.Module, sample: dict[str, Any] | None = None) -> Layout:
    """The attention layers of `model`, found by running it once on a few tokens.

    Parameters
    ----------
    model: a transformers model.
    sample: keyword arguments of a forward call, for models that don't take `input_ids`; given
        one, the model is examined anew.

    Raises ArchitectureError when no softmax attention is found, or a layer's heads can't be
    told apart. The result is kept for the lifetime of the model object.
    """
    return examined(unwrapped(model), sample)[0]


def examined(model: nn.Module, sample: dict[str, Any] | None = None) -> tuple[Layout, Any]:
    """The layout, and the observation that it was read from (see `probe.Observation`)."""
    if not hasattr(model, "config"):
        raise ArchitectureError(
            f"{type(model).__name__} has no transformers configuration; give a transformers "
            "model, not a wrapper around one"
        )
    known = _CACHE.setdefault(model, {})
    implementation = str(getattr(model.config, "_attn_implementation", None))
    if sample is not None or implementation not in known:
        from tempering.attention.examining.watch import observe

        with untempered():  # whatever is in force
            observation = observe(model, sample)
        plan = _arrange(model, observation.layers)
        known[implementation] = (_with_outside(model, plan, observation.reached), observation)
    return known[implementation]


def _arrange(model: nn.Module, layers: Sequence[AttentionLayer]) -> Layout:
    if not layers:
        own = next((name for name, module in model.named_modules() if attends(module)), None)
        raise ArchitectureError(
            f"{type(model).__name__} shows no softmax attention in a forward pass, "
            "so it has no attention temperature"
            if own is None
            else f"{own} ({type(model.get_submodule(own)).__name__}) attends without calling a "
            "softmax over keys, so its temperature can't be controlled exactly"
        )
    numbered: list[AttentionLayer] = []
    depths: dict[str, int] = {}
    for layer in layers:
        container, index = _position(model, layer.name)
        if container is None:
            # A module outside any list of layers (one shared block): counted in order of use.
            index = sum(other.stack == layer.stack for other in numbered)
        size = len(container) if container is not None else index + 1
        depths[layer.stack] = max(depths.get(layer.stack, 0), size, index + 1)
        numbered.append(replace(layer, index=index))
    order = {"encoder": 0, "decoder": 1, "cross": 2}
    numbered.sort(key=lambda layer: (order[layer.stack], layer.index))
    return Layout(tuple(numbered), _untempered(model, numbered), depths)


def _position(model: nn.Module, name: str) -> tuple[nn.ModuleList | None, int]:
    """The outermost ModuleList around a module, and the module's place in it."""
    parts = name.split(".")
    for depth, part in enumerate(parts):
        if part.isdigit():
            container = model.get_submodule(".".join(parts[:depth])) if depth else model
            if isinstance(container, nn.ModuleList) and len(container) > 1:
                return container, int(part)
    for depth, part in enumerate(parts):
        if part.isdigit():
            container = model.get_submodule(".".join(parts[:depth])) if depth else model
            if isinstance(container, nn.ModuleList):
                return container, int(part)
    return None, 0


def _untempered(model: nn.Module, layers: Sequence[AttentionLayer]) -> tuple[str, ...]:
    """Entries of lists of layers without a layer of the layout, and attention not reached."""
    lists: dict[str, set[int]] = {}
    for layer in layers:
        match = re.match(r"(.*?)\.?(\d+)\.", layer.name + ".")
        if match:
            lists.setdefault(match.group(1), set()).add(int(match.group(2)))
    missing: list[str] = []
    for prefix, present in lists.items():
        container = model.get_submodule(prefix) if prefix else model
        if isinstance(container, nn.ModuleList):
            missing += [f"{prefix}.{i}" for i in range(len(container)) if i not in present]
    known = [*(layer.name for layer in layers), *missing]
    for name, module in model.named_modules():
        if attends(module) and not any(_related(name, other) for other in known):
            missing.append(name)
            known.append(name)
    return tuple(missing)


def _with_outside(model: nn.Module, plan: Layout, reached: Collection[str]) -> Layout:
    """The layout with the modules that attend by their code and did not on the sample."""
    outside = tuple(
        name
        for name, module in model.named_modules()
        if attends(module) and not any(_related(name, layer) for layer in plan.names)
    )
    return replace(plan, outside=outside, unreached=tuple(n for n in outside if n not in reached))


def _related(name: str, other: str) -> bool:
    return f"{name}.".startswith(f"{other}.") or f"{other}.".startswith(f"{name}.")
