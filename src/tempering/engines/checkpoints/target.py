"""What a bake of files changes, and what the baked model has to compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tempering.attention.baking.bake import foldable
from tempering.attention.baking.comparison import (
    controlled_logits,
    deviation,
    logits_of,
    verification_inputs,
)
from tempering.attention.baking.profile_folds import Betas, profile_folds
from tempering.attention.examining.layout_of import layout
from tempering.attention.profiles.profile import Profile
from tempering.errors import CheckError, ModelError

# Of the standard deviation of the logits, for weights whose rounding is at most `ROUNDING`.
_STORED = 0.1
_REAL_TOKENS = 128


@dataclass(frozen=True)
class BakeTarget:
    """The folds of a profile, and the logits of the controlled model.

    verdict: "per head" or "per layer". folds: each with beta per head. profile: bound to the
    model. inputs, wanted: forward arguments, and the controlled model's logits of each.
    """

    verdict: str
    folds: Betas
    profile: Profile
    inputs: list[dict[str, Any]]
    wanted: list[Tensor]

    def deviation(self, model: Any) -> float:
        """How far a model's logits are from the wanted ones, in their standard deviations."""
        return deviation(logits_of(model, self.inputs), self.wanted)

    def check_stored(self, model: Any, what: str) -> float:
        """The deviation of a model that was loaded back; CheckError where it is large."""
        stored = self.deviation(model)
        if not stored <= _STORED:
            raise CheckError(
                f"the {what} loaded back disagrees with the controlled model: its logits are off "
                f"by {stored:.2g} of their standard deviation (allowed {_STORED:g}); nothing was "
                "written"
            )
        return stored


def bake_target(
    model: Any, tokenizer: Any, profile: Profile, say: Callable[[str], None]
) -> BakeTarget:
    """Find the folds of a profile that was checked against the model, and run the model under it.

    Raises BakeError (names the layer and the reason), ProfileError, ModelError.
    """
    say("finding what folds, layer by layer")
    profile.resolve(layout(model), scales=True)
    found = foldable(model)
    folds = profile_folds(found, model, profile)
    bound = profile.adopt(model)
    say("comparing with the controlled model")
    random = verification_inputs(model, None)
    inputs = [*random, *_real_inputs(model, tokenizer, random[0])]
    wanted = controlled_logits(model, bound, inputs)
    return BakeTarget(found.verdict, folds, bound, inputs, wanted)


def _real_inputs(model: Any, tokenizer: Any, random: dict[str, Any]) -> list[dict[str, Any]]:
    """A stretch of real text, as the model reads it; nothing for one that reads more than text.

    random: arguments of its forward.
    """
    from tempering.data import sample_text

    if not {*random} <= {"input_ids", "attention_mask", "token_type_ids"}:
        return []
    ids = tokenizer(sample_text("demo"), return_tensors="pt")["input_ids"]
    if ids.shape[1] == 0:
        raise ModelError(
            "the tokenizer beside the weights makes no tokens of English text, so the result can't "
            "be compared on any; save the model's own tokenizer there"
        )
    limit = int(getattr(model.config, "max_position_embeddings", 0) or 0)
    # Some count a few positions that are not for tokens.
    longest = min(_REAL_TOKENS, limit // 2) if limit > 1 else _REAL_TOKENS
    return [{"input_ids": ids[:, :longest]}]
