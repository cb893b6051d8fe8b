"""What bakes into a model, verified: random temperatures folded, against the controlled model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tempering.attention.baking.bake import foldable, refuse_baked
from tempering.attention.baking.comparison import (
    TOLERANCE,
    controlled_logits,
    deviation,
    logits_of,
    verification_inputs,
)
from tempering.attention.baking.foldable import NO, PER_HEAD, PER_LAYER, Foldable
from tempering.attention.baking.folds import folded
from tempering.attention.baking.profile_folds import betas
from tempering.attention.control.self_check import random_temperatures
from tempering.attention.examining.layout_of import examined
from tempering.attention.profiles.profile import Profile


@dataclass(frozen=True)
class BakeVerdict:
    """What bakes into a model, and how it was verified.

    verdict: "per head", "per layer" or "no". reason: why not more.
    layers: attention layers that fold, at least per layer, of `of` in all.
    deviation: of the logits with random temperatures folded from the controlled model's, in
        their standard deviations, over all layers that fold; None where none does.
    """

    verdict: str
    reason: str
    layers: int
    of: int
    deviation: float | None


def bake_verdict(model: nn.Module, sample: dict[str, Any] | None = None) -> BakeVerdict:
    """Find what folds into the weights of `model`, fold random temperatures, and compare.

    Every layer that folds gets temperatures log-uniform in 1/3..3, per head where it takes them
    so, and the others 1. The logits must agree with the controlled model's to 1e-4 of their
    standard deviation in float32; otherwise the verdict is "no", with the deviation as reason.

    Parameters
    ----------
    model: a transformers model in float32, untempered; it is left as it is.
    sample: keyword arguments of a forward call, for models that don't take `input_ids`.

    Raises RefusedError when the model is tempered at the moment, BakeError when it is baked.
    """
    refuse_baked(model)
    found = foldable(model, sample)
    count = sum(layer.verdict != NO for layer in found.plan)
    if count == 0:
        return BakeVerdict(found.verdict, found.reason, 0, len(found.plan), None)
    known = examined(model, sample)
    model_layout, sample = known.layout, known.sample
    profile = Profile.from_rows(_temperatures(found, model_layout.heads), model_layout)
    inputs = verification_inputs(model, sample)
    wanted = controlled_logits(model, profile, inputs, sample)
    with folded(model, betas(found, model, profile)):
        error = deviation(logits_of(model, inputs), wanted)
    verdict, reason = found.verdict, found.reason
    if not error <= TOLERANCE:
        verdict = NO
        reason = (
            f"its logits are off by {error:.2g} of their standard deviation when random "
            f"temperatures are folded (allowed {TOLERANCE:g})"
        )
    return BakeVerdict(verdict, reason, count, len(found.plan), error)


def _temperatures(found: Foldable, heads: tuple[int, ...]) -> list[Tensor]:
    """Random temperatures for each layer, as far as it takes them."""
    rows = []
    for layer, count in zip(found.plan, heads, strict=True):
        if layer.verdict == PER_HEAD:
            row = random_temperatures(layer.name, count)
        elif layer.verdict == PER_LAYER:
            row = random_temperatures(layer.name, 1).expand(count)
        else:
            row = torch.ones(count)
        rows.append(row.double())
    return rows
