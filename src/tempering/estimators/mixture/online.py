"""Sums of a mixture over chunks of rows that are not kept, for `partial_fit`."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from tempering.errors import DataError
from tempering.estimators.mixture.em import _EMPTY, Components, Family, expect, in_data_units
from tempering.estimators.mixture.rows import Rows


class RunningSums(NamedTuple):
    """Of all rows seen, for each component: masses, means, covariances without the ridge.

    Those of two parts of the rows add up exactly, by the rule for means and scatters (Chan, Golub,
    LeVeque 1979). Every row counts alike; a row keeps the responsibilities of the mixture that it
    was shown to.
    """

    mass: Tensor  # sum w r
    pulled: Tensor  # sum w r u
    means: Tensor  # from the origin, like the covariances in the data's units
    covariances: Tensor

    @classmethod
    def of(cls, rows: Rows, components: Components, family: Family) -> RunningSums:
        """One E-step over the rows; components are as the rows are measured."""
        sums = expect(rows, components, family)
        mass, pulled = sums.mass + _EMPTY, sums.pulled + _EMPTY
        share = rows.given / rows.total  # chunks count by their weights as given
        if not math.ulp(0.0) < share < math.inf:
            raise DataError(
                f"the weights of this chunk add up to {rows.given:g}, which can't be added to "
                "those of other chunks; scale the weights of all of them"
            )
        factor = family.shape.factor(components.covariances, components.means)
        means, covariances = sums.shape.update(sums.moments, pulled, mass, components.means, factor)
        made = in_data_units(Components(mass.log(), means, covariances), rows)
        return cls(mass * share, pulled * share, made.means, made.covariances)

    def plus(self, other: RunningSums, family: Family) -> RunningSums:
        """Both parts as one."""
        mass, pulled = self.mass + other.mass, self.pulled + other.pulled
        gap = other.means - self.means
        means = self.means + (other.pulled / pulled).unsqueeze(1) * gap
        shape = family.shape
        total = shape.wide(mass, self.covariances)
        both = (
            shape.wide(self.mass, self.covariances) / total * self.covariances
            + shape.wide(other.mass, other.covariances) / total * other.covariances
            + shape.outer(gap, self.pulled * other.pulled / pulled) / total
        )
        return RunningSums(mass, pulled, means, both)

    def components(self, family: Family) -> Components:
        """The M-step, in the data's units."""
        return Components(
            self.mass.log() - self.mass.sum().log(),
            self.means,
            family.shape.widen(self.covariances, family.ridge),
        )
