"""The calls that attention layers receive in a forward pass, and each layer alone on its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tempering.attention.baking.isolated_layer import Arguments, Isolated, with_own_cache
from tempering.attention.examining.sample import run, sample_inputs
from tempering.attention.hooks import interface_patch
from tempering.attention.layout import AttentionLayer


def isolated_layers(
    model: nn.Module, layers: Sequence[AttentionLayer], sample: dict[str, Any] | None
) -> Generator[Isolated, None, None]:
    """Each layer alone, on the calls that one forward pass of the model makes to it."""
    config: Any = model.config
    implementation = config._attn_implementation
    setter: Any = getattr(model, "set_attn_implementation", None)
    # Fused kernels run in half precision and show no logits.
    switched = implementation not in (None, "eager", "sdpa")
    if switched:
        setter("eager")
    try:
        calls = capture_calls(model, [layer.name for layer in layers], sample)
        # The interface is wrapped once, and not anew for each trial.
        interface_patch.acquire()
        try:
            for layer in layers:
                yield Isolated(model.get_submodule(layer.name), layer, calls.pop(layer.name))
        finally:
            interface_patch.release()
    finally:
        if switched:
            setter(implementation)


def capture_calls(
    model: nn.Module, names: list[str], sample: dict[str, Any] | None = None
) -> dict[str, list[Arguments]]:
    """The arguments of every call that the named modules receive in one forward pass."""
    calls: dict[str, list[Arguments]] = {name: [] for name in names}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[name].append((tree_map(_copied, args), tree_map(_copied, kwargs)))

        return keep

    handles = [
        model.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True)
        for name in names
    ]
    try:
        run(model, sample if sample is not None else sample_with_types(model))
    finally:
        for handle in handles:
            handle.remove()
    return calls


def sample_with_types(model: Any) -> dict[str, Any]:
    """A padded batch, with two types of tokens where the model knows them: XLNet's queries meet
    weights for them that take no part otherwise.
    """
    inputs = sample_inputs(model)
    types = int(getattr(model.config, "type_vocab_size", 2) or 1)
    if hasattr(model.config, "type_vocab_sizes"):  # TAPAS has seven types for each token
        types = 1
    if "token_type_ids" in inspect.signature(model.forward).parameters and types > 1:
        ids = inputs["input_ids"]
        halves = torch.arange(ids.shape[1], device=ids.device) * 2 // ids.shape[1]
        inputs["token_type_ids"] = halves.expand_as(ids).contiguous()
    return inputs


def _copied(item: Any) -> Any:
    if not isinstance(item, Tensor):
        return with_own_cache(item)
    item = item.detach().clone()
    if not item.is_floating_point():
        return item
    # In float32, masking must be float32's lowest number.
    masked = item <= torch.finfo(item.dtype).min / 2
    return item.float().masked_fill(masked, torch.finfo(torch.float32).min)
