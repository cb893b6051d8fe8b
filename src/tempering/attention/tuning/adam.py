"""Adam on a few pieces at a time, with dual ascent on the constraint's multiplier:

m <- m exp(rate clip((c + gap - within)/within, -1, 3))

c: a running mean of the cost; gap: what held-out data cost more, at most MARGIN within
"""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from torch import Tensor, nn

from tempering.attention.tuning.method import Method, Move
from tempering.attention.tuning.objectives import Piece
from tempering.attention.tuning.passes import Pass, Report, gradient_pass, loss_pass
from tempering.attention.tuning.problem import MARGIN, Problem
from tempering.attention.tuning.tunable import Tunable

# Dual ascent starts at the weight of a divergence that served first, and can rise by a factor of
# e in three steps, and fall by it in ten.
_FIRST_MULTIPLIER, _DUAL_RATE, _MEMORY = 3.0, 0.1, 0.9


class Adam(Method):
    """Adam on `rows` pieces of each objective a step, with warm-up and cosine decay."""

    def __init__(
        self,
        problem: Problem,
        live: Tunable,
        *,
        prior: float,
        rate: float,
        steps: int,
        rows: int,
        seed: int,
    ) -> None:
        self.problem, self.live, self.rows, self.seed = problem, live, rows, seed
        self.prior, self.rate, self.steps = prior, rate, steps
        size = live.size
        self.parameter = nn.Parameter(torch.zeros(size, dtype=torch.float64))
        self.optimizer = torch.optim.Adam([self.parameter], lr=rate)
        self.multiplier = _FIRST_MULTIPLIER if problem.limit else 0.0
        self.cost, self.gap = 0.0, 0.0
        self.bases: dict[str, float] = {}

    def advance(
        self, theta: Tensor, step: int, held_cost: float | None, report: Report | None
    ) -> Move:
        """One step on the next few pieces of each objective."""
        loss, gradient = 0.0, self.prior * theta
        for goal in self.problem.goals:
            run = self._run(theta, goal.pieces, step, report)
            loss += goal.weight * run.mean
            gradient = gradient + goal.weight * run.gradient
        if self.problem.limit is not None and self.problem.constraint is not None:
            pieces, within = self.problem.limit.pieces, self.problem.constraint.within
            chosen = self._draw(pieces, step)
            run = self._run(theta, pieces, step, report, self.problem.kind)
            base = self._base(chosen, step) if self.problem.kind == "loss" else 0.0
            self.cost = _MEMORY * self.cost + (1 - _MEMORY) * (run.mean - base)
            # A running mean from 0 lags behind at first.
            seen = self.cost / (1 - _MEMORY ** (step + 1))
            gradient = gradient + self.multiplier * run.gradient
            if held_cost is not None:
                self.gap = min(max(0.0, held_cost - seen), MARGIN * within)
            excess = (seen + self.gap - within) / within
            self.multiplier *= math.exp(_DUAL_RATE * max(-1.0, min(3.0, excess)))
        self._step(theta, gradient, step)
        return Move(self.parameter.detach().clone(), loss, self.multiplier)

    def _base(self, pieces: list[Piece], step: int) -> float:
        """The mean loss of the untempered model; computed once for each piece."""
        for piece in pieces:
            if piece.digest not in self.bases:
                self.bases[piece.digest] = loss_pass(self.live, None, [piece], step=step).mean
        weights = [piece.count for piece in pieces]
        values = [self.bases[piece.digest] for piece in pieces]
        return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)

    def _step(self, theta: Tensor, gradient: Tensor, step: int) -> None:
        warm = min(1.0, (step + 1) / max(1.0, self.steps / 10))
        decay = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        self.optimizer.param_groups[0]["lr"] = self.rate * warm * decay
        self.parameter.data.copy_(theta)
        self.parameter.grad = gradient
        self.optimizer.step()

    def _run(
        self,
        theta: Tensor,
        pieces: tuple[Piece, ...],
        step: int,
        report: Report | None,
        kind: Any = "loss",
    ) -> Pass:
        return gradient_pass(
            self.live,
            theta,
            self._draw(pieces, step),
            kind=kind,
            rows=self.rows,
            step=step,
            report=report,
        )

    def _draw(self, pieces: tuple[Piece, ...], step: int) -> list[Piece]:
        """The next few pieces, in an order drawn anew for every round through them."""
        chosen = []
        for place in range(step * self.rows, (step + 1) * self.rows):
            order = list(range(len(pieces)))
            random.Random(f"{self.seed} {place // len(pieces)}").shuffle(order)
            chosen.append(pieces[order[place % len(pieces)]])
        return chosen

    def state(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "multiplier": self.multiplier,
            "cost": self.cost,
            "gap": self.gap,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.multiplier = state["multiplier"]
        self.cost, self.gap = state["cost"], state["gap"]
