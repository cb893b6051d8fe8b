"""The four kinds of covariance: distances, additive moments, and what moments make of them.

One class a kind. Rows come in chunks x [rows, features], already measured from the pivot of the
data; rivals come first in every matrix, [components, rows], so that the posterior over them is
taken along contiguous memory. Parameters are small and stay float64; x sets the dtype of the work.

These classes measure every row from each component's own centre, so that neither the distance
between components nor their distance from the pivot costs digits. `expanded.py` holds quicker
classes for components that are wide enough for their distance from the pivot.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

# A squared pivot of a Cholesky factor is off by about eps of its column's variance, and the log
# density by half of the pivot's relative error: by more than 1e-3 nats where the squared pivot is
# below this part of the variance.
_ROUNDED = 500 * torch.finfo(torch.float64).eps

Moments = tuple[Tensor, ...]


class Factor(NamedTuple):
    """Covariances made ready for distances: y = (x - mu) whitener has covariance 1."""

    whitener: Tensor
    root: Tensor  # what undoes it: x - mu = y root
    log_det: Float64[Tensor, " components"]  # log |whitener|


class Shape(ABC):
    """A kind of covariance. `broken` says which covariances are not positive definite."""

    name: str

    @abstractmethod
    def factor(self, covariances: Tensor, means: Tensor) -> Factor: ...

    @abstractmethod
    def whiten(
        self, gaps: Float[Tensor, "components rows features"], factor: Factor
    ) -> Float[Tensor, "components rows features"]:
        """y of the gaps x - mu_k."""

    def distances(
        self, x: Float[Tensor, "rows features"], means: Tensor, factor: Factor
    ) -> tuple[Float[Tensor, "components rows"], Tensor]:
        """Squared Mahalanobis distances, and an intermediate that `moments` takes."""
        y = self.whiten(x - means.to(x.dtype).unsqueeze(1), factor)
        return torch.linalg.vector_norm(y, dim=-1).square_(), y

    def logits(
        self, x: Tensor, means: Tensor, factor: Factor, offset: Tensor, slope: float
    ) -> tuple[Float[Tensor, "components rows"], Tensor]:
        """offset + slope * squared distances, and the same intermediate."""
        squared, middle = self.distances(x, means, factor)
        return squared.mul_(slope).add_(offset.to(x.dtype).unsqueeze(1)), middle

    def moments(self, middle: Tensor, pulls: Float[Tensor, "components rows"]) -> Moments:
        """Sums over the rows of a chunk, weighted by w r u; they add up over chunks and ranks."""
        pulled = middle * pulls.unsqueeze(-1)
        return pulled.sum(1), self.second(pulled, middle)

    def pulled(self, moments: Moments, pulls: Float[Tensor, "components rows"]) -> Tensor:
        """Sum w r u of a chunk, whose moments are known."""
        return pulls.sum(1)

    @abstractmethod
    def second(self, pulled: Tensor, middle: Tensor) -> Tensor:
        """Second moments; pulled = y weighted by w r u, middle = y."""

    @abstractmethod
    def update(
        self, moments: Moments, pulled: Tensor, mass: Tensor, means: Tensor, factor: Factor
    ) -> tuple[Tensor, Tensor]:
        """Means and covariances from summed moments; pulled = sum w r u, mass = sum w r."""

    @abstractmethod
    def widen(self, covariances: Tensor, variance: float) -> Tensor:
        """Add `variance` to every diagonal."""

    @abstractmethod
    def from_full(self, full: Tensor, mass: Tensor) -> Tensor:
        """The covariances of this kind nearest (in likelihood) to full ones [K, D, D]."""

    @abstractmethod
    def to_full(self, covariances: Tensor, components: int, features: int) -> Tensor:
        """The same covariances as full matrices [K, D, D]."""

    @abstractmethod
    def variances(self, covariances: Tensor, features: int) -> Tensor:
        """The diagonals [blocks, D]: a row for each component, or one that all share."""

    @abstractmethod
    def parameters(self, components: int, features: int) -> int:
        """Free numbers in the covariances."""

    @abstractmethod
    def outer(self, gaps: Tensor, weights: Tensor) -> Tensor:
        """Scatter of gaps [K, D] between means, each with a weight."""

    def width(self, features: int) -> int:
        """Numbers of an intermediate for each row and component."""
        return features

    def wide(self, numbers: Tensor, covariances: Tensor) -> Tensor:
        """A number for each component, shaped to multiply covariances."""
        return numbers.view(-1, *[1] * (covariances.ndim - 1))

    def broken(self, covariances: Tensor) -> Bool[Tensor, " blocks"]:
        """Which covariances are not positive definite and finite."""
        return ~(torch.isfinite(covariances) & (covariances > 0)).view(len(covariances), -1).all(1)

    def pick(self, covariances: Tensor, index: list[int] | Tensor) -> Tensor:
        """The covariances of some components."""
        return covariances[index]


class Full(Shape):
    """Every component has a covariance of its own, [K, D, D]."""

    name = "full"

    def factor(self, covariances: Tensor, means: Tensor) -> Factor:
        root, whitener, log_det = _cholesky(covariances)
        return Factor(whitener, root, log_det)

    def whiten(self, gaps: Tensor, factor: Factor) -> Tensor:
        return gaps @ factor.whitener.to(gaps.dtype)

    def second(self, pulled: Tensor, middle: Tensor) -> Tensor:
        return pulled.mT @ middle

    def update(
        self, moments: Moments, pulled: Tensor, mass: Tensor, means: Tensor, factor: Factor
    ) -> tuple[Tensor, Tensor]:
        # In the coordinates of the old component, so nothing large cancels near convergence.
        first, second = moments
        shift = first / pulled.unsqueeze(-1)
        scatter = (second - first.unsqueeze(-1) * shift.unsqueeze(-2)) / mass[:, None, None]
        moved = means + (shift.unsqueeze(1) @ factor.root).squeeze(1)
        return moved, _symmetric(factor.root.mT @ scatter @ factor.root)

    def widen(self, covariances: Tensor, variance: float) -> Tensor:
        eye = torch.eye(covariances.shape[-1], dtype=covariances.dtype, device=covariances.device)
        return covariances + variance * eye

    def from_full(self, full: Tensor, mass: Tensor) -> Tensor:
        return full

    def to_full(self, covariances: Tensor, components: int, features: int) -> Tensor:
        return covariances

    def variances(self, covariances: Tensor, features: int) -> Tensor:
        return torch.diagonal(covariances, dim1=-2, dim2=-1)

    def parameters(self, components: int, features: int) -> int:
        return components * features * (features + 1) // 2

    def outer(self, gaps: Tensor, weights: Tensor) -> Tensor:
        return weights[:, None, None] * gaps.unsqueeze(2) * gaps.unsqueeze(1)

    def broken(self, covariances: Tensor) -> Tensor:
        return _not_definite(covariances)


class Tied(Shape):
    """All components share one covariance, [D, D]."""

    name = "tied"

    def factor(self, covariances: Tensor, means: Tensor) -> Factor:
        root, whitener, log_det = _cholesky(covariances)
        return Factor(whitener, root, log_det.expand(len(means)))

    def whiten(self, gaps: Tensor, factor: Factor) -> Tensor:
        return gaps @ factor.whitener.to(gaps.dtype)

    def second(self, pulled: Tensor, middle: Tensor) -> Tensor:
        return pulled.flatten(0, 1).mT @ middle.flatten(0, 1)

    def update(
        self, moments: Moments, pulled: Tensor, mass: Tensor, means: Tensor, factor: Factor
    ) -> tuple[Tensor, Tensor]:
        first, second = moments
        shift = first / pulled.unsqueeze(-1)
        scatter = (second - first.mT @ shift) / mass.sum()
        return means + shift @ factor.root, _symmetric(factor.root.mT @ scatter @ factor.root)

    def widen(self, covariances: Tensor, variance: float) -> Tensor:
        return Full().widen(covariances, variance)

    def from_full(self, full: Tensor, mass: Tensor) -> Tensor:
        return torch.einsum("k,kij->ij", mass / mass.sum(), full)

    def to_full(self, covariances: Tensor, components: int, features: int) -> Tensor:
        return covariances.expand(components, features, features)

    def variances(self, covariances: Tensor, features: int) -> Tensor:
        return torch.diagonal(covariances).unsqueeze(0)

    def parameters(self, components: int, features: int) -> int:
        return features * (features + 1) // 2

    def outer(self, gaps: Tensor, weights: Tensor) -> Tensor:
        return (weights.unsqueeze(1) * gaps).mT @ gaps

    def wide(self, numbers: Tensor, covariances: Tensor) -> Tensor:
        return numbers.sum()

    def broken(self, covariances: Tensor) -> Tensor:
        return _not_definite(covariances.unsqueeze(0))

    def pick(self, covariances: Tensor, index: list[int] | Tensor) -> Tensor:
        return covariances


class Diagonal(Shape):
    """Every component has variances of its own, [K, D], and no correlation."""

    name = "diag"

    def factor(self, covariances: Tensor, means: Tensor) -> Factor:
        root = covariances.sqrt()
        return Factor(1 / root, root, -root.log().sum(1))

    def whiten(self, gaps: Tensor, factor: Factor) -> Tensor:
        return gaps * factor.whitener.to(gaps.dtype).unsqueeze(1)

    def second(self, pulled: Tensor, middle: Tensor) -> Tensor:
        return (pulled * middle).sum(1)

    def update(
        self, moments: Moments, pulled: Tensor, mass: Tensor, means: Tensor, factor: Factor
    ) -> tuple[Tensor, Tensor]:
        first, second = moments
        shift = first / pulled.unsqueeze(1)
        # Not below 0 but by rounding, where all of a component's rows agree in a column.
        spread = ((second - first * shift) / mass.unsqueeze(1)).clamp_min(0)
        return means + shift * factor.root, spread * factor.root.square()

    def widen(self, covariances: Tensor, variance: float) -> Tensor:
        return covariances + variance

    def from_full(self, full: Tensor, mass: Tensor) -> Tensor:
        return torch.diagonal(full, dim1=-2, dim2=-1).clone()

    def to_full(self, covariances: Tensor, components: int, features: int) -> Tensor:
        return torch.diag_embed(covariances)

    def variances(self, covariances: Tensor, features: int) -> Tensor:
        return covariances

    def parameters(self, components: int, features: int) -> int:
        return components * features

    def outer(self, gaps: Tensor, weights: Tensor) -> Tensor:
        return weights.unsqueeze(1) * gaps.square()


class Spherical(Shape):
    """Every component has one variance, [K]."""

    name = "spherical"

    def factor(self, covariances: Tensor, means: Tensor) -> Factor:
        root = covariances.sqrt()
        return Factor(1 / root, root, -means.shape[1] * root.log())

    def whiten(self, gaps: Tensor, factor: Factor) -> Tensor:
        return gaps * factor.whitener.to(gaps.dtype)[:, None, None]

    def second(self, pulled: Tensor, middle: Tensor) -> Tensor:
        return (pulled * middle).sum((1, 2))

    def update(
        self, moments: Moments, pulled: Tensor, mass: Tensor, means: Tensor, factor: Factor
    ) -> tuple[Tensor, Tensor]:
        first, second = moments
        shift = first / pulled.unsqueeze(1)
        spread = (second - (first * shift).sum(1)) / (mass * means.shape[1])
        moved = means + shift * factor.root.unsqueeze(1)
        return moved, spread.clamp_min(0) * factor.root.square()

    def widen(self, covariances: Tensor, variance: float) -> Tensor:
        return covariances + variance

    def from_full(self, full: Tensor, mass: Tensor) -> Tensor:
        return torch.diagonal(full, dim1=-2, dim2=-1).mean(1)

    def to_full(self, covariances: Tensor, components: int, features: int) -> Tensor:
        eye = torch.eye(features, dtype=covariances.dtype, device=covariances.device)
        return covariances[:, None, None] * eye

    def variances(self, covariances: Tensor, features: int) -> Tensor:
        return covariances.unsqueeze(1).expand(-1, features)

    def parameters(self, components: int, features: int) -> int:
        return components

    def outer(self, gaps: Tensor, weights: Tensor) -> Tensor:
        return weights * gaps.square().mean(1)


SHAPES: dict[str, type[Shape]] = {shape.name: shape for shape in (Full, Tied, Diagonal, Spherical)}


def _cholesky(covariances: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(root, whitener, log |whitener|): covariance = root' root, whitener = root^-1."""
    lower = torch.linalg.cholesky(covariances)
    eye = torch.eye(covariances.shape[-1], dtype=covariances.dtype, device=covariances.device)
    inverse = torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)
    log_det = -torch.diagonal(lower, dim1=-2, dim2=-1).log().sum(-1)
    return lower.mT, inverse.mT.contiguous(), log_det


def _not_definite(covariances: Tensor) -> Tensor:
    """Not positive definite, or only by rounding: a column left with less than `_ROUNDED` of its
    variance once the columns before it are known, the square of a pivot over the variance."""
    factors, info = torch.linalg.cholesky_ex(covariances)
    pivots = torch.diagonal(factors, dim1=-2, dim2=-1)
    root = torch.diagonal(covariances, dim1=-2, dim2=-1).sqrt()
    apart = (pivots / root).square() > _ROUNDED  # False for NaN too
    return (info != 0) | ~torch.isfinite(factors).flatten(-2).all(-1) | ~apart.all(-1)


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2
