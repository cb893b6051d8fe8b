"""The folds that give a model the temperatures of a profile."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tempering.attention.baking.foldable import Foldable
from tempering.attention.baking.folds import Fold
from tempering.attention.examining.layout_of import layout
from tempering.attention.profiles.profile import Profile
from tempering.errors import BakeError

Betas = list[tuple[Fold, Float[Tensor, "heads"]]]


def betas(found: Foldable, model: nn.Module, profile: Profile) -> Betas:
    """The folds that give the model a profile's temperatures, each with beta per head.

    Raises BakeError that names the first layer whose temperatures can't be folded. Layers at
    T = 1 ask for nothing.
    """
    if not found.plan:
        raise BakeError(found.reason)
    chosen: dict[str, tuple[str, Fold, Tensor]] = {}
    rows = profile.resolve(layout(model))
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
