"""How to fit a temperature: prior, bounds, and how long to try."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from tempering.counts import whole_number
from tempering.errors import InputError

# float64 holds the inverse of these temperatures, and products of it with ordinary logits.
_LOWEST, _HIGHEST = 1e-300, 1e300
_LEAST_SD = 1e-100  # its inverse square is the prior's curvature


@dataclass(frozen=True)
class FitSettings:
    """prior: (mean, sd) of log T or None. bounds: of T. max_iter: most passes over all rows."""

    prior: tuple[float, float] | None
    bounds: tuple[float, float]
    max_iter: int

    @classmethod
    def checked(cls, prior: Any, bounds: Any, max_iter: Any) -> FitSettings:
        """Settings from what a user gave; InputError names the one that is out of range."""
        low, high = _two_numbers(bounds, "bounds", "(lowest, highest) T, 0 < lowest < highest")
        if not 0 < low < high:
            raise InputError(f"bounds = ({low:g}, {high:g}); expected 0 < lowest T < highest T")
        if low < _LOWEST or high > _HIGHEST:
            raise InputError(
                f"bounds = ({low:g}, {high:g}); expected temperatures from {_LOWEST:g} to "
                f"{_HIGHEST:g}, whose inverse float64 can hold"
            )
        if prior is not None:
            prior = _two_numbers(prior, "prior", "(mean, sd) of log T, sd above 0; or None")
            if prior[1] < _LEAST_SD:
                raise InputError(
                    f"prior = (mean, sd) of log T has sd = {prior[1]:g}; expected > 0, and no less "
                    f"than {_LEAST_SD:g}"
                )
        return cls(prior, (low, high), whole_number(max_iter, "max_iter", 1))

    def in_unit(self, unit: float) -> FitSettings:
        """The same settings for losses counted in this unit, a power of 4: a wider prior."""
        if self.prior is None or unit == 1:
            return self
        mean, sd = self.prior
        return replace(self, prior=(mean, sd * math.sqrt(unit)))

    @property
    def log_beta_bounds(self) -> tuple[float, float]:
        """Bounds of log beta = -log T."""
        return -math.log(self.bounds[1]), -math.log(self.bounds[0])

    @property
    def stiffness(self) -> float:
        """The second derivative of the prior's loss in log beta."""
        return 0.0 if self.prior is None else self.prior[1] ** -2

    def pull(
        self, log_beta: Float[np.ndarray, "blocks"]
    ) -> tuple[Float[np.ndarray, "blocks"], Float[np.ndarray, "blocks"], float]:
        """The prior's loss (log T - mean)^2 / (2 sd^2), its slope in log beta, its curvature."""
        if self.prior is None:
            return np.zeros_like(log_beta), np.zeros_like(log_beta), 0.0
        mean, sd = self.prior
        z = (log_beta + mean) / sd
        return z * z / 2, z / sd, self.stiffness


def _two_numbers(value: Any, name: str, expected: str) -> tuple[float, float]:
    try:
        first, second = (float(item) for item in value)
    except (TypeError, ValueError):
        first = second = math.nan
    if not (math.isfinite(first) and math.isfinite(second)):
        raise InputError(f"{name} = {value!r}; expected two finite numbers, {expected}")
    return first, second
