"""`tune`: temperatures that make a model better at something, learned with every weight frozen."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tempering.attention.examining.layout_of import layout
from tempering.attention.profiles.fingerprint import agree_on_model, fingerprint
from tempering.attention.tuning.adam import Adam
from tempering.attention.tuning.basis import Basis, make_basis, scale_basis
from tempering.attention.tuning.live_law import RULES, LawRange
from tempering.attention.tuning.live_temperatures import Bounds, LiveTemperatures, live_temperatures
from tempering.attention.tuning.method import Method
from tempering.attention.tuning.newton import Newton
from tempering.attention.tuning.objectives import Constraint, Objective
from tempering.attention.tuning.outcome import (
    INTERRUPTED,
    ConstraintError,
    HeldOut,
    Step,
    Tuned,
    guard,
)
from tempering.attention.tuning.problem import Problem, make_problem
from tempering.attention.tuning.run import Progress, Run
from tempering.attention.tuning.saved_run import SavedRun
from tempering.errors import ConvergenceWarning, InputError
from tempering.ranks import here

STEPS = {"newton": 8, "adam": 100}


def tune(
    model: nn.Module,
    objectives: Objective | Sequence[Objective],
    *,
    per: str | Basis = "head",
    constraint: Constraint | None = None,
    prior_sd: float | int = 0.5,
    bounds: Bounds = (0.2, 5.0),
    method: str = "newton",
    steps: int | None = None,
    held_out: float | int | Sequence[Objective] = 0.2,
    patience: int = 3,
    damping: float | int = 1.0,
    radius: float | int = 0.15,
    rate: float | int = 0.02,
    rows: int = 1,
    checkpoint: bool = False,
    output_scales: bool = False,
    rule: str | None = None,
    seed: int = 0,
    state: str | Path | None = None,
    until: float | None = None,
    on_step: Callable[[Step], None] | None = None,
    progress: Progress | None = None,
) -> Tuned:
    """Find the temperatures under which a model is better at what the objectives say.

        minimise  sum_k w_k L_k(theta) + |theta|^2 / (2 prior_sd^2 N)   under  c(theta) <= within

    with N targets learned from and log T = B theta (see `basis`). No weight changes, and none
    takes a gradient. Ctrl-C keeps the best point so far. The ranks of a run (`tempering.ranks`)
    share the pieces, to the result of one process.

    Parameters
    ----------
    model: a transformers model, on one device or several.
    objectives: from `from_text`, `from_pairs`, `from_functions`; several add up by their weights.
    per: one number for each head, layer, kv group, type of layer, or spline knot; or a Basis.
    constraint: what other data may lose, see `Constraint`.
    prior_sd: standard deviation of the Gaussian prior on each number, in log T. For text from few
        chunks .15 is better than the default (benchmarks/tuning_prior.py).
    bounds: of T, lowest < 1 < highest.
    method: "newton", a full pass a step (the first with one more backward pass for the curvature,
        and up to 8 where pieces are few or under a constraint; see `steps`); "adam", `rows` pieces
        of each objective a step.
    steps: at most; 8 Newton or 100 Adam steps without it.
    held_out: share of the pieces to judge by, or objectives to judge by; 0 judges by the
        calibration data.
    patience: stop after so many evaluations without a better one.
    damping, radius: of Newton steps; the largest change of a number in a step is `radius`.
    rate: of Adam, warmed up over a tenth of the steps and decaying to 0.
    rows: pieces of equal length that run side by side.
    checkpoint: run every layer again in the backward pass, for less memory.
    output_scales: learn factors on the outputs of heads as well, see `scale_basis`.
    rule: "power" learns two numbers in place of each one, log T(n) = a + b log(n / n0) for a query
        that sees n keys (see `live_law`); None learns constants.
    state: a file that keeps the run after every step; the same call goes on from it to the result
        of a run in one piece, or gives a finished run's result again.
    until: a time of `time.perf_counter()` at which the run ends, at the best point so far.
    on_step: called with each row of the history. progress: (stage, done, total).

    Raises
    ------
    DataError: too little data, or overlapping parts.
    ConstraintError: nothing within the constraint is better; it holds the trade-off.
    RefusedError: a loss that is not finite (it names the head and the step).
    RankError: ranks with other models, data or settings.

    Warns
    -----
    CollapseWarning: T at a bound, or support under its floor. ConvergenceWarning: nothing gained.
    """
    if until is not None and here().size > 1:
        raise InputError(
            "ranks have clocks of their own; a run that ends at a time takes one process"
        )
    numbers = {"prior_sd": prior_sd, "damping": damping, "radius": radius, "rate": rate}
    count = _check(method, steps, rows, patience, numbers)
    problem = make_problem(objectives, constraint, held_out, seed)
    plan = layout(model)
    basis = per if isinstance(per, Basis) else make_basis(model, plan, per)
    scales = scale_basis(plan) if output_scales else None
    law = None if rule is None else _law(rule, problem)
    settings: dict[str, Any] = {
        "model": fingerprint(model),
        "objectives": [(o.name, o.weight, o.digest) for o in problem.goals],
        "held-out data": [(o.name, o.weight, o.digest) for o in problem.watched_goals],
        "constraint": constraint
        and (constraint.kind, constraint.within, constraint.objective.digest),
        "basis": (basis.per, hashlib.sha256(basis.matrix.numpy().tobytes()).hexdigest()),
        **numbers,
        "bounds": bounds,
        **({"output scales": len(scales.names)} if scales else {}),
        **({"rule": (rule, law.length, law.longest)} if law else {}),
        "rows": rows,
        "patience": patience,
        "method": method,
        "steps": count,
        "seed": seed,
    }
    agree_on_model(model)
    here().agree(settings)
    prior = 1 / (float(prior_sd) ** 2 * problem.targets)
    with live_temperatures(
        model, basis, bounds, checkpoint=checkpoint, scales=scales, law=law
    ) as tempering:
        mover: Method
        if method == "newton":
            mover = Newton(
                problem,
                tempering,
                prior=prior,
                damping=float(damping),
                radius=float(radius),
                rows=rows,
                seed=seed,
            )
        else:
            mover = Adam(
                problem, tempering, prior=prior, rate=float(rate), steps=count, rows=rows, seed=seed
            )
        every = 1 if method == "newton" else max(1, count // 10)
        run = Run(problem, tempering, mover, SavedRun(state, settings), rows, progress, on_step)
        run.walk(count, every, patience, math.inf if until is None else until)
        tuned = _tuned(run, tempering, float(prior_sd), seed)
    if tuned.stopped_because == INTERRUPTED:
        return tuned
    if not tuned.met and constraint is not None:
        raise ConstraintError(tuned, constraint.within)
    if tuned.step == 0:
        warnings.warn(
            f"no step lowered the {tuned.watched} loss of {tuned.before:.4f}, so T is 1 "
            "everywhere; try more data, fewer numbers (per='layer'), a smaller prior_sd or a "
            "smaller radius",
            ConvergenceWarning,
            stacklevel=2,
        )
    return tuned


def _tuned(run: Run, tempering: LiveTemperatures, prior_sd: float, seed: int) -> Tuned:
    choice = run.choose()
    problem, start = run.problem, run.trail[0][1]
    profile = tempering.profile(choice.theta)
    held_out = []
    for goal, before, after in zip(
        problem.watched_goals, start.losses, choice.seen.losses, strict=True
    ):
        counts = torch.tensor([piece.count for piece in goal.pieces], dtype=torch.float64)
        held_out.append(HeldOut(goal.name, before, after, counts))
    collapse = None
    try:
        if run.stopped != INTERRUPTED:
            collapse = guard(tempering, choice.theta, problem.watched_goals, prior_sd)
    except KeyboardInterrupt:
        run.stopped = INTERRUPTED
    return Tuned(
        profile=profile,
        theta=choice.theta,
        names=tempering.names,
        history=tuple(run.history),
        step=choice.step,
        room=choice.room,
        watched=problem.watched,
        before=start.value,
        after=choice.seen.value,
        cost=choice.seen.cost,
        met=choice.met,
        held_out=tuple(held_out),
        trade_off=choice.points,
        stopped_because=run.stopped,
        targets=problem.targets,
        seed=seed,
        collapse=collapse,
    )


def _law(rule: str, problem: Problem) -> LawRange:
    """The lengths over which a rule is learned; InputError for another rule."""
    if rule not in RULES:
        raise InputError(f"the rules that can be learned are {', '.join(RULES)}; not '{rule}'")
    limits = [item for item in (problem.limit, problem.watched_limit) if item is not None]
    return LawRange.of(problem.goals, (*problem.watched_goals, *limits))


def _check(
    method: str, steps: int | None, rows: int, patience: int, numbers: dict[str, float | int]
) -> int:
    if method not in STEPS:
        raise InputError(f"temperatures are tuned by {' or '.join(STEPS)}, not by '{method}'")
    count = STEPS[method] if steps is None else steps
    for name, value in numbers.items():
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"{name} is a positive number, not {value:g}")
    if min(count, patience, rows) < 1:
        raise InputError(
            f"steps, patience and rows are at least 1; got {count}, {patience} and {rows}"
        )
    return count
