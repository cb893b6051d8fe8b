"""Learned temperatures: the parameter, its prior, and the check that reports collapse."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tempering.errors import CollapseWarning, EnergyError, SupportError, TemperatureError
from tempering.posterior import support
from tempering.temperature.base import Temperature, as_result, level_text
from tempering.tensors import TensorLike, as_tensor

_AT_BOUND = math.log(1.01)  # within 1 % of a bound counts as at it
# At support 1.05 two hypotheses have .99 and .01: the gradient r_h (1 - r_h) of the second is then
# 1/25 of its greatest value, and learning has nearly stopped.
_FLOOR = 1.05
# One standard deviation is T within .61 to 1.65. Temperatures learned per head on a 135M model lay
# within .67 to 1.68 (dev/LOG.md).
_PRIOR_SD = 0.5


@dataclass(frozen=True)
class LogNormalPrior:
    """A Gaussian prior on log T: mean (of log T, so 0 is T = 1) and standard deviation sd > 0."""

    mean: float | int = 0.0
    sd: float | int = _PRIOR_SD

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and 0 < self.sd < math.inf):
            raise TemperatureError(
                f"a prior on log T has a finite mean and 0 < sd < inf, "
                f"got mean {self.mean:g} and sd {self.sd:g}"
            )

    def penalty(self, log_temperature: Float[Tensor, "..."]) -> Float[Tensor, ""]:
        """-log prior, nats, constant dropped: the sum of (log T - mean)^2 / (2 sd^2) over units."""
        return ((log_temperature - self.mean).square() / (2 * self.sd**2)).sum()


_PRIOR = LogNormalPrior()


@dataclass(frozen=True)
class Collapse:
    """Positions of collapsed units: T at its lower or upper bound, or support under the floor."""

    cold: tuple[tuple[int, ...], ...]
    hot: tuple[tuple[int, ...], ...]
    thin: tuple[tuple[int, ...], ...]

    def __str__(self) -> str:
        named = (
            (self.cold, "T at its lower bound"),
            (self.hot, "T at its upper bound"),
            (self.thin, "support under its floor"),
        )
        return "; ".join(f"{what} {_places(units)}" for units, what in named if units)


class Learned(Temperature):
    """A temperature that is learned through its logarithm, within bounds, under a prior.

        log T = c + w tanh((x - c)/w),   c, w: the centre and half-width of the log bounds

    The parameter x is log T itself near the centre of the bounds, where the slope is 1, so that
    learning rates mean what they mean for log T; T can't leave the bounds, and no step is clamped.
    The bounds are in the state_dict (`limits`): the same x is another T under other bounds.
    Add `penalty()` to the loss (once per example that the loss sums over, or divided by their
    number where it averages), and call `check()` now and then.

    Parameters
    ----------
    initial: T at the start, strictly within the bounds.
    shape: one temperature for each unit, e.g. (layers, heads); () for one in all.
    bounds: lowest and highest T, 0 < lowest < highest, finite.
    prior: the prior on log T.
    support_floor: `check` reports a mean support under it.

    Raises
    ------
    TemperatureError: bounds or initial value that aren't as above, or an initial value so near
        its bound that x would be infinite; a state of other bounds, or one that is not finite.
    SupportError: a floor under 1.
    """

    def __init__(
        self,
        initial: float | int = 1.0,
        *,
        shape: tuple[int, ...] = (),
        bounds: tuple[float | int, float | int] = (0.05, 20.0),
        prior: LogNormalPrior = _PRIOR,
        support_floor: float | int = _FLOOR,
    ) -> None:
        super().__init__()
        low, high = bounds
        if not 0 < low < high < math.inf:
            raise TemperatureError(f"bounds are 0 < lowest < highest < inf, got {low:g}, {high:g}")
        if not low < initial < high:
            raise TemperatureError(
                f"a learned temperature starts strictly between its bounds {low:g} and {high:g}, "
                f"got {initial:g}; move the bounds"
            )
        if not support_floor >= 1:
            raise SupportError(f"a support floor is >= 1, got {support_floor:g}")
        self.bounds = (float(low), float(high))
        wide_dtypes = (torch.float32, torch.float64)
        self._ends = {dtype: _ends(*self.bounds, dtype) for dtype in wide_dtypes}
        logs = tuple(map(math.log, self.bounds))
        self._log_ends = {dtype: _ends(logs[0], logs[1], dtype) for dtype in wide_dtypes}
        self.prior = prior
        self.support_floor = float(support_floor)
        centre, width = self._centre_and_width()
        position = (math.log(initial) - centre) / width
        if not -1 < position < 1:
            raise TemperatureError(
                f"a learned temperature can't start at {initial:.17g}, which float64 can't tell "
                f"from its bound in log T, where nothing is learned; start further inside "
                f"{low:g} to {high:g}, or move the bounds"
            )
        start = centre + width * math.atanh(position)
        wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.unbounded = nn.Parameter(torch.full(shape, start, dtype=wide))
        self.register_buffer("limits", torch.tensor(self.bounds, dtype=torch.float64))

    @property
    def log_temperature(self) -> Tensor:
        """log T of each unit, within the log bounds; differentiable in the parameter."""
        centre, width = self._centre_and_width()
        level = centre + width * torch.tanh((self.unbounded - centre) / width)
        return _inside(level, self._log_ends[level.dtype])

    def penalty(self) -> Float[Tensor, ""]:
        """-log prior of log T in nats, summed over units, its constant dropped; differentiable."""
        return self.prior.penalty(self.log_temperature)

    def check(self, energies: TensorLike | None = None) -> Collapse | None:
        """The collapse guard: report units with T at a bound, or with too little support.

        Parameters
        ----------
        energies: hypotheses last, rows to which T broadcasts; with them the mean support of each
            unit over its rows is held against the floor.

        Returns
        -------
        The units whose T is within 1 % of a bound or whose support is under the floor, or None.

        Warns
        -----
        CollapseWarning: says the same, and what to try.
        """
        level = self.log_temperature.detach().double()
        low, high = map(math.log, self.bounds)
        collapse = Collapse(
            cold=_positions(level <= low + _AT_BOUND),
            hot=_positions(level >= high - _AT_BOUND),
            thin=()
            if energies is None
            else _positions(self._support(energies) < self.support_floor),
        )
        if not (collapse.cold or collapse.hot or collapse.thin):
            return None
        warnings.warn(
            f"a learned temperature collapsed: {collapse}; "
            f"try a prior with a smaller sd (now {self.prior.sd:g}), a larger weight on penalty(), "
            f"a smaller learning rate, or other bounds (now {self.bounds[0]:g} to "
            f"{self.bounds[1]:g})",
            CollapseWarning,
            stacklevel=2,
        )
        return collapse

    def _support(self, energies: TensorLike) -> Tensor:
        """Mean support of each unit over its rows."""
        energies = as_tensor(energies, "energies", EnergyError)
        rows = support(energies.detach(), self(energies).detach())
        units = self.unbounded.shape
        return rows.sum_to_size(units) * (max(self.unbounded.numel(), 1) / max(rows.numel(), 1))

    def _centre_and_width(self) -> tuple[float, float]:
        low, high = map(math.log, self.bounds)
        return (low + high) / 2, (high - low) / 2

    def _temperature(self, energies: Tensor | None, u: float | int | Tensor | None) -> Tensor:
        level = self.log_temperature.exp()
        level = level if energies is None else as_result(level, energies)
        return _inside(level, self._ends[level.dtype])

    def _check_state(self, state: Mapping[str, Tensor]) -> None:
        limits, parameter = state.get("limits"), state.get("unbounded")
        # A state that was converted to a narrower dtype is rounded to it.
        near = 0.0 if limits is None else 8 * torch.finfo(limits.dtype).eps
        if limits is not None and not all(
            math.isclose(saved, own, rel_tol=near)
            for saved, own in zip(limits.tolist(), self.bounds, strict=True)
        ):
            low, high = limits.tolist()
            raise TemperatureError(
                f"the state is of a learned temperature with bounds {low:g} to {high:g}, this one "
                f"has {self.bounds[0]:g} to {self.bounds[1]:g}, under which it would be another "
                "T; make the module with the bounds that were saved"
            )
        if parameter is not None and not bool(torch.isfinite(parameter).all()):
            where = _places(_positions(~torch.isfinite(parameter)))
            raise TemperatureError(
                f"the state of a learned temperature is not finite {where}; load an earlier one"
            )

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if f"{prefix}limits" not in state_dict and f"{prefix}unbounded" in state_dict:
            # States saved before 0.2 don't hold their bounds; this module's are assumed.
            state_dict = {**state_dict, f"{prefix}limits": self.limits}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        low, high = self.bounds
        return f"{level_text(self().detach())}, bounds=({low:g}, {high:g}), prior={self.prior}"


def _ends(low: float, high: float, dtype: torch.dtype) -> tuple[float, float]:
    """The least and the greatest number of a dtype that lie within low and high."""
    least, most = torch.tensor([low, high], dtype=torch.float64).to(dtype)
    up = torch.tensor(math.inf, dtype=dtype)
    if float(least) < low:
        least = torch.nextafter(least, up)
    if float(most) > high:
        most = torch.nextafter(most, -up)
    return float(least), float(most)


def _inside(values: Tensor, ends: tuple[float, float]) -> Tensor:
    """Values that rounding carried past a bound, put back on it; the gradient is unchanged."""
    inside = values.detach().clamp(*ends)
    return torch.where(torch.isfinite(values), values + (inside - values).detach(), inside)


def _positions(units: Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(place) for place in units.nonzero().tolist())


def _places(units: tuple[tuple[int, ...], ...]) -> str:
    if units == ((),):
        return "(the only unit)"
    more = f" and {len(units) - 3} more" if len(units) > 3 else ""
    return f"at {', '.join(str(list(place)) for place in units[:3])}{more}"
