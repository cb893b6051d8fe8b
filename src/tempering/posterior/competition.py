"""Rows of energies at a temperature: checks of the input, and the sums behind every quantity.

Energies are measured from one minimiser of the row (`first`). The sums then have terms of one
sign, so small entropies keep their relative accuracy, and nothing overflows.
"""

from __future__ import annotations

import math
import numbers
from typing import NamedTuple

import torch
from torch import Tensor

from tempering.errors import EnergyError, InputError, TemperatureError
from tempering.tensors import TensorLike, as_tensor

Number = float | int | Tensor


class Competition(NamedTuple):
    """Rows of hypotheses at a temperature; the hypothesis axis is kept in every tensor.

    `heat` is T with 0 replaced by inf. At T = 0 only ties are alive, and their excess is 0:
    divided by inf it gives the exact limit, and a gradient of 0.
    """

    dim: int
    minimum: Tensor  # the energy of `first`
    first: Tensor  # bool: one minimiser in each row
    finite: Tensor  # bool: energies that are not +inf
    excess: Tensor  # energy - minimum; 0 where dead and at `first`
    temperature: Tensor
    heat: Tensor
    reduced: Tensor  # excess / heat
    weights: Tensor  # exp(-reduced); 0 where dead and at `first`, whose weight is 1
    others: Tensor  # the sum of `weights`, so Z = (1 + others) exp(-minimum/T)

    def responsibilities(self) -> Tensor:
        return torch.where(self.first, 1.0, self.weights) / (1.0 + self.others)

    def mean_excess(self) -> Tensor:
        # Shares before the sum: energies near the end of the dtype must not add up beyond it.
        return (self.weights / (1.0 + self.others) * self.excess).sum(self.dim, keepdim=True)

    def mean_reduced(self) -> Tensor:
        return (self.weights * self.reduced).sum(self.dim, keepdim=True) / (1.0 + self.others)

    def entropy(self) -> Tensor:
        return torch.log1p(self.others) + self.mean_reduced()

    def support(self) -> Tensor:
        # exp(S) as a product, without the logarithm of a count: ties and limits are exact.
        return (1.0 + self.others) * torch.exp(self.mean_reduced())

    def heat_capacity(self) -> Tensor:
        mean = self.mean_reduced()
        square = (self.weights * (self.reduced - mean).square()).sum(self.dim, keepdim=True)
        return (square + mean.square()) / (1.0 + self.others)

    def peak(self) -> Tensor:
        return 1.0 / (1.0 + self.others)

    def log_partition(self) -> Tensor:
        pole = torch.where(self.minimum == 0, 0.0, torch.sign(self.minimum.detach()) * math.inf)
        base = torch.where(self.temperature == 0, pole, self.minimum / self.heat)
        return torch.log1p(self.others) - base

    def free_energy(self) -> Tensor:
        hot = self.temperature == math.inf
        finite = torch.where(hot, 0.0, self.temperature)
        inside = self.minimum - finite * torch.log1p(self.others)
        # At the limits as U - T S, from which autograd finds dF/dd = r, and dF/dT = -S at T = 0.
        drop = torch.where(hot & (self.others > 0), math.inf, 0.0)
        limit = self.minimum + self.mean_excess() - finite * self.entropy() - drop
        return torch.where(hot | (self.temperature == 0), limit, inside)


def compete(energies: TensorLike, temperature: TensorLike, dim: int) -> Competition:
    """Check energies and temperature, and let the hypotheses along `dim` compete."""
    whole, dim = in_working_dtype(energies, dim)
    level = one_per_row(temperature, whole, dim, TemperatureError, "temperature").unsqueeze(dim)
    if not bool((level >= 0).all()):
        raise temperature_error(level.squeeze(dim))
    # argmin, not amin: the minimiser's own excess has to be 0 with gradient 0, also among ties.
    index = whole.detach().argmin(dim, keepdim=True)
    minimum = whole.gather(dim, index)
    check_energy_rows(whole, minimum, dim)
    first = torch.zeros_like(whole, dtype=torch.bool).scatter(dim, index, True)
    finite = whole < math.inf  # NaN and -inf are refused above
    # Beyond `horizon` temperatures exp underflows to exactly 0. Leaving such hypotheses out
    # changes no value, and keeps 0 * inf out of every gradient.
    kind = torch.finfo(whole.dtype)
    horizon = -math.log(kind.smallest_normal * kind.eps)
    excess = whole - minimum
    alive = finite & (excess <= horizon * level) & ~first
    heat = torch.where(level == 0, math.inf, level)
    excess = torch.where(alive, excess, 0.0)
    reduced = excess / heat
    weights = torch.where(alive, torch.exp(-reduced), 0.0)
    others = weights.sum(dim, keepdim=True)
    return Competition(dim, minimum, first, finite, excess, level, heat, reduced, weights, others)


