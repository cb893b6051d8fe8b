"""A way of moving the numbers: what Newton and Adam have in common.

Both minimise  L(theta) + prior/2 |theta|^2  under  c(theta) <= within.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from tempering.attention.tuning.passes import Report


class Move(NamedTuple):
    """The next point, and what was seen at the last one.

    loss: of the calibration data at the point left, nats. multiplier: of the constraint.
    """

    theta: Tensor
    loss: float
    multiplier: float


class Method(ABC):
    """A way of moving theta, with a state that can be kept."""

    @abstractmethod
    def advance(
        self,
        theta: Float[Tensor, "numbers"],
        step: int,
        held_cost: float | None,
        report: Report | None,
    ) -> Move:
        """Learn from the data at theta and step on; held_cost: of the watched data there."""
        ...

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What `restore` takes; tensors and plain values."""
        ...

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        ...
