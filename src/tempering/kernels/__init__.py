"""Kernels: energies of hypotheses given an input.

    kernel      d_h(z), x = z - c_h                          log odds of the signed -m, +m
    Gaussian    x^2 / (2 sigma^2)                            2 m z / sigma^2
    Laplace     |x| / b                                      2 clip(z, -m, m) / b
    StudentT    (nu + D)/2 log(1 + x^2/(nu sigma^2))         returns to 0 far out
    Huber       x^2/2, beyond delta a line                   bounded
    PseudoHuber delta^2 (sqrt(1 + (x/delta)^2) - 1)          bounded
    Logistic    2 log cosh(x / (2 b))                        bounded
    Angular     kappa (1 - cos x)                            2 kappa sin(m) sin(z)
    Mahalanobis x' Sigma^-1 x / 2                            2 m' Sigma^-1 z

A kernel holds its hypotheses: Signed, Centred or Prototypes, each with a prior.
"""

from __future__ import annotations

from torch import nn

from tempering.errors import InputError, RefusedError
from tempering.kernels.base import Kernel
from tempering.kernels.hypotheses import Centred, Hypotheses, Prototypes, Signed
from tempering.kernels.scalar import Gaussian, Huber, Laplace, Logistic, PseudoHuber, StudentT
from tempering.kernels.vector import Angular, Mahalanobis

__all__ = [
    "KERNELS",
    "Angular",
    "Centred",
    "Gaussian",
    "Huber",
    "Hypotheses",
    "Kernel",
    "Laplace",
    "Logistic",
    "Mahalanobis",
    "Prototypes",
    "PseudoHuber",
    "Signed",
    "StudentT",
    "as_kernel",
]

KERNELS: dict[str, type[Kernel]] = {
    "gaussian": Gaussian,
    "laplace": Laplace,
    "student-t": StudentT,
    "huber": Huber,
    "pseudo-huber": PseudoHuber,
    "logistic": Logistic,
    "angular": Angular,
    "mahalanobis": Mahalanobis,
}


def as_kernel(kernel: Kernel | str | nn.Module | type) -> Kernel:
    """A kernel from itself or its name, e.g. "student-t" for StudentT().

    Raises
    ------
    RefusedError: for a linear layer or the identity, which induce no posterior.
    InputError: for a name that is not in KERNELS, or anything else.
    """
    if isinstance(kernel, Kernel):
        return kernel
    name = kernel.lower() if isinstance(kernel, str) else _class_name(kernel)
    if name in KERNELS:
        return KERNELS[name]()
    if name in ("linear", "identity"):
        raise RefusedError(
            f"{name} is not an activation of this family, nor a special case of it: a posterior "
            "needs hypotheses that compete for the input, and a linear map or the identity has "
            "none, so it has no responsibilities and no temperature. Use it as it is, next to an "
            f"activation; or choose a kernel: {', '.join(KERNELS)}"
        )
    raise InputError(f"no kernel {kernel!r}; expected a Kernel or one of: {', '.join(KERNELS)}")


def _class_name(kernel: object) -> str:
    kind = kernel if isinstance(kernel, type) else type(kernel)
    for refused in (nn.Linear, nn.Identity):
        if issubclass(kind, refused):
            return refused.__name__.lower()
    return ""
