"""`search`: temperatures for a score that has no gradient, such as accuracy or a judge's verdict.

Optuna's tree-structured Parzen estimator proposes a few numbers theta (per type of layer, per
spline knot, or the amplitudes of patterns), each within the log bounds; log T = B theta.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tempering.attention.examining.layout_of import layout
from tempering.attention.profiles.fingerprint import fingerprint
from tempering.attention.profiles.profile import Profile
from tempering.attention.tuning.basis import Basis, make_basis
from tempering.attention.tuning.live_temperatures import Bounds, LiveTemperatures, live_temperatures
from tempering.attention.tuning.outcome import INTERRUPTED
from tempering.attention.tuning.saved_run import SavedRun
from tempering.errors import ConvergenceWarning, InputError, RefusedError
from tempering.proposals import Axis, Tried, need_optuna, proposal

Score = Callable[[Any], float]
# With more numbers, a sampler that learns one score a trial finds nothing.
_MOST = 24


class Trial(NamedTuple):
    """One point that was tried, and its score."""

    theta: tuple[float, ...]
    score: float


@dataclass(frozen=True, eq=False)
class Searched:
    """The best temperatures of a search.

    theta, names: the numbers and what each stands for. score, untempered: on the data searched
    over, of which the best is flattered by having been chosen. held_out: (untempered, best) on
    the held-out score, which is not. stopped_because: "all trials made" or "interrupted".
    """

    profile: Profile
    theta: Tensor
    names: tuple[str, ...]
    trials: tuple[Trial, ...]
    score: float
    untempered: float
    held_out: tuple[float, float] | None
    stopped_because: str
    seed: int


def search(
    model: nn.Module,
    score: Score,
    *,
    per: str | Basis = "spline",
    trials: int = 40,
    bounds: Bounds = (0.5, 2.0),
    held_out: Score | None = None,
    seed: int = 0,
    state: str | Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Searched:
    """Find temperatures with a high score, where the score has no gradient.

    Parameters
    ----------
    model: a transformers model; its weights stay as they are.
    score: takes the model, tempered, and returns a number; higher is better.
    per: "type", "layer", "kv", "head" or "spline" where these are at most 24 numbers, or a Basis
        (see `pattern_basis`).
    trials: points to try; the first is the untempered model.
    bounds: of T. seed: of the proposals.
    held_out: the same score on other data; run on the untempered model and on the best at the end.
    state: a file that keeps the trials; the same call goes on from it, to the result of a
        search in one piece.

    Raises
    ------
    MissingExtraError: optuna is not installed. InputError: too many numbers for a search.
    RefusedError: a score that is not finite; it names the trial and its temperatures.

    Warns
    -----
    ConvergenceWarning: no trial beat the untempered model.
    """
    need_optuna()
    plan = layout(model)
    basis = per if isinstance(per, Basis) else make_basis(model, plan, per)
    numbers = basis.matrix.shape[1]
    if numbers > _MOST:
        raise InputError(
            f"a search without gradients moves at most {_MOST} numbers, and per='{basis.per}' has "
            f"{numbers}; use per='spline' or 'type', a pattern_basis, or tune(...) with a loss"
        )
    if trials < 2:
        raise InputError(f"a search makes at least 2 trials, not {trials}")
    settings = {
        "model": fingerprint(model),
        "score": getattr(score, "__qualname__", type(score).__qualname__),
        "basis": (basis.per, hashlib.sha256(basis.matrix.numpy().tobytes()).hexdigest()),
        "bounds": bounds,
        "seed": seed,
    }
    saved = SavedRun(state, settings)
    made = [Trial(*item) for item in (saved.load() or {}).get("trials", [])]
    stopped = "all trials made"
    with live_temperatures(model, basis, bounds, checkpoint=False) as tempering, torch.no_grad():
        try:
            while len(made) < trials:
                theta = _proposal(made, numbers, bounds, seed)
                made.append(Trial(tuple(theta.tolist()), _scored(tempering, theta, score, made)))
                saved.save({"trials": [tuple(item) for item in made]})
                if progress is not None:
                    progress("search", len(made), trials)
            best = max(made, key=lambda item: item.score)
            pair = None
            if held_out is not None:
                zero = torch.zeros(numbers, dtype=torch.float64)
                pair = (
                    _scored(tempering, zero, held_out, made),
                    _scored(tempering, _vector(best), held_out, made),
                )
        except KeyboardInterrupt:
            if not made:
                raise
            stopped, pair, best = INTERRUPTED, None, max(made, key=lambda item: item.score)
        profile = tempering.profile(_vector(best))
    if stopped != INTERRUPTED and best.score <= made[0].score:
        warnings.warn(
            f"no trial scored above the untempered model's {made[0].score:g}, so T is 1 "
            "everywhere; try more trials, other numbers (per=...), or a score over more data",
            ConvergenceWarning,
            stacklevel=2,
        )
    return Searched(
        profile=profile,
        theta=_vector(best),
        names=basis.names,
        trials=tuple(made),
        score=best.score,
        untempered=made[0].score,
        held_out=pair,
        stopped_because=stopped,
        seed=seed,
    )


def _vector(trial: Trial) -> Tensor:
    return torch.tensor(trial.theta, dtype=torch.float64)


def _scored(
    tempering: LiveTemperatures, theta: Float[Tensor, "numbers"], score: Score, made: Any
) -> float:
    tempering.set(theta)
    value = float(score(tempering.model))
    if not math.isfinite(value):
        named = ", ".join(
            f"{name} {float(number.exp()):.3g}"
            for name, number in zip(tempering.basis.names, theta, strict=True)
        )
        raise RefusedError(
            f"trial {len(made)}: the score is {value:g} at T: {named}; "
            "return a finite number for every model, or narrow the bounds"
        )
    return value


def _proposal(made: list[Trial], numbers: int, bounds: Bounds, seed: int) -> Tensor:
    if not made:
        return torch.zeros(numbers, dtype=torch.float64)
    axes = [Axis(math.log(bounds[0]), math.log(bounds[1]))] * numbers
    tried = [Tried(item.theta, item.score) for item in made]
    return torch.tensor(proposal(tried, axes, seed), dtype=torch.float64)
