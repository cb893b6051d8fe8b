"""Radial kernels: densities of a component that depend on its Mahalanobis distance only."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.special import betaln
from torch import Tensor

# Below this squared distance the pull of the Laplace kernel, 1/m, stops growing: a mean that sits
# on a row would otherwise be held there for ever (Weiszfeld's problem).
_NEAREST = 1e-12


@dataclass(frozen=True)
class Radial(ABC):
    """A density exp(-energy(m^2)) |Sigma|^-1/2 / Z_D of x with m^2 = (x-mu)' Sigma^-1 (x-mu).

    EM needs three things of it: the energy, the constant log Z_D, and the pull
    u(m^2) = 2 d energy / d m^2, the weight of a row in the mean and the scatter. As the energies
    are concave in m^2, the M-step with weights r u raises the likelihood (iteratively reweighted
    least squares; Peel and McLachlan 2000 for Student-t).
    """

    @property
    def strongest(self) -> float:
        """The largest pull in one dimension: rounding in a square grows by it in the moments."""
        return 1.0

    @abstractmethod
    def energy(self, squared: Float[Tensor, "..."], features: int) -> Float[Tensor, "..."]:
        """Energy at squared distance m^2; 0 at the mean."""

    @abstractmethod
    def pull(self, squared: Float[Tensor, "..."], features: int) -> Float[Tensor, "..."] | None:
        """u(m^2); None where it is 1 everywhere."""

    @abstractmethod
    def far(
        self,
        mantissa: Float[Tensor, "components rows"],
        exponent: Int[Tensor, "components rows"],
        features: int,
    ) -> tuple[Float[Tensor, "components rows"], Float[Tensor, " rows"]]:
        """Energies at m = mantissa 2^exponent, above those of the nearest component, and these.

        For distances whose squares are beyond float64; what is beyond it is inf.
        """

    @abstractmethod
    def log_normaliser(self, features: int) -> float:
        """log of the integral of exp(-energy(|y|^2)) over y in R^D."""

    @abstractmethod
    def mixing(self, rows: np.ndarray, random: np.random.RandomState) -> np.ndarray:
        """Factors [n, 1] that make standard normal rows [n, D] a sample of the kernel."""


@dataclass(frozen=True)
class RadialGaussian(Radial):
    """energy = m^2 / 2."""

    def energy(self, squared: Tensor, features: int) -> Tensor:
        return squared / 2

    def pull(self, squared: Tensor, features: int) -> None:
        return None

    def far(self, mantissa: Tensor, exponent: Tensor, features: int) -> tuple[Tensor, Tensor]:
        m, least, unit = _nearest_first(mantissa, exponent)
        return _times(_times((m - least) * (m + least) / 2, unit), unit), least**2 / 2 * unit * unit

    def log_normaliser(self, features: int) -> float:
        return features / 2 * math.log(2 * math.pi)

    def mixing(self, rows: np.ndarray, random: np.random.RandomState) -> np.ndarray:
        return np.ones((len(rows), 1))


@dataclass(frozen=True)
class RadialLaplace(Radial):
    """energy = m: the elliptical Laplace kernel; on the line |x - mu| / b with b^2 = Sigma."""

    @property
    def strongest(self) -> float:
        return 1 / math.sqrt(_NEAREST)

    def energy(self, squared: Tensor, features: int) -> Tensor:
        return squared.sqrt()

    def pull(self, squared: Tensor, features: int) -> Tensor:
        return squared.clamp_min(_NEAREST).rsqrt()

    def far(self, mantissa: Tensor, exponent: Tensor, features: int) -> tuple[Tensor, Tensor]:
        m, least, unit = _nearest_first(mantissa, exponent)
        return _times(m - least, unit), least * unit

    def log_normaliser(self, features: int) -> float:
        # The surface 2 pi^(D/2) / Gamma(D/2) times the integral of m^(D-1) exp(-m), Gamma(D).
        half = features / 2
        return math.log(2) + half * math.log(math.pi) + math.lgamma(features) - math.lgamma(half)

    def mixing(self, rows: np.ndarray, random: np.random.RandomState) -> np.ndarray:
        # The radius is Gamma(D, 1); the direction is that of the normal row.
        radius = random.standard_gamma(rows.shape[1], size=(len(rows), 1))
        return radius / np.linalg.norm(rows, axis=1, keepdims=True)


@dataclass(frozen=True)
class RadialStudentT(Radial):
    """energy = (nu + D)/2 log(1 + m^2/nu), with nu degrees of freedom."""

    nu: float = 4.0

    @property
    def strongest(self) -> float:
        return 1 + 1 / self.nu  # in each column

    def energy(self, squared: Tensor, features: int) -> Tensor:
        return (self.nu + features) / 2 * torch.log1p(squared / self.nu)

    def pull(self, squared: Tensor, features: int) -> Tensor:
        return (self.nu + features) / (self.nu + squared)

    def far(self, mantissa: Tensor, exponent: Tensor, features: int) -> tuple[Tensor, Tensor]:
        log_square = 2 * (mantissa.log() + exponent.double() * math.log(2))
        log_ratio = log_square - math.log(self.nu)
        energy = (self.nu + features) / 2 * torch.logaddexp(torch.zeros_like(log_ratio), log_ratio)
        return energy - energy.amin(0), energy.amin(0)

    def log_normaliser(self, features: int) -> float:
        half = features / 2
        # lgamma(nu / 2) - lgamma(nu / 2 + half), which would cancel where nu is large.
        ratio = float(betaln(self.nu / 2, half)) - math.lgamma(half)
        return ratio + half * (math.log(self.nu) + math.log(math.pi))

    def mixing(self, rows: np.ndarray, random: np.random.RandomState) -> np.ndarray:
        return np.sqrt(self.nu / random.chisquare(self.nu, size=(len(rows), 1)))


KERNELS: dict[str, type[Radial]] = {
    "gaussian": RadialGaussian,
    "laplace": RadialLaplace,
    "student_t": RadialStudentT,
}


def radial(name: str, nu: float) -> Radial:
    """The kernel of that name; `nu` is for "student_t"."""
    return RadialStudentT(float(nu)) if name == "student_t" else KERNELS[name]()


def _nearest_first(mantissa: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(m in units of the nearest component's power of two, the least m, that power)."""
    least = exponent.amin(0)
    m = mantissa * torch.exp2((exponent - least).double())
    return m, m.amin(0), torch.exp2(least.double())


def _times(numbers: Tensor, factor: Tensor) -> Tensor:
    """The product, 0 where a number is 0 and its factor inf."""
    return torch.where(numbers == 0, numbers, numbers * factor)
