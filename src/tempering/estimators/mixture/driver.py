"""The whole fit: anneal, set the covariances free, cool to T = 1, move, converge."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from tempering.estimators.mixture.anneal import Break, Stage, anneal
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
from tempering.estimators.mixture.start import from_clusters
from tempering.estimators.mixture.survey import Survey, survey

# From the last variance of the annealing the covariances are set free, and cool on.
RELEASE = (1.2, 1.1)
_PASSES = 5
# Moves are sought on at most this many rows, more where a component would get too few of them.
_SAMPLE = 20_000
_STARTS_REFINED = 4  # one in so many of the starts: moves take longer than all climbs
_SAMPLE_PER_COMPONENT = 20


class Trace:
    """What a fit has come to, also where it is interrupted."""

    def __init__(self) -> None:
        self.stages: list[Stage] = []
        self.freed: list[tuple[float, Survey]] = []  # (temperature, survey)
        self.components: Components | None = None
        self.value = -math.inf
        self.converged = False
        self.moves = 0
        self.start = 0  # which start gave the components; 0 is the annealed one
        self.collapsed = 0  # starts that came to a covariance that is not positive definite
        self._passes = self._moving = 0

    @property
    def passes(self) -> int:
        """Passes over the rows so far."""
        return self._passes + self._moving

    @property
    def breaks(self) -> tuple[Break, ...]:
        """The splits of the annealing."""
        return self.stages[-1].breaks if self.stages else ()

    @property
    def unit(self) -> float:
        """The kernel's variance at T = 1; 1 where no annealing set it."""
        return self.stages[-1].variance or 1.0 if self.stages else 1.0

    def settled(self, stage: Stage, components: Components) -> None:
        """A stage of the annealing."""
        self.stages.append(stage)
        self.spent(stage.passes + 1)
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

    def path(self) -> tuple[list[float], list[Survey]]:
        """Temperatures, and what was surveyed there."""
        cooling = [(stage.variance / self.unit, stage.survey) for stage in self.stages]
        both = cooling + self.freed
        return [t for t, _ in both], [seen for _, seen in both]


def grow(
    rows: Rows,
    count: int,
    family: Family,
    generator: torch.Generator,
    temperatures: Sequence[float] | None,
    max_iter: int,
    trace: Trace,
) -> None:
    """Anneal up to `count` components, set their covariances free, and move."""
    for stage in anneal(rows, count, temperatures):
        trace.settled(stage, released(stage, family))
    cool(rows, RELEASE, family, trace, rows.features + 2.0)
    sample = moving_sample(rows, count)
    trace.components = fill(rows, sample, kept(trace), count, family, generator)
    refine(rows, sample, kept(trace), family, generator, trace.keep, max_iter)


def best_of(
    starts: int,
    rows: Rows,
    count: int,
    family: Family,
    generator: torch.Generator,
    random: np.random.RandomState,
    temperatures: Sequence[float] | None,
    max_iter: int,
    trace: Trace,
) -> None:
    """Anneal, then start again from k-means; the likeliest mixture is kept."""
    collapsed = None
    try:
        grow(rows, count, family, generator, temperatures, max_iter, trace)
    except CollapsedError as error:
        collapsed = error
        trace.collapsed += 1
    if count > 1:
        restart(rows, count, family, generator, random, starts, max_iter, trace)
    if collapsed is not None and trace.value == -math.inf:
        raise collapsed


def restart(
    rows: Rows,
    count: int,
    family: Family,
    generator: torch.Generator,
    random: np.random.RandomState,
    starts: int,
    max_iter: int,
    trace: Trace,
) -> None:
    """Further starts, in turn from the clusters of k-means and from those of random centres.

    All climb; one in four is refined, and every one that is the likeliest so far. Starts are the
    same whatever their number, so that more of them are never worse.
    """
    sample = moving_sample(rows, count)
    for number in range(1, starts):
        start = from_clusters(sample, count, family, random, settled=number % 2 == 1)
        if start is None:
            continue
        trace.another()

        def keep(fit: Fit, number: int = number) -> None:
            trace.keep_better(fit, number)

        try:
            climbed = climb(rows, start, family, tol=NEAR, passes=max_iter)
            trace.spent(climbed.passes)
            if number % _STARTS_REFINED == 1 or climbed.value > trace.value + NEAR / 10:
                refine(rows, sample, climbed.components, family, generator, keep, max_iter)
        except CollapsedError:
            trace.collapsed += 1


def cool(
    rows: Rows,
    temperatures: Sequence[float],
    family: Family,
    trace: Trace,
    prior_rows: float = 0.0,
) -> None:
    """A few passes of EM at each temperature, covariances free; what is seen there is kept.

    prior_rows: draws every covariance towards the pooled one; components that hold a few rows
    only are freed from them so.
    """
    for temperature in temperatures:
        state = kept(trace)
        for _ in range(_PASSES):
            sums = expect(rows, state, family, temperature)
            state = maximise(sums, state, family, prior_rows)
            trace.spent(1)
        trace.components = state
        trace.freed.append((temperature, survey(rows, state, family, temperature)))


def finish(rows: Rows, family: Family, tol: float, max_iter: int, trace: Trace) -> None:
    """EM at T = 1 to its limit."""
    climbed = climb(rows, kept(trace), family, tol=tol, passes=max_iter)
    trace.components, trace.value = climbed.components, climbed.value
    trace.converged = climbed.converged
    trace.spent(climbed.passes)
    trace.freed.append((1.0, survey(rows, climbed.components, family)))


def released(stage: Stage, family: Family) -> Components:
    """The components of a stage with covariances of the family, drawn towards the pooled one."""
    seen, features = stage.survey, stage.survey.means.shape[1]
    mass = seen.mass[:, None, None]
    pooled = (mass * seen.scatter).sum(0) / mass.sum()
    full = (mass * seen.scatter + (features + 2) * pooled) / (mass + features + 2)
    covariances = family.shape.from_full(full, seen.mass)
    return Components(
        stage.components.log_mass, seen.means, family.shape.widen(covariances, family.ridge)
    )


def moving_sample(rows: Rows, count: int) -> Rows:
    """The rows on which moves are sought."""
    return rows.sample(max(_SAMPLE, _SAMPLE_PER_COMPONENT * count * (rows.features + 1)))


def kept(trace: Trace) -> Components:
    """The components that a trace holds by now."""
    if trace.components is None:
        raise RuntimeError("a trace is asked for components before it holds any")
    return trace.components
