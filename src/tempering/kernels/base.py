"""The interface of kernels: energies, their differences and log odds of an input."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.errors import EnergyError, InputError
from tempering.kernels.hypotheses import (
    Hypotheses,
    Parameter,
    Prototypes,
    Signed,
    as_parameter,
    at_least_float32,
    check_positive,
    in_dtype_of,
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

    def excess(self, z: TensorLike) -> Float[Tensor, "... hypotheses"]:
        """d_h(z) - d_k(z) for every hypothesis, with k the best one: what a posterior reads.

        In closed form: far from all centres the energies themselves round to one number.

        Returns [..., H], at least float32, +inf where a difference overflows. Raises InputError
        when z does not fit the hypotheses, EnergyError where not even the best one is known.
        """
        z = _working(z)
        excess = self._signed_excess(z) if self._is_signed else self._excess(z)
        lost = (~(excess.detach() > -torch.inf)).nonzero()
        if len(lost):
            raise EnergyError(
                f"energies at {lost[0].tolist()} differ by more than {z.dtype} can hold; give z "
                "in float64, or in another unit"
            )
        return excess

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
        return self._log_odds(z, in_dtype_of(self.hypotheses.m, z))

    @property
    def _is_signed(self) -> bool:
        return isinstance(self.hypotheses, Signed)

    def _signed_excess(self, z: Tensor) -> Tensor:
        odds = self.log_odds(z).unsqueeze(-1)
        zero = torch.zeros_like(odds)
        return torch.where(odds >= 0, torch.cat([odds, zero], -1), torch.cat([zero, -odds], -1))

    def _shape_names(self) -> list[str]:
        return [field.name for field in fields(self) if field.name != "m"]

    @abstractmethod
    def _check(self) -> None: ...

    @abstractmethod
    def _energies(self, z: Tensor) -> Tensor: ...

    @abstractmethod
    def _excess(self, z: Tensor) -> Tensor:
        """`excess` for hypotheses that are not signed."""

    @abstractmethod
    def _log_odds(self, z: Tensor, m: Tensor) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class NoiseKernel(Kernel):
    """A kernel whose energy is a function of the deviation z - c_h, feature by feature."""

    def _check(self) -> None:
        for name in self._shape_names():
            check_positive(f"{name} of {type(self).__name__}", getattr(self, name))
        if isinstance(self.hypotheses, Signed):
            check_positive("m, the distance of the signed centres from 0,", self.hypotheses.m)

    def _energies(self, z: Tensor) -> Tensor:
        values = self.hypotheses.values(z)
        if isinstance(self.hypotheses, Prototypes):
            check_features(z, values.shape[-1])
            return self._vector_energies(z, values)
        if isinstance(self.hypotheses, Signed):
            values = in_dtype_of(self.hypotheses.m, z).unsqueeze(-1) * values
        z, values = self._on_line(z), self._on_line(values)
        return self._noise(z.unsqueeze(-1) - values, *self._shapes(z, 1))

    def _excess(self, z: Tensor) -> Tensor:
        values = self.hypotheses.values(z)
        if isinstance(self.hypotheses, Prototypes):
            check_features(z, values.shape[-1])
            return self._vector_excess(z, values)
        z, values = self._on_line(z).unsqueeze(-1), self._on_line(values)
        shapes = self._shapes(z.squeeze(-1), 1)
        values = values.expand(*z.shape[:-1], values.shape[-1])

        def about(best: Tensor) -> Tensor:
            rivals = values.gather(-1, best)
            return self._difference(z, values, rivals, *shapes)

        with torch.no_grad():
            # Rounded distances may tie; differences about one of the tied show which is nearest.
            first = (z - values).abs().argmin(-1, keepdim=True)
            best = about(first).argmin(-1, keepdim=True)
        return about(best)

    def _on_line(self, x: Tensor) -> Tensor:
        """Positions on the line; a periodic kernel takes them into one period."""
        return x

    def _difference(self, z: Tensor, own: Tensor, rival: Tensor, *shapes: Tensor) -> Tensor:
        """noise(z - own) - noise(z - rival), where `rival` is the nearer centre.

        Close to the rival the two energies differ so much that subtracting them loses nothing.
        Elsewhere it is the log odds of two signed centres about their midpoint.
        """
        close = (z - rival).abs() < (own - rival).abs() / 4
        energy = self._noise(torch.where(close, z - own, 0.0), *shapes)
        least = self._noise(torch.where(close, z - rival, 0.0), *shapes)
        return torch.where(close, energy - least, self._midpoint_odds(z, own, rival, *shapes))

    def _midpoint_odds(self, z: Tensor, own: Tensor, rival: Tensor, *shapes: Tensor) -> Tensor:
        half_own, half_rival = own / 2, rival / 2
        middle = half_own + half_rival
        # What rounding took off the sum (Knuth's two-sum): a midpoint near z keeps its digits.
        from_own = middle - half_rival
        rest = (half_own - from_own) + (half_rival - (middle - from_own))
        gap = (z - middle) - rest.detach()
        m = half_rival - half_own
        none = (m == 0) & (gap == 0)  # a centre held against itself, at the centre: 0/0 for some
        side = torch.where(m < 0, -1.0, 1.0).to(m)
        odds = self._noise_odds(gap, torch.where(none, 1.0, side * m), *shapes)
        return torch.where(none, 0.0, side * odds)

    def _log_odds(self, z: Tensor, m: Tensor) -> Tensor:
        return self._noise_odds(z, m, *self._shapes(z, 0))

    def _shapes(self, z: Tensor, extra: int) -> list[Tensor]:
        """The shape parameters, aligned with `extra` dimensions behind those of the rows."""
        values = [in_dtype_of(getattr(self, name), z) for name in self._shape_names()]
        return [v.reshape(v.shape + (1,) * extra) if v.ndim else v for v in values]

    def _vector_energies(self, z: Tensor, vectors: Tensor) -> Tensor:
        # Independent noise in every feature: energies add. Holds [..., K, features] at once.
        return self._noise(z.unsqueeze(-2) - vectors, *self._shapes(z, 2)).sum(-1)

    def _vector_excess(self, z: Tensor, vectors: Tensor) -> Tensor:
        # Holds [..., K, features] at once.
        z, shapes = z.unsqueeze(-2), self._shapes(z, 2)

        def about(best: Tensor) -> Tensor:
            rivals = vectors[best].unsqueeze(-2)
            return self._difference(z, vectors, rivals, *shapes).sum(-1)

        with torch.no_grad():
            first = self._noise(z - vectors, *shapes).sum(-1).argmin(-1)
            best = about(first).argmin(-1)
        return about(best)

    @abstractmethod
    def _noise(self, deviation: Tensor, *shapes: Tensor) -> Tensor:
        """The energy of a deviation; shape parameters in the order of the fields."""

    @abstractmethod
    def _noise_odds(self, z: Tensor, m: Tensor, *shapes: Tensor) -> Tensor:
        """noise(z + m) - noise(z - m) without cancellation."""


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
