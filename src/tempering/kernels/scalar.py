"""Kernels of independent noise: the energy of a deviation from the centre, feature by feature."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tempering.kernels.base import NoiseKernel
from tempering.kernels.distances import (
    above_least,
    distances,
    far_inputs,
    far_squared_excess,
    plain_distances,
    squared_distances,
    squared_excess,
)
from tempering.kernels.hypotheses import Parameter

# Beyond this ratio 1 + x^2 rounds to x^2, in float64 too.
_FAR = 1e9
_SHARP = 1 / _FAR


@dataclass(frozen=True, eq=False)
class Gaussian(NoiseKernel):
    """Gaussian noise: d_h(z) = ||z - c_h||^2 / (2 sigma^2).

    Signed log odds 2 m z/sigma^2, so the mean is tanh(m z/(sigma^2 T)). sigma^2 is a temperature.

    Parameters
    ----------
    sigma: standard deviation; unit of z; > 0.
    """

    sigma: Parameter = 1.0

    def _noise(self, deviation: Tensor, *shapes: Tensor) -> Tensor:
        (sigma,) = shapes
        return (deviation / sigma).square() / 2

    def _noise_odds(self, z: Tensor, m: Tensor, *shapes: Tensor) -> Tensor:
        (sigma,) = shapes
        return 2 * (m / sigma) * (z / sigma)

    def _vector_energies(self, z: Tensor, vectors: Tensor) -> Tensor:
        (sigma,) = self._shapes(z, 1)
        return squared_distances(z, vectors) / (2 * sigma.square())

    def _vector_excess(self, z: Tensor, vectors: Tensor) -> Tensor:
        (sigma,) = self._shapes(z, 1)
        return squared_excess(z, vectors) / (2 * sigma.square())


@dataclass(frozen=True, eq=False)
class Laplace(NoiseKernel):
    """Laplace noise: d_h(z) = |z - c_h|/b, summed over features.

    Signed log odds 2 clip(z, -m, m)/b, so the mean is a variant of hard tanh.

    Parameters
    ----------
    b: mean absolute deviation; unit of z; > 0.
    """

    b: Parameter = 1.0

    def _noise(self, deviation: Tensor, *shapes: Tensor) -> Tensor:
        (b,) = shapes
        return deviation.abs() / b

    def _noise_odds(self, z: Tensor, m: Tensor, *shapes: Tensor) -> Tensor:
        (b,) = shapes
        # As clip(z, -m, m), but with the slope in m also where m = 0.
        return 2 * torch.where(z.abs() <= m, z, torch.sign(z) * m) / b

    def _vector_energies(self, z: Tensor, vectors: Tensor) -> Tensor:
        (b,) = self._shapes(z, 1)
        return plain_distances(z, vectors, 1.0) / b

    def _vector_excess(self, z: Tensor, vectors: Tensor) -> Tensor:
        (b,) = self._shapes(z, 1)
        lengths = plain_distances(z, vectors, 1.0)
        far = far_inputs(lengths, vectors, 1.0)
        if not bool(far.any()):
            return above_least(lengths / b)
        return torch.where(
            far.unsqueeze(-1), super()._vector_excess(z, vectors), above_least(lengths / b)
        )


@dataclass(frozen=True, eq=False)
class StudentT(NoiseKernel):
    """Student-t noise: d_h(z) = (nu + D)/2 log(1 + ||z - c_h||^2/(nu sigma^2)), D features.

    D = 1 on the line. The log odds are not monotone: far from all centres no hypothesis explains z,
    and they return to 0.

    Parameters
    ----------
    sigma: width; unit of z; > 0.
    nu: degrees of freedom; > 0. nu -> inf is the Gaussian.
    """

    sigma: Parameter = 1.0
    nu: Parameter = 3.0

    def _noise(self, deviation: Tensor, *shapes: Tensor) -> Tensor:
        sigma, nu = shapes
        return (nu + 1) / 2 * _log1p_square(deviation, sigma * nu.sqrt())

    def _noise_odds(self, z: Tensor, m: Tensor, *shapes: Tensor) -> Tensor:
        sigma, nu = shapes
        # By symmetry computed from |z|, where the ratio under the logarithm is at least 1. With s
        # the smaller and l the larger of |z| and m, the ratio less 1 is 4 (s/l)/d^2, with
        # d^2 = nu (sigma/l)^2 + (1 - s/l)^2: made of ratios of lengths, which don't overflow.
        side = torch.where(z >= 0, 1.0, -1.0).to(z)
        far = side * z
        small, large = torch.minimum(far, m), torch.maximum(far, m)
        d = torch.hypot(nu.sqrt() * (sigma / large), (large - small) / large)
        share = 4 * (small / large)
        sharp = d < _SHARP
        blunt = torch.where(sharp, 1.0, d)
        keen = torch.where(sharp, d, 1.0)
        odds = torch.where(
            sharp,
            torch.log(torch.where(sharp, share, 1.0)) - 2 * torch.log(keen),
            torch.log1p(share / blunt.square()),
        )
        return side * (nu + 1) / 2 * odds

    def _vector_energies(self, z: Tensor, vectors: Tensor) -> Tensor:
        return self._of_lengths(z, distances(z, vectors), vectors.shape[-1])

    def _of_lengths(self, z: Tensor, lengths: Tensor, features: int) -> Tensor:
        sigma, nu = self._shapes(z, 1)
        return (nu + features) / 2 * _log1p_square(lengths, sigma * nu.sqrt())

    def _vector_excess(self, z: Tensor, vectors: Tensor) -> Tensor:
        lengths, features = distances(z, vectors), vectors.shape[-1]
        excess = above_least(self._of_lengths(z, lengths, features))
        far = far_inputs(lengths, vectors)
        if not bool(far.any()):
            return excess
        sigma, nu = (shape.expand(*z.shape[:-1], 1)[far] for shape in self._shapes(z, 1))
        # The ratio of 1 + d_h^2/w^2 to 1 + d_k^2/w^2, with w^2 = nu sigma^2, less 1.
        ratio = far_squared_excess(z[far], vectors, lengths[far], sigma * nu.sqrt())
        exact = (nu + features) / 2 * torch.log1p(ratio)
        return excess.index_put(far.nonzero(as_tuple=True), exact)


@dataclass(frozen=True, eq=False)
class Huber(NoiseKernel):
    """Huber's loss: d_h(z) = x^2/2 for |x| <= delta, else delta (|x| - delta/2); x = z - c_h.

    Summed over features. Its slope is clip(x, -delta, delta): outliers pull with bounded force.

    Parameters
    ----------
    delta: where the parabola turns into a line; unit of z; > 0.

    Source: Huber (1964), Robust estimation of a location parameter.
    """

    delta: Parameter = 1.0

    def _noise(self, deviation: Tensor, *shapes: Tensor) -> Tensor:
        (delta,) = shapes
        # c x - c^2/2 with c = clip(x) is both branches in one.
        clipped = torch.clamp(deviation, -delta, delta)
        return clipped * (deviation - clipped / 2)

    def _noise_odds(self, z: Tensor, m: Tensor, *shapes: Tensor) -> Tensor:
        (delta,) = shapes
        # By symmetry from |z|. The two deviations |z| + m and |z| - m lie in the parabola or on a
        # line each; every branch is written so that no digits cancel in it.
        side = torch.where(z >= 0, 1.0, -1.0).to(z)
        size = side * z
        inner = size - m
        wide = 2 * delta * m - (delta - inner).square() / 2
        narrow = 2 * m * size - (size - delta + m).square() / 2
        mixed = torch.where(m >= 2 * delta, wide, narrow)
        lines = 2 * delta * torch.minimum(size, m)
        odds = torch.where(inner.abs() > delta, lines, mixed)
        return side * torch.where(size + m <= delta, 2 * m * size, odds)


@dataclass(frozen=True, eq=False)
class PseudoHuber(NoiseKernel):
    """The smooth Huber loss: d_h(z) = delta^2 (sqrt(1 + (x/delta)^2) - 1); x = z - c_h.

    Summed over features.

    Parameters
    ----------
    delta: where the parabola turns towards a line; unit of z; > 0.

    Source: Charbonnier et al. (1997).
    """

    delta: Parameter = 1.0

    def _noise(self, deviation: Tensor, *shapes: Tensor) -> Tensor:
        (delta,) = shapes
        # x^2 / (sqrt(1 + (x/delta)^2) + 1): the same without cancellation near the centre.
        x = deviation / delta
        return deviation * (deviation / (_hypotenuse(x) + 1))

    def _noise_odds(self, z: Tensor, m: Tensor, *shapes: Tensor) -> Tensor:
        (delta,) = shapes
        roots = _hypotenuse((z + m) / delta) + _hypotenuse((z - m) / delta)
        return 4 * m * (z / roots)


@dataclass(frozen=True, eq=False)
class Logistic(NoiseKernel):
    """Logistic noise: d_h(z) = 2 log cosh((z - c_h)/(2 b)), summed over features.

    The negative log density of the logistic distribution, with 0 at the centre: a smooth Laplace.

    Parameters
    ----------
    b: width; unit of z; > 0.
    """

    b: Parameter = 1.0

    def _noise(self, deviation: Tensor, *shapes: Tensor) -> Tensor:
        (b,) = shapes
        return 2 * _log_cosh(deviation / (2 * b))

    def _noise_odds(self, z: Tensor, m: Tensor, *shapes: Tensor) -> Tensor:
        (b,) = shapes
        # 2 log[cosh(u + v)/cosh(u - v)], by symmetry from u >= 0, in the form that keeps its
        # digits: atanh(tanh u tanh v) for small odds, the linear part and a rest for large ones.
        side = torch.where(z >= 0, 1.0, -1.0).to(z)
        u, v = side * z / (2 * b), m / (2 * b)
        low, gap = torch.minimum(u, v), (u - v).abs()
        high = low + gap
        small = 2 * torch.atanh(torch.tanh(low.clamp(max=1.0)) * torch.tanh(high))
        large = 2 * low + torch.log1p(torch.expm1(-4 * low) * torch.sigmoid(-2 * gap))
        return 2 * side * torch.where(low < 1, small, large)


def _log1p_square(x: Tensor, unit: Tensor) -> Tensor:
    """log(1 + (x/unit)^2), also where the square overflows."""
    far = x.abs() > _FAR * unit
    size = torch.where(far, x.abs(), 1.0)
    near = torch.where(far, 0.0, x) / unit
    return torch.where(far, 2 * (torch.log(size) - torch.log(unit)), torch.log1p(near.square()))


def _hypotenuse(x: Tensor) -> Tensor:
    """sqrt(1 + x^2) without overflow."""
    return torch.hypot(x, torch.ones_like(x))


def _log_cosh(x: Tensor) -> Tensor:
    """log cosh x, also where cosh overflows; smooth at 0, where |x| is not."""
    # log(1 + 2 sinh(x/2)^2) has no cancellation near 0; past 10 it nears the line |x| - log 2.
    far = x.abs() > 10
    close = torch.where(far, 0.0, x)
    bulge = torch.log1p(2 * torch.sinh(close / 2).square())
    line = x.abs() - math.log(2) + torch.log1p(torch.exp(-2 * x.abs()))
    return torch.where(far, line, bulge)
