"""What a mixture is fitted to, and with which settings: checked, with the row or the name."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import numpy as np
import sklearn.exceptions
import torch
from jaxtyping import Bool, Float64
from sklearn.utils._param_validation import Interval, InvalidParameterError, StrOptions
from torch import Tensor

from tempering import errors
from tempering.errors import DataError, InputError, ScheduleError
from tempering.estimators.mixture.covariance import SHAPES
from tempering.estimators.mixture.em import Components, Family, in_data_units
from tempering.estimators.mixture.radial import KERNELS
from tempering.estimators.mixture.ranks import agreed, gathered
from tempering.estimators.mixture.rows import Rows
from tempering.schedules import Schedule, as_schedule
from tempering.tensors import from_numpy

# A schedule is read at as many temperatures as keep neighbours this far apart, or closer.
_STEP = math.log(1 / 0.9)
_FRAMED = 10_000  # rows whose medians are taken
_EXTREME = 1000  # units are 2^-1000..2^1000, so that their inverses are normal numbers too
_WIDE = 300  # a ridge up to 2^600 squared units is a number to reckon with
_FARTHEST = 1e120  # in units: squares of this, added up and weighted, are still float64
_RIDGE = 0.1  # of the variance within components: a tenth is 5% of a deviation
_REPEATED = 1e-9
_FINE = 1e-3  # of the square of a column's spread: clusters are seldom this much narrower
_COUNTABLE = 60  # weights up to 2^60 are added up as they are


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
    "nu": [Number(Real, 0, None, closed="neither")],
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


def rows_of(
    read: Callable[[], Tensor], sample_weight: Any, group: Any, ridge: float
) -> tuple[Rows, Bool[Tensor, " rows"]]:
    """Rows of weight above 0, and which those are; DataError names what can't be.

    read: gives this rank's rows, checked. ridge: the variance that will be added to covariances.
    """

    def local() -> tuple[Tensor, Tensor | None]:
        values = read()
        return values, _weights(sample_weight, values)

    values, weights = agreed(group, local)
    alive = torch.ones(len(values), dtype=torch.bool) if weights is None else weights > 0
    if weights is not None:
        weights = _bounded(weights, group)
    total = float(len(values) if weights is None else weights.sum())
    parts = gathered(group, (values.shape[1], total, int(alive.sum())))
    widths, totals, counts = zip(*parts)
    if len(set(widths)) > 1:
        raise DataError(f"the ranks' rows have {list(widths)} features; expected as many on each")
    if sum(totals) <= 0:
        raise DataError("every sample_weight is zero, so no row counts; give some rows a weight")
    if weights is not None:
        if not bool(alive.all()):
            values, weights = values[alive], weights[alive]
        # Weights count as numbers of rows. Those that average below 1 can't: they are enlarged.
        average = sum(totals) / sum(counts)
        weights = weights / average if average < 1 else weights
    rows = framed(values, weights, group, ridge)
    if rows.reach > _FARTHEST:
        raise DataError(_far_row(rows, alive))
    return rows, alive


def framed(values: Tensor, weights: Tensor | None, group: Any, ridge: float = 0.0) -> Rows:
    """Rows measured from the medians of the columns, in the power of two near their spread.

    Neither moves with a few rows far away, so these cost the others no digits; and as the unit is
    a power of two, a fit is the same in all units of the data but for their unit.
    """
    plain = Rows(values, weights, group, values.new_zeros(values.shape[1]).double())
    if plain.count == 0:
        return plain
    drawn = plain.sample(_FRAMED)
    sample = drawn.values.double()
    pivot = _medians(sample, drawn.weights)
    reached = values.abs().amax().double().view(1) if len(values) else plain.pivot.new_zeros(1)
    largest = float(plain.greatest(reached))
    if largest == 0:
        return Rows(values, weights, group, pivot)
    # A ridge far above all variances is the measure itself.
    least = math.frexp(math.sqrt(ridge))[1] - _WIDE if ridge > 0 else -_EXTREME
    apart = (sample / largest - pivot / largest).abs()
    spreads = _spreads(apart, drawn.weights)
    spread = float(spreads.amax())
    if spread == 0:
        gaps = (values.double() - pivot).abs()
        away = float(plain.greatest(gaps.amax().view(1) if len(values) else pivot.new_zeros(1)))
        if ridge > 0 and away == 0:  # of rows that all agree the ridge is the measure
            return Rows(values, weights, group, pivot, 2.0 ** math.frexp(math.sqrt(ridge))[1])
        spread = 1.0  # else the numbers themselves are
    exponent = math.frexp(spread)[1] + math.frexp(largest)[1] - 1
    exponent = min(max(exponent, least, -_EXTREME), _EXTREME)
    fine = (spreads > 0) & (spreads < spread / _FARTHEST)
    if ridge == 0 and bool(fine.any()):
        column = int(fine.nonzero()[0])
        raise DataError(
            f"column {column} of X spreads over about {float(spreads[column]) * largest:.1g} and "
            f"column {int(spreads.argmax())} over {spread * largest:.1g}: no float64 holds the "
            "squares of both. Scale the columns to similar spreads"
        )
    return Rows(values, weights, group, pivot, 2.0**exponent)


def _medians(values: Tensor, weights: Tensor) -> Tensor:
    """The weighted median of each column: a number of that column."""
    order = values.argsort(0)
    below = weights[order].cumsum(0)
    middle = (below >= below[-1] / 2).int().argmax(0)
    return values.gather(0, order.gather(0, middle.unsqueeze(0))).squeeze(0)


def _spreads(apart: Tensor, weights: Tensor) -> Tensor:
    """The median of each column's distances; the mean where more than half of them are 0."""
    middle = _medians(apart, weights)
    return torch.where(middle > 0, middle, weights @ apart / weights.sum())


