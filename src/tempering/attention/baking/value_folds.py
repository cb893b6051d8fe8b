"""Folds of output scales: factors on the rows that make the values of a head.

    s sum_j p_j v_j = sum_j p_j (s v_j)

so the scale of a head's output is one of its values, and heads that share values need one scale.
Which rows make the values of which head is read off gradients, as for queries (`head_labels`), and
proved on the layer alone: the values are s times the old ones, and everything that the layer
returns is what it returns under the scales themselves.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.attention.baking.fold_proof import floor_of, output_error
from tempering.attention.baking.folds import Fold, folded
from tempering.attention.baking.head_labels import Slices, marks_of
from tempering.attention.baking.isolated_layer import Isolated, SeenLogits
from tempering.attention.hooks import interface_patch
from tempering.errors import BakeError

_TOLERANCE = 2e-5  # of the largest value of a head, as for logits


def value_folds(
    layer: Isolated, scale: Float[Tensor, "heads"]
) -> list[tuple[Fold, Float[Tensor, "value_heads"]]]:
    """The folds that multiply each head's output by its scale, by names in the layer's module.

    Raises BakeError that names the layer: heads that share values have different scales, or no
    weights make its values alone.
    """
    name = layer.layer.name
    with layer.jittered():
        values, _ = _seen(layer)
        heads = values[0].shape[1]
        groups = scale.reshape(heads, -1)
        if not bool((groups == groups[:, :1]).all()):
            raise BakeError(
                f"{name}: its {layer.layer.heads} heads share the values of {heads}, so heads of a "
                "group take one output scale; the profile has "
                f"{float(scale.min()):g} to {float(scale.max()):g}"
            )
        own = groups[:, 0].double()
        expected = layer.run(scale=scale)
        for chosen in _candidates(layer, heads):
            parts = [(fold, own) for fold in chosen]
            with folded(layer.module, parts):
                after, outputs = _seen(layer)
            right = all(
                _agree(new, old * own.to(old)[None, :, None, None])
                for new, old in zip(after, values, strict=True)
            )
            if right and output_error(expected, outputs, floor_of(layer)) <= 1:
                return parts
    raise BakeError(
        f"{name}: no weights make its values alone, so the output scales of its heads can't be "
        "folded; take temperatures alone: tempering repair --no-scales"
    )


def _seen(layer: Isolated) -> tuple[list[Tensor], list[SeenLogits]]:
    """The values that a layer's attention function is given, and all else that a run shows.

    Float[Tensor, "batch value_heads keys size"] for every call.
    """
    found: list[Tensor] = []

    def wrap(function: Callable[..., Any], eager: Callable[..., Any]) -> Callable[..., Any]:
        def attention(module: Any, *args: Any, **kwargs: Any) -> Any:
            found.append(args[2] if len(args) > 2 else kwargs["value"])
            return function(module, *args, **kwargs)

        return attention

    with interface_patch.watched(wrap):
        runs = layer.run()
    if not found:
        raise BakeError(f"{layer.layer.name}: its values don't pass the attention interface")
    return found, runs


def _agree(found: Tensor, wanted: Tensor) -> bool:
    size = wanted.abs().amax(dim=(0, 2, 3), keepdim=True)
    return bool(((found - wanted).abs() <= _TOLERANCE * size).all())


def _candidates(layer: Isolated, heads: int) -> Iterator[tuple[Fold, ...]]:
    """The parameters of each submodule, and of each two, whose slices make one head's values."""
    owners: dict[str, list[Fold]] = {}
    for name, fold in _reaching(layer, heads).items():
        owners.setdefault(name.rpartition(".")[0], []).append(fold)
    for count in (1, 2):
        for chosen in itertools.combinations(owners.values(), count):
            yield tuple(fold for group in chosen for fold in group)


def _reaching(layer: Isolated, heads: int) -> dict[str, Fold]:
    """For each parameter whose slices along an axis make the values of one head each, its fold."""
    parameters = dict(layer.module.named_parameters())
    marks = marks_of(heads)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            values = [item for item in _seen(layer)[0] if item.requires_grad]
            plain, marked = _gradients(values, list(parameters.values()), marks)
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
    found = {}
    for name, one, two in zip(parameters, plain, marked, strict=True):
        if one is None or two is None or not bool((one != 0).any()):
            continue
        for axis in range(one.ndim):
            labels = Slices(one, two, axis).labels(marks)
            if labels is not None:
                found[name] = Fold.of(name, axis, labels)
                break
    return found


def _gradients(
    values: Sequence[Tensor], parameters: Sequence[Tensor], marks: Tensor
) -> Iterator[Sequence[Tensor | None]]:
    """Of random cotangents of the values, and of the same times a head's mark."""
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(item.shape, generator=generator).to(item) for item in values]
    for factor in (torch.ones_like(marks), marks):
        if not values:
            yield [None] * len(parameters)
            continue
        yield torch.autograd.grad(
            values,
            parameters,
            [item * factor.to(item)[None, :, None, None] for item in cotangents],
            retain_graph=True,
            allow_unused=True,
        )
