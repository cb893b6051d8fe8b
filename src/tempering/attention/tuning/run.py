"""A run of tuning under way: evaluate, step, keep the state, stop, choose the best point."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tempering.attention.tuning.kept import Kept
from tempering.attention.tuning.moving import Method
from tempering.attention.tuning.newton import Newton
from tempering.attention.tuning.outcome import Step, TradeOff
from tempering.attention.tuning.passes import Report
from tempering.attention.tuning.problem import Problem, Watched, merit, watch
from tempering.attention.tuning.tunable import Tunable

Progress = Callable[[str, int, int], None]

# A change of every log T by less than this is no change: 0.1 % of T.
_STILL = 1e-3
# Powers of the best temperatures that are weighed under a constraint: cost grows about as the
# square of log T, gain about in proportion, so a smaller room may lie within it.
_ROOMS = (0.25, 0.5, 0.75)


class Option(NamedTuple):
    """A point that could be chosen: of a step, or a room of its temperatures."""

    label: str
    step: int
    room: float
    theta: Tensor
    seen: Watched

    @property
    def cost(self) -> float:
        """Of the constraint on watched data, nats per token."""
        return self.seen.cost or 0.0


class Choice(NamedTuple):
    """The point chosen; met: False when every better point than the start breaks the constraint."""

    step: int
    room: float
    theta: Tensor
    seen: Watched
    met: bool
    points: tuple[TradeOff, ...]


class Run:
    """What was seen so far, and the point to go on from."""

    def __init__(
        self,
        problem: Problem,
        tempering: Tunable,
        mover: Method,
        kept: Kept,
        rows: int,
        progress: Progress | None,
        on_step: Callable[[Step], None] | None,
    ) -> None:
        self.problem, self.live, self.mover, self.kept = problem, tempering, mover, kept
        self.rows, self.progress, self.on_step = rows, progress, on_step
        self.theta = torch.zeros(tempering.size, dtype=torch.float64)
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

    def choose(self) -> Choice:
        """The best point seen; under a constraint also among smaller rooms of it."""
        best = min(range(len(self.trail)), key=self._merits().__getitem__)
        step = self.history[best].step
        if self.problem.constraint is None:
            return Choice(step, 1.0, *self.trail[best], True, ())
        options = [
            Option(f"step {row.step}", row.step, 1.0, *point)
            for row, point in zip(self.history, self.trail, strict=True)
        ]
        if self.stopped != "interrupted" and best > 0:
            options += self._rooms(step, self.trail[best][0])
        within = [o for o in options if o.cost <= self.problem.constraint.within]
        chosen = min(within, key=lambda option: option.seen.value)
        better = [o for o in options if o.seen.value < options[0].seen.value]
        # All that is better costs too much: the one that comes closest goes into the error.
        met = chosen.step > 0 or not better
        if not met and self.stopped != "interrupted":
            chosen = min(better, key=self._merit)
        points = tuple(TradeOff(o.label, o.seen.value, o.cost, o is chosen) for o in options)
        return Choice(chosen.step, chosen.room, chosen.theta, chosen.seen, met, points)

    def _evaluate(self, count: int) -> None:
        seen = self._watch(self.theta, f"{self.problem.watched}, step {self.step} of {count}")
        before = self.trail[-1][0] if self.trail else self.theta
        coldest, hottest = self.live.extent(self.theta)
        self.trail.append((self.theta, seen))
        self.history.append(
            Step(
                step=self.step,
                loss=None,
                held_out=seen.value,
                cost=seen.cost,
                multiplier=0.0,
                coldest=coldest,
                hottest=hottest,
                moved=self.live.moved(before, self.theta),
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

    def _rooms(self, step: int, theta: Tensor) -> list[Option]:
        found = []
        try:
            for room in _ROOMS:
                seen = self._watch(theta * room, "trade-off")
                found.append(Option(f"step {step}, room {room:g}", step, room, theta * room, seen))
        except KeyboardInterrupt:
            self.stopped = "interrupted"
        return found

    def _merits(self) -> list[float]:
        """What each point of the trail is worth; lower is better."""
        return [self._merit(Option("", 0, 1.0, *point)) for point in self.trail]

    def _merit(self, option: Option) -> float:
        within = self.problem.constraint.within if self.problem.constraint else None
        strongest = max(row.multiplier for row in self.history)
        return merit(option.seen.value, option.seen.cost, within, strongest)

    def _stale(self, patience: int) -> bool:
        merits = self._merits()
        return len(merits) - 1 - merits.index(min(merits)) >= patience

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
