"""The whole fit: anneal, set the covariances free, cool to T = 1, move, converge."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from tempering.estimators.mixture.anneal import AnnealingStep, Break, anneal
from tempering.estimators.mixture.em import (
    CollapsedError,
    Components,
    Family,
    climb,
    expect,
    maximise,
)
from tempering.estimators.mixture.refine import NEAR, Fit, fill, refine
from tempering.estimators.mixture.rows import Rows
from tempering.estimators.mixture.snapshot import Snapshot, snapshot
from tempering.estimators.mixture.start import from_clusters

# Temperatures above 1 at which covariances are free for a few passes each, so that components can
# still share rows while they take their shapes; as warm as the lower reheats (`refine.REHEATS`).
RELEASE = (1.2, 1.1)
_PASSES = 5
# Moves are sought on at most this many rows, which fit in memory, and on more where that leaves a
# component fewer than 20 for each number of its mean and mass.
_SAMPLE = 20_000
_SAMPLE_PER_COMPONENT = 20
_RUNS = 10  # of k-means, for one start
_STARTS_REFINED = 4  # one start in four is refined, because moves take longer than all climbs


class FitProgress:
    """What a fit has come to so far; an interrupted fit is made of it."""

    def __init__(self) -> None:
        self.steps: list[AnnealingStep] = []
        self.freed: list[tuple[float, Snapshot]] = []  # (temperature, snapshot)
        self.components: Components | None = None
        self.value = -math.inf
        self.converged = False
        self.moves = 0
        self.start = 0  # which start gave the components; 0 is the annealed one
        self.collapsed = 0  # starts that came to a covariance that is not positive definite
        self._passes = self._moving = 0

    @property
    def reached(self) -> Components:
        """The components so far, of which there are some once annealing has begun."""
        if self.components is None:
            raise RuntimeError("a fit is asked for components before it has any")
        return self.components

    @property
    def passes(self) -> int:
        """Passes over the rows so far."""
        return self._passes + self._moving

    @property
    def breaks(self) -> tuple[Break, ...]:
        """The splits of the annealing."""
        return self.steps[-1].breaks if self.steps else ()

    @property
    def unit(self) -> float:
        """The kernel's variance at T = 1; 1 where no annealing set it."""
        return self.steps[-1].variance or 1.0 if self.steps else 1.0

    def settled(self, step: AnnealingStep, components: Components) -> None:
        """Take down a step of the annealing, and the components that it leads to."""
        self.steps.append(step)
        self.spent(step.passes + 1)
        self.components = components

    def spent(self, passes: int) -> None:
        """More passes over the rows."""
        self._passes += passes

    def another(self) -> None:
        """A further start: its passes come on top."""
        self._passes, self._moving = self.passes, 0

    def keep(self, fit: Fit) -> None:
        """An improvement found by moves."""
        self.components, self.value = fit.components, fit.value
        self._moving, self.moves = fit.passes, fit.moves

    def keep_better(self, fit: Fit, start: int) -> None:
        """What a further start has come to, if it is likelier."""
        if fit.value > self.value + NEAR / 10:
            self.keep(fit)
            self.start = start

    def path(self) -> tuple[list[float], list[Snapshot]]:
        """Temperatures, and what was surveyed there."""
        cooling = [(step.variance / self.unit, step.snapshot) for step in self.steps]
        both = cooling + self.freed
        return [t for t, _ in both], [seen for _, seen in both]


def grow(
    rows: Rows,
    count: int,
    family: Family,
    generator: torch.Generator,
    temperatures: Sequence[float] | None,
    max_iter: int,
    progress: FitProgress,
) -> None:
    """Anneal up to `count` components, set their covariances free, and move."""
    for step in anneal(rows, count, temperatures):
        progress.settled(step, released(step, family))
    cool(rows, RELEASE, family, progress, rows.features + 2.0)
    sample = moving_sample(rows, count)
    progress.components = fill(rows, sample, progress.reached, count, family, generator)
    refine(rows, sample, progress.reached, family, generator, progress.keep, max_iter)


