"""A run of tuning under way: evaluate, step, keep the state, stop, choose the best point."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tempering.attention.tuning.kept import Kept
from tempering.attention.tuning.live import Live
from tempering.attention.tuning.moving import Method
from tempering.attention.tuning.newton import Newton
from tempering.attention.tuning.outcome import (
    ConstraintError,
    HeldOut,
    Step,
    TradeOff,
    Tuned,
    guard,
)
from tempering.attention.tuning.passes import Report
from tempering.attention.tuning.problem import Problem, Watched, merit, watch
from tempering.errors import ConvergenceWarning

Progress = Callable[[str, int, int], None]

# A change of every log T by less than this is no change: 0.1 % of T.
_STILL = 1e-3
# Powers of the best temperatures that are weighed under a constraint: cost grows about as the
# square of log T, gain about in proportion, so a smaller room may lie within it.
_ROOMS = (0.25, 0.5, 0.75)


class Run:
    """What was seen so far, and the point to go on from."""

    def __init__(
        self,
        problem: Problem,
        tempering: Live,
        mover: Method,
        kept: Kept,
        rows: int,
        progress: Progress | None,
        on_step: Callable[[Step], None] | None,
    ) -> None:
        self.problem, self.live, self.mover, self.kept = problem, tempering, mover, kept
        self.rows, self.progress, self.on_step = rows, progress, on_step
        size = tempering.basis.matrix.shape[1]
        self.theta = torch.zeros(size, dtype=torch.float64)
        self.step = 0
        self.stopped = ""
        self.history: list[Step] = []
        self.trail: list[tuple[Tensor, Watched]] = []  # for each row of the history

    def walk(self, count: int, every: int, patience: int) -> None:
        """Step until there is a reason to stop; the state is kept after every step."""
        self._restore()
        try:
            while not self.stopped:
                watched = self.step % every == 0 or self.step == count
                if watched:
                    self._evaluate(count)
                if self.step == count:
                    self.stopped = "all steps taken"
                elif watched and self._stale(patience):
                    self.stopped = f"{self.problem.watched} loss stopped falling"
                else:
                    self._advance(count, watched)
                self._keep()
                if watched and self.on_step is not None:
                    self.on_step(self.history[-1])
        except KeyboardInterrupt:
            if not self.history:
                raise
            self.stopped = "interrupted"

    def result(self, seed: int, prior_sd: float) -> Tuned:
        """The best point seen, and everything about it; ConstraintError when none will do."""
        best = min(range(len(self.trail)), key=self._merits().__getitem__)
        room, theta, seen = 1.0, *self.trail[best]
        start = self.trail[0][1]
        points: list[TradeOff] = []
        met = True
        constraint = self.problem.constraint
        if constraint is not None:
            options = [
                (f"step {row.step}", row.step, 1.0, *point)
                for row, point in zip(self.history, self.trail, strict=True)
            ]
            if self.stopped != "interrupted" and best > 0:
                options += [
                    (f"step {self.history[best].step}, room {r:g}", self.history[best].step, r, *p)
                    for r, p in zip(_ROOMS, self._rooms(theta), strict=True)
                ]
            within = [o for o in options if (o[4].cost or 0.0) <= constraint.within]
            label, step, room, theta, seen = min(within, key=lambda option: option[4].value)
            met = step > 0
            if not met:  # what came closest, for the error
                label, step, room, theta, seen = min(options[1:] or options, key=self._outside)
            points = [TradeOff(o[0], o[4].value, o[4].cost or 0.0, o[0] == label) for o in options]
        else:
            step = self.history[best].step
        profile = self.live.profile(theta)
        tuned = Tuned(
            profile=profile,
            theta=theta,
            names=self.live.basis.names,
            history=tuple(self.history),
            step=step,
            room=room,
            watched=self.problem.watched,
            before=start.value,
            after=seen.value,
            cost=seen.cost,
            met=met,
            held_out=self._held_out(start, seen),
            trade_off=tuple(points),
            stopped_because=self.stopped,
            targets=self.problem.targets,
            seed=seed,
            collapse=None
            if self.stopped == "interrupted"
            else guard(self.live, profile, self.problem.watched_goals, prior_sd),
        )
        return self._judged(tuned)

    def _judged(self, tuned: Tuned) -> Tuned:
        if self.stopped != "interrupted":
            self.kept.finish()
            if not tuned.met and self.problem.constraint is not None:
                raise ConstraintError(tuned, self.problem.constraint.within)
            if tuned.step == 0:
                warnings.warn(
                    f"no step lowered the {tuned.watched} loss of {tuned.before:.4f}, so T is 1 "
                    "everywhere; try more data, fewer numbers (per='layer'), a smaller prior_sd "
                    "or a smaller radius",
                    ConvergenceWarning,
                    stacklevel=4,
                )
        return tuned

    def _evaluate(self, count: int) -> None:
        seen = self._watch(self.theta, f"{self.problem.watched}, step {self.step} of {count}")
        before = self.trail[-1][0] if self.trail else self.theta
        temperatures = torch.cat(self.live.temperatures(self.theta))
        self.trail.append((self.theta, seen))
        self.history.append(
            Step(
                step=self.step,
                loss=None,
                held_out=seen.value,
                cost=seen.cost,
                multiplier=0.0,
                coldest=float(temperatures.min()),
                hottest=float(temperatures.max()),
                moved=self._moved(before),
            )
        )

    def _advance(self, count: int, watched: bool) -> None:
        learned = [*self.problem.goals, *([self.problem.limit] if self.problem.limit else [])]
        total = sum(len(objective.pieces) for objective in learned)
        report = self._counter(f"gradients, step {self.step + 1} of {count}", total)
        cost = self.history[-1].cost if watched else None
        move = self.mover.advance(self.theta, self.step, cost, report)
        if watched:
            self.history[-1] = self.history[-1]._replace(loss=move.loss, multiplier=move.multiplier)
        still = float((move.theta - self.theta).abs().max()) < _STILL
        self.theta, self.step = move.theta, self.step + 1
        if still and isinstance(self.mover, Newton):
            self.stopped = "converged"

    def _watch(self, theta: Tensor, stage: str) -> Watched:
        return watch(
            self.problem,
            self.live,
            theta,
            self.trail[0][1] if self.trail else None,
            rows=self.rows,
            step=self.step,
            report=self._counter(stage, self.problem.watched_pieces),
        )

    def _rooms(self, theta: Tensor) -> list[tuple[Tensor, Watched]]:
        found = []
        for room in _ROOMS:
            found.append((theta * room, self._watch(theta * room, f"trade-off, room {room:g}")))
        return found

    def _merits(self) -> list[float]:
        """What each point of the trail is worth; lower is better."""
        within = self.problem.constraint.within if self.problem.constraint else None
        strongest = max(row.multiplier for row in self.history)
        return [merit(row.held_out, row.cost, within, strongest) for row in self.history]

    def _outside(self, option: tuple[Any, ...]) -> float:
        within = self.problem.constraint.within if self.problem.constraint else None
        strongest = max(row.multiplier for row in self.history)
        return merit(option[4].value, option[4].cost, within, strongest)

    def _stale(self, patience: int) -> bool:
        merits = self._merits()
        return len(merits) - 1 - merits.index(min(merits)) >= patience

    def _moved(self, before: Tensor) -> str:
        """The three numbers that changed most, with the temperatures they stand for."""
        change = (self.theta - before).abs()
        most = change.topk(min(3, len(change))).indices.tolist()
        return "; ".join(
            f"{self.live.basis.names[i]}: {float(self.theta[i].exp()):.3f}"
            for i in most
            if change[i] > 0
        )

    def _held_out(self, before: Watched, after: Watched) -> tuple[HeldOut, ...]:
        return tuple(
            HeldOut(
                goal.name,
                one,
                other,
                torch.tensor([piece.count for piece in goal.pieces], dtype=torch.float64),
            )
            for goal, one, other in zip(
                self.problem.watched_goals, before.losses, after.losses, strict=True
            )
        )

    def _counter(self, stage: str, total: int) -> Report | None:
        if self.progress is None:
            return None
        progress, done = self.progress, [0]

        def count(more: int) -> None:
            done[0] += more
            progress(stage, done[0], total)

        return count

    def _keep(self) -> None:
        self.kept.save(
            {
                "theta": self.theta,
                "step": self.step,
                "stopped": self.stopped,
                "history": [tuple(row) for row in self.history],
                "trail": [(theta, tuple(seen)) for theta, seen in self.trail],
                "mover": self.mover.state(),
            }
        )

    def _restore(self) -> None:
        state = self.kept.load()
        if state is None:
            return
        self.theta, self.step, self.stopped = state["theta"], state["step"], state["stopped"]
        self.history = [Step(*row) for row in state["history"]]
        self.trail = [(theta, Watched(*seen)) for theta, seen in state["trail"]]
        self.mover.restore(state["mover"])
