"""The settings of a mixture, with their constraints, and its warnings."""

from __future__ import annotations

import math
import warnings
from numbers import Integral, Real
from typing import Any

import numpy as np
import sklearn.exceptions
import torch
from sklearn.utils._param_validation import Interval, InvalidParameterError, StrOptions

from tempering import errors
from tempering.errors import InputError, ScheduleError
from tempering.estimators.mixture.covariance import SHAPES
from tempering.estimators.mixture.radial import KERNELS
from tempering.schedules import Schedule, as_schedule

# A schedule is read at so many temperatures that neighbours differ by 10% at most, which is the
# step of `anneal.COOLING`.
_STEP = math.log(1 / 0.9)


class MixtureConvergenceWarning(errors.ConvergenceWarning, sklearn.exceptions.ConvergenceWarning):
    """A mixture that stopped before it converged; both libraries' filters know it."""


class ParameterError(InputError, InvalidParameterError):
    """A setting out of its constraints; scikit-learn's error too."""


class Number(Interval):
    """An interval of numbers that takes no True or False."""

    def is_satisfied_by(self, value: Any) -> bool:
        return not isinstance(value, bool | np.bool_) and super().is_satisfied_by(value)


CONSTRAINTS: dict[str, list[Any]] = {
    "n_components": [Number(Integral, 1, None, closed="left")],
    "covariance_type": [StrOptions(set(SHAPES))],
    "kernel": [StrOptions(set(KERNELS))],
    "nu": [Number(Real, 1e-300, None, closed="left")],
    "schedule": [str, Schedule],
    "criterion": [StrOptions({"bic", "held-out"}), None],
    "means_init": ["array-like", None],
    "reg_covar": [Number(Real, 0, None, closed="left")],
    "tol": [Number(Real, 0, None, closed="neither")],
    "max_iter": [Number(Integral, 1, None, closed="left")],
    "n_init": [Number(Integral, 1, None, closed="left")],
    "random_state": ["random_state"],
    "distributed": ["boolean"],
}


def check_parameters(estimator: Any) -> None:
    """ParameterError, in scikit-learn's words, for a setting out of its constraints."""
    try:
        estimator._validate_params()
    except InvalidParameterError as error:
        raise ParameterError(str(error)) from None


def whole(value: Any, name: str, expected: str) -> int:
    """A whole number, 1 or more."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise InputError(f"{name} = {value!r}; expected {expected}, a whole number, 1 or more")
    return int(value)


def temperatures_of(schedule: Any) -> list[float] | None:
    """The temperatures of a schedule, read on a clock fine enough; None for "adaptive"."""
    if isinstance(schedule, str) and schedule == "adaptive":
        return None
    pattern = as_schedule(schedule)
    fine = pattern.sample(max(1000, 2 * pattern.stages))
    if not bool(torch.isfinite(fine).all()) or not bool((fine > 0).all()):
        raise ScheduleError(
            f"{pattern} has temperatures outside 0 < T < inf; a mixture is annealed at finite "
            "temperatures above 0"
        )
    way = float(fine.log().diff().abs().sum())
    values = pattern.sample(max(2 * pattern.stages, 1 + math.ceil(way / _STEP))).tolist()
    if values[-1] != 1:
        raise ScheduleError(
            f"{pattern} ends at {values[-1]:g}; annealing ends at T = 1, where it is ordinary EM"
        )
    return values


def warn(message: str, level: int) -> None:
    """A MixtureConvergenceWarning, pointed at the caller `level` frames up."""
    warnings.warn(message, MixtureConvergenceWarning, stacklevel=level + 1)