def in_working_dtype(energies: TensorLike, dim: int) -> tuple[Tensor, int]:
    """Energies in the dtype of the work (float32 at least; integers exactly, in float64), and
    the hypothesis axis counted from the front."""
    energies = as_tensor(energies, "energies", EnergyError)
    if energies.is_complex() or energies.dtype == torch.bool:
        raise EnergyError(f"energies must be real numbers, got {energies.dtype}")
    if not -energies.dim() <= dim < energies.dim():
        raise EnergyError(
            f"energies of shape {tuple(energies.shape)} have no dimension {dim} for the "
            "hypotheses; give at least one dimension and name it with dim"
        )
    if energies.shape[dim] == 0:
        raise EnergyError(
            f"energies of shape {tuple(energies.shape)} have no hypotheses along dim {dim}; "
            "give at least one"
        )
    floating = energies.is_floating_point()
    dtype = torch.promote_types(energies.dtype, torch.float32) if floating else torch.float64
    return energies.to(dtype), dim % energies.dim()


def one_per_row(
    value: TensorLike, energies: Tensor, dim: int, error: type[InputError], name: str
) -> Tensor:
    """Numbers as one value for each row, in the energies' dtype and device."""
    shape = energies.shape[:dim] + energies.shape[dim + 1 :]
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        # In the dtype of the work at once: torch's default, float32, would make inf of 1e300.
        given = torch.tensor(float(value), dtype=energies.dtype)
    else:
        given = as_tensor(value, name, error)
    if given.is_complex() or given.dtype == torch.bool:
        raise error(f"{name} must be real, got {given.dtype}")
    try:
        # Not torch.broadcast_shapes, whose first call imports sympy (0.3 s).
        return given.to(energies).expand(shape)
    except RuntimeError:
        raise error(
            f"{name} of shape {tuple(given.shape)} doesn't broadcast to {tuple(shape)}, the shape "
            f"of the energies {tuple(energies.shape)} without their hypothesis dimension {dim}"
        ) from None


def check_energy_rows(energies: Tensor, minimum: Tensor, dim: int) -> None:
    """Raise EnergyError, with the position, for NaN, -inf, no finite energy, or overflow.

    `minimum` (hypothesis axis kept) is NaN, -inf or +inf in exactly the rows at fault.
    """
    if bool(torch.isfinite(minimum).all()):
        # d - min d overflows only if the minimum is at least half a spacing of the largest numbers.
        kind = torch.finfo(energies.dtype)
        if not bool((minimum < -kind.max * kind.eps / 8).any()):
            return
        over = torch.isinf(energies - minimum) & torch.isfinite(energies)
        if not bool(over.any()):
            return
        raise EnergyError(
            f"energies{first_position(over)} lies further from its row's minimum than "
            f"{energies.dtype} can hold; give float64, or +inf to rule a hypothesis out"
        )
    for bad, what, mend in (
        (torch.isnan(energies), "NaN", "find where it arises"),
        (energies == -math.inf, "-inf", "low energies win; to rule a hypothesis out give +inf"),
    ):
        if bool(bad.any()):
            raise EnergyError(
                f"energies{first_position(bad)} is {what} ({int(bad.sum())} in all); {mend}"
            )
    bad = (energies == math.inf).all(dim)
    raise EnergyError(
        f"row{first_position(bad)} has no finite energy along dim {dim} "
        f"({int(bad.sum())} such in all); leave at least one hypothesis possible"
    )


def temperature_error(temperature: Tensor, name: str = "temperature") -> TemperatureError:
    """The error for a negative or NaN temperature, with the first position."""
    bad = ~(temperature >= 0)
    where = first_position(bad) if temperature.dim() else ""
    return TemperatureError(
        f"{name}{where} is {temperature[bad][0].item():g} ({int(bad.sum())} in all); "
        "expected 0..inf, both limits included"
    )


def first_position(bad: Tensor) -> str:
    """The first position that holds, as an index: [2, 0, 5]."""
    return str([int(i) for i in bad.nonzero()[0]])
