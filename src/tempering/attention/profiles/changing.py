"""Profiles with rules of length under a room, shuffled, or as constants for one length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tempering.attention.profiles.length_base import LengthRule
from tempering.attention.profiles.length_rules import Power
from tempering.attention.profiles.rule_base import PerHead, Rule


def scaled_rule(rule: Rule | None, room: float) -> Rule | None:
    """The rule whose T is T ** room. rule: `power`, or None."""
    if not isinstance(rule, Power):
        return None
    slopes = rule.slope if isinstance(rule.slope, PerHead) else (rule.slope,)
    found = PerHead(slope * room for slope in slopes)
    made = replace(rule, slope=found if isinstance(rule.slope, PerHead) else found[0])
    if rule.free:
        return made
    coldest, hottest = sorted(bound**room for bound in rule.bounds)
    return replace(made, coldest=coldest, hottest=hottest)


def can_be_moved(rules: Sequence[Rule | None]) -> bool:
    """Whether the numbers of the rules can go to other heads: `power` of one length and bounds."""
    alike = {
        (item.length, item.bounds) if isinstance(item, Power) else item
        for item in rules
        if item is not None
    }
    return len(alike) == 1 and all(isinstance(item, Power) for item in rules if item is not None)


def moved_rules(
    rules: Sequence[Rule | None], sizes: Sequence[int], order: Int[Tensor, "all_heads"]
) -> tuple[Rule, ...]:
    """The rules with the slopes of all heads of all layers in another order; see `can_be_moved`."""
    slopes: list[float] = []
    for item, size in zip(rules, sizes, strict=True):
        own = item.slope if isinstance(item, Power) else 0.0
        slopes += own if isinstance(own, PerHead) else [own] * size
    first = next(item for item in rules if isinstance(item, Power))
    parts = torch.tensor(slopes, dtype=torch.float64)[order].split(list(sizes))
    return tuple(replace(first, slope=PerHead(part.tolist())) for part in parts)


def constants_at(
    rows: Sequence[Float[Tensor, "heads"]], rules: Sequence[Rule | None], length: int
) -> list[Float[Tensor, "heads"]]:
    """The T of each layer whose logarithm is the mean of log T over the queries of a text.

    The text has `length` tokens, of which query i sees i + 1. Every rule is one of length.
    """
    n = torch.arange(1, length + 1)[None, None]
    found = []
    for row, item in zip(rows, rules, strict=True):
        if isinstance(item, LengthRule):
            row = row * item.of_counts(n)[0].log().mean(-1).neg().exp()
        found.append(row)
    return found
