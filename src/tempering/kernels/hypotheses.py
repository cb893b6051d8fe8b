"""The hypotheses that compete: their centres, their values, their prior."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from numbers import Real

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.errors import InputError
from tempering.tensors import TensorLike, as_tensor

Number = float | int
Parameter = TensorLike
Weights = TensorLike


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype that work is done in: float64 stays, everything narrower becomes float32."""
    return torch.promote_types(dtype, torch.float32)


def in_dtype_of(value: Parameter | Weights, work: Tensor) -> Tensor:
    """`value` as a tensor of the dtype and device of `work`."""
    return torch.as_tensor(value, dtype=work.dtype, device=work.device)


def as_parameter(name: str, value: TensorLike | None) -> Number | Tensor | None:
    """A number as it is, None too; an array or a list as a tensor."""
    if value is None or isinstance(value, Tensor | float | int):
        return value
    return float(value) if isinstance(value, Real) else as_tensor(value, name, InputError)


def check_positive(name: str, value: Parameter, *, below: float = float("inf")) -> None:
    """Refuse a parameter that is not positive, not finite, or not under `below`."""
    tensor = torch.as_tensor(value).detach()
    if tensor.numel() and bool(((tensor > 0) & (tensor < below)).all()):
        return
    limit = "finite" if below == float("inf") else f"under {below:.6g}"
    raise InputError(
        f"{name} must be positive and {limit}; got {tensor.tolist()}. "
        "Give a positive number, or a tensor with one for each unit"
    )


def _finite(name: str, value: Tensor) -> None:
    if not value.is_floating_point():
        raise InputError(f"{name} must be floating point; got {value.dtype}. Use .float()")
    bad = (~torch.isfinite(value.detach())).nonzero()
    if len(bad):
        where = tuple(bad[0].tolist())
        raise InputError(f"{name} must be finite; got {value[where].item()} at {list(where)}")


def _checked_prior(prior: Weights | None, count: int) -> Tensor | None:
    if prior is None:
        return None
    weights = as_tensor(prior, "the prior", InputError)
    if not weights.is_floating_point() or isinstance(prior, list | tuple):
        weights = weights.to(torch.get_default_dtype())
    if weights.shape != (count,):
        raise InputError(
            f"the prior has shape {list(weights.shape)}; expected one weight for each of the "
            f"{count} hypotheses, shape [{count}]"
        )
    for h, weight in enumerate(weights.detach().tolist()):
        if not 0 < weight < float("inf"):
            raise InputError(
                f"the prior of hypothesis {h} is {weight}; expected a positive finite weight. "
                "Leave out a hypothesis that can't be true"
            )
    return weights


class Hypotheses(ABC):
    """What competes for an input: Signed, Centred or Prototypes.

    The prior pi is a measure over the hypotheses: r_h is proportional to pi_h exp(-d_h/T).
    Temperature does not act on it: at T = inf the responsibilities are the prior, at
    T = 0 the minimisers share in proportion to it. Only its ratios matter.
    """

    prior: Weights | None

    @property
    @abstractmethod
    def count(self) -> int:
        """The number of hypotheses H."""

    @abstractmethod
    def values(self, work: Tensor) -> Float[Tensor, "... hypotheses"]:
        """The value of each hypothesis, which the statistics summarise, in the dtype of `work`."""

    def log_prior(self, work: Tensor) -> Float[Tensor, " hypotheses"] | None:
        """log pi_h, normalised, in the dtype of `work`; None for equal priors."""
        if self.prior is None:
            return None
        weights = in_dtype_of(self.prior, work)
        return torch.log(weights) - torch.log(weights.sum())


@dataclass(frozen=True, eq=False)
class Signed(Hypotheses):
    """Two hypotheses s in {-1, +1} with centres s m, in the order (-, +).

    Parameters
    ----------
    m: distance of each centre from 0; unit of z; > 0. A tensor broadcasts to z: one value for
        each unit. For Mahalanobis alone it is a vector of shape [features], not 0.
    prior: (pi_-, pi_+), positive; None for equal.
    """

    m: Parameter = 1.0
    prior: Weights | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "m", as_parameter("m", self.m))
        if torch.is_tensor(self.m):
            _finite("m", self.m)
        object.__setattr__(self, "prior", _checked_prior(self.prior, 2))

    @property
    def count(self) -> int:
        return 2

    def values(self, work: Tensor) -> Float[Tensor, "2"]:
        """The signs (-1, +1)."""
        return work.new_tensor([-1.0, 1.0])


@dataclass(frozen=True, eq=False)
class Centred(Hypotheses):
    """Hypotheses with explicit centres on the line, each standing for its centre.

    Parameters
    ----------
    centres: [H], or [units, H] with a row for each unit; unit of z; H >= 2.
    prior: [H] positive weights; None for equal.
    """

    centres: Weights
    prior: Weights | None = None

    def __post_init__(self) -> None:
        centres = as_tensor(self.centres, "centres", InputError)
        if isinstance(self.centres, list | tuple):
            centres = centres.to(torch.get_default_dtype())
        if centres.ndim == 0 or centres.shape[-1] < 2:
            raise InputError(
                f"centres have shape {list(centres.shape)}; expected [H] or [units, H], H >= 2: "
                "a single hypothesis has no rival, so its responsibility is always 1"
            )
        _finite("centres", centres)
        object.__setattr__(self, "centres", centres)
        object.__setattr__(self, "prior", _checked_prior(self.prior, centres.shape[-1]))

    @property
    def count(self) -> int:
        return torch.as_tensor(self.centres).shape[-1]

    def values(self, work: Tensor) -> Float[Tensor, "... hypotheses"]:
        """The centres."""
        return in_dtype_of(self.centres, work)


@dataclass(frozen=True, eq=False)
class Prototypes(Hypotheses):
    """K prototype vectors; the last dimension of z holds the features.

    Parameters
    ----------
    vectors: [K, features]; unit of z; K >= 2.
    prior: [K] positive weights; None for equal.
    """

    vectors: Float[Tensor, "prototypes features"]
    prior: Weights | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "vectors", as_tensor(self.vectors, "prototypes", InputError))
        if self.vectors.ndim != 2 or self.vectors.shape[0] < 2 or self.vectors.shape[1] < 1:
            raise InputError(
                f"prototypes have shape {list(self.vectors.shape)}; expected [K, features] with "
                "K >= 2: a single hypothesis has no rival, so its responsibility is always 1"
            )
        _finite("prototypes", self.vectors)
        object.__setattr__(self, "prior", _checked_prior(self.prior, len(self.vectors)))

    @property
    def count(self) -> int:
        return len(self.vectors)

    def values(self, work: Tensor) -> Float[Tensor, "prototypes features"]:
        """The prototype vectors."""
        return in_dtype_of(self.vectors, work)
