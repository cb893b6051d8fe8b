"""Which activations have a closed form: the members of the family that are known by other names.

kernel, hypotheses      statistic   activation                         at T = 0
Gaussian, signed        mean        tanh(m z/(sigma^2 T))              step
Laplace, signed         mean        tanh(clip(z, -m, m)/(b T))         step
Gaussian, two centred   mean        between them by a sigmoid
Gaussian, signed        variance    sech^2(m z/(sigma^2 T))
Gaussian, signed        gate-mean   z sigmoid(2 m z/(sigma^2 T))       ReLU
monotone log odds       mode        step, at every T < inf
monotone log odds       gate-mode   ReLU, at every T < inf
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.kernels import (
    Centred,
    Gaussian,
    Huber,
    Kernel,
    Laplace,
    Logistic,
    PseudoHuber,
    Signed,
    StudentT,
)
from tempering.units.fused import Gate, HardTanh, SechSquared, Sigmoid, Tanh

# Steeper slopes take the general path, which saturates before c z can overflow: at this slope c z
# stays within float32 for |z| up to 3e30.
STEEPEST = 1e8
# Kernels whose log odds have the sign of z.
_ODD = (Gaussian, Laplace, StudentT, Huber, PseudoHuber, Logistic)


@dataclass(frozen=True)
class SignStep:
    """sign(z), 0 at 0; NaN stays NaN."""

    def __call__(self, z: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return torch.where(torch.isnan(z), z, torch.sign(z))


@dataclass(frozen=True)
class ReLU:
    """z 1[z > 0]."""

    def __call__(self, z: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return torch.relu(z)


@dataclass(frozen=True)
class Between:
    """low + (high - low) curve(z): the mean of two centres."""

    curve: Sigmoid
    low: float
    high: float

    def __call__(self, z: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return torch.add(self.low, self.curve(z), alpha=self.high - self.low)


def closed_form(
    kernel: Kernel, statistic: str, temperature: float | int | Tensor = 1.0
) -> Callable[[Tensor], Tensor] | None:
    """The closed form of an activation, or None where there is none.

    Closed forms need plain numbers: parameters that are tensors (one for each unit, or learned)
    go through the log odds, in the same formula. Parameters as `tempering.activation`.
    """
    level = known_number(temperature)
    hypotheses = kernel.hypotheses
    if level is None or level == math.inf:
        return None
    if isinstance(hypotheses, Signed):
        return _signed(kernel, hypotheses, statistic, level)
    if isinstance(hypotheses, Centred) and type(kernel) is Gaussian and statistic == "mean":
        return _between(kernel, hypotheses, level)
    return None


def known_number(value: object) -> float | None:
    """The value of a number, or of a tensor that holds one and isn't learned; else None."""
    if isinstance(value, Tensor):
        # Reading it from a GPU waits for the GPU, but so does every check of the general path.
        known = value.ndim == 0 and not value.requires_grad
        return float(value) if known and not torch.compiler.is_compiling() else None
    return float(value) if isinstance(value, Real) else None


def _signed(
    kernel: Kernel, hypotheses: Signed, statistic: str, level: float
) -> Callable[[Tensor], Tensor] | None:
    fair = hypotheses.prior is None
    m = known_number(hypotheses.m)
    if type(kernel) in _ODD and fair:
        if statistic == "mode" or (statistic == "mean" and level == 0):
            return SignStep()
        if statistic == "gate-mode" or (statistic == "gate-mean" and level == 0):
            return ReLU()
    bias = _bias(hypotheses)
    if m is None or bias is None:
        return None
    if type(kernel) is Laplace and statistic == "mean":
        c = _slope(1.0, known_number(kernel.b), level)
        return None if c is None else HardTanh(c, m, bias / 2)
    if type(kernel) is not Gaussian:
        return None
    sigma = known_number(kernel.sigma)
    c = None if sigma is None else _slope(m / sigma, sigma, level)
    if c is None:
        return None
    if statistic == "mean":
        return Tanh(c, bias=bias / 2)
    if statistic == "variance":
        return SechSquared(c, bias=bias / 2)
    if statistic == "gate-mean" and fair:
        return Gate(2 * c)
    return None


def _between(kernel: Gaussian, hypotheses: Centred, level: float) -> Between | Sigmoid | None:
    centres = torch.as_tensor(hypotheses.centres)
    bias = _bias(hypotheses)
    sigma = known_number(kernel.sigma)
    known = centres.shape == (2,) and not centres.requires_grad
    if not known or bias is None or sigma is None or torch.compiler.is_compiling():
        return None
    low, high = centres.tolist()
    c = _slope((high - low) / sigma, sigma, level)
    if c is None:
        return None
    curve = Sigmoid(c, origin=(low + high) / 2, bias=bias)
    return curve if (low, high) == (0.0, 1.0) else Between(curve, low, high)


def _slope(above: float, below: float | None, level: float) -> float | None:
    """above/(below T); None where it is unknown or too steep."""
    if below is None or abs(above) > STEEPEST * below * level:
        return None
    return above / below / level


def _bias(hypotheses: Signed | Centred) -> float | None:
    """log(pi_2/pi_1) of two hypotheses; None where it is learned."""
    if hypotheses.prior is None:
        return 0.0
    prior = torch.as_tensor(hypotheses.prior)
    if prior.requires_grad or prior.shape != (2,) or torch.compiler.is_compiling():
        return None
    first, second = prior.tolist()
    return math.log(second) - math.log(first)
