"""The likelihood of an engine's log probabilities, given what the reference says they are.

    y = m(theta) + s e,    e ~ Student t with 5 degrees of freedom

y: the engine's log probabilities, m: the reference's, in nats; s: the engine's own noise, chosen
as the likelihood likes it best. Few tokens of low probability carry large errors, hence the t.
Errors of neighbours hang together: variances are taken over blocks of 16 tokens (the sandwich).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tempering.intervals import t_quantile

FREEDOM = 5.0
BLOCK = 16
# Right float32 engines differ by some 1e-5 nats: no scale is smaller, and no smaller difference is
# evidence.
SMALLEST = 1e-5
_ROUNDS = 100
_STEPS = 8  # Gauss-Newton takes 3 to 6 from T = 1 to T = 0.5
# Temperatures in float32 lose some 2^-23 a layer: at T = 0.5 a fit was off by 2.5e-6.
_EXACT = 5e-6
_FARTHEST = 0.5  # of log T in one step
_FAR = 0.05  # of log T, beyond which a Jacobian is formed anew
_LOG_CONSTANT = (
    math.lgamma((FREEDOM + 1) / 2) - math.lgamma(FREEDOM / 2) - 0.5 * math.log(FREEDOM * math.pi)
)


def scale_of(residuals: Float[Tensor, "targets"], least: float = SMALLEST) -> float:
    """The s of greatest likelihood, nats; at least `least`."""
    squares = residuals.double().square()
    s2 = max(float(squares.median()), least**2)
    for _ in range(_ROUNDS):
        new = float(((FREEDOM + 1) * squares / (FREEDOM + squares / s2)).mean())
        new = max(new, least**2)
        if abs(new - s2) <= 1e-9 * s2:
            break
        s2 = new
    return math.sqrt(s2)


def log_likelihoods(residuals: Float[Tensor, "targets"], scale: float) -> Float[Tensor, "targets"]:
    """log density of every residual, nats."""
    e = residuals.double() / scale
    kernel = torch.log1p(e.square() / FREEDOM) * (FREEDOM + 1) / 2
    return _LOG_CONSTANT - math.log(scale) - kernel


class Fitted(NamedTuple):
    """Numbers of greatest likelihood.

    theta: the numbers. variance: their covariance, by the sandwich over blocks. residuals: y - m
    at theta, nats. scale: s. value: log likelihood, nats. projection: [numbers, targets], what a
    small residual adds to theta.
    """

    theta: Tensor
    variance: Tensor
    residuals: Tensor
    scale: float
    value: float
    projection: Tensor


Model = Callable[[Tensor], Tensor]  # theta [rows, numbers] -> m [rows, targets]


def fit(
    y: Float[Tensor, "targets"],
    model: Model,
    start: Float[Tensor, "numbers"],
    blocks: Int[Tensor, "targets"],
    *,
    least: float = SMALLEST,
    step: float = 0.01,
    frozen: bool = False,
) -> Fitted:
    """The theta of greatest likelihood, by Gauss-Newton steps on a Jacobian of differences.

    least: of s. step: of the differences. frozen: one-sided differences, and a new Jacobian only
    where theta moved far: for many numbers.
    """
    theta = start.double().clone()
    predicted, jacobian = _linear(model, theta, step, frozen)
    residuals = y.double() - predicted
    scale = scale_of(residuals, least)
    value = float(log_likelihoods(residuals, scale).sum())
    formed = theta.clone()
    for _ in range(_STEPS):
        _, projection = _inverse(jacobian, residuals, scale)
        delta = projection @ residuals
        delta = delta * min(1.0, _FARTHEST / max(float(delta.abs().max()), 1e-30))
        better = False
        for _ in range(6):
            new = model((theta + delta)[None])[0].double()
            left = y.double() - new
            s = scale_of(left, least)
            found = float(log_likelihoods(left, s).sum())
            if found > value:
                better = True
                break
            delta = delta / 2
        if not better:
            break
        gained, theta = found - value, theta + delta
        residuals, scale, value = left, s, found
        if not frozen or float((theta - formed).abs().max()) > _FAR:
            _, jacobian = _linear(model, theta, step, frozen)
            formed = theta.clone()
        if gained < 1e-3:
            break
    inverse, projection = _inverse(jacobian, residuals, scale)
    # Differences below `least` are no evidence, however alike the two are.
    variance = sandwich(jacobian, residuals, scale, blocks, inverse) + least**2 * inverse
    return Fitted(theta, variance, residuals, scale, value, projection)


def _linear(model: Model, theta: Tensor, step: float, one_sided: bool) -> tuple[Tensor, Tensor]:
    """m at theta, and its Jacobian [targets, numbers] by differences."""
    count = len(theta)
    moved = step * torch.eye(count, dtype=theta.dtype)
    if one_sided:
        found = model(torch.cat([theta[None], theta + moved])).double()
        return found[0], ((found[1:] - found[0]) / step).T
    found = model(torch.cat([theta[None], theta + moved, theta - moved])).double()
    return found[0], ((found[1 : count + 1] - found[count + 1 :]) / (2 * step)).T


def _inverse(jacobian: Tensor, residuals: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(J'WJ)^-1 and (J'WJ)^-1 J'W, with the t's weights; a number that nothing tells apart from 0
    keeps a variance of 1."""
    e2 = (residuals / scale).square()
    weights = (FREEDOM + 1) / (FREEDOM + e2)
    weighted = jacobian.T * weights
    normal = weighted @ jacobian + torch.eye(jacobian.shape[1], dtype=jacobian.dtype) * scale**2
    inverse = torch.linalg.inv(normal)
    return inverse, inverse @ weighted


