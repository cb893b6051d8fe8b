"""Where the values of a parameter are: in it, packed inside it, or kept elsewhere by accelerate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tempering.errors import ModelError


def parts_of(model: nn.Module, name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that hold a parameter's values, by name.

    Quantised weights (torchao, quanto) are tensors around tensors: their packed values, scales
    and zero points. Weights that accelerate offloads are on the meta device between the forwards
    of their module, whose hook knows where they are.

    Raises ModelError for a parameter that has no values at all.
    """
    if value.is_meta:
        value = offloaded(model, name)
    if type(value) not in (nn.Parameter, Tensor) and is_traceable_wrapper_subclass(value):
        inner: Any = value
        for part in inner.__tensor_flatten__()[0]:
            yield from parts_of(model, f"{name}.{part}", getattr(value, part))
    else:
        yield name, value


def offloaded(model: nn.Module, name: str) -> Tensor:
    """A parameter that accelerate keeps elsewhere; ModelError where it is nowhere."""
    path = name.split(".")
    for depth in range(len(path) - 1, -1, -1):
        for hook in _hooks(model.get_submodule(".".join(path[:depth]))):
            kept, key = getattr(hook, "weights_map", None), ".".join(path[depth:])
            if kept is not None:
                try:
                    found = kept[key]
                except KeyError:
                    continue
                if isinstance(found, Tensor) and not found.is_meta:
                    return found
    raise ModelError(
        f"can't fingerprint the model: {name} is on the meta device and has no data; "
        "load the weights first"
    )


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    """accelerate's hooks of a module."""
    hook: Any = module.__dict__.get("_hf_hook")
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def input_embeddings(model: Any) -> Any:
    """What embeds a model's token ids; None for a model that embeds none."""
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its inputs: where its embeddings are, or run if accelerate moves them."""
    embedding = input_embeddings(model)
    places = [item for item in (embedding, model) if isinstance(item, nn.Module)]
    for hook in (hook for item in places for hook in _hooks(item)):
        if getattr(hook, "execution_device", None) is not None:
            return torch.device(hook.execution_device)
    values = (value for item in places for value in item.parameters() if not value.is_meta)
    first = next(values, None)
    return torch.device("cpu") if first is None else first.device