def best_of(
    starts: int,
    rows: Rows,
    count: int,
    family: Family,
    generator: torch.Generator,
    random: np.random.RandomState,
    temperatures: Sequence[float] | None,
    max_iter: int,
    progress: FitProgress,
) -> None:
    """Anneal, then start again from clusters; `progress` holds the likeliest mixture."""
    collapsed = None
    try:
        grow(rows, count, family, generator, temperatures, max_iter, progress)
    except CollapsedError as error:
        collapsed = error
        progress.collapsed += 1
    if count > 1:
        restart(rows, count, family, generator, random, starts, max_iter, progress)
    if collapsed is not None and progress.value == -math.inf:
        raise collapsed


def restart(
    rows: Rows,
    count: int,
    family: Family,
    generator: torch.Generator,
    random: np.random.RandomState,
    starts: int,
    max_iter: int,
    progress: FitProgress,
) -> None:
    """Further starts, in turn from the clusters of k-means and from those of random centres.

    The first takes one run of k-means, which seldom leaves a row by itself; the third and later
    ones take the best of ten, which together cost less than one run of EM.

    All climb; one in four is refined, and every one that is the likeliest so far. Starts are the
    same whatever their number, so that more of them are never worse.
    """
    sample = moving_sample(rows, count)
    for number in range(1, starts):
        runs = (1 if number == 1 else _RUNS) if number % 2 else 0
        start = from_clusters(sample, count, family, random, runs)
        if start is None:
            continue
        progress.another()

        def keep(fit: Fit, number: int = number) -> None:
            progress.keep_better(fit, number)

        try:
            climbed = climb(rows, start, family, tol=NEAR, passes=max_iter)
            progress.spent(climbed.passes)
            if number % _STARTS_REFINED == 1 or climbed.value > progress.value + NEAR / 10:
                refine(rows, sample, climbed.components, family, generator, keep, max_iter)
        except CollapsedError:
            progress.collapsed += 1


def cool(
    rows: Rows,
    temperatures: Sequence[float],
    family: Family,
    progress: FitProgress,
    prior_rows: float = 0.0,
) -> None:
    """A few passes of EM at each temperature, covariances free, with a snapshot of each.

    prior_rows: draw every covariance towards the pooled one, as if that many rows had it. So a
    component that holds only a few rows is widened, and can take in others.
    """
    for temperature in temperatures:
        state = progress.reached
        for _ in range(_PASSES):
            sums = expect(rows, state, family, temperature)
            state = maximise(sums, state, family, prior_rows)
            progress.spent(1)
        progress.components = state
        progress.freed.append((temperature, snapshot(rows, state, family, temperature)))


def finish(rows: Rows, family: Family, tol: float, max_iter: int, progress: FitProgress) -> None:
    """EM at T = 1 to its limit."""
    climbed = climb(rows, progress.reached, family, tol=tol, passes=max_iter)
    progress.components, progress.value = climbed.components, climbed.value
    progress.converged = climbed.converged
    if not climbed.converged:  # the value is that before the last step, which still gained
        progress.value = expect(rows, climbed.components, family).objective / rows.total
    progress.spent(climbed.passes)
    progress.freed.append((1.0, snapshot(rows, climbed.components, family)))


def released(step: AnnealingStep, family: Family) -> Components:
    """The components of a step with covariances of their own, drawn towards the pooled one."""
    seen, features = step.snapshot, step.snapshot.means.shape[1]
    mass = seen.mass[:, None, None]
    pooled = (mass * seen.scatter).sum(0) / mass.sum()
    full = (mass * seen.scatter + (features + 2) * pooled) / (mass + features + 2)
    covariances = family.shape.from_full(full, seen.mass)
    return Components(
        step.components.log_mass, seen.means, family.shape.widen(covariances, family.ridge)
    )


def moving_sample(rows: Rows, count: int) -> Rows:
    """The rows on which moves are sought."""
    return rows.sample(max(_SAMPLE, _SAMPLE_PER_COMPONENT * count * (rows.features + 1)))
