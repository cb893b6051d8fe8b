"""Softmaxes whose results a module throws away, like the one in the attention of SAM 2.

Such a module computes a softmax, and attends by the attention interface without it. A temperature
has nothing to do there, which is proven and not assumed: the model gives the same output, bit for
bit, with NaN in the place of what these softmaxes give.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from tempering.attention.examining.module_stack import ModuleStack
from tempering.attention.examining.sample import run
from tempering.attention.hooks import interface_patch, softmax_route


def results_unused(
    model: nn.Module, inputs: dict[str, Any], cache: bool, names: Collection[str]
) -> bool:
    """Whether the softmaxes that these modules call outside the interface change no output."""
    plain = _tensors(run(model, inputs, cache))
    spoiled = _Spoiled(ModuleStack(model), names)
    with spoiled.modules.followed(), interface_patch.watched(spoiled.spared), spoiled:
        others = _tensors(run(model, inputs, cache))
    return bool(plain) and all(map(torch.equal, plain, others))


class _Spoiled(TorchFunctionMode):
    """NaN in the place of the softmaxes that some modules call outside the attention interface."""

    def __init__(self, modules: ModuleStack, names: Collection[str]) -> None:
        super().__init__()
        self.modules, self.names = modules, names
        self.interface_calls = 0

    def spared(self, function: Callable[..., Any], eager: Callable[..., Any]) -> Callable[..., Any]:
        """A function of the interface, whose own softmax is left as it is."""

        def attention(*args: Any, **kwargs: Any) -> Any:
            self.interface_calls += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.interface_calls -= 1

        return attention

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in softmax_route.SOFTMAXES or self.interface_calls or not self.modules.running:
            return result
        name = self.modules.name_of(self.modules.caller())
        return torch.full_like(result, torch.nan) if name in self.names else result


def _tensors(output: Any) -> list[Tensor]:
    return [item for item in tree_flatten(output)[0] if isinstance(item, Tensor)]
