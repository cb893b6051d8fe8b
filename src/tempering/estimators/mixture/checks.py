"""What a mixture is fitted to, and with which settings: checked, with the row or the name."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import sklearn.exceptions
import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from tempering import errors
from tempering.errors import DataError, InputError, ScheduleError
from tempering.estimators.mixture.covariance import SHAPES
from tempering.estimators.mixture.em import Family
from tempering.estimators.mixture.radial import radial
from tempering.estimators.mixture.ranks import agreed, gathered
from tempering.estimators.mixture.rows import Rows
from tempering.schedules import Schedule, as_schedule
from tempering.tensors import from_numpy

# A schedule is read at as many temperatures as keep neighbours this far apart, or closer.
_STEP = math.log(1 / 0.9)


class MixtureConvergenceWarning(errors.ConvergenceWarning, sklearn.exceptions.ConvergenceWarning):
    """A mixture that stopped before it converged; both libraries' filters know it."""


def family_of(covariance_type: Any, kernel: Any, nu: Any, reg_covar: Any) -> Family:
    """Kind of covariance, kernel and ridge; InputError names the setting that can't be."""
    if not isinstance(covariance_type, str) or covariance_type not in SHAPES:
        raise InputError(
            f"covariance_type = {covariance_type!r}; expected one of {', '.join(SHAPES)}"
        )
    ridge = real(reg_covar, "reg_covar", "a variance, 0 or more", least=0.0)
    return Family(SHAPES[covariance_type](), radial(kernel, nu), ridge)


def whole(value: Any, name: str, expected: str) -> int:
    """A whole number, 1 or more."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise InputError(f"{name} = {value!r}; expected {expected}, a whole number, 1 or more")
    return int(value)


def real(value: Any, name: str, expected: str, least: float) -> float:
    """A finite number, `least` or more."""
    good = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not good or not math.isfinite(value) or value < least:
        raise InputError(f"{name} = {value!r}; expected {expected}")
    return float(value)


def temperatures_of(schedule: Any) -> list[float] | None:
    """The temperatures of a schedule, read on a clock fine enough; None for "adaptive"."""
    if isinstance(schedule, str) and schedule == "adaptive":
        return None
    if not isinstance(schedule, str | Schedule):
        raise InputError(
            f'schedule = {schedule!r}; expected "adaptive", or a schedule or its text, such as '
            '"geometric(50,1)"'
        )
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


def rows_of(
    read: Callable[[], Tensor], sample_weight: Any, group: Any
) -> tuple[Rows, Bool[Tensor, " rows"]]:
    """Rows of weight above 0, and which those are; DataError names what can't be.

    read: gives this rank's rows, checked.
    """

    def local() -> tuple[Tensor, Tensor | None]:
        values = read()
        return values, _weights(sample_weight, values)

    values, weights = agreed(group, local)
    alive = torch.ones(len(values), dtype=torch.bool) if weights is None else weights > 0
    total = float(len(values) if weights is None else weights.sum())
    parts = gathered(group, (values.shape[1], total, int(alive.sum())))
    widths, totals, counts = zip(*parts)
    if len(set(widths)) > 1:
        raise DataError(f"the ranks' rows have {list(widths)} features; expected as many on each")
    if sum(totals) <= 0:
        raise DataError("every sample_weight is zero, so no row counts; give some rows a weight")
    if weights is None:
        return Rows(values, None, group), alive
    if not bool(alive.all()):
        values, weights = values[alive], weights[alive]
    # Weights count as numbers of rows. Those that average below 1 can't: they are enlarged.
    average = sum(totals) / sum(counts)
    return Rows(values, weights / average if average < 1 else weights, group), alive


def array_rows(array: np.ndarray) -> Tensor:
    """An array [rows, features] as a tensor, of the same memory where torch can read it."""
    values = from_numpy(array)
    check_finite(values, "X")
    return values


def check_tensor(X: Tensor, least: int, name: str = "X") -> Tensor:
    """A tensor [rows, features] of float32 or float64; others are converted where exact."""
    if X.ndim != 2:
        raise DataError(
            f"Expected 2D array, got a tensor of shape {tuple(X.shape)} instead: {name} holds a "
            "row for each sample, [rows, features]. Reshape your data"
        )
    if X.is_complex():
        raise DataError(f"Complex data not supported: {name} is {X.dtype}")
    if X.dtype not in (torch.float32, torch.float64):
        X = X.to(torch.float32 if X.dtype in (torch.float16, torch.bfloat16) else torch.float64)
    if X.shape[0] < least or X.shape[1] < 1:
        raise DataError(
            f"{name} has {X.shape[0]} sample(s) and {X.shape[1]} feature(s); expected at least "
            f"{least} and 1"
        )
    check_finite(X, name)
    return X.detach()


def check_finite(values: Tensor, name: str) -> None:
    """DataError that names the row and column of the first NaN or inf."""
    for start in range(0, len(values), 2**16):
        bad = ~torch.isfinite(values[start : start + 2**16])
        if bool(bad.any()):
            row, column = bad.nonzero()[0].tolist()
            value = "NaN" if torch.isnan(values[start + row, column]) else "infinity"
            raise DataError(
                f"Input {name} contains {value}: row {start + row}, column {column}. Mend or drop "
                "that row"
            )


def check_distinct(rows: Rows, count: int) -> None:
    """DataError when there are fewer distinct rows than components."""
    if rows.group is None and len(rows.values) < count:
        raise DataError(
            f"n_components = {count} with n_samples = {len(rows.values)} row(s) of weight above "
            "0; a mixture needs at least as many rows as components: fit fewer components"
        )
    size = max(1000, 10 * count)
    while count > 1:
        seen = len(torch.unique(rows.sample(size).values, dim=0))
        if seen >= count:
            return
        if size >= rows.count:
            raise DataError(
                f"n_components = {count}, but X has {seen} distinct row(s) of {rows.count}; "
                f"fit at most {seen} component(s)"
            )
        size = min(rows.count, size * 100)


def as_numbers(
    given: Any, device: torch.device, name: str, expected: str
) -> Float64[Tensor, "..."]:
    """A tensor, or what numpy reads as an array of numbers; DataError for anything else."""
    if isinstance(given, Tensor):
        return given.detach().to(device, torch.float64)
    try:
        return torch.as_tensor(np.asarray(given, dtype=np.float64), device=device)
    except (TypeError, ValueError):
        raise DataError(f"{name} can't be read as numbers; give {expected}") from None


def warn(message: str, level: int) -> None:
    """A MixtureConvergenceWarning, pointed at the caller `level` frames up."""
    warnings.warn(message, MixtureConvergenceWarning, stacklevel=level + 1)


def _weights(given: Any, values: Tensor) -> Tensor | None:
    """Weights as numbers of rows, float64 on the rows' device."""
    if given is None:
        return None
    weights = as_numbers(given, values.device, "sample_weight", "one for each row")
    if weights.ndim == 0:
        weights = weights.expand(len(values))
    if weights.shape != (len(values),):
        raise DataError(
            f"sample_weight has shape {tuple(weights.shape)}; expected ({len(values)},), one for "
            "each row of X"
        )
    bad = ~(torch.isfinite(weights) & (weights >= 0))
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise DataError(
            f"sample_weight[{row}] is {float(weights[row]):g}; expected a finite weight, 0 or more"
        )
    return weights
