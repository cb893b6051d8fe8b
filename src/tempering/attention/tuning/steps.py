"""How the numbers move: damped Newton steps with the Fisher matrix.

Few numbers (hundreds) and many tokens make second order cheap: with s_db the gradient of the mean
loss of batch b, over n_b targets, were its targets the d-th draw from the model itself,

    F = 1/D sum_d sum_b w_b n_b s_db s_db^T,    w_b = n_b / sum n

is the Fisher matrix of the mean loss without bias, of a rank up to the number of draws. Where
nothing can be drawn, the spread of the gradients g_b stands in for it:

    F = sum_b w_b n_b (g_b - g)(g_b - g)^T,    g = sum_b w_b g_b

since the variance of a batch mean is that of one target over n_b. A step solves

    (F + damping diag(F) + prior I) delta = -(g + prior theta)

and is kept within |delta| <= radius, number by number. F is that of the first point; from then on
every full pass also tells how the gradient changed, and F is corrected to agree (see
`secant_update`), so that later steps converge faster than linearly.

Under a constraint c(theta) <= aim, with c's own gradient and Fisher matrix, F and g become
F + m F_c and g + m g_c, and the multiplier m is the smallest for which the step's predicted
c + g_c delta + delta^T F_c delta / 2 is at most the aim.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

# A step counts as having shown at least this share of the curvature expected (Powell's constant).
_LEAST_CURVATURE = 0.2
# Beyond this a multiplier is no trade-off any more: only the constraint counts.
LARGEST = 1e6


class Quadratic(NamedTuple):
    """A loss near a point: value + gradient delta + delta^T curvature delta / 2, nats."""

    value: float
    gradient: Float[Tensor, "numbers"]
    curvature: Float[Tensor, "numbers numbers"]

    def at(self, delta: Float[Tensor, "numbers"]) -> float:
        """The predicted loss after a step."""
        return self.value + float(self.gradient @ delta + delta @ self.curvature @ delta / 2)


def quadratic(
    losses: Float[Tensor, "batches"],
    gradients: Float[Tensor, "batches numbers"],
    counts: Float[Tensor, "batches"],
    drawn: Float[Tensor, "draws batches numbers"] | None = None,
) -> Quadratic:
    """The mean loss over all targets, its gradient and its Fisher matrix.

    drawn: gradients for targets drawn from the model; without them, the empirical Fisher matrix.
    """
    weights = counts / counts.sum()
    gradient = (gradients * weights[:, None]).sum(0)
    spread = (gradients - gradient)[None] if drawn is None else drawn / len(drawn) ** 0.5
    scaled = (spread * (weights * counts).sqrt()[:, None]).flatten(0, 1)
    return Quadratic(float((losses * weights).sum()), gradient, scaled.T @ scaled)


def secant_update(
    curvature: Float[Tensor, "numbers numbers"],
    step: Float[Tensor, "numbers"],
    change: Float[Tensor, "numbers"],
) -> Float[Tensor, "numbers numbers"]:
    """The curvature B corrected by what a step s changed in the gradient, y (damped BFGS).

        B' = B - B s s^T B / (s^T B s) + y y^T / (s^T y),   so that B' s = y

    Where s^T y < s^T B s / 5, y is mixed with B s so far that equality holds, which keeps B'
    positive definite where B is. A step of zero curvature says nothing and changes nothing.

    Source: Powell (1978), The convergence of variable metric methods for nonlinearly constrained
    optimization calculations.
    """
    moved = curvature @ step
    expected = float(step @ moved)
    if not 0 < expected < math.inf:
        return curvature
    found = float(step @ change)
    if found < _LEAST_CURVATURE * expected:
        share = (1 - _LEAST_CURVATURE) * expected / (expected - found)
        change = share * change + (1 - share) * moved
        found = float(step @ change)
    return curvature - torch.outer(moved, moved) / expected + torch.outer(change, change) / found


class Secant:
    """A curvature that is corrected at every point where the gradient is seen."""

    def __init__(self) -> None:
        self.curvature: Tensor | None = None
        self.last: tuple[Tensor, Tensor] | None = None  # a point and the gradient there

    def at(self, theta: Float[Tensor, "numbers"], here: Quadratic) -> Quadratic:
        """The loss near theta; its own curvature counts at the first point alone."""
        if self.curvature is None:
            self.curvature = here.curvature
        elif self.last is not None:
            point, gradient = self.last
            self.curvature = secant_update(self.curvature, theta - point, here.gradient - gradient)
        self.last = (theta, here.gradient)
        return here._replace(curvature=self.curvature)

    @property
    def known(self) -> Float[Tensor, "numbers numbers"]:
        """The curvature as corrected so far."""
        if self.curvature is None:
            raise RuntimeError("no point was seen yet")
        return self.curvature

    def state(self) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
        """What `restore` takes."""
        return self.curvature, self.last

    def restore(self, state: tuple[Tensor | None, tuple[Tensor, Tensor] | None]) -> None:
        """Go on from a state."""
        self.curvature, self.last = state


def weighted_sum(terms: list[tuple[float, Quadratic]]) -> Quadratic:
    """The sum of weighted losses."""
    return Quadratic(
        sum(weight * term.value for weight, term in terms),
        torch.stack([weight * term.gradient for weight, term in terms]).sum(0),
        torch.stack([weight * term.curvature for weight, term in terms]).sum(0),
    )


def damped_step(
    goal: Quadratic, theta: Float[Tensor, "numbers"], *, prior: float, damping: float, radius: float
) -> Float[Tensor, "numbers"]:
    """The step of theta for a loss plus prior/2 |theta|^2.

    prior: 1/sd^2 of a number, per target. damping: share of the curvature's diagonal that is added
    to it. radius: largest change of any number.
    """
    matrix = goal.curvature + torch.diag(damping * goal.curvature.diagonal() + prior)
    scale = matrix.diagonal().sqrt().clamp(min=1e-12)
    scaled = matrix / scale / scale[:, None]
    solved = torch.linalg.solve(scaled, (goal.gradient + prior * theta) / scale)
    return (-solved / scale).clamp(-radius, radius)


def constrained_step(
    goal: Quadratic,
    limit: Quadratic,
    aim: float,
    theta: Float[Tensor, "numbers"],
    *,
    prior: float,
    damping: float,
    radius: float,
) -> tuple[Float[Tensor, "numbers"], float]:
    """The step that keeps the predicted constraint at most at its aim, and its multiplier.

    Where no step within the radius does, the multiplier is the largest, and the step follows the
    constraint alone.
    """

    def step(multiplier: float) -> Tensor:
        both = weighted_sum([(1.0, goal), (multiplier, limit)])
        return damped_step(both, theta, prior=prior, damping=damping, radius=radius)

    free = step(0.0)
    if limit.at(free) <= aim:
        return free, 0.0
    high = 1.0
    while limit.at(step(high)) > aim:
        high *= 4
        if high > LARGEST:
            return step(LARGEST), LARGEST
    low = 0.0 if high == 1.0 else high / 4
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if limit.at(step(middle)) > aim else (low, middle)
    return step(high), high
