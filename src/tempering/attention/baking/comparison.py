"""Whether folded weights do what a profile asks: logits against those of the controlled model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tempering.attention.baking.folds import ADDS_ONE, Fold
from tempering.attention.baking.layer_calls import sample_with_types
from tempering.attention.control.tempered import tempered
from tempering.attention.examining.sample import run
from tempering.attention.examining.stored import input_embeddings
from tempering.attention.profiles.profile import Profile
from tempering.errors import BakeError, CheckError
from tempering.inputs.answers import answers_of

# Of the standard deviation of the logits: float32 leaves about 1e-6.
TOLERANCE = 1e-4
# Share of a head's folded weights that rounding to the stored dtype may lose: twice what
# bfloat16 loses on average (2^-9 / sqrt 3, for 8 bits of precision).
ROUNDING = 2.0**-8
_LENGTH = 48


def verification_inputs(model: nn.Module, sample: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Forward arguments to compare two models on: a padded batch, and longer random tokens."""
    if sample is not None:
        return [sample]
    inputs = [sample_with_types(model)]
    own: Any = model
    config, embedding = own.config, input_embeddings(own)
    length = min(_LENGTH, int(getattr(config.get_text_config(), "max_position_embeddings", 0) or 0))
    # Musicgen has an embedding for each of its codebooks.
    plain = isinstance(getattr(embedding, "weight", None), Tensor)
    alone = {*inputs[0]} <= {"input_ids", "attention_mask", "token_type_ids"}
    if plain and alone and length > inputs[0]["input_ids"].shape[1]:
        generator = torch.Generator().manual_seed(3)
        low, high = 5, max(6, min(1000, embedding.weight.shape[0]))
        ids = torch.randint(low, high, (2, length), generator=generator)
        inputs.append({"input_ids": ids.to(embedding.weight.device)})
    return inputs


def logits_of(model: nn.Module, inputs: Sequence[dict[str, Any]]) -> list[Tensor]:
    """Output logits (or last hidden states), one row for each token that counts."""
    found = []
    for arguments in inputs:
        given = answers_of(model, run(model, arguments))
        output = given.logits if given.logits is not None else given.features
        assert output is not None
        mask = arguments.get("attention_mask")
        if mask is not None and output.shape[1] == mask.shape[1]:
            # Some models answer with several rows for one of the batch.
            output = output[mask.bool().repeat_interleave(len(output) // len(mask), 0)]
        found.append(output.cpu().reshape(-1, output.shape[-1]))
    return found


def controlled_logits(
    model: nn.Module, profile: Profile, inputs: Sequence[dict[str, Any]], sample: Any = None
) -> list[Tensor]:
    """`logits_of` the model under the profile."""
    with tempered(model, profile, sample=sample):
        return logits_of(model, inputs)


def deviation(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest difference of two lists of logits, in standard deviations of the wanted ones."""
    shares = []
    for one, two in zip(got, wanted, strict=True):
        spread = max(float(two.double().std()), 1e-300)
        shares.append(float((one.double() - two.double()).abs().max()) / spread)
    return max(shares)


def check_deviation(value: float, what: str) -> None:
    """CheckError unless a deviation is within `TOLERANCE` (NaN is not)."""
    if not value <= TOLERANCE:
        raise CheckError(
            f"{what} disagrees with the controlled model: its logits are off by {value:.2g} of "
            f"their standard deviation (allowed {TOLERANCE:g}); nothing was written"
        )


def rounding(fold: Fold, exact: Tensor, stored: Tensor) -> float:
    """What storing folded weights lost, as a share of their norm: the worst of the fold's runs."""
    worst = 0.0
    for start, stop, _ in fold.runs:
        one = exact.narrow(fold.axis, start, stop - start).double()
        two = stored.narrow(fold.axis, start, stop - start).double()
        size = float((one + 1 if fold.form == ADDS_ONE else one).norm())
        worst = max(worst, float((two - one).norm()) / max(size, 1e-300) if size else 0.0)
    return worst


def refuse_rounding(
    fold: Fold, beta: Tensor, weights: Tensor, exact: Tensor, stored: Tensor
) -> None:
    """BakeError when storing folded weights in their dtype loses more than `ROUNDING`.

    Parameters
    ----------
    weights: as they were. exact, stored: folded, before and after rounding to their dtype.
    """
    dtype = str(weights.dtype).removeprefix("torch.")
    low, high = float(1 / beta.max()), float(1 / beta.min())
    most = f"temperatures of {low:g} to {high:g}" if low < high else f"the temperature {low:g}"
    if not bool(stored.isfinite().all()):
        raise BakeError(
            f"{fold.parameter} would be infinite in {dtype} with {most} in it; give temperatures "
            "nearer to 1"
        )
    lost = rounding(fold, exact, stored)
    if not lost <= ROUNDING:
        raise BakeError(
            f"{fold.parameter} would lose {lost:.2g} of itself when it is stored as {dtype} with "
            f"{most} in it (allowed {ROUNDING:.2g}); load (and save) the model in float32, then "
            "bake that"
        )
