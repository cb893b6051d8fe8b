"""What every kernel does: turn an input and hypotheses into energies and log odds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.errors import InputError
from tempering.kernels.hypotheses import (
    Hypotheses,
    Parameter,
    Prototypes,
    Signed,
    as_parameter,
    at_least_float32,
    like,
    positive,
)
from tempering.tensors import TensorLike, as_tensor


@dataclass(frozen=True, eq=False)
class Kernel(ABC):
    """Energies d_h(z) of competing hypotheses; lower is better.

    Parameters
    ----------
    m: a number, or a tensor with one for each unit: the signed hypotheses -m and +m.
        Or Signed(m, prior), Centred(centres, prior), Prototypes(vectors, prior).

    Further parameters set the shape; a tensor holds one value for each unit. A kernel never
    changes. z has shape [..., units] and the energies [..., units, H]; where hypotheses are
    vectors, z has shape [..., features] and the energies [..., H].
    """

    m: Parameter | Hypotheses = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.m, Hypotheses):
            object.__setattr__(self, "m", Signed(self.m))
        for name in self._shape_names():
            object.__setattr__(self, name, as_parameter(name, getattr(self, name)))
        self._check()

    @property
    def hypotheses(self) -> Hypotheses:
        """What competes."""
        if not isinstance(self.m, Hypotheses):
            raise TypeError("a kernel holds Hypotheses once it is made")
        return self.m

    @property
    def takes_vectors(self) -> bool:
        """Whether the last dimension of z holds the features of one input."""
        return isinstance(self.hypotheses, Prototypes)

    def rows(self, z: Tensor) -> torch.Size:
        """The shape of the competitions in z: that of the energies without the hypotheses."""
        return z.shape[:-1] if self.takes_vectors else z.shape

    def with_parameters(self, **parameters: Any) -> Kernel:
        """The same kernel with some parameters replaced."""
        return replace(self, **parameters)

    def energies(self, z: TensorLike) -> Float[Tensor, "... hypotheses"]:
        """d_h(z) for every hypothesis; 0 at its centre.

        Returns [..., H], at least float32. Raises InputError when z does not fit the hypotheses.
        """
        return self._energies(_working(z))

    def log_odds(self, z: TensorLike) -> Float[Tensor, "..."]:
        """Log odds of the signed hypotheses at T = 1 and equal priors, d_-(z) - d_+(z).

        In closed form: the difference of two energies would lose small odds to rounding.
        Returns the shape `rows(z)`. Raises InputError for other hypotheses.
        """
        if not isinstance(self.hypotheses, Signed):
            raise InputError(
                f"log odds need the two signed hypotheses; got {type(self.hypotheses).__name__}. "
                "Use energies(z)"
            )
        z = _working(z)
        return self._log_odds(z, like(self.hypotheses.m, z))

    def _shape_names(self) -> list[str]:
        return [field.name for field in fields(self) if field.name != "m"]

    @abstractmethod
    def _check(self) -> None: ...

    @abstractmethod
    def _energies(self, z: Tensor) -> Tensor: ...

    @abstractmethod
    def _log_odds(self, z: Tensor, m: Tensor) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class NoiseKernel(Kernel):
    """A kernel that charges energy for the deviation z - c_h, by feature."""

    def _check(self) -> None:
        for name in self._shape_names():
            positive(f"{name} of {type(self).__name__}", getattr(self, name))
        if isinstance(self.hypotheses, Signed):
            positive("m, the distance of the signed centres from 0,", self.hypotheses.m)

    def _energies(self, z: Tensor) -> Tensor:
        values = self.hypotheses.values(z)
        if isinstance(self.hypotheses, Prototypes):
            check_features(z, values.shape[-1])
            return self._vector_energies(z, values)
        if isinstance(self.hypotheses, Signed):
            values = like(self.hypotheses.m, z).unsqueeze(-1) * values
        return self._noise(z.unsqueeze(-1) - values, *self._shapes(z, 1))

    def _log_odds(self, z: Tensor, m: Tensor) -> Tensor:
        return self._noise_odds(z, m, *self._shapes(z, 0))

    def _shapes(self, z: Tensor, extra: int) -> list[Tensor]:
        """The shape parameters, aligned with `extra` dimensions behind those of the rows."""
        values = [like(getattr(self, name), z) for name in self._shape_names()]
        return [v.reshape(v.shape + (1,) * extra) if v.ndim else v for v in values]

    def _vector_energies(self, z: Tensor, vectors: Tensor) -> Tensor:
        # Independent noise in every feature: energies add. Holds [..., K, features] at once.
        return self._noise(z.unsqueeze(-2) - vectors, *self._shapes(z, 2)).sum(-1)

    @abstractmethod
    def _noise(self, deviation: Tensor, *shapes: Tensor) -> Tensor:
        """The energy of a deviation; shape parameters in the order of the fields."""

    @abstractmethod
    def _noise_odds(self, z: Tensor, m: Tensor, *shapes: Tensor) -> Tensor:
        """noise(z + m) - noise(z - m) without cancellation."""


def squared_distances(
    z: Float[Tensor, "*rows features"], vectors: Float[Tensor, "prototypes features"]
) -> Float[Tensor, "*rows prototypes"]:
    """||z - w_k||^2 in memory for the result alone."""
    return _distances(z, vectors).square()


def distances(
    z: Float[Tensor, "*rows features"], vectors: Float[Tensor, "prototypes features"]
) -> Float[Tensor, "*rows prototypes"]:
    """||z - w_k|| in memory for the result alone, also of lengths whose square overflows."""
    longest = torch.finfo(z.dtype).max ** 0.5 / 1e3
    far = z.detach().abs().amax(-1) > longest
    if bool((vectors.detach().abs() > longest).any()):
        far = torch.ones_like(far)
    if not bool(far.any()):
        return _distances(z, vectors)
    near = _distances(torch.where(far.unsqueeze(-1), 0.0, z), vectors.clamp(-longest, longest))
    apart = z[far].unsqueeze(-2) - vectors
    size = apart.detach().abs().amax(-1, keepdim=True).clamp(min=torch.finfo(z.dtype).tiny)
    lengths = size.squeeze(-1) * torch.linalg.vector_norm(apart / size, dim=-1)
    return near.index_put(far.nonzero(as_tuple=True), lengths)


def _distances(z: Tensor, vectors: Tensor) -> Tensor:
    # Not by ||z||^2 - 2 z.w + ||w||^2: that loses near prototypes which lie far from the origin.
    flat = z.reshape(-1, z.shape[-1])
    lengths = torch.cdist(flat, vectors, compute_mode="donot_use_mm_for_euclid_dist")
    return lengths.reshape(*z.shape[:-1], len(vectors))


def check_features(z: Tensor, features: int) -> None:
    """Refuse an input whose last dimension does not hold the features of the hypotheses."""
    if z.ndim == 0 or z.shape[-1] != features:
        raise InputError(
            f"z has shape {list(z.shape)}; the hypotheses have {features} features, so the last "
            f"dimension of z must be {features}"
        )


def _working(z: TensorLike) -> Tensor:
    z = as_tensor(z, "z", InputError)
    if not z.is_floating_point():
        raise InputError(f"z must be floating point; got {z.dtype}. Use z.float()")
    return z.to(at_least_float32(z.dtype))
