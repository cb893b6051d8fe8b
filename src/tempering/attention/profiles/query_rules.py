"""Rules that read the logits of a query: its temperature is solved for, or a polynomial of S.

See `rules` for the table.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.attention.limits import COLDEST, HOTTEST
from tempering.attention.profiles.rule_base import Rule
from tempering.binding import number_arguments
from tempering.calls import CallNode, call_text, number_text
from tempering.errors import ProfileError
from tempering.posterior import entropy, temperature_for

# Velickovic et al., "Softmax is not enough (for sharp size generalisation)", 2024, figure 4:
# fitted by them to a head that finds a maximum; entropies up to 0.5 nats are left alone.
PAPER = (-0.037, 0.481, -2.3, 4.917, -1.791)
PAPER_FLOOR = 0.5
_LARGEST = 1e30  # of a polynomial's coefficients, whose sums float64 then holds


class QueryRule(Rule):
    """A temperature that the logits of a query decide."""

    @abstractmethod
    def beta(self, logits: Float[Tensor, "rows keys"]) -> tuple[Tensor, Tensor, Tensor]:
        """beta of each row, and which rows stand at the cold and at the hot bound.

        Hidden logits are -inf.
        """


@dataclass(frozen=True)
class Held(QueryRule):
    """Support or entropy held at a level, by temperatures within bounds.

    level: in keys or in nats. coldest, hottest: bounds of T.
    """

    least: ClassVar[float]

    level: float
    coldest: float = COLDEST
    hottest: float = HOTTEST

    def __post_init__(self) -> None:
        if not self.least <= self.level < math.inf:
            raise ProfileError(
                f"{self.name}({number_text(self.level)}): a held {self.name} is finite and "
                f"at least {number_text(self.least)}"
            )
        if not COLDEST <= self.coldest <= self.hottest <= HOTTEST:
            raise ProfileError(
                f"{self.name}({number_text(self.level)}): bounds of T lie in {COLDEST:g} to "
                f"{HOTTEST:g}, the colder one first; not {self.coldest:g}, {self.hottest:g}"
            )

    @classmethod
    def of(cls, call: CallNode) -> Rule:
        if len(call.arguments) == 2 and call.arguments[1].keyword is None:
            raise call.arguments[1].complaint(
                f"{cls.signature} takes a level, or a level and two bounds of T; a bound alone is "
                "named: hottest=2"
            )
        return super().of(call)

    def __str__(self) -> str:
        if (self.coldest, self.hottest) == (COLDEST, HOTTEST):
            return call_text(self.name, self.level)
        return call_text(self.name, self.level, self.coldest, self.hottest)

    @property
    @abstractmethod
    def entropy(self) -> float:
        """The level in nats."""

    def beta(self, logits: Float[Tensor, "rows keys"]) -> tuple[Tensor, Tensor, Tensor]:
        """beta of each row, and which rows stand at the cold and at the hot bound.

        Hidden logits are -inf. Where no temperature changes anything (one key, or equal logits),
        beta is 1.
        """
        seen = torch.isfinite(logits)
        top = logits.detach().amax(-1)
        bottom = logits.detach().masked_fill(~seen, math.inf).amin(-1)
        free = (seen.any(-1) & (top > bottom)).nonzero().flatten()
        energies = -logits[free]
        with torch.no_grad():
            cold = entropy(energies, self.coldest) >= self.entropy
            hot = (entropy(energies, self.hottest) <= self.entropy) & ~cold
        temperature = energies.new_full((len(free),), self.coldest)
        temperature[hot] = self.hottest
        inner = (~cold & ~hot).nonzero().flatten()
        if len(inner):
            solved = temperature_for(energies[inner], math.exp(self.entropy))
            temperature = temperature.index_put(
                (inner,), solved.clamp(self.coldest, self.hottest).to(temperature)
            )
        beta = logits.new_ones(len(logits)).index_put((free,), temperature.reciprocal())
        ends = [logits.new_zeros(len(logits), dtype=torch.bool) for _ in range(2)]
        ends[0][free], ends[1][free] = cold, hot
        return beta, ends[0], ends[1]


class Support(Held):
    """`Held` at a number of live keys, 1 or more."""

    name, signature, least = "support", "support(level, coldest, hottest)", 1.0

    @property
    def entropy(self) -> float:
        return math.log(self.level)


class Entropy(Held):
    """`Held` at an entropy in nats, 0 or more."""

    name, signature, least = "entropy", "entropy(level, coldest, hottest)", 0.0

    @property
    def entropy(self) -> float:
        return self.level


@dataclass(frozen=True)
class Polynomial(QueryRule):
    """beta = max(1, polynomial in the query's entropy) where that exceeds 0.5 nats, else 1.

    coefficients: of the highest power first. Source: Velickovic et al., 2024, figure 4.
    """

    name, signature = "polynomial", "polynomial(c4, c3, c2, c1, c0)"

    coefficients: tuple[float, ...] = PAPER

    def __post_init__(self) -> None:
        if not self.coefficients or not all(abs(c) <= _LARGEST for c in self.coefficients):
            raise ProfileError(
                "polynomial(..): give finite coefficients, the highest power first, and none "
                f"beyond {_LARGEST:g}"
            )

    @classmethod
    def of(cls, call: CallNode) -> Rule:
        given = number_arguments(call, cls.signature)
        return call.made(lambda: cls(given) if given else cls())

    def __str__(self) -> str:
        return call_text(self.name, *self.coefficients)

    def beta(self, logits: Float[Tensor, "rows keys"]) -> tuple[Tensor, Tensor, Tensor]:
        alive = torch.isfinite(logits).any(-1, keepdim=True)
        found = entropy(-torch.where(alive, logits, torch.zeros_like(logits)))
        value = torch.zeros_like(found, dtype=torch.float64)
        for coefficient in self.coefficients:
            value = value * found + coefficient
        value = torch.where(found > PAPER_FLOOR, value.clamp(min=1.0), torch.ones_like(value))
        cold = value > 1 / COLDEST
        return value.clamp(max=1 / COLDEST).to(found), cold, torch.zeros_like(cold)
