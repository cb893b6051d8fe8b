"""What the methods of minimising, Newton and Adam, have in common.

Both minimise  L(theta) + prior/2 |theta|^2  under  c(theta) <= within.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from tempering.attention.tuning.passes import Report


class Move(NamedTuple):
    """The next point, and what was seen at the one before it.

    loss: of the calibration data at the point before, nats. multiplier: of the constraint.
    """

    theta: Tensor
    loss: float
    multiplier: float


class Method(ABC):
    """A method that moves theta step by step; its state can be saved and restored."""

    @abstractmethod
    def advance(
        self,
        theta: Float[Tensor, "numbers"],
        step: int,
        held_cost: float | None,
        report: Report | None,
    ) -> Move:
        """Learn from the data at theta, and give the next point.

        held_cost: of the constraint on watched data at theta, if they were looked at there.
        """
        ...

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What `restore` takes; tensors and plain values."""
        ...

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        ...
