"""Profiles with rules of length under a room, shuffled, or as constants for one length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tempering.attention.limits import COLDEST, HOTTEST
from tempering.attention.profiles.length_base import LengthRule
from tempering.attention.profiles.length_rules import Power
from tempering.attention.profiles.rule_base import PerHead, Rule

LONGEST = 10**8  # tokens of a text whose queries are gone through
_AT_ONCE = 2**20


def scaled_rule(rule: Rule | None, room: float) -> Rule | None:
    """The rule whose T is T ** room. rule: `power`, or None."""
    if not isinstance(rule, Power):
        return None
    slopes = rule.slope if isinstance(rule.slope, PerHead) else (rule.slope,)
    found = PerHead(slope * room for slope in slopes)
    made = replace(rule, slope=found if isinstance(rule.slope, PerHead) else found[0])
    # A bound as wide as attention's own holds nothing, and so does what becomes of it.
    coldest, hottest = rule.bounds if room >= 0 else rule.bounds[::-1]
    return replace(
        made,
        coldest=COLDEST if coldest in (COLDEST, HOTTEST) else coldest**room,
        hottest=HOTTEST if hottest in (COLDEST, HOTTEST) else hottest**room,
    )


def can_be_moved(rules: Sequence[Rule | None]) -> bool:
    """Whether slopes can go to other heads: those of `power` of one length and bounds for all."""
    if any(isinstance(item, Power) and isinstance(item.length, PerHead) for item in rules):
        return False
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
    rows: Sequence[Float[Tensor, "heads"]],
    rules: Sequence[Rule | None],
    length: int,
    windows: Sequence[int | None],
) -> list[Float[Tensor, "heads"]]:
    """The T of each layer whose logarithm is the mean of log T over the queries of a text.

    The text has `length` tokens, of which query i sees i + 1, or as many as its layer's window
    holds. Every rule is one of length.
    """
    found = []
    for row, item, window in zip(rows, rules, windows, strict=True):
        if isinstance(item, LengthRule):
            most = min(length, window or length)
            total = row.new_zeros(1)
            for first in range(1, most + 1, _AT_ONCE):
                n = torch.arange(first, min(first + _AT_ONCE, most + 1))
                log_beta = item.of_counts(n[None, None])[0].log()
                total = total + log_beta.sum(-1)
            row = row * ((total + (length - most) * log_beta[:, -1]) / length).neg().exp()
        found.append(row)
    return found
