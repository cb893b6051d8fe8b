"""A model run in float32 a block at a time, so that its weights may stay on disk as they are.

Weights loaded in the dtype of their file are pages of that file, not memory. Where they are
used they become float32 copies, with a fold in them where one is tried, and vanish afterwards:
what is held is one block (a layer, or the embedding) at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tempering.attention.baking.folds import Fold


def folded_copy(weights: Tensor, parts: Iterable[tuple[Fold, Tensor]], rounded: bool) -> Tensor:
    """A float32 (or wider) copy of weights with folds in it, rounded to their dtype if asked."""
    copied = weights.detach().to(torch.promote_types(weights.dtype, torch.float32), copy=True)
    for fold, beta in parts:
        fold.apply_(copied, beta)
    return copied.to(weights.dtype).to(copied.dtype) if rounded else copied


@contextlib.contextmanager
def widened(
    model: nn.Module, folds: Iterable[tuple[Fold, Tensor]] = (), rounded: bool = False
) -> Iterator[None]:
    """Inside, the model runs in float32, with betas folded in; its own weights stay untouched.

    Parameters
    ----------
    model: a model whose weights are of any floating dtype.
    folds: of its parameters, by name, each with beta per head.
    rounded: whether folded weights are rounded to the dtype that they are stored in.
    """
    parts: dict[int, list[tuple[Fold, Tensor]]] = {}
    for fold, beta in folds:
        parts.setdefault(id(model.get_parameter(fold.parameter)), []).append((fold, beta))
    saved: dict[int, list[list[tuple[nn.Module, str, nn.Parameter]]]] = {}

    def widen(inner: Callable[[nn.Module], Iterable[nn.Module]]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            own: list[tuple[nn.Module, str, nn.Parameter]] = []
            saved.setdefault(id(module), []).append(own)
            for owner in inner(module):
                for name, weights in owner._parameters.items():
                    if weights is None or not weights.is_floating_point():
                        continue
                    fold = parts.get(id(weights), ())
                    if fold or torch.finfo(weights.dtype).bits < 32:
                        own.append((owner, name, weights))
                        copied = folded_copy(weights, fold, rounded and bool(fold))
                        owner._parameters[name] = nn.Parameter(copied, requires_grad=False)

        return hook

    def restore(module: nn.Module, args: Any, output: Any) -> None:
        for owner, name, weights in saved[id(module)].pop():
            owner._parameters[name] = weights

    handles = []
    for module, whole in _blocks(model):
        inner = nn.Module.modules if whole else _itself
        handles.append(module.register_forward_pre_hook(widen(inner)))
        handles.append(module.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _itself(module: nn.Module) -> list[nn.Module]:
    return [module]


def _blocks(model: nn.Module) -> list[tuple[nn.Module, bool]]:
    """Layers, to be widened whole, and the modules outside them that have weights of their own."""
    found: list[tuple[nn.Module, bool]] = []
    seen: set[int] = set()

    def walk(module: nn.Module, listed: bool) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        if listed:
            found.append((module, True))
            return
        if any(item is not None for item in module._parameters.values()):
            found.append((module, False))
        for child in module.children():
            walk(child, isinstance(module, nn.ModuleList))

    walk(model, False)
    return found
