"""The plain alternatives to tuned temperatures, fitted to the same tokens."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tempering.attention.examining.layout_of import layout
from tempering.attention.layout import Layout
from tempering.attention.tuning.adam import Adam
from tempering.attention.tuning.adapted import output_temperature, query_biases, query_lora
from tempering.attention.tuning.adapted_scales import head_scales, norm_weights, together
from tempering.attention.tuning.basis import make_basis, uniform_basis
from tempering.attention.tuning.live_temperatures import live_temperatures
from tempering.attention.tuning.method import Method
from tempering.attention.tuning.newton import Newton
from tempering.attention.tuning.objectives import Constraint, Objective
from tempering.attention.tuning.outcome import INTERRUPTED
from tempering.attention.tuning.problem import Problem, make_problem
from tempering.attention.tuning.run import Progress, Run
from tempering.attention.tuning.saved_run import SavedRun
from tempering.attention.tuning.tunable import Tunable
from tempering.errors import InputError

ALTERNATIVES = ("output temperature", "uniform temperature", "biases of q", "LoRA rank 1 on q")
# What repair is compared with besides, each also together with temperatures.
T_RATE = 0.1  # of log T, beside any other's rate
SCALES = ("output scale of heads", "weights of norms")
WITH_TEMPERATURES = " and temperatures"
_EVERY = (*ALTERNATIVES, *SCALES, *(f"{n}{WITH_TEMPERATURES}" for n in (*ALTERNATIVES, *SCALES)))

# These have one number each, which Newton's method fits.
_ONE_NUMBER = ALTERNATIVES[:2]
# The standard deviation of the prior on log T, and the bounds of T: those of `tune`.
_PRIOR_SD, _BOUNDS = 0.5, (0.2, 5.0)
# All the data tell of one number, so its curvature is sure: steps are damped less, and may be
# longer, than those of `tune` for hundreds of numbers (1.0 and 0.15).
_DAMPING, _RADIUS = 0.1, 0.2

Opened = Callable[[], AbstractContextManager[Tunable]]


@dataclass(frozen=True, eq=False)
class Alternative:
    """One alternative, fitted.

    numbers: how many were learned. before, after: weighted watched loss, nats. cost: of the
    constraint, nats per token. met: within the constraint and better than nothing. passes: over
    the calibration data up to the chosen point. seconds: of the whole fit. rate: of Adam.
    """

    label: str
    numbers: int
    before: float
    after: float
    cost: float | None
    met: bool
    passes: float
    seconds: float
    rate: float | None
    opened: Opened
    theta: Tensor

    @contextlib.contextmanager
    def active(self) -> Iterator[Any]:
        """The model under this alternative, until the end."""
        with self.opened() as tunable:
            tunable.set(self.theta)
            yield tunable.model


def fit_alternatives(
    model: nn.Module,
    objectives: Objective | Sequence[Objective],
    *,
    which: Sequence[str] = ALTERNATIVES,
    constraint: Constraint | None = None,
    held_out: float | int | Sequence[Objective] = 0.2,
    passes: int = 8,
    rates: Sequence[float] = (3e-4, 1e-3, 3e-3),
    target: str = "q_proj",
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Alternative]:
    """Fit the alternatives to the same calibration data, judged by the same held-out data.

    Parameters
    ----------
    which: of `ALTERNATIVES` and `SCALES`, each also with `WITH_TEMPERATURES` at its end.
    objectives, constraint, held_out, seed: as for `tune`, so that the data are parted alike.
    passes: over the calibration data, at most. Biases and LoRA step after every piece (Adam); they
        are fitted at each of `rates`, `passes` passes each, and the best held-out one counts, so
        they get more than an equal budget.
    target: the linear layer that makes the queries.

    Raises RefusedError when there is no such layer; the model is left as it was.
    """
    unknown = [name for name in which if name not in _EVERY]
    if unknown:
        raise InputError(f"alternatives are {', '.join(_EVERY)}; not {', '.join(unknown)}")
    problem = make_problem(objectives, constraint, held_out, seed)
    plan = layout(model)
    uniform = uniform_basis(plan)
    alone: dict[str, Opened] = {
        "output temperature": lambda: output_temperature(model),
        "uniform temperature": lambda: live_temperatures(model, uniform, _BOUNDS, checkpoint=False),
        "biases of q": lambda: query_biases(model, target),
        "LoRA rank 1 on q": lambda: query_lora(model, target, seed),
        "output scale of heads": lambda: head_scales(model),
        "weights of norms": lambda: norm_weights(model),
    }

    def way_of(label: str, rate: float | None) -> Opened:
        name = label.removesuffix(WITH_TEMPERATURES)
        if name == label:
            return alone[name]
        return partial(_with_temperatures, model, plan, alone[name], rate or T_RATE)

    found = []
    for label in which:
        fits = [
            fit_alternative(label, way_of(label, rate), problem, passes, rate, seed, progress)
            for rate in ((None,) if label in _ONE_NUMBER else rates)
        ]
        within = [fit for fit in fits if fit.met] or fits
        found.append(min(within, key=lambda fit: fit.after))
    return found


def _with_temperatures(
    model: nn.Module, plan: Layout, alone: Opened, rate: float
) -> AbstractContextManager[Tunable]:
    """One of them and a temperature for each head, which learns at a rate of its own."""
    basis = make_basis(model, plan, "head")
    temperatures = live_temperatures(model, basis, _BOUNDS, checkpoint=False)
    return together(temperatures, alone(), units=(T_RATE / rate, 1.0))


def fit_alternative(
    label: str,
    opened: Opened,
    problem: Problem,
    passes: int,
    rate: float | None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Alternative:
    """Fit one tunable, of here or of one's own: `passes` over the data, by Adam at a rate.

    opened: gives the model with its numbers, until the end. rate: None for Newton's method.
    """
    start = time.monotonic()
    pieces = max(len(goal.pieces) for goal in problem.goals)
    with opened() as tunable, torch.enable_grad():
        method: Method
        if rate is None:
            method = Newton(
                problem,
                tunable,
                prior=1 / (_PRIOR_SD**2 * problem.targets),
                damping=_DAMPING,
                radius=_RADIUS,
                rows=1,
                seed=seed,
            )
            count, every = passes, 1
        else:
            count, every = passes * pieces, pieces
            method = Adam(problem, tunable, prior=0.0, rate=rate, steps=count, rows=1, seed=seed)
        named = None if progress is None else _under(progress, label)
        run = Run(problem, tunable, method, SavedRun(None, {}), 1, named, None)
        run.walk(count, every, patience=passes)
        if run.stopped == INTERRUPTED:
            raise KeyboardInterrupt
        choice = run.choose()
        if problem.constraint is not None and not choice.met:
            choice = choice._replace(theta=choice.theta * 0, seen=run.trail[0][1], step=0)
    return Alternative(
        label=label,
        numbers=tunable.size,
        before=run.trail[0][1].value,
        after=choice.seen.value,
        cost=choice.seen.cost,
        met=choice.met,
        passes=choice.step / every,
        seconds=time.monotonic() - start,
        rate=rate,
        opened=opened,
        theta=choice.theta,
    )


def _under(progress: Progress, label: str) -> Progress:
    return lambda stage, done, total: progress(f"{label}: {stage}", done, total)
