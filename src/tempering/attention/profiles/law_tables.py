"""The laws of many layers computed together, for engines that fill a table before each step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from tempering.attention.profiles.length_base import Law, LengthRule
from tempering.attention.profiles.length_rules import InsteadOf
from tempering.attention.profiles.rule_base import PerHead


def stacked(
    rules: Sequence[LengthRule | None], heads: int, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """One function for the laws of many layers: n [tokens, layers or 1] -> beta of every head.

    beta: Float[Tensor, "tokens layers heads"] in float64; 1 where a layer has no rule. It equals
    `of_counts` of each rule, computed for all layers of one kind of rule at once.
    """
    kinds: dict[Any, list[int]] = {}
    for index, rule in enumerate(rules):
        if rule is not None:
            kind = (rule.inner.name, rule.own.name) if isinstance(rule, InsteadOf) else rule.name
            kinds.setdefault(kind, []).append(index)
    parts = []
    for members in kinds.values():
        chosen = [rule for rule in map(rules.__getitem__, members) if rule is not None]
        parts.append((torch.tensor(members, device=device), _of_one_kind(chosen, heads, device)))

    def betas(n: Tensor) -> Tensor:
        out = torch.ones(len(n), len(rules), heads, dtype=torch.float64, device=device)
        for index, law in parts:
            own = n if n.shape[1] == 1 else n[:, index]
            out[:, index] = law(own[..., None].clamp(min=1).double()).expand(-1, len(index), heads)
        return out

    return betas


def _of_one_kind(
    rules: Sequence[LengthRule], heads: int, device: torch.device
) -> Callable[[Tensor], Tensor]:
    first = rules[0]
    if isinstance(first, InsteadOf):
        pairs = [(rule.inner, rule.own) for rule in rules if isinstance(rule, InsteadOf)]
        inner = _of_one_kind([one for one, _ in pairs], heads, device)
        own = _of_one_kind([other for _, other in pairs], heads, device)
        return lambda n: inner(n) / own(n)
    tables = []
    for values in zip(*(rule.numbers for rule in rules), strict=True):
        rows = [list(item) if isinstance(item, PerHead) else [item] * heads for item in values]
        tables.append(torch.tensor(rows, dtype=torch.float64, device=device))
    assert isinstance(first, Law)
    formula = first.law
    return lambda n: formula(n, *tables)


def cut_rule(rule: LengthRule, start: int, stop: int) -> LengthRule:
    """The rule for heads start to stop - 1 alone."""
    values = {each.name: getattr(rule, each.name) for each in fields(rule)}  # type: ignore[arg-type]
    own = {
        name: PerHead(value[start:stop])
        for name, value in values.items()
        if isinstance(value, PerHead)
    }
    return replace(rule, **own) if own else rule  # type: ignore[type-var]