def sandwich(
    jacobian: Tensor, residuals: Tensor, scale: float, blocks: Tensor, inverse: Tensor
) -> Tensor:
    """Covariance of theta: bread is the curvature, filling the sums of gradients over blocks."""
    e2 = (residuals / scale).square()
    weights = (FREEDOM + 1) / (FREEDOM + e2)
    slopes = (FREEDOM + 1) * (FREEDOM - e2) / (FREEDOM + e2).square()
    bread = inverse * float(weights.mean() / slopes.mean().clamp(min=0.1))
    gradients = jacobian * (weights * residuals)[:, None]
    count = int(blocks.max()) + 1
    sums = torch.zeros(count, jacobian.shape[1], dtype=jacobian.dtype)
    sums.index_add_(0, blocks, gradients)
    used = len(blocks.unique())
    spare = max(used - jacobian.shape[1], 1)
    return bread @ (sums.T @ sums) @ bread * (used / spare)


def blocks_of(counts: Sequence[int]) -> Int[Tensor, "targets"]:
    """The block of every target, for prompts of so many targets each."""
    found, first = [], 0
    for count in counts:
        mine = torch.arange(count) // BLOCK
        found.append(mine + first)
        first += -(-count // BLOCK)
    return torch.cat(found)


class Contest(NamedTuple):
    """One hypothesis against another, paired over blocks: gain in nats and its z."""

    gain: float
    z: float


def contest(better: Tensor, worse: Tensor, blocks: Tensor) -> Contest:
    """The gain in log likelihood of the first over the second, and gain over standard error.

    Vuong's test of two models (Econometrica 57, 1989), with the variance taken over blocks.
    """
    difference = better - worse
    count = int(blocks.max()) + 1
    sums = torch.zeros(count, dtype=difference.dtype).index_add_(0, blocks, difference)
    gain = float(sums.sum())
    spread = float(sums.std()) * math.sqrt(count) if count > 1 else math.inf
    return Contest(gain, gain / spread if spread > 0 else (math.inf if gain > 0 else 0.0))


def half_width(variance: float, bias: float, blocks: int) -> float:
    """Half a 95% interval of log T: chance, what the engine's rounding alone does, and that of
    the reference, which applies temperatures in float32."""
    return t_quantile(max(blocks - 1, 1)) * math.sqrt(variance + bias**2 + _EXACT**2)
