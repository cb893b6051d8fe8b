"""A run of tuning under way: evaluate, step, keep the state, stop, choose the best point."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tempering.attention.tuning.method import Method
from tempering.attention.tuning.newton import Newton
from tempering.attention.tuning.outcome import INTERRUPTED, Step, TradeOff
from tempering.attention.tuning.passes import Report
from tempering.attention.tuning.problem import Problem, Watched, merit, watch
from tempering.attention.tuning.saved_run import SavedRun
from tempering.attention.tuning.steps import LARGEST
from tempering.attention.tuning.tunable import Tunable
from tempering.ranks import here

Progress = Callable[[str, int, int], None]

# A step that changes every log T by less than this, 0.1 % of T, changes nothing: converged.
_STILL = 1e-3
# Under a constraint, a point's temperatures may be stretched to at most this power of them.
_FARTHEST = 1.5
# The stretch aims at this share of the constraint, so that a small miss stays within it.
_SAFE = 0.95


class _TimeUpError(Exception):
    """The time given to a run is over."""


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


def _crossing(whole: float, r: float, cost: float, goal: float) -> float:
    """Where a r + b r^2 through (1, whole) and (r, cost) reaches the goal."""
    if abs(r - 1) > 1e-6:
        curve = (cost / r - whole) / (r - 1)
        line = whole - curve
        inside = line * line + 4 * curve * goal
        if curve > 0 and inside > 0:
            return min((math.sqrt(inside) - line) / (2 * curve), _FARTHEST)
    return min(r * math.sqrt(goal / cost), _FARTHEST) if cost > 0 else r


class Run:
    """What was seen so far, and the point to go on from."""

    def __init__(
        self,
        problem: Problem,
        tempering: Tunable,
        mover: Method,
        saved: SavedRun,
        rows: int,
        progress: Progress | None,
        on_step: Callable[[Step], None] | None,
    ) -> None:
        self.problem, self.live, self.mover, self.saved = problem, tempering, mover, saved
        self.rows, self.progress, self.on_step = rows, progress, on_step
        self.theta = torch.zeros(tempering.size, dtype=torch.float64)
        self.step = 0
        self.stopped = ""
        self.until = math.inf
        self.history: list[Step] = []
        self.trail: list[tuple[Tensor, Watched]] = []  # for each row of the history

    def walk(self, count: int, every: int, patience: int, until: float = math.inf) -> None:
        """Step until there is a reason to stop; the state is kept after every step.

        until: by `time.perf_counter()`. A step under way is given up then, between two pieces of
        data; only the look at the start is always finished.
        """
        self._restore()
        self.until = until
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
        except _TimeUpError:
            self.stopped = "time is up"
        except KeyboardInterrupt:
            if not self.history:
                raise
            self.stopped = INTERRUPTED
        finally:
            self.until = math.inf  # what follows is short, and has to be finished

    def choose(self) -> Choice:
        """The best point seen; under a constraint also among rooms of the most promising one."""
        if self.problem.constraint is None:
            best = min(range(len(self.trail)), key=lambda i: self.trail[i][1].value)
            return Choice(self.history[best].step, 1.0, *self.trail[best], True, ())
        options = [
            Option(f"step {row.step}", row.step, 1.0, *point)
            for row, point in zip(self.history, self.trail, strict=True)
        ]
        if self.stopped != INTERRUPTED:
            options += self._rooms(options, self.problem.constraint.within)
        within = [o for o in options if o.cost <= self.problem.constraint.within]
        chosen = min(within, key=lambda option: option.seen.value)
        better = [o for o in options if o.seen.value < options[0].seen.value]
        # Where all that is better costs too much, the error shows the one that comes closest.
        met = chosen.step > 0 or not better
        if not met and self.stopped != INTERRUPTED:
            chosen = min(better, key=self._merit)
        points = tuple(TradeOff(o.label, o.seen.value, o.cost, o is chosen) for o in options)
        return Choice(chosen.step, chosen.room, chosen.theta, chosen.seen, met, points)

    def _rooms(self, options: list[Option], within: float) -> list[Option]:
        """The point that promises most when its temperatures are stretched to fit the constraint.

        Along theta r cost grows about as r^2 and the gain G, best near r = 1, as G (2 r - r^2).
        """

        def room(option: Option) -> float:
            return min(math.sqrt(within / option.cost), _FARTHEST)

        def promise(option: Option) -> float:
            gain, r = options[0].seen.value - option.seen.value, room(option)
            return gain * (2 * r - r * r)

        stretched = [option for option in options if option.cost > 0 and promise(option) > 0]
        found: list[Option] = []
        if not stretched:
            return found
        best = max(stretched, key=promise)
        r = room(best)
        try:
            for _ in range(2):
                theta = best.theta * r
                seen = self._watch(theta, "trade-off")
                found.append(Option(f"{best.label}, room {r:.3g}", best.step, r, theta, seen))
                r = _crossing(best.cost, r, found[-1].cost, _SAFE * within)
        except KeyboardInterrupt:
            self.stopped = INTERRUPTED
        return found

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
        # Linear algebra may differ in its last digit from one processor to another.
        move = here().same(self.mover.advance(self.theta, self.step, cost, report))
        if watched:
            self.history[-1] = self.history[-1]._replace(loss=move.loss, multiplier=move.multiplier)
        still = float((move.theta - self.theta).abs().max()) < _STILL
        self.theta, self.step = move.theta, self.step + 1
        if still and isinstance(self.mover, Newton):
            self.stopped = "converged"

    def _watch(self, theta: Tensor, stage: str) -> Watched:
        seen = watch(
            self.problem,
            self.live,
            theta,
            self.trail[0][1] if self.trail else None,
            rows=self.rows,
            step=self.step,
            report=self._counter(stage, self.problem.watched_pieces),
        )
        return here().same(seen)

    def _merit(self, option: Option) -> float:
        """What a point is worth; lower is better."""
        within = self.problem.constraint.within if self.problem.constraint else None
        felt = [row.multiplier for row in self.history if row.multiplier < LARGEST]
        return merit(option.seen.value, option.seen.cost, within, max(felt, default=0.0))

    def _stale(self, patience: int) -> bool:
        """Whether the last `patience` evaluations brought nothing better.

        Under a constraint the first steps may leave it; a run has all its steps to come back.
        """
        merits = [self._merit(Option("", 0, 1.0, *point)) for point in self.trail]
        best = merits.index(min(merits))
        if best == 0 and self.problem.constraint is not None:
            return False
        return len(merits) - 1 - best >= patience

    def _counter(self, stage: str, total: int) -> Report | None:
        if self.progress is None and self.until == math.inf:
            return None
        done = 0

        def count(more: int) -> None:
            nonlocal done
            done += more
            if self.progress is not None:
                self.progress(stage, done, total)
            if self.history and time.perf_counter() > self.until:
                raise _TimeUpError

        return count

    def _keep(self) -> None:
        self.saved.save(
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
        state = self.saved.load()
        if state is None:
            return
        self.theta, self.step, self.stopped = state["theta"], state["step"], state["stopped"]
        self.history = [Step(*row) for row in state["history"]]
        self.trail = [(theta, Watched(*seen)) for theta, seen in state["trail"]]
        self.mover.restore(state["mover"])
