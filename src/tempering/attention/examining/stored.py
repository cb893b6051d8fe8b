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
    if not _packs(value):
        yield name, value
        return
    for part in value.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
        yield from parts_of(model, f"{name}.{part}", getattr(value, part))


def packed(value: Tensor) -> Iterator[Tensor]:
    """The plain tensors inside a parameter; the parameter where it is one itself."""
    if not _packs(value):
        yield value
        return
    for part in value.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
        yield from packed(getattr(value, part))


def _packs(value: Tensor) -> bool:
    plain = type(value) is nn.Parameter or type(value) is Tensor
    return not plain and is_traceable_wrapper_subclass(value)


def check_stored(model: nn.Module) -> None:
    """ModelError for a parameter that has no values anywhere."""
    for name, value in model.named_parameters():
        if value.is_meta:
            _elsewhere(model, name)


def offloaded(model: nn.Module, name: str) -> Tensor:
    """A parameter that accelerate keeps elsewhere; ModelError where it is nowhere."""
    kept, key = _elsewhere(model, name)
    value = kept[key]
    if value.is_meta:
        raise ModelError(_NOWHERE.format(name))
    return value


_NOWHERE = "{} is on the meta device and has no values; load the model's weights first"


def _elsewhere(model: nn.Module, name: str) -> tuple[Any, str]:
    """The mapping of accelerate's that holds a parameter, and the key there."""
    path = name.split(".")
    for depth in range(len(path) - 1, -1, -1):
        key = ".".join(path[depth:])
        for hook in hooks(model.get_submodule(".".join(path[:depth]))):
            kept = getattr(hook, "weights_map", None)
            if kept is not None and _holds(kept, key):
                return kept, key
    raise ModelError(_NOWHERE.format(name))


def _holds(kept: Any, key: str) -> bool:
    # Asking one of accelerate's mappings whether it holds a key reads the weight from disk.
    within = getattr(kept, "dataset", kept)
    key = f"{getattr(kept, 'prefix', '')}{key}"
    named = [getattr(within, part, ()) for part in ("state_dict", "index")]
    return key in within if isinstance(within, dict) else any(key in names for names in named)


def hooks(module: nn.Module) -> tuple[Any, ...]:
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
    for hook in (hook for item in places for hook in hooks(item)):
        if getattr(hook, "execution_device", None) is not None:
            return torch.device(hook.execution_device)
    values = (value for item in places for value in item.parameters() if not value.is_meta)
    first = next(values, None)
    return torch.device("cpu") if first is None else first.device
