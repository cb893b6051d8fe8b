"""Whether the data determine a mixture: refusals, and warnings that say what to change."""

from __future__ import annotations

import math
import warnings

import torch

from tempering import errors
from tempering.errors import DataError
from tempering.estimators.mixture.covariance import SHAPES
from tempering.estimators.mixture.em import Components, Family, in_data_units
from tempering.estimators.mixture.reading import MEDIAN_ROWS, typical_spreads
from tempering.estimators.mixture.rows import Rows

_RIDGE = 0.1  # of the variance within components: a tenth is 5% of a deviation
# Components on rows that repeat have no variance but rounding, 1e-9 of the ridge at the most.
_REPEATED = 1e-9
_FINE = 1e-3  # of the square of a column's spread: clusters are seldom this much narrower


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
    large = family.ridge > _RIDGE * within
    if not bool(large.any()):
        return
    drawn = rows.sample(MEDIAN_ROWS)
    spread = typical_spreads(drawn.measured(drawn.values, torch.float64).abs(), drawn.weights)
    # A ridge above the square of a spread may leave no digit of the variances within.
    above = (family.ridge > spread.square()) & (spread > 0)
    # Components on rows that repeat have no variance but rounding; a ridge is what they need.
    told = (within > _REPEATED * family.ridge) & (family.ridge > _FINE * spread.square())
    small = large & (spread > 0) & (above | told)
    if not bool(small.any()):
        return
    column = int(small.nonzero()[0])
    square = rows.unit * rows.unit
    next_to = (
        f"the variance within components, {float(within[column]) * square:.3g} in column {column}"
        if bool(told[column])
        else f"the spread of column {column}, about {float(spread[column]) * rows.unit:.1g} squared"
    )
    warnings.warn(
        f"reg_covar = {family.ridge * rows.unit * rows.unit:.3g} is large next to {next_to}: it "
        "blurs clusters that the data may tell apart. Pass reg_covar=0, or scale X to a variance "
        "of about 1",
        errors.TemperingWarning,
        stacklevel=level + 1,
    )
