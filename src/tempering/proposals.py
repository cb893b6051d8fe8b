"""The next point of a search whose score has no gradient, from the points tried so far (Optuna).

The sampler, a tree-structured Parzen estimator, is made anew for each proposal, with a seed of its
own. So a proposal is a function of the points before it, and a search that was stopped goes on to
the result of one in a piece.

Source: Bergstra et al. 2011, Algorithms for hyper-parameter optimization; Akiba et al. 2019,
Optuna.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from tempering.errors import MissingExtraError


class Axis(NamedTuple):
    """The range of one number; log: equal factors are equal steps; whole: whole numbers alone."""

    low: float
    high: float
    log: bool = False
    whole: bool = False


class Tried(NamedTuple):
    """A point and its score; higher is better."""

    point: tuple[float, ...]
    score: float


def proposal(tried: Sequence[Tried], axes: Sequence[Axis], seed: int) -> tuple[float, ...]:
    """The next point to try.

    Raises MissingExtraError when optuna is not installed.
    """
    optuna = need_optuna()
    space = {
        f"{i}": optuna.distributions.IntDistribution(int(axis.low), int(axis.high), log=axis.log)
        if axis.whole
        else optuna.distributions.FloatDistribution(axis.low, axis.high, log=axis.log)
        for i, axis in enumerate(axes)
    }
    with _quiet(optuna):
        sampler = optuna.samplers.TPESampler(seed=seed * 1_000_003 + len(tried))
        study = optuna.create_study(direction="maximize", sampler=sampler)
        for item in tried:
            params = {
                f"{i}": int(value) if axis.whole else value
                for i, (value, axis) in enumerate(zip(item.point, axes, strict=True))
            }
            study.add_trial(
                optuna.trial.create_trial(params=params, distributions=space, value=item.score)
            )
        asked = study.ask(space).params
    return tuple(float(asked[f"{i}"]) for i in range(len(axes)))


def need_optuna() -> Any:
    """The package; MissingExtraError where it is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise MissingExtraError("optuna", "tune") from error
    return optuna


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
