"""How many components: grow and shrink at T = 1 while a criterion rises."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from tempering.estimators._anneal import anneal
from tempering.estimators._driver import RELEASE, Trace, cool, kept, moving_sample, released
from tempering.estimators._em import Components, Family, climb, expect
from tempering.estimators._moves import best_split, cheapest_merges, look
from tempering.estimators._refine import Fit, at_temperature, refine, replaced
from tempering.estimators._rows import Rows

Criterion = Callable[[Components, float], float]

_NEAR = 1e-4  # nats per row: how near to its limit EM is run before sizes are compared
_TRIED = 3  # splits and merges tried at each size


def bic(rows: Rows, family: Family) -> Criterion:
    """-BIC/2 per row, from components and their mean log-likelihood; higher is better."""

    def score(components: Components, value: float) -> float:
        free = family.parameters(*components.means.shape)
        return value - free * math.log(rows.total) / (2 * rows.total)

    return score


def held_out(held: Rows, family: Family) -> Criterion:
    """Mean log-likelihood of rows that the fit does not see."""

    def score(components: Components, value: float) -> float:
        return expect(held, components, family).objective / held.total

    return score


def grow_selected(
    rows: Rows,
    most: int,
    family: Family,
    generator: torch.Generator,
    criterion: Criterion,
    max_iter: int,
    trace: Trace,
) -> dict[int, float]:
    """Fit as many components, up to `most`, as the criterion likes best.

    The sizes that annealing goes through are fitted first; the best of them then moves, grows by
    its best splits and shrinks by its cheapest merges until no size next to it is better.

    Returns the best criterion at every size that was tried.
    """
    found: dict[int, float] = {}
    starts: dict[int, Components] = {}
    for stage in anneal(rows, most):
        trace.settled(stage, released(stage, family))
        starts[len(stage.components.means)] = kept(trace)
    best = (-math.inf, kept(trace))
    for size, start in sorted(starts.items()):
        climbed = climb(rows, start, family, tol=_NEAR, passes=max_iter)
        trace.spent(climbed.passes)
        found[size] = criterion(climbed.components, climbed.value)
        if found[size] > best[0]:
            best = (found[size], climbed.components)
    trace.components = best[1]
    cool(rows, RELEASE, family, trace)
    sample = moving_sample(rows, most)
    while True:
        refine(rows, sample, kept(trace), family, generator, trace.keep, max_iter)
        here = len(kept(trace).means)
        score = criterion(kept(trace), trace.value)
        found[here] = max(found.get(here, -math.inf), score)
        for start in _neighbours(sample, kept(trace), family, generator, most):
            warm = at_temperature(rows, start, family, 1.1, 3)
            climbed = climb(rows, warm, family, tol=_NEAR, passes=max_iter)
            trace.spent(climbed.passes + 3)
            size, value = len(start.means), criterion(climbed.components, climbed.value)
            found[size] = max(found.get(size, -math.inf), value)
            if value > score:
                trace.keep(Fit(climbed.components, climbed.value, 0, trace.moves))
                break
        else:
            return found


def _neighbours(
    sample: Rows,
    components: Components,
    family: Family,
    generator: torch.Generator,
    most: int,
) -> Iterator[Components]:
    """One component more, by the splits that gain most; one less, by the cheapest merges."""
    view = look(sample, components, family)
    if len(components.means) < most:
        each = (
            best_split(view, k, components, family, generator) for k in range(len(components.means))
        )
        splits = sorted((split for split in each if split), key=lambda split: -split.gain)
        for split in splits[:_TRIED]:
            yield replaced(components, [split.component], split.children, family)
    if len(components.means) > 1:
        for merge in cheapest_merges(view, components, family, _TRIED):
            yield replaced(components, [merge.first, merge.second], merge.merged, family)
