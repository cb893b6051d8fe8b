"""Drawing tokens from tempered logits by numbers in [0, 1): one rule for the engines that draw.

token = the first whose cumulative probability exceeds the number
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tempering.posterior import responsibilities


class Drawn(NamedTuple):
    """Tokens, and the log probability of each as it was drawn, nats."""

    tokens: Int[Tensor, "rows"]
    logprobs: Float[Tensor, "rows"]


def draw_tokens(
    cooled: Float[Tensor, "rows vocab"],
    numbers: Float[Tensor, "rows"],
) -> Drawn:
    """One token a row from tempered logits, -inf where cut. numbers: in [0, 1), float64."""
    weights = responsibilities(-cooled)
    cumulative = weights.double().cumsum(-1)
    tokens = torch.searchsorted(cumulative, numbers.to(cumulative)[:, None], right=True)
    if int(tokens.max()) == weights.shape[-1]:
        # Rounding left a last sum below 1, and the number above it: the last live token is drawn.
        last = (weights > 0).long().cumsum(-1).argmax(-1, keepdim=True)
        tokens = torch.minimum(tokens, last)
    return Drawn(tokens[:, 0], weights.gather(1, tokens)[:, 0].log())