def _bounded(weights: Tensor, group: Any) -> Tensor:
    """Weights scaled by a power of two where they are too large or too small to be added up."""
    largest = max(gathered(group, float(weights.max()) if len(weights) else 0.0))
    exponent = math.frexp(largest)[1]
    if abs(exponent) <= _COUNTABLE:
        return weights
    least = torch.finfo(torch.float64).tiny  # a row of a weight above 0 keeps one
    shift = (_COUNTABLE if exponent > 0 else 0) - exponent
    half = shift // 2  # 2^shift itself may be no number
    scaled = (weights * 2.0**half) * 2.0 ** (shift - half)
    return torch.where(weights > 0, scaled.clamp_min(least), weights)


def _far_row(rows: Rows, alive: Tensor) -> str:
    """What to say of a row whose squared distance is no number."""
    gaps = rows.measured(rows.values, torch.float64).abs()
    row, column = divmod(int(gaps.argmax()), rows.features)
    number = int(alive.nonzero()[row])
    return (
        f"row {number}, column {column} is {float(rows.values[row, column]):g}: it lies "
        f"{float(gaps[row, column]):.1g} times the typical spread of X, about {rows.unit:.1g}, "
        "from the median, and squares of that do not fit float64. Drop or clip that row, or scale "
        "that column"
    )


def array_rows(array: np.ndarray) -> Tensor:
    """An array [rows, features] as a tensor of the same memory, finite."""
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
    if count > 1 and (seen := _distinct(rows, count)) < count:
        raise DataError(
            f"n_components = {count}, but X has {seen} distinct row(s) of {rows.count}; "
            f"fit at most {seen} component(s)"
        )


def warn_of_few_rows(count: int, family: Family, rows: Rows, level: int) -> None:
    """Warn where a mixture has more free numbers than there are distinct rows.

    One component has one maximum, which its mean and scatter give, so it needs no warning.
    """
    free = family.parameters(count, rows.features)
    if count == 1 or (seen := _distinct(rows, free)) >= free:
        return
    kinds = {name: Family(kind(), family.kernel, 0.0) for name, kind in SHAPES.items()}
    numbers = {name: kind.parameters(count, rows.features) for name, kind in kinds.items()}
    fitting = [f"{name!r} ({number} numbers)" for name, number in numbers.items() if number <= seen]
    leaner = f"covariance_type = {' or '.join(fitting)}, " if fitting else ""
    warnings.warn(
        f"X has {seen} distinct row(s) for the {free} free numbers of {count} components with "
        f"covariance_type = {family.shape.name!r}: they do not determine a mixture. Components "
        "that shrink onto a few rows have a likelihood that only reg_covar bounds, and other "
        f"starts may find likelier ones. Use {leaner}fewer components, a larger reg_covar, or "
        "more rows",
        errors.TemperingWarning,
        stacklevel=level + 1,
    )


def _distinct(rows: Rows, enough: int) -> int:
    """The number of distinct rows; where that is `enough` or more, some number from there on."""
    size = max(1000, 10 * enough)
    while True:
        seen = len(torch.unique(rows.sample(size).values, dim=0))
        if seen >= enough or size >= rows.count:
            return seen
        size = min(rows.count, size * 100)


def check_fits(components: Components, family: Family, rows: Rows) -> Components:
    """The components in the data's units; DataError where a variance there is no float64."""
    made = in_data_units(components, rows)
    variances = family.shape.variances(made.covariances, rows.features)
    bad = ~((variances >= torch.finfo(torch.float64).tiny) & (variances < math.inf))
    if bool(bad.any()):
        block, column = bad.nonzero()[0].tolist()
        inside = family.shape.variances(components.covariances, rows.features)
        power = math.log10(float(inside[block, column])) + 2 * math.log10(rows.unit)
        raise DataError(
            f"the variance of component {block} in column {column} is about 1e{power:.0f}, outside "
            "the range of float64 (1e-308 to 1e308): X is spread over about "
            f"{rows.unit:.1g}. Divide X by that, and multiply the means by it"
        )
    return made


def warn_of_ridge(components: Components, family: Family, rows: Rows, level: int) -> None:
    """Warn where the ridge, not the data, makes the variances within components."""
    if family.ridge == 0:
        return
    inside = family.shape.variances(components.covariances, rows.features) - family.ridge
    mass = components.log_mass.exp() if len(inside) > 1 else inside.new_ones(1)
    within = (mass @ inside) / mass.sum()
    small = (family.ridge > _RIDGE * within) & (within > _REPEATED * family.ridge)
    if bool(small.any()):
        # Components on rows that repeat have no variance but rounding; a ridge is what they need.
        drawn = rows.sample(_FRAMED)
        spread = _spreads(drawn.measured(drawn.values, torch.float64).abs(), drawn.weights)
        small = small & (family.ridge > _FINE * spread.square()) & (spread > 0)
    if bool(small.any()):
        column = int(small.nonzero()[0])
        square = rows.unit * rows.unit
        warnings.warn(
            f"reg_covar = {family.ridge * square:.3g} is large next to the variance within "
            f"components, {float(within[column]) * square:.3g} in column {column}: it blurs "
            "clusters that the data may tell apart. Pass reg_covar=0, or scale X to a variance of "
            "about 1",
            errors.TemperingWarning,
            stacklevel=level + 1,
        )


def as_numbers(
    given: Any, device: torch.device, name: str, expected: str
) -> Float64[Tensor, "..."]:
    """A tensor, or what numpy reads as an array of numbers; DataError for anything else."""
    if isinstance(given, Tensor):
        return given.detach().to(device, torch.float64)
    try:
        return from_numpy(np.asarray(given, dtype=np.float64)).to(device)
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
