"""Which layers of a model have a softmax, and how many heads compete there."""

from __future__ import annotations

import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from tempering.errors import ArchitectureError


@dataclass(frozen=True)
class AttentionLayer:
    """One attention module of a model.

    name: module name, e.g. "model.layers.3.self_attn".
    stack: "decoder", "encoder" or "cross" (decoder queries over encoder keys).
    index: place of its layer in the stack, counted from 0 and including layers without softmax.
    heads, kv_heads: query heads, key-value heads.
    route: "interface" (transformers' attention interface) or "softmax" (attention code of its
        own, reached at its softmax call).
    folded: with route "softmax", whether heads are folded into the batch axis.
    mask_floor: logits at or below it are masking, and stay as they are.
    features: what sits before the softmax besides scaled products: "sinks", "softcap",
        "position_bias".
    """

    name: str
    stack: str
    index: int
    heads: int
    kv_heads: int
    route: str = "interface"
    folded: bool = False
    mask_floor: float = float(torch.finfo(torch.float32).min) / 2
    features: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """The attention layers of a model in order of depth, and the layers that have none.

    depths: number of layers of each stack, softmax or not; the clock of a schedule over depth.
    untempered: names of layers without softmax (state space, linear attention, ...).
    """

    layers: tuple[AttentionLayer, ...]
    untempered: tuple[str, ...]
    depths: dict[str, int]

    @property
    def names(self) -> tuple[str, ...]:
        """Module names, one for each row of a profile."""
        return tuple(layer.name for layer in self.layers)

    @property
    def heads(self) -> tuple[int, ...]:
        """Number of query heads in each row of a profile."""
        return tuple(layer.heads for layer in self.layers)

    def describe(self) -> str:
        """A short text for messages, e.g. "30 layers x 9 heads"."""
        counts = sorted(set(self.heads))
        heads = str(counts[0]) if len(counts) == 1 else f"{counts[0]}..{counts[-1]}"
        return f"{len(self.layers)} layers x {heads} heads"


_CACHE: weakref.WeakKeyDictionary[nn.Module, Layout] = weakref.WeakKeyDictionary()


def layout(model: nn.Module, sample: dict[str, Any] | None = None) -> Layout:
    """The attention layers of `model`, found by running it once on a few tokens.

    Parameters
    ----------
    model: a transformers model.
    sample: keyword arguments of a forward call, for models that don't take `input_ids`.

    Raises ArchitectureError when no softmax attention is found, or a layer's heads can't be
    told apart. The result is kept for the lifetime of the model object.
    """
    found = _CACHE.get(model)
    if found is None:
        from tempering.attention.probe import observe

        observation = observe(model, sample)
        found = _arrange(model, observation.layers)
        _CACHE[model] = found
    return found


def _arrange(model: nn.Module, layers: Sequence[AttentionLayer]) -> Layout:
    if not layers:
        raise ArchitectureError(
            f"{type(model).__name__} shows no softmax attention in a forward pass, "
            "so it has no attention temperature"
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
    """Entries of the lists of layers that hold at least one attention layer but not here."""
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
    return tuple(missing)
