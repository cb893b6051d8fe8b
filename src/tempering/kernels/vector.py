"""Kernels of angles, and of correlated features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.errors import EnergyError, InputError
from tempering.kernels.base import Kernel, NoiseKernel, check_features
from tempering.kernels.distances import squared_distances, squared_excess
from tempering.kernels.hypotheses import (
    Hypotheses,
    Parameter,
    Prototypes,
    Signed,
    check_positive,
    in_dtype_of,
)


@dataclass(frozen=True, eq=False)
class Angular(NoiseKernel):
    """Angles: d_h(z) = kappa (1 - cos(angle between z and c_h)).

    On the line, z and the centres are angles in radians (von Mises noise), and the signed log
    odds are 2 kappa sin(z) sin(m). For prototypes the angle is that between the vectors (von
    Mises-Fisher noise): their lengths don't matter.

    Parameters
    ----------
    kappa: concentration; energy; > 0.
    """

    kappa: Parameter = 1.0

    def _check(self) -> None:
        super()._check()
        if isinstance(self.hypotheses, Signed):
            check_positive("m of Angular, an angle in radians,", self.hypotheses.m, below=torch.pi)

    def _noise(self, deviation: Tensor, *shapes: Tensor) -> Tensor:
        (kappa,) = shapes
        return 2 * kappa * torch.sin(deviation / 2).square()

    def _noise_odds(self, z: Tensor, m: Tensor, *shapes: Tensor) -> Tensor:
        (kappa,) = shapes
        return 2 * kappa * torch.sin(m) * torch.sin(z)

    def _vector_energies(self, z: Tensor, vectors: Tensor) -> Tensor:
        (kappa,) = self._shapes(z, 1)
        # 1 - cos = ||difference of unit vectors||^2 / 2, which keeps small angles.
        return kappa / 2 * squared_distances(_direction(z, "z"), _direction(vectors, "prototypes"))

    def _vector_excess(self, z: Tensor, vectors: Tensor) -> Tensor:
        (kappa,) = self._shapes(z, 1)
        return kappa / 2 * squared_excess(_direction(z, "z"), _direction(vectors, "prototypes"))

    def _on_line(self, x: Tensor) -> Tensor:
        # A centre subtracted from a large angle would be lost to rounding, and the phase with it.
        return torch.atan2(torch.sin(x), torch.cos(x))


@dataclass(frozen=True, eq=False)
class Mahalanobis(Kernel):
    """Gaussian noise with correlated features: d_h(z) = (z - c_h)' Sigma^-1 (z - c_h) / 2.

    Signed hypotheses are the vectors -m and +m, with log odds 2 m' Sigma^-1 z: the mean is
    tanh(m' Sigma^-1 z / T), the unit of logistic regression.

    Parameters
    ----------
    m: a vector [features], not 0; or Signed(vector, prior) or Prototypes(vectors, prior).
    covariance: Sigma, [features, features]; unit of z squared; symmetric positive definite.
    """

    covariance: Float[Tensor, "features features"] | None = None

    @property
    def takes_vectors(self) -> bool:
        return True

    def _check(self) -> None:
        if self.covariance is None:
            raise InputError(
                "Mahalanobis needs the covariance of the noise: Mahalanobis(m, covariance), with "
                "m [features] (or Prototypes) and covariance [features, features]"
            )
        features = _features(self.hypotheses)
        if self.covariance.shape != (features, features):
            raise InputError(
                f"the covariance has shape {list(self.covariance.shape)}; the hypotheses have "
                f"{features} features, so it must be [{features}, {features}]"
            )
        covariance = self.covariance.detach()
        lopsided = (covariance - covariance.mT).abs().max()
        if not bool(lopsided <= 1e-5 * covariance.abs().max()):
            raise InputError(
                f"the covariance is not symmetric: entries differ from their mirror by up to "
                f"{lopsided.item():.3g}. Give (C + C.T) / 2"
            )
        _, failed = torch.linalg.cholesky_ex(covariance)
        if bool(failed):
            raise InputError(
                f"the covariance is not positive definite (minor {int(failed)}); add some "
                "variance to its diagonal"
            )

    def _energies(self, z: Tensor) -> Tensor:
        if isinstance(self.hypotheses, Signed):
            m = in_dtype_of(self.hypotheses.m, z)
            centres = torch.stack([-m, m])
        else:
            centres = self.hypotheses.values(z)
        return squared_distances(*self._whitened_from(centres, z)) / 2

    def _excess(self, z: Tensor) -> Tensor:
        return squared_excess(*self._whitened_from(self.hypotheses.values(z), z)) / 2

    def _whitened_from(self, centres: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and centres, measured from the first centre: the origin may lie far off."""
        check_features(z, centres.shape[-1])
        return self._whitened(z - centres[0]), self._whitened(centres - centres[0])

    def _log_odds(self, z: Tensor, m: Tensor) -> Tensor:
        return 2 * self._whitened(z) @ self._whitened(m)

    def _whitened(self, z: Tensor) -> Tensor:
        if self.covariance is None:
            raise TypeError("checked when the kernel was made")
        check_features(z, len(self.covariance))
        root = torch.linalg.cholesky(in_dtype_of(self.covariance, z))
        flat = z.reshape(-1, z.shape[-1])
        return torch.linalg.solve_triangular(root, flat.mT, upper=False).mT.reshape(z.shape)


def _features(hypotheses: Hypotheses) -> int:
    if isinstance(hypotheses, Prototypes):
        return hypotheses.vectors.shape[1]
    m = hypotheses.m if isinstance(hypotheses, Signed) else None
    if torch.is_tensor(m) and m.ndim == 1 and bool((m != 0).any()):
        return len(m)
    given = f"m = {m}" if m is not None else type(hypotheses).__name__
    raise InputError(
        f"Mahalanobis compares vectors; got {given}. Give m as a tensor [features] that is not 0, "
        "or Prototypes(vectors); on the line use Gaussian"
    )


def _direction(vectors: Tensor, name: str) -> Tensor:
    size = vectors.detach().abs().amax(-1, keepdim=True)
    null = (size == 0).squeeze(-1).nonzero()
    if len(null):
        raise EnergyError(
            f"{name} at {null[0].tolist()} is the vector 0, which has no direction; the angular "
            "kernel needs vectors that are not 0"
        )
    # In units of the largest feature, whose square can't overflow, nor vanish.
    scaled = vectors / size
    return scaled / torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
