"""In-context linear regression by attention whose softmax is linearised: error and best T, exactly.

Prompts hold n examples x ~ N(0, X), y = w x + e, w ~ N(0, W), e ~ N(0, noise^2), and ask for y at
a further x_q. Attention scores example i by s_i = x_q M x_i and answers with a weighted mean of the
y_i; its softmax(s / T) to first order in 1/T is (1 + (s_i - mean s)/T)/n, so the answer is

    mean y + a/T,   a = x_q M c,   c = 1/n sum_i (x_i - mean x) y_i

With d = w x_q - mean y, what is left to explain, the error is a quadratic in 1/T:

    E(T) = E[a^2]/T^2 - 2 E[a d]/T + E[d^2] + noise^2,     T* = E[a^2] / E[a d]

    E[a^2] = tr(X M F M'),  E[a d] = tr(X M G),  E[d^2] = (1 + 1/n) tr(X W) + noise^2/n
    F = E[c c'] = (m^2 X W X + m (X W X + tr(W X) X) + noise^2 m X)/n^2,   G = E[c w'] = m/n X W

with m = n - 1 and the moments of a Wishart matrix, so for every n and not only in the limit of
many dimensions. M = G' F^-1 is best at T = 1: the weights that were pretrained.

Source: Demir and Dogan (arXiv 2511.01292), whose theorem has the same form, T* = tr(A M' F1 M) over
the symmetric part of tr(A F2 M), for n and the dimensions going to infinity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Setting:
    """What prompts are drawn from; inputs and tasks are diagonals of X and W."""

    inputs: Tensor
    tasks: Tensor
    noise: float
    examples: int


class Moments(NamedTuple):
    """E[a^2], E[a d], and the error that no a explains, E[d^2] + noise^2."""

    square: float
    product: float
    rest: float

    @property
    def best(self) -> float:
        """The temperature of the least error."""
        return self.square / self.product

    def error(self, temperature: float) -> float:
        return self.square / temperature**2 - 2 * self.product / temperature + self.rest


def _of_answers(setting: Setting) -> tuple[Tensor, Tensor]:
    """F and G."""
    x, w = torch.diag(setting.inputs), torch.diag(setting.tasks)
    n, m = setting.examples, setting.examples - 1
    moved = x @ w @ x
    spread = m * m * moved + m * (moved + (w @ x).trace() * x) + setting.noise**2 * m * x
    return spread / n**2, m / n * x @ w


def pretrained(setting: Setting) -> Tensor:
    """M, best at T = 1."""
    f, g = _of_answers(setting)
    return torch.linalg.solve(f, g).T


def moments(weights: Tensor, setting: Setting) -> Moments:
    """In closed form."""
    f, g = _of_answers(setting)
    x, n = torch.diag(setting.inputs), setting.examples
    rest = (1 + 1 / n) * float((x @ torch.diag(setting.tasks)).trace())
    return Moments(
        float((x @ weights @ f @ weights.T).trace()),
        float((x @ weights @ g).trace()),
        rest + setting.noise**2 * (1 + 1 / n),
    )


class Prompts(NamedTuple):
    """What attention sees of drawn prompts.

    scores: s_i, [prompts, examples]; answers: y_i - mean y. left: d + e_q. bayes: the error of the
    ridge regression that knows the setting.
    """

    scores: Tensor
    answers: Tensor
    left: Tensor
    bayes: Tensor

    @property
    def shift(self) -> Tensor:
        """a."""
        return (self.scores * self.answers).mean(1)

    def measured(self) -> Moments:
        """The moments of these prompts."""
        a, d = self.shift, self.left
        return Moments(float((a * a).mean()), float((a * d).mean()), float((d * d).mean()))

    def softmax_error(self, temperature: float, sharpness: float) -> float:
        """The mean squared error of true softmax, of scores times sharpness and values over it."""
        weights = (sharpness * self.scores / temperature).softmax(1)
        answered = (weights * self.answers).sum(1) / sharpness
        return float((self.left - answered).square().mean())


def drawn(weights: Tensor, setting: Setting, count: int, generator: torch.Generator) -> Prompts:
    """Prompts of a setting, float64."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    size, n = len(setting.inputs), setting.examples
    x = normal(count, n + 1, size) * setting.inputs.sqrt()
    w = normal(count, size) * setting.tasks.sqrt()
    y = torch.einsum("pnd,pd->pn", x, w) + setting.noise * normal(count, n + 1)
    seen, asked = x[:, :-1], x[:, -1]
    given, goal = y[:, :-1], y[:, -1]
    scores = torch.einsum("pd,de,pne->pn", asked, weights, seen)
    ridge = torch.diag(setting.noise**2 / setting.tasks)
    fitted = torch.linalg.solve(seen.mT @ seen + ridge, (seen.mT @ given[..., None]))[..., 0]
    mean = given.mean(1)
    return Prompts(
        scores, given - mean[:, None], goal - mean, (goal - (asked * fitted).sum(1)).square()
    )
