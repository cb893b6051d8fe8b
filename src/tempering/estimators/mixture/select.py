"""How many components: grow and shrink at T = 1 while a criterion rises."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float64
from torch import Tensor

from tempering.estimators.mixture.anneal import anneal
from tempering.estimators.mixture.driver import RELEASE, FitProgress, cool, moving_sample, released
from tempering.estimators.mixture.em import (
    CollapsedError,
    Components,
    Family,
    climb,
    log_likelihoods,
)
from tempering.estimators.mixture.moves import best_split, cheapest_merges, look
from tempering.estimators.mixture.refine import Fit, at_temperature, refine, replaced
from tempering.estimators.mixture.rows import Rows

_NEAR = 1e-4  # nats per row: how near to its limit EM is run before sizes are compared
_TRIED = 3  # splits and merges tried at each size


class Score(NamedTuple):
    """What a criterion says of a mixture; higher is better."""

    value: float  # nats per row
    size: int
    rows: Float64[Tensor, " held"] | None = None  # log-likelihoods of the rows held out


class Bic:
    """-BIC/2 per row."""

    def __init__(self, rows: Rows, family: Family) -> None:
        self.rows, self.family = rows, family

    def __call__(self, components: Components, value: float) -> Score:
        free = self.family.parameters(*components.means.shape)
        total = self.rows.total
        return Score(value - free * math.log(total) / (2 * total), len(components.means))

    def rises(self, new: Score, old: Score) -> bool:
        """Whether `new` is better."""
        return new.value > old.value + _NEAR / 10


class HeldOutLikelihood:
    """Mean log-likelihood of rows that the fit does not see."""

    def __init__(self, held: Rows, family: Family) -> None:
        self.held, self.family = held, family

    def __call__(self, components: Components, value: float) -> Score:
        each = log_likelihoods(self.held, components, self.family)
        (total,) = self.held.reduce([(each @ self.held.weights).view(1)])
        return Score(float(total) / self.held.total, len(components.means), each)

    def rises(self, new: Score, old: Score) -> bool:
        """Whether `new` is better: by more than its standard error if it has more components."""
        if new.rows is None or old.rows is None or new.size <= old.size:
            return new.value > old.value + _NEAR / 10
        gain = new.rows - old.rows
        (square,) = self.held.reduce([(gain.square() @ self.held.weights).view(1)])
        rise = new.value - old.value
        error = math.sqrt(max(float(square) / self.held.total - rise**2, 0.0) / self.held.total)
        return rise > error


Criterion = Bic | HeldOutLikelihood


def grow_selected(
    rows: Rows,
    most: int,
    family: Family,
    generator: torch.Generator,
    criterion: Criterion,
    max_iter: int,
    progress: FitProgress,
) -> dict[int, float]:
    """Fit as many components, up to `most`, as the criterion likes best.

    The sizes that annealing goes through are fitted first; the best of them then moves, grows by
    its best splits and shrinks by its cheapest merges until no size next to it is better.

    Returns the best criterion at every size that was tried.
    """
    found: dict[int, float] = {}
    starts: dict[int, Components] = {}
    for step in anneal(rows, most):
        progress.settled(step, released(step, family))
        starts[len(step.components.means)] = progress.reached
    best: tuple[Score, Components] | None = None
    collapsed: CollapsedError | None = None
    for size, start in sorted(starts.items()):
        try:
            climbed = climb(rows, start, family, tol=_NEAR, passes=max_iter)
        except CollapsedError as error:  # one size too many is no fault of the others
            collapsed = error
            continue
        progress.spent(climbed.passes)
        score = criterion(climbed.components, climbed.value)
        found[size] = score.value
        if best is None or criterion.rises(score, best[0]):
            best = (score, climbed.components)
            progress.components = climbed.components
    if best is None and collapsed is not None:
        raise collapsed
    cool(rows, RELEASE, family, progress)
    sample = moving_sample(rows, most)
    best = None
    while True:
        # Moves raise the likelihood, and may lower a criterion: then they are not kept.
        refine(rows, sample, progress.reached, family, generator, progress.keep, max_iter)
        score = criterion(progress.reached, progress.value)
        if best is None or criterion.rises(score, best[0]):
            best = (score, progress.reached)
        progress.components = best[1]
        found[best[0].size] = max(found.get(best[0].size, -math.inf), best[0].value)
        for start in _neighbours(sample, best[1], family, generator, most):
            try:
                warm = at_temperature(rows, start, family, 1.1, 3)
                climbed = climb(rows, warm, family, tol=_NEAR, passes=max_iter)
            except CollapsedError:
                continue
            progress.spent(climbed.passes + 3)
            score = criterion(climbed.components, climbed.value)
            found[score.size] = max(found.get(score.size, -math.inf), score.value)
            if criterion.rises(score, best[0]):
                best = (score, climbed.components)
                progress.keep(Fit(climbed.components, climbed.value, 0, progress.moves))
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
