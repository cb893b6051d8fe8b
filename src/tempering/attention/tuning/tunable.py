"""What can be tuned in a frozen model: temperatures, and whatever is compared with them."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from tempering.attention.tuning.objectives import Piece


class Tunable(ABC):
    """A model that `size` numbers theta change; theta = 0 is the model untouched."""

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


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No weight takes a gradient and every module is in eval mode, until the end."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    modes = [(module, module.training) for module in model.modules()]
    for weight in trained:
        weight.requires_grad_(False)
    model.eval()
    try:
        yield
    finally:
        for weight in trained:
            weight.requires_grad_(True)
        for module, mode in modes:
            module.training = mode
