"""The rows of a fit as they are given: checked, weighted, and measured from their medians."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from tempering.errors import DataError
from tempering.estimators.mixture.ranks import agreed, gathered
from tempering.estimators.mixture.rows import Rows
from tempering.tensors import from_numpy, refuse_masked

MEDIAN_ROWS = 10_000  # rows whose medians are taken
_EXTREME = 1000  # units are 2^-1000..2^1000, so that their inverses are normal numbers too
# A unit is at least 2^-300 of the ridge's deviation: the ridge is then below 2^600 squared units.
_WIDE = 300
_FARTHEST = 1e120  # in units: squares of this, added up and weighted, are still float64
_COUNTABLE = 60  # weights up to 2^60 are added up as they are


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
    given = float(len(values) if weights is None else weights.sum())
    if weights is not None:
        weights = _bounded(weights, group)
    total = float(len(values) if weights is None else weights.sum())
    parts = gathered(group, (values.shape[1], total, int(alive.sum()), given))
    widths, totals, counts, givens = zip(*parts)
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
    rows.given = sum(givens)
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
    drawn = plain.sample(MEDIAN_ROWS)
    sample = drawn.values.double()
    pivot = _medians(sample, drawn.weights)
    reached = values.abs().amax().double().view(1) if len(values) else plain.pivot.new_zeros(1)
    largest = float(plain.greatest(reached))
    if largest == 0:
        return Rows(values, weights, group, pivot)
    # A ridge far above all variances is the measure itself.
    least = math.frexp(math.sqrt(ridge))[1] - _WIDE if ridge > 0 else -_EXTREME
    apart = (sample / largest - pivot / largest).abs()
    spreads = typical_spreads(apart, drawn.weights)
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


def typical_spreads(apart: Tensor, weights: Tensor) -> Tensor:
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


def as_numbers(
    given: Any, device: torch.device, name: str, expected: str
) -> Float64[Tensor, "..."]:
    """A tensor, or what numpy reads as an array of numbers; DataError for anything else."""
    if isinstance(given, Tensor):
        return given.detach().to(device, torch.float64)
    refuse_masked(given, name, DataError)
    try:
        return from_numpy(np.asarray(given, dtype=np.float64)).to(device)
    except (TypeError, ValueError):
        raise DataError(f"{name} can't be read as numbers; give {expected}") from None
