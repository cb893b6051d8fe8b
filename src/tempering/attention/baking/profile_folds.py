"""The folds that give a model the temperatures of a profile."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tempering.attention.baking.foldable import Foldable
from tempering.attention.baking.folds import Fold
from tempering.attention.baking.isolated_layer import Isolated
from tempering.attention.baking.layer_calls import isolated_layers
from tempering.attention.baking.value_folds import value_folds
from tempering.attention.examining.layout_of import layout
from tempering.attention.profiles.profile import Profile
from tempering.errors import BakeError

# Each fold with its factors: 1/T by head, or output scales by value head.
Betas = list[tuple[Fold, Float[Tensor, "_heads"]]]


def betas(found: Foldable, model: nn.Module, profile: Profile) -> Betas:
    """The folds that give the model a profile's temperatures, each with beta per head.

    Raises BakeError that names the first layer whose temperatures can't be folded. Layers at
    T = 1 ask for nothing.
    """
    if not found.plan:
        raise BakeError(found.reason)
    chosen: dict[str, tuple[str, Fold, Tensor]] = {}
    rows = profile.resolve(layout(model), scales=True)
    for layer, temperature in zip(found.plan, rows, strict=True):
        beta = temperature.double().reciprocal()
        if not layer.folds and bool((beta != 1).any()):
            raise BakeError(f"{layer.name}: {layer.reason}; give it the temperature 1")
        for fold in layer.folds:
            if not fold.per_head and bool((beta != beta[0]).any()):
                raise BakeError(
                    f"{layer.name}: {layer.reason}, so it takes one temperature for all heads; "
                    f"the profile has {float(temperature.min()):g} to "
                    f"{float(temperature.max()):g}"
                )
            other = chosen.get(fold.parameter)
            if other is not None and not torch.equal(other[2], beta):
                raise BakeError(
                    f"{layer.name} shares {fold.parameter} with {other[0]}, and the profile has "
                    "different temperatures for them; give both the same"
                )
            chosen[fold.parameter] = (layer.name, fold, beta)
    return [(fold, beta) for _, fold, beta in chosen.values() if bool((beta != 1).any())]


def named_fold(model: nn.Module, layer: Isolated, fold: Fold) -> Fold:
    """The fold of a parameter by its name in the model; the first one, where it has several."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    own = model.get_parameter(f"{layer.layer.name}.{fold.parameter}")
    return replace(fold, parameter=first[id(own)])


def profile_folds(
    found: Foldable, model: nn.Module, profile: Profile, sample: dict[str, Any] | None = None
) -> Betas:
    """The folds that give a model a profile, each with its factor per head.

    Those of temperatures (`betas`), then those of output scales (`value_folds`).

    Raises BakeError that names the first layer which can't be folded.
    """
    chosen = betas(found, model, profile)
    model_layout = layout(model, sample)
    scales = profile.scales_by_layer(model_layout) or ()
    moved = {
        layer.name: scale
        for layer, scale in zip(model_layout.layers, scales, strict=bool(scales))
        if bool((scale != 1).any())
    }
    layers = [layer for layer in model_layout.layers if layer.name in moved]
    with contextlib.closing(isolated_layers(model, layers, sample)) as isolated:
        for layer in isolated:
            for fold, scale in value_folds(layer, moved[layer.layer.name]):
                chosen.append((named_fold(model, layer, fold), scale))
    return chosen
