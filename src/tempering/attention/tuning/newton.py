"""Newton steps on full passes over the calibration data; the formulas are in `steps`."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tempering.attention.tuning.method import Method, Move
from tempering.attention.tuning.objectives import Objective
from tempering.attention.tuning.passes import Report, gradient_pass
from tempering.attention.tuning.problem import MARGIN, Problem, merit
from tempering.attention.tuning.steps import (
    Quadratic,
    Secant,
    constrained_step,
    damped_step,
    quadratic,
    weighted_sum,
)
from tempering.attention.tuning.tunable import Tunable
from tempering.errors import DataError

# Drawn gradients for the curvature of an objective, at least. Damped steps need few: a second and a
# third draw of each of 16 chunks lowered the loss of other text no further, and those of 4 chunks
# less than a second step does in the same time (dev/LOG.md).
_OF_GOALS = 4
# A constraint's cost is predicted from its curvature, and low in directions that it doesn't see: it
# takes this many for each number.
_OF_LIMIT = 2
_MOST_DRAWS = 8  # of one piece


class Point(NamedTuple):
    """A point, and the calibration data's losses near it."""

    theta: Tensor
    goal: Quadratic
    limit: Quadratic | None

    def merit(self, prior: float, aim: float, multiplier: float) -> float:
        """The loss with its prior and what a breach of the constraint counts."""
        value = self.goal.value + prior / 2 * float(self.theta @ self.theta)
        return merit(value, self.limit and self.limit.value, aim, multiplier)


class Newton(Method):
    """Damped Newton steps; one that makes things worse is taken back and tried at half radius."""

    def __init__(
        self,
        problem: Problem,
        live: Tunable,
        *,
        prior: float,
        damping: float,
        radius: float,
        rows: int,
        seed: int,
    ) -> None:
        for goal in (*problem.goals, *([problem.limit] if problem.limit else [])):
            if goal.kind == "function" and len(goal.pieces) < 2:
                raise DataError(
                    f"'{goal.name}' has one piece to learn from, and Newton's method takes a "
                    "function's curvature from the spread of at least 2: give more, or "
                    "method='adam'"
                )
        self.problem, self.live, self.rows, self.seed = problem, live, rows, seed
        self.prior, self.damping, self.radius = prior, damping, radius
        self.within = problem.constraint.within if problem.constraint else math.inf
        self.multiplier = 0.0
        self.kept: Point | None = None  # the last point that was not taken back
        self.goal_curvature, self.limit_curvature = Secant(), Secant()
        self.start: float | None = None  # the loss of the constraint's text at theta = 0

    def advance(
        self, theta: Tensor, step: int, held_cost: float | None, report: Report | None
    ) -> Move:
        """One full pass with gradients, and the step from it."""
        here = Point(theta, self._goal(theta, step, report), self._limit(theta, step, report))
        aim = self.within
        if here.limit is not None and held_cost is not None:
            # A margin is left: what the watched text costs above the text that is learned from.
            aim -= min(max(0.0, held_cost - here.limit.value), MARGIN * self.within)
        weighing = (self.prior, aim, self.multiplier)
        if self.kept is not None and here.merit(*weighing) > self.kept.merit(*weighing):
            self.radius /= 2
            base = self._corrected(self.kept)
        else:
            base = self.kept = here
        options = {"prior": self.prior, "damping": self.damping, "radius": self.radius}
        if base.limit is None:
            delta = damped_step(base.goal, base.theta, **options)
        else:
            delta, self.multiplier = constrained_step(
                base.goal, base.limit, aim, base.theta, **options
            )
        return Move(base.theta + delta, here.goal.value, self.multiplier)

    def _corrected(self, point: Point) -> Point:
        """A point seen before, with the curvature as it is known now."""
        goal = point.goal._replace(curvature=self.goal_curvature.known)
        limit = point.limit and point.limit._replace(curvature=self.limit_curvature.known)
        return Point(point.theta, goal, limit)

    def _goal(self, theta: Tensor, step: int, report: Report | None) -> Quadratic:
        terms = []
        first = self.goal_curvature.curvature is None
        for item in self.problem.goals:
            run = gradient_pass(
                self.live,
                theta,
                item.pieces,
                rows=self.rows,
                step=step,
                draws=self._draws(item, _OF_GOALS) if first else 0,
                seed=self.seed,
                report=report,
            )
            found = quadratic(run.losses, run.gradients, run.counts, run.drawn)
            terms.append((item.weight, found))
        return self.goal_curvature.at(theta, weighted_sum(terms))

    def _draws(self, objective: Objective, wanted: int) -> int:
        """How often the targets of every piece are drawn; functions have none to draw.

        wanted: drawn gradients in all.
        """
        if objective.kind == "function":
            return 0
        return min(math.ceil(wanted / len(objective.pieces)), _MOST_DRAWS)

    def _limit(self, theta: Tensor, step: int, report: Report | None) -> Quadratic | None:
        if self.problem.limit is None:
            return None
        # A divergence and its gradient are 0 at the start: there the losses give its curvature.
        first = self.start is None
        run = gradient_pass(
            self.live,
            theta,
            self.problem.limit.pieces,
            kind="loss" if first else self.problem.kind,
            rows=self.rows,
            step=step,
            draws=self._draws(self.problem.limit, _OF_LIMIT * self.live.size) if first else 0,
            seed=self.seed,
            report=report,
        )
        found = quadratic(run.losses, run.gradients, run.counts, run.drawn)
        if first:
            self.start = found.value
        if self.problem.kind == "loss":
            found = found._replace(value=found.value - (self.start or 0.0))
        elif first:
            found = Quadratic(0.0, torch.zeros_like(found.gradient), found.curvature)
        return self.limit_curvature.at(theta, found)

    def state(self) -> dict[str, Any]:
        kept = self.kept
        return {
            "radius": self.radius,
            "multiplier": self.multiplier,
            "goal curvature": self.goal_curvature.state(),
            "limit curvature": self.limit_curvature.state(),
            "start": self.start,
            "kept": kept and (kept.theta, tuple(kept.goal), kept.limit and tuple(kept.limit)),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.radius, self.multiplier = state["radius"], state["multiplier"]
        self.goal_curvature.restore(state["goal curvature"])
        self.limit_curvature.restore(state["limit curvature"])
        self.start = state["start"]
        if state["kept"] is not None:
            theta, goal, limit = state["kept"]
            self.kept = Point(theta, Quadratic(*goal), limit and Quadratic(*limit))
