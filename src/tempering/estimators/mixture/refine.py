"""From an annealed mixture to the best one nearby: moves, reheats, and EM between them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from tempering.estimators.mixture.em import (
    Climb,
    CollapsedError,
    Components,
    Family,
    climb,
    expect,
    log_density,
    maximise,
    prepared,
    remaining,
    shares_of,
)
from tempering.estimators.mixture.moves import (
    Merge,
    Split,
    View,
    best_split,
    cheapest_merges,
    join,
    look,
    pick,
    refit,
)
from tempering.estimators.mixture.rows import Rows

# Temperatures a finished fit is heated to, with covariances free, before it cools again.
REHEATS = (1.1, 1.2, 1.4)
# Between moves EM stops this near its limit, in nats per row.
NEAR = 1e-4
_PARTIAL_TURNS = 30
# A move that loses less than this part of what a component's free numbers are worth may still gain
# once all components have moved.
_HOPE = 0.3
# The most moves of a fit. A likelihood without bound would allow moves for ever.
_MOVES, _MOVES_PER_COMPONENT = 50, 10


class Fit(NamedTuple):
    """A mixture at T = 1 and its mean log-likelihood."""

    components: Components
    value: float
    passes: int
    moves: int


def refine(
    rows: Rows,
    sample: Rows,
    start: Components,
    family: Family,
    generator: torch.Generator,
    keep: Callable[[Fit], None],
    passes: int,
) -> Fit:
    """Moves and reheats until none raises the likelihood.

    sample: the rows, or some of them in memory, on which moves are sought; every one is judged
    on all rows. keep: told of every improvement.
    """
    first = climb(rows, start, family, tol=NEAR, passes=passes)
    fit = Fit(first.components, first.value, first.passes, 0)
    keep(fit)
    for _ in range(_MOVES + _MOVES_PER_COMPONENT * len(start.means)):
        better = _move(rows, sample, fit, family, generator, passes)
        better = better or _reheat(rows, fit, family, passes)
        if better is None:
            return fit
        fit = better
        keep(fit)
    return fit


def at_temperature(
    rows: Rows,
    components: Components,
    family: Family,
    temperature: float,
    passes: int,
    prior_rows: float = 0.0,
) -> Components:
    """A few passes of EM at a temperature, covariances free."""
    for _ in range(passes):
        sums = expect(rows, components, family, temperature)
        components = maximise(sums, components, family, prior_rows)
    return components


def _move(
    rows: Rows,
    sample: Rows,
    fit: Fit,
    family: Family,
    generator: torch.Generator,
    passes: int,
) -> Fit | None:
    count, features = fit.components.means.shape
    if count < 3:
        return _split_anew(rows, sample, fit, family, generator, passes) if count == 2 else None
    view = look(sample, fit.components, family)
    splits = [best_split(view, k, fit.components, family, generator) for k in range(count)]
    merges = cheapest_merges(view, fit.components, family, 2 * count)
    # Refitting may win back about a nat for each free number of a component.
    worth = 1 + features + family.shape.parameters(1, features)
    plans = _plans(splits, merges, worth, 3 * count)
    trials = []
    for merge, split, expected in plans:
        index = [merge.first, merge.second, split.component]
        parts = join([merge.merged, split.children], family)
        try:
            gain, parts = _partial(view, index, parts, family, -_HOPE * worth)
        except CollapsedError:
            continue
        trials.append((gain, index, parts))
        if gain > 0 and expected > 0:
            break
    trials.sort(key=lambda trial: -trial[0])
    spent = 0
    for gain, index, parts in trials[:5]:
        if gain < -_HOPE * worth:
            break
        moved = replaced(fit.components, index, parts, family)
        try:
            for temperature in (1.2, 1.1):
                moved = at_temperature(rows, moved, family, temperature, 3)
            tried = _climb_above(rows, moved, fit, family, passes)
        except CollapsedError:
            continue
        spent += tried.passes + 6
        if tried.value > fit.value + NEAR / 10:
            return Fit(tried.components, tried.value, fit.passes + spent, fit.moves + 1)
    return None


def _split_anew(
    rows: Rows,
    sample: Rows,
    fit: Fit,
    family: Family,
    generator: torch.Generator,
    passes: int,
) -> Fit | None:
    """The move of two components, which have no third to split: merge them, and cut elsewhere."""
    (merge,) = cheapest_merges(look(sample, fit.components, family), fit.components, family, 1)
    try:
        whole = look(sample, merge.merged, family)
        split = best_split(whole, 0, merge.merged, family, generator)
        if split is None:
            return None
        tried = _climb_above(rows, split.children, fit, family, passes)
    except CollapsedError:
        return None
    if tried.value <= fit.value + NEAR / 10:
        return None
    return Fit(tried.components, tried.value, fit.passes + tried.passes, fit.moves + 1)


def _plans(
    splits: list[Split | None], merges: list[Merge], worth: int, most: int
) -> list[tuple[Merge, Split, float]]:
    """Merges with splits of a third component, the most promising first."""
    plans = [
        (merge, split, split.gain - merge.loss)
        for split in splits
        if split is not None
        for merge in merges
        if split.component not in (merge.first, merge.second)
    ]
    plans = [plan for plan in plans if plan[2] > -worth]
    plans.sort(key=lambda plan: -plan[2])
    return plans[:most]


def _partial(
    view: View, index: list[int], parts: Components, family: Family, least: float
) -> tuple[float, Components]:
    """EM of the components of a move, the rest of the mixture held; the gain in nats."""
    own = view.responsibilities[index].sum(0)
    near = own > 1e-2
    x, w, before = view.x[near], view.weights[near], view.log_likelihood[near]
    rest = before + torch.log((1 - own[near]).clamp_min(torch.finfo(torch.float64).tiny))
    base = float(before @ w)
    share = torch.logsumexp(parts.log_mass, 0)
    values: list[float] = []
    for _ in range(_PARTIAL_TURNS):
        density = log_density(x, parts, *prepared(x, parts, family))[0]
        joint = density + parts.log_mass.unsqueeze(1)
        total = torch.logaddexp(torch.logsumexp(joint, 0), rest)
        values.append(float(total @ w) - base)
        left = remaining(values)
        if left < 1 or values[-1] + 2 * left < least:
            break
        r = shares_of(joint - total).mul_(w)
        parts = refit(x, r, parts, family)
        parts = parts._replace(log_mass=parts.log_mass - torch.logsumexp(parts.log_mass, 0) + share)
    return values[-1], parts


def replaced(
    components: Components, index: list[int], parts: Components, family: Family
) -> Components:
    rest = [k for k in range(len(components.means)) if k not in index]
    return join([pick(components, rest, family), parts], family)


def _reheat(rows: Rows, fit: Fit, family: Family, passes: int) -> Fit | None:
    """Heat with covariances free, cool, and keep what is better."""
    spent = 0
    if len(fit.components.means) < 2:
        return None
    for temperature in REHEATS:
        try:
            warm = at_temperature(rows, fit.components, family, temperature, 10)
            tried = _climb_above(rows, warm, fit, family, passes)
        except CollapsedError:
            continue
        spent += tried.passes + 10
        if tried.value > fit.value + NEAR:
            return Fit(tried.components, tried.value, fit.passes + spent, fit.moves)
    return None


def _climb_above(rows: Rows, start: Components, fit: Fit, family: Family, passes: int) -> Climb:
    return climb(rows, start, family, tol=NEAR, passes=passes, target=fit.value)


def fill(
    rows: Rows,
    sample: Rows,
    components: Components,
    count: int,
    family: Family,
    generator: torch.Generator,
) -> Components:
    """Up to `count` components by the splits that gain most, where annealing found fewer.

    That is so when a schedule ends too hot, or rows that repeat leave nothing to split by.
    """
    while len(components.means) < count:
        view = look(sample, components, family)
        each = [
            best_split(view, k, components, family, generator) for k in range(len(components.means))
        ]
        splits = [split for split in each if split is not None]
        if splits:
            best = max(splits, key=lambda split: split.gain)
            components = replaced(components, [best.component], best.children, family)
        else:
            components = _beside(view, components, family)
        components = at_temperature(rows, components, family, 1.1, 3, rows.features + 2.0)
    return components


def _beside(view: View, components: Components, family: Family) -> Components:
    """One component more, at the least likely row, with the mass of one row."""
    row = int(view.log_likelihood.argmin())
    owner = pick(components, [int(view.responsibilities[:, row].argmax())], family)
    log_mass = owner.log_mass.new_full((1,), -math.log(float(view.weights.sum())))
    new = Components(log_mass, view.x[row].unsqueeze(0), owner.covariances)
    return join([components, new], family)
