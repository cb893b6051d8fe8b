"""The kinds of covariance for components that are wide for their distance from the pivot.

With the squares multiplied out, |x - mu|^2 = |x|^2 - 2 x mu + |mu|^2, an E-step is one product of
matrices. That costs digits: terms as large as (reach / sigma)^2 cancel, with `reach` the largest
distance of a row from the pivot and sigma the least deviation of a component. `suited` says where
that is too much; there `covariance.py` measures from every component's own centre.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.estimators.mixture.covariance import (
    Diagonal,
    Factor,
    Full,
    Moments,
    Shape,
    Spherical,
    Tied,
    _symmetric,
)

# Rounding may move a log density by this many nats: a tenth of the default tolerance of a fit.
_ROUNDING = 1e-6


class WhitenedFull(Full):
    """Full covariances; rows are whitened before the centre is taken off: an error of first order
    in reach / sigma."""

    def distances(
        self, x: Float[Tensor, "rows features"], means: Tensor, factor: Factor
    ) -> tuple[Float[Tensor, "components rows"], Tensor]:
        whitener = factor.whitener.to(x.dtype)
        shift = (means.unsqueeze(1) @ factor.whitener).to(x.dtype)
        y = torch.baddbmm(shift, x.expand(len(means), *x.shape), whitener, beta=-1)
        return torch.linalg.vector_norm(y, dim=-1).square_(), y


class ExpandedTied(Tied):
    """One covariance for all, so rows are whitened once."""

    def width(self, features: int) -> int:
        return 1

    def distances(
        self, x: Float[Tensor, "rows features"], means: Tensor, factor: Factor
    ) -> tuple[Float[Tensor, "components rows"], Tensor]:
        z = x @ factor.whitener.to(x.dtype)
        centres = means @ factor.whitener
        squares = centres.square().sum(1, keepdim=True).to(x.dtype)
        cross = torch.addmm(squares, centres.to(x.dtype), z.mT, alpha=-2)
        return cross.add_(z.square().sum(1)).clamp_min_(0), z

    def moments(self, middle: Tensor, pulls: Tensor) -> Moments:
        return pulls @ middle, middle.mT @ (middle * pulls.sum(0).unsqueeze(1))

    def update(
        self, moments: Moments, pulled: Tensor, mass: Tensor, means: Tensor, factor: Factor
    ) -> tuple[Tensor, Tensor]:
        first, second = moments
        centres = first / pulled.unsqueeze(-1)
        scatter = (second - first.mT @ centres) / mass.sum()
        return centres @ factor.root, _symmetric(factor.root.mT @ scatter @ factor.root)


class _Linear(Shape):
    """|x - mu|^2 is linear in columns that the components share: 1, numbers and their products."""

    def width(self, features: int) -> int:
        return 1

    @abstractmethod
    def _expanded(self, x: Tensor, means: Tensor, factor: Factor) -> tuple[Tensor, Tensor]:
        """(coefficients [K, C], columns [C, N]) of the squared distances; the first column is 1."""

    def distances(self, x: Tensor, means: Tensor, factor: Factor) -> tuple[Tensor, Tensor]:
        # Rounding may leave a row on its mean a little below 0.
        squared, columns = self.logits(x, means, factor, means.new_zeros(len(means)), 1.0)
        return squared.clamp_min_(0), columns

    def logits(
        self, x: Tensor, means: Tensor, factor: Factor, offset: Tensor, slope: float
    ) -> tuple[Tensor, Tensor]:
        # One product of matrices, and no pass of its own for the offset and the slope.
        coefficients, columns = self._expanded(x, means, factor)
        coefficients = slope * coefficients
        coefficients[:, 0] += offset
        return coefficients.to(x.dtype) @ columns, columns

    def moments(self, middle: Tensor, pulls: Tensor) -> Moments:
        # This way round the product takes up to a third less time.
        return ((middle @ pulls.mT).mT,)

    def pulled(self, moments: Moments, pulls: Tensor) -> Tensor:
        return moments[0][:, 0]


class ExpandedFull(_Linear, Full):
    """Covariances of its own for each component; columns are x_i, and x_i x_j for i <= j."""

    def _expanded(self, x: Tensor, means: Tensor, factor: Factor) -> tuple[Tensor, Tensor]:
        precision = factor.whitener @ factor.whitener.mT
        pulled = (precision @ means.unsqueeze(2)).squeeze(2)
        first, second = _pairs(x.shape[1], x.device)
        weights = precision[:, first, second] * torch.where(first == second, 1.0, 2.0)
        squares = (pulled * means).sum(1, keepdim=True)
        return torch.cat([squares, -2 * pulled, weights], 1), _products(x)

    def moments(self, middle: Tensor, pulls: Tensor) -> Moments:
        # Covariances are small differences of these sums: float32's would cost them three digits.
        return ((middle.double() @ pulls.mT.double()).mT,)

    def update(
        self, moments: Moments, pulled: Tensor, mass: Tensor, means: Tensor, factor: Factor
    ) -> tuple[Tensor, Tensor]:
        features = means.shape[1]
        _, first, pairs = moments[0].tensor_split([1, 1 + features], 1)
        moved = first / pulled.unsqueeze(1)
        i, j = _pairs(features, means.device)
        second = means.new_empty(len(means), features, features)
        second[:, i, j] = second[:, j, i] = pairs
        return moved, (second - first.unsqueeze(2) * moved.unsqueeze(1)) / mass[:, None, None]


class ExpandedDiagonal(_Linear, Diagonal):
    """Variances of its own for each component."""

    def _expanded(self, x: Tensor, means: Tensor, factor: Factor) -> tuple[Tensor, Tensor]:
        precision = factor.whitener.square()
        squares = (precision * means.square()).sum(1, keepdim=True)
        columns = _begun(x, 1 + 2 * x.shape[1])
        own, squared = columns[1:].chunk(2)
        torch.mul(own, own, out=squared)  # along contiguous memory, as x itself is not
        return torch.cat([squares, -2 * precision * means, precision], 1), columns

    def update(
        self, moments: Moments, pulled: Tensor, mass: Tensor, means: Tensor, factor: Factor
    ) -> tuple[Tensor, Tensor]:
        first, second = moments[0][:, 1:].chunk(2, 1)
        moved = first / pulled.unsqueeze(1)
        return moved, ((second - first * moved) / mass.unsqueeze(1)).clamp_min(0)


class ExpandedSpherical(_Linear, Spherical):
    """One variance for each component."""

    def _expanded(self, x: Tensor, means: Tensor, factor: Factor) -> tuple[Tensor, Tensor]:
        precision = factor.whitener.square().unsqueeze(1)
        squares = (precision * means.square()).sum(1, keepdim=True)
        columns = _begun(x, 2 + x.shape[1])
        columns[-1] = x.square().sum(1)
        return torch.cat([squares, -2 * precision * means, precision], 1), columns

    def update(
        self, moments: Moments, pulled: Tensor, mass: Tensor, means: Tensor, factor: Factor
    ) -> tuple[Tensor, Tensor]:
        first, second = moments[0][:, 1:-1], moments[0][:, -1]
        moved = first / pulled.unsqueeze(1)
        spread = (second - (first * moved).sum(1)) / (mass * means.shape[1])
        return moved, spread.clamp_min(0)


_EXPANDED: dict[str, Shape] = {
    shape.name: shape
    for shape in (ExpandedFull(), ExpandedTied(), ExpandedDiagonal(), ExpandedSpherical())
}
_WHITENED = WhitenedFull()


def suited(shape: Shape, factor: Factor, reach: float, pull: float) -> Shape:
    """The quick class of that kind, or `shape` itself where rounding would show in float64.

    pull: the largest weight of a row in the moments.
    """
    largest = float(factor.whitener.abs().amax()) * reach
    rounding = torch.finfo(torch.float64).eps * largest
    whitened = shape.name == "full" and rounding < _ROUNDING
    # Products of columns are made once, whitened rows for each component.
    cheaper = not whitened or factor.whitener.shape[-1] <= 2 * len(factor.whitener)
    if cheaper and rounding * largest * max(pull, 1.0) < _ROUNDING:
        return _EXPANDED[shape.name]
    return _WHITENED if whitened else shape


def _pairs(features: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Places (i, j) of a symmetric matrix, i <= j, row by row."""
    i, j = torch.triu_indices(features, features, device=device)
    return i, j


def _begun(x: Float[Tensor, "rows features"], count: int) -> Float[Tensor, "columns rows"]:
    """So many columns of every row, along contiguous memory: 1 and x; the rest is to be filled."""
    columns = x.new_empty(count, len(x))
    columns[0] = 1
    columns[1 : 1 + x.shape[1]] = x.mT
    return columns


def _products(x: Float[Tensor, "rows features"]) -> Float[Tensor, "columns rows"]:
    """The columns 1, x_i, and x_i x_j for i <= j."""
    features = x.shape[1]
    start = 1 + features
    columns = _begun(x, start + features * (features + 1) // 2)
    own = columns[1:start]
    for i in range(features):
        stop = start + features - i
        torch.mul(own[i], own[i:], out=columns[start:stop])
        start = stop
    return columns
