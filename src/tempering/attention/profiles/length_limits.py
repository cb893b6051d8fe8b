"""Whether a rule of length keeps T within attention's limits in a context."""

from __future__ import annotations

import math

import torch
from jaxtyping import Int
from torch import Tensor

from tempering.attention.limits import COLDEST, HOTTEST
from tempering.attention.profiles.length_base import Bounded, LengthRule
from tempering.errors import ProfileError

_LENGTHS = 512  # of a context at which a law is looked at; laws are smooth or have steps far wider


def lengths_up_to(longest: int) -> Int[Tensor, "lengths"]:
    """Whole numbers from 1 to `longest`, close together in the logarithm."""
    grid = torch.logspace(0, math.log10(longest), _LENGTHS, dtype=torch.float64).round().long()
    return grid.clamp(1, longest).unique()


def check_lengths(rule: LengthRule, longest: int, where: str, heads: int) -> None:
    """ProfileError where T leaves attention's limits for a query that sees up to `longest` keys.

    where: names the layer. heads: of the layer.
    """
    if rule.heads not in (None, heads):
        raise ProfileError(
            f"{where} has {heads} heads, and {rule.label} has numbers for {rule.heads}"
        )
    n = lengths_up_to(longest)
    beta = rule.of_counts(n[None, None])[0]
    bad = ~((beta >= 1 / HOTTEST * (1 - 1e-12)) & (beta <= 1 / COLDEST * (1 + 1e-12)))
    if not bool(bad.any()):
        return
    # The violation at the shortest length.
    at = int(bad.any(0).nonzero()[0])
    head = int(bad[:, at].nonzero()[0])
    value = float(beta[head, at])
    temperature = f"T = {1 / value:.4g}" if value > 0 else f"1/T = {value:.4g}"
    named = f", head {head}" if rule.heads else ""
    raise ProfileError(
        f"{where}{named}: {rule.label} has {temperature} for a query that sees {int(n[at])} keys, "
        f"and the context has {longest}; T lies in {COLDEST:g} to {HOTTEST:g}. Take a smaller "
        "slope, or give the rule bounds of T" + _bounds_of(rule)
    )


def _bounds_of(rule: LengthRule) -> str:
    return f": {rule.signature}" if isinstance(rule, Bounded) else ""
