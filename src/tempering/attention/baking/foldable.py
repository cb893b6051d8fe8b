"""What folds into a model's weights, layer by layer, as data."""

from __future__ import annotations

from dataclasses import dataclass

from tempering.attention.baking.folds import Fold

PER_HEAD, PER_LAYER, NO = "per head", "per layer", "no"


@dataclass(frozen=True)
class LayerFold:
    """What folds into one attention layer.

    name: module name. verdict: "per head", "per layer" or "no". reason: why not more.
    folds: the parameters to fold, by their names in the model.
    """

    name: str
    verdict: str
    reason: str = ""
    folds: tuple[Fold, ...] = ()


@dataclass(frozen=True)
class Foldable:
    """What folds into a model's weights: the least that all its layers allow.

    verdict: "per head", "per layer" or "no". reason: of the first layer that allows no more.
    plan: one entry for each attention layer, in the order of the layout.
    """

    verdict: str
    reason: str
    plan: tuple[LayerFold, ...] = ()
