"""Sums of a mixture over chunks of rows that are not kept, for `partial_fit`."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from tempering.estimators.mixture.em import _EMPTY, Components, Family, expect
from tempering.estimators.mixture.rows import Rows


class Seen(NamedTuple):
    """What rows so far say of each component: masses, means, covariances without the ridge.

    Two of them add up exactly, by the rule for means and scatters of parts (Chan, Golub, LeVeque
    1979). Every row counts alike; early rows were shared out by earlier components.
    """

    mass: Tensor  # sum w r
    pulled: Tensor  # sum w r u
    means: Tensor  # from the origin
    covariances: Tensor

    @classmethod
    def of(cls, rows: Rows, components: Components, family: Family) -> Seen:
        """One E-step over the rows; components are measured from the rows' pivot."""
        sums = expect(rows, components, family)
        mass, pulled = sums.mass + _EMPTY, sums.pulled + _EMPTY
        factor = family.shape.factor(components.covariances, components.means)
        means, covariances = family.shape.update(
            sums.moments, pulled, mass, components.means, factor
        )
        return cls(mass, pulled, means + rows.pivot, covariances)

    def plus(self, other: Seen, family: Family) -> Seen:
        """Both parts as one."""
        mass, pulled = self.mass + other.mass, self.pulled + other.pulled
        gap = other.means - self.means
        means = self.means + (other.pulled / pulled).unsqueeze(1) * gap
        shape = family.shape
        both = (
            shape.wide(self.mass, self.covariances) * self.covariances
            + shape.wide(other.mass, other.covariances) * other.covariances
            + shape.outer(gap, self.pulled * other.pulled / pulled)
        )
        return Seen(mass, pulled, means, both / shape.wide(mass, both))

    def components(self, family: Family, pivot: Tensor) -> Components:
        """The M-step."""
        return Components(
            self.mass.log() - self.mass.sum().log(),
            self.means - pivot,
            family.shape.widen(self.covariances, family.ridge),
        )
