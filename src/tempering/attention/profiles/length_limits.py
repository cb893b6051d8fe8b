"""Whether a rule of length keeps T within attention's limits in a context."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tempering.attention.limits import COLDEST, HOTTEST
from tempering.attention.profiles.length_base import Bounded, LengthRule
from tempering.errors import ProfileError

_LENGTHS = 512  # of a context at which a law is looked at; laws are smooth or have steps far wider


def lengths_up_to(longest: int) -> Int[Tensor, "lengths"]:
    """Whole numbers from 1 to `longest`, close together in the logarithm."""
    grid = torch.logspace(0, math.log10(longest), _LENGTHS, dtype=torch.float64).round().long()
    return grid.clamp(1, longest).unique()


def check_lengths(
    rule: LengthRule,
    longest: int,
    where: str,
    heads: int,
    beta: Float[Tensor, "rows heads"] | None = None,
) -> None:
    """ProfileError where T leaves attention's limits for a query that sees up to `longest` keys.

    where: names the layer. heads: of the layer. beta: 1/T that the rule's is multiplied by, in any
    of some rows; 1 without it.
    """
    if rule.heads not in (None, heads):
        raise ProfileError(
            f"{where} has {heads} heads, and {rule.label} has numbers for {rule.heads}"
        )
    n = lengths_up_to(longest)
    found = rule.of_counts(n[None, None])[0]
    own = None if beta is None else beta.detach().to("cpu", torch.float64)
    for end in (None,) if own is None else (own.amin(0), own.amax(0)):
        of_profile = 1.0 if end is None else end[:, None]
        _refuse(rule, found * of_profile, n, where, "" if end is None else " with the profile's T")


def _refuse(
    rule: LengthRule, beta: Float[Tensor, "heads_or_1 lengths"], n: Tensor, where: str, more: str
) -> None:
    slack = 1e-6 if more else 1e-12  # the profile's beta may be kept in float32
    bad = ~((beta >= 1 / HOTTEST * (1 - slack)) & (beta <= 1 / COLDEST * (1 + slack)))
    if not bool(bad.any()):
        return
    # The violation at the shortest length.
    at = int(bad.any(0).nonzero()[0])
    head = int(bad[:, at].nonzero()[0])
    value = float(beta[head, at])
    temperature = f"T = {1 / value:.4g}" if value > 0 else f"1/T = {value:.4g}"
    named = f", head {head}" if len(beta) > 1 else ""
    raise ProfileError(
        f"{where}{named}: {rule.label}{more} has {temperature} for a query that sees {int(n[at])} "
        f"keys, and the context has {int(n[-1])}; T lies in {COLDEST:g} to {HOTTEST:g}. Take a "
        "smaller slope, or give the rule bounds of T" + _bounds_of(rule)
    )


def _bounds_of(rule: LengthRule) -> str:
    return f": {rule.signature}" if isinstance(rule, Bounded) else ""
