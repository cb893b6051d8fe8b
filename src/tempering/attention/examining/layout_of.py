"""The layout of a model, found by running it once on a few tokens."""

from __future__ import annotations

import re
import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from tempering.attention.denoisers import is_linear, of_diffusers, processor_of
from tempering.attention.examining import watch
from tempering.attention.examining.stored import check_stored, input_device
from tempering.attention.examining.structure import (
    ObjectRef,
    Structure,
    code,
    own_code,
    same,
    submodule,
    walk,
)
from tempering.attention.examining.subject import check_sample, check_subject, unwrapped
from tempering.attention.examining.towers import tower_of
from tempering.attention.hooks.ownership import untempered
from tempering.attention.layout import AttentionLayer, Layout, attends
from tempering.errors import ArchitectureError, NoSoftmaxError
from tempering.inputs.answers import on
from tempering.others import check_release


@dataclass(eq=False)
class Description:
    """What one examination of a model found; it holds for as long as the structure stays.

    observation: what the layout was read from. attention: the modules of the layout. code: the
    functions that they run; own_code: those that belong to an instance and not to its class.
    passed: whether the model has passed the self-check since. sample: what it was run on, where a
    caller gave that.
    """

    layout: Layout
    observation: Any
    structure: Structure
    attention: tuple[ObjectRef, ...]
    code: tuple[ObjectRef, ...]
    own_code: tuple[ObjectRef, ...]
    passed: bool = False
    sample: dict[str, Any] | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        model_layout: Layout,
        observation: Any,
        sample: dict[str, Any] | None = None,
    ) -> Description:
        # Read after the forward, which may have changed the model (modules made on first use).
        structure, _ = walk(model)
        attention = [submodule(model, name) for name in model_layout.names]
        return cls(
            model_layout,
            observation,
            structure,
            tuple(map(weakref.ref, attention)),
            code(structure.kinds, attention),
            own_code(attention),
            sample=sample,
        )

    def holds(self, structure: Structure) -> bool:
        """Whether a model is still made of the same, and runs the same code."""
        return (
            structure == self.structure
            and same(self.code, code(structure.kinds, self.modules))
            and same(self.own_code, own_code(self.modules))
        )

    @property
    def modules(self) -> list[Any]:
        """The attention modules, in the order of the layout."""
        return [item() for item in self.attention]


_KNOWN: weakref.WeakKeyDictionary[nn.Module, Description] = weakref.WeakKeyDictionary()


def layout(model: nn.Module, sample: dict[str, Any] | None = None) -> Layout:
    """The attention layers of `model`, found by running it once on a few tokens.

    Parameters
    ----------
    model: a model of transformers or diffusers.
    sample: keyword arguments of a forward call, for models that don't take `input_ids` (see
        `recorded_call`); given one, the model is examined anew. It is kept for later.

    The result is kept while the model doesn't change. A change of its modules, their `forward`,
    its configuration, dtype or device is noticed, and the model examined anew. Layers of a model
    of diffusers stand in the order in which they run, those of its own attention before those of
    cross attention.

    Raises ArchitectureError when no softmax attention is found, or a layer's heads can't be
    told apart.
    """
    return examined(unwrapped(model), sample).layout


def layout_reached(model: nn.Module, sample: dict[str, Any] | None) -> Layout:
    """The layout as inputs like a sample reach it: the known one, if it was found on such inputs.

    sample: None for plain text.
    """
    model = unwrapped(model)
    known = _KNOWN.get(model)
    if sample is not None and (known is None or not {*sample} <= {*(known.sample or ())}):
        return examined(model, sample).layout
    return examined(model).layout


def examined(
    model: nn.Module,
    sample: dict[str, Any] | None = None,
    structure: Structure | None = None,
) -> Description:
    """The description of a model: the known one while it holds, or else a new one.

    structure: of `model` at this moment, if the caller has it.
    A model that was given a sample and has changed is examined on that sample anew.
    """
    check_subject(model)
    if sample is not None:
        check_sample(sample)
    structure = walk(model)[0] if structure is None else structure
    known = _KNOWN.get(model)
    if sample is None and known is not None and known.holds(structure):
        return known
    if sample is None and known is not None and known.sample is not None:
        sample = on(model, known.sample, input_device(model))
    check_stored(model)
    if of_diffusers(model):
        check_release("diffusers")
    with untempered():  # whatever handles hold the model
        observation = watch.observe(model, sample)
    model_layout = _with_outside(model, _arrange(model, observation.layers), observation.reached)
    known = _KNOWN[model] = Description.of(model, model_layout, observation, sample)
    return known


def _arrange(model: nn.Module, layers: Sequence[AttentionLayer]) -> Layout:
    if not layers:
        unread = next((name for name, module in model.named_modules() if attends(module)), None)
        if unread is None:
            raise NoSoftmaxError(
                f"{type(model).__name__} shows no softmax attention in a forward pass, "
                "so it has no attention temperature"
            )
        raise ArchitectureError(
            f"{unread} ({type(model.get_submodule(unread)).__name__}) attends without calling a "
            "softmax over keys, so its temperature can't be controlled exactly"
        )
    numbered: list[AttentionLayer] = []
    depths: dict[str, int] = {}
    towers = [tower_of(model, layer.name) for layer in layers]
    alone = len(set(towers)) == 1
    for layer, tower in zip(layers, towers, strict=True):
        layer = replace(layer, tower="" if alone else tower)
        container, index = None, 0
        if not of_diffusers(model):
            container, index = _position(model, layer.name)
        if container is None:
            # A module outside any list of layers (one shared block), or one of many lists that
            # are run in turn (diffusers): counted in order of use.
            index = sum(other.part == layer.part for other in numbered)
        size = len(container) if container is not None else index + 1
        depths[layer.part] = max(depths.get(layer.part, 0), size, index + 1)
        numbered.append(replace(layer, index=index))
    order = {"encoder": 0, "decoder": 1, "cross": 2}
    first = {part: place for place, part in enumerate(depths)}
    numbered.sort(key=lambda layer: (order[layer.stack], first[layer.part], layer.index))
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
        match = re.match(r"(?:(.*?)\.)?(\d+)\.", layer.name + ".")
        if match:
            lists.setdefault(match.group(1) or "", set()).add(int(match.group(2)))
    missing: list[str] = []
    for prefix, present in lists.items():
        container = model.get_submodule(prefix) if prefix else model
        if isinstance(container, nn.ModuleList):
            missing += [f"{prefix}.{i}" for i in range(len(container)) if i not in present]
    known = [*(layer.name for layer in layers), *missing]
    for name, module in model.named_modules():
        attention = attends(module) or is_linear(processor_of(module))
        if attention and not any(_related(name, other) for other in known):
            missing.append(name)
            known.append(name)
    return tuple(missing)


def _with_outside(model: nn.Module, model_layout: Layout, reached: Collection[str]) -> Layout:
    """The layout with the modules that attend by their code and did not on the sample."""
    outside = tuple(
        name
        for name, module in model.named_modules()
        if attends(module) and not any(_related(name, layer) for layer in model_layout.names)
    )
    return replace(
        model_layout, outside=outside, unreached=tuple(n for n in outside if n not in reached)
    )


def _related(name: str, other: str) -> bool:
    return f"{name}.".startswith(f"{other}.") or f"{other}.".startswith(f"{name}.")
