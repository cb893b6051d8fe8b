"""What a run works on: calibration data to learn from, and watched data to judge by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tempering.attention.tuning.objectives import Constraint, Objective
from tempering.attention.tuning.passes import Kind, Report, loss_pass
from tempering.attention.tuning.split import refuse_overlap, split
from tempering.attention.tuning.tunable import Tunable
from tempering.errors import InputError

# The share of the constraint's text to hold out, where objectives bring held-out data with them.
_SHARE = 0.2
# Held-out text may cost more than calibration text; a margin of the constraint is left for it, at
# most this share of it. A larger difference counts as noise, which the choice of a point sees to.
MARGIN = 0.75


@dataclass(frozen=True, eq=False)
class Problem:
    """Objectives and constraint, each parted into calibration and what is watched.

    watched is "held out", or "calibration" where nothing is held out: then both are the same.
    """

    goals: tuple[Objective, ...]
    watched_goals: tuple[Objective, ...]
    constraint: Constraint | None
    limit: Objective | None
    watched_limit: Objective | None
    watched: str

    @property
    def kind(self) -> Kind:
        """What a pass over the constraint's data computes."""
        divergence = self.constraint is not None and self.constraint.kind == "divergence"
        return "divergence" if divergence else "loss"

    @property
    def targets(self) -> int:
        """Targets of all objectives that are learned from."""
        return sum(goal.count for goal in self.goals)

    @property
    def watched_pieces(self) -> int:
        """Pieces that are watched."""
        limit = self.watched_limit.pieces if self.watched_limit else ()
        return sum(len(goal.pieces) for goal in self.watched_goals) + len(limit)


def make_problem(
    objectives: Objective | Sequence[Objective],
    constraint: Constraint | None,
    held_out: float | int | Sequence[Objective],
    seed: int,
) -> Problem:
    """Part the data.

    held_out: the share of each objective's pieces that is held out (0 for none), or objectives
    of one's own to hold out, one for each objective.

    Raises DataError for too little data, or held-out data that overlap with what is learned from.
    """
    goals = (objectives,) if isinstance(objectives, Objective) else tuple(objectives)
    if not goals or not all(isinstance(goal, Objective) for goal in goals):
        raise InputError("give an Objective to tune for, or several: from_text(tokenizer, text)")
    limit = constraint.objective if constraint else None
    watched_limit = limit
    if isinstance(held_out, bool | np.bool_):
        raise InputError(f"held_out = {held_out!r}; expected a share, or objectives to hold out")
    if isinstance(held_out, int | float | np.number):
        if held_out == 0:
            return Problem(goals, goals, constraint, limit, limit, "calibration")
        share = float(held_out)
        parts = [split(goal, share, seed) for goal in goals]
        goals, others = tuple(p[0] for p in parts), tuple(p[1] for p in parts)
    else:
        share, others = _SHARE, tuple(held_out)
        if len(others) != len(goals):
            raise InputError(
                f"{len(goals)} objectives and {len(others)} to hold out: give one for each"
            )
        refuse_overlap(goals, others, "calibration and held-out data")
    if limit is not None:
        limit, watched_limit = split(limit, share, seed)
    return Problem(goals, others, constraint, limit, watched_limit, "held out")


class Watched(NamedTuple):
    """The watched losses at one point.

    losses: one tensor for each objective, a loss for each piece. value: their weighted mean.
    cost: mean of the constraint's quantity, nats per token, and costs of its pieces.
    """

    losses: tuple[Tensor, ...]
    value: float
    cost: float | None
    costs: Tensor | None


def watch(
    problem: Problem,
    live: Tunable,
    theta: Float[Tensor, "numbers"],
    base: Watched | None,
    *,
    rows: int,
    step: int,
    report: Report | None,
) -> Watched:
    """Run what is watched, forward only; base: the same at theta = 0, for the cost."""
    found, value = [], 0.0
    for goal in problem.watched_goals:
        run = loss_pass(live, theta, goal.pieces, rows=rows, step=step, report=report)
        found.append(run.losses)
        value += goal.weight * run.mean
    if problem.watched_limit is None:
        return Watched(tuple(found), value, None, None)
    pieces = problem.watched_limit.pieces
    run = loss_pass(live, theta, pieces, kind=problem.kind, rows=rows, step=step, report=report)
    before = torch.zeros_like(run.losses)
    if problem.kind == "loss":
        before = run.losses if base is None or base.costs is None else base.costs
    cost = float(((run.losses - before) * run.counts).sum() / run.counts.sum())
    return Watched(tuple(found), value, cost, run.losses)


def merit(value: float, cost: float | None, within: float | None, multiplier: float) -> float:
    """The loss, plus what a breach of the constraint counts; inf where it is not a number."""
    if cost is None or within is None:
        return value
    total = value + max(1.0, 2 * multiplier) * max(0.0, cost - within)
    return total if math.isfinite(total) else math.inf
