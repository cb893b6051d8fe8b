"""The proof of a fold in one attention layer, and what is wrong with one that fails it.

A fold of random betas is right when, on the layer alone with jittered weights,

    the finished logits are beta times the old ones, wherever they are not masked;
    they still are for beta = 2^30 and 2^-30, so that nothing clamps or caps on the way;
    everything that the layer returns equals what it returns under the temperatures themselves;
    whatever the layer ranks, to choose keys or experts, is ranked as before.

On the weights as they are, what the layer returns is compared again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from enum import Enum, auto

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.attention.baking.folds import ADDS_ONE, Fold, folded
from tempering.attention.baking.isolated_layer import Isolated, SeenLogits
from tempering.attention.control.self_check import random_temperatures

# Relative to the largest logit of a head; float32 rounding on a few tokens gives about 1e-6.
_TOLERANCE = 2e-5
# Rounding of a logit l is eps l; a sum of a few products and the division double it a few times.
_ROUNDINGS = 16
_UNIFORM = 0.6
_EXTREME = 2.0**30


class Flaw(Enum):
    """What is wrong with a fold."""

    UNDONE = auto()
    """The logits stay as they were: something normalises them."""
    AFFINE = auto()
    """The logits are beta a + b: a part of them is scaled, another is not."""
    LOGITS = auto()
    """The logits are wrong in another way."""
    OUTPUTS = auto()
    """The logits are right; what the layer returns is not."""
    LENT = auto()
    """As `OUTPUTS`, by a part of the logits that the layer hands on to others."""
    CHOICES = auto()
    """Keys or experts are chosen otherwise."""
    CLAMPED = auto()
    """The logits are right for moderate betas and wrong for extreme ones."""


def flaw_of(
    layer: Isolated,
    base: list[SeenLogits],
    folds: tuple[Fold, ...],
    per_head: bool,
    explained: bool,
) -> Flaw | None:
    """What is wrong with a fold of a layer with jittered weights; None when it is right.

    Parameters
    ----------
    base: what the layer shows without a fold.
    explained: whether an affine part is known already, so that it isn't searched for again.
    """
    heads = layer.layer.heads
    beta = _betas(layer, per_head)
    runs = _folded_run(layer, folds, beta)
    if not _logits_agree(base, runs, beta):
        if _logits_agree(base, runs, torch.ones(heads), 1e-2):
            return Flaw.UNDONE
        affine = not explained and _affine(layer, base, folds)
        return Flaw.AFFINE if affine else Flaw.LOGITS
    floor = floor_of(layer)
    if output_error(layer.run(beta), runs, floor) > 1:
        return Flaw.OUTPUTS
    if not _choices_agree(base, runs, beta, floor):
        return Flaw.CHOICES
    # 1 + w' can't be small without rounding, so a fold of that form is tried upwards alone.
    tiny = () if any(fold.form == ADDS_ONE for fold in folds) else (1 / _EXTREME,)
    for extreme in (_EXTREME, *tiny):
        beta = torch.full((heads,), extreme)
        if not _logits_agree(base, _folded_run(layer, folds, beta), beta):
            return Flaw.CLAMPED
    return None


def gives_numbers(runs: list[SeenLogits]) -> bool:
    """Whether every output has finite numbers (a query that sees only padding may have none)."""
    outputs = [item for seen in runs for item in seen.outputs if item.numel()]
    return all(bool(item.isfinite().any()) for item in outputs)


def error_as_it_is(
    layer: Isolated, folds: tuple[Fold, ...], per_head: bool, jittered: list[SeenLogits]
) -> float:
    """How far a fold of the layer's own weights is from its temperatures.

    Of what rounding allows, so that 1 and less is right; infinite where there is no number, though
    there is one with jittered weights.

    Parameters
    ----------
    jittered: what the layer shows with jittered weights. Those as they are may cancel (equal ones
        after a norm of mean 0), and rounding is all that remains: so it counts by the larger size
        of the two.
    """
    beta = _betas(layer, per_head)
    expected, runs = layer.run(beta), _folded_run(layer, folds, beta)
    for one, two in zip(expected, jittered, strict=True):
        for own, other in zip(one.outputs, two.outputs, strict=True):
            if bool((other.isfinite() & ~own.isfinite()).any()):
                return math.inf
    return output_error(expected, runs, floor_of(layer), jittered)


def _betas(layer: Isolated, per_head: bool) -> Float[Tensor, "heads"]:
    heads = layer.layer.heads
    if per_head:
        return random_temperatures(layer.layer.name, heads).reciprocal()
    return torch.full((heads,), _UNIFORM)


def floor_of(layer: Isolated) -> float:
    return max(layer.layer.mask_floor, torch.finfo(torch.float32).min / 2)


def _folded_run(
    layer: Isolated, folds: tuple[Fold, ...], beta: Float[Tensor, "heads"]
) -> list[SeenLogits]:
    with folded(layer.module, ((fold, beta) for fold in folds)):
        return layer.run()


def _logits_agree(
    base: list[SeenLogits],
    runs: list[SeenLogits],
    beta: Float[Tensor, "heads"],
    tolerance: float = _TOLERANCE,
) -> bool:
    """Whether the logits are beta times the old ones, per head and for the sinks by themselves."""
    found = False
    for old, new in zip(base, runs, strict=True):
        for before, seen, after in zip(old.logits, old.visible, new.logits, strict=True):
            wanted = (before * beta.to(before)[None, :, None, None]).masked_fill(~seen, 0.0)
            error = (after.masked_fill(~seen, 0.0) - wanted).abs()
            split = before.shape[-1] - int(old.sinks)
            for part in (slice(0, split), slice(split, None)):
                if wanted[..., part].numel() == 0:
                    continue
                size = wanted[..., part].abs().amax(dim=(0, 2, 3))
                worst = error[..., part].amax(dim=(0, 2, 3))
                found = found or bool((size > 0).all())
                if not bool((worst <= tolerance * size).all()):
                    return False
    return found


def _affine(layer: Isolated, base: list[SeenLogits], folds: tuple[Fold, ...]) -> bool:
    """Whether the logits are beta a + b: a part of them is scaled, another is not."""
    heads = layer.layer.heads
    slopes = []
    for value in (0.5, 2.0):
        runs = _folded_run(layer, folds, torch.full((heads,), value))
        pairs = [
            (after - before)[seen] / (value - 1)
            for old, new in zip(base, runs, strict=True)
            for before, seen, after in zip(old.logits, old.visible, new.logits, strict=True)
        ]
        slopes.append(torch.cat(pairs))
    error = (slopes[0] - slopes[1]).abs().max()
    return bool(error <= 1e-3 * slopes[0].abs().max())


def output_error(
    expected: list[SeenLogits],
    runs: list[SeenLogits],
    floor: float,
    others: Sequence[SeenLogits] = (),
) -> float:
    """The largest difference of two runs' outputs, of what rounding allows; infinite for NaN.

    Masking among the outputs (a position bias may hold some) is left aside, and so is NaN in both
    (of a query that sees padding alone). Logits round by a
    share of themselves, and a softmax passes that on to the output, whatever the size of that is.

    Parameters
    ----------
    others: runs whose outputs differences are measured by where they are larger.
    """
    worst = 0.0
    for one, two, other in itertools.zip_longest(expected, runs, others):
        if len(one.outputs) != len(two.outputs):
            return math.inf
        allowed = _TOLERANCE + _ROUNDINGS * torch.finfo(torch.float32).eps * _largest_logit(one)
        for index, (wanted, got) in enumerate(zip(one.outputs, two.outputs, strict=True)):
            if wanted.shape != got.shape:
                return math.inf
            same = (wanted == got) | (wanted.isnan() & got.isnan())
            same |= (wanted <= floor) & (got <= floor)
            error = (wanted - got).masked_fill(same, 0.0).abs()
            size = max(_size(item.outputs[index], floor) for item in (one, other) if item)
            share = float(error.max()) / max(allowed * size, 1e-300) if error.numel() else 0.0
            worst = math.inf if math.isnan(share) else max(worst, share)
    return worst


def _size(output: Tensor, floor: float) -> float:
    """The largest number of an output, masking aside."""
    kept = output[output.isfinite() & (output > floor)].abs()
    return float(kept.max()) if kept.numel() else 0.0


def _largest_logit(seen: SeenLogits) -> float:
    kept = [logits[mask] for logits, mask in zip(seen.logits, seen.visible, strict=True)]
    return max((float(item.abs().max()) for item in kept if item.numel()), default=0.0)


def _choices_agree(
    base: list[SeenLogits], runs: list[SeenLogits], beta: Tensor, floor: float
) -> bool:
    """Whether ranked tensors are the old ones, or one positive multiple of them."""
    for old, new in zip(base, runs, strict=True):
        for before, after in zip(old.choices, new.choices, strict=True):
            seen = before.isfinite() & (before > floor)
            one, two = before[seen], after[seen]
            if not bool(one.any()):
                factor = 1.0
            elif bool(beta.min() == beta.max()):
                factor = float(two.norm() / one.norm())
            else:
                factor = 1.0
            wanted = factor * one
            if not torch.allclose(two, wanted, _TOLERANCE, _TOLERANCE * float(wanted.norm())):
                return False
    return True
