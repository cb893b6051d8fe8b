"""What numbers theta can be tuned in: temperatures, and whatever is compared with them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tempering.attention.tuning.pieces import Piece


class Tunable(ABC):
    """A model in the hands of `size` numbers; theta = 0 is the model untouched."""

    model: Any
    size: int

    @abstractmethod
    def set(self, theta: Float[Tensor, "*rows numbers"]) -> None:
        """Put theta in force, differentiably; with rows, each row of a batch has its own."""

    @abstractmethod
    def untempered(self) -> None:
        """Put theta = 0 in force."""

    @abstractmethod
    def extent(self, theta: Float[Tensor, "numbers"]) -> tuple[float, float]:
        """The coldest and the hottest temperature, 1 and 1 where there are none."""

    @abstractmethod
    def moved(self, before: Float[Tensor, "numbers"], after: Float[Tensor, "numbers"]) -> str:
        """What changed most between two points, in words."""

    @abstractmethod
    def trouble(self, theta: Tensor | None, piece: Piece, gradient: Tensor | None) -> str:
        """Why a piece's loss or gradient is not finite at theta, and what to try."""
