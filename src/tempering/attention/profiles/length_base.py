"""What rules of length share: numbers, the text form, bounds of T. `length_rules` has the rules."""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tempering.attention.limits import COLDEST, HOTTEST
from tempering.attention.profiles.rule_base import PerHead, Rule
from tempering.calls import call_text, number_text
from tempering.errors import ProfileError

Number = float | int | PerHead


class LengthRule(Rule):
    """A temperature that only the number of visible keys decides."""

    @property
    @abstractmethod
    def numbers(self) -> tuple[Number, ...]:
        """The numbers of the rule; those of single heads are `PerHead`."""

    @abstractmethod
    def of_counts(
        self, seen: Int[Tensor, "rows heads_or_1 q_seq"], places: Tensor | None = None
    ) -> Float[Tensor, "rows heads q_seq"]:
        """beta for queries that see so many keys; float64, heads 1 where all are alike.

        places: of each query among the tokens, counted from 1, which a law of the layer's own
        reads; the same as `seen` without it.
        """

    @property
    def heads(self) -> int | None:
        counts = {len(item) for item in self.numbers if isinstance(item, PerHead)}
        return max(counts, default=None)

    def at_bounds(self, beta: Tensor) -> tuple[int, int]:
        """How many of these betas stand at the cold and at the hot bound of the rule."""
        return 0, 0


class Law(LengthRule):
    """A rule of length with a formula of its own, `law`."""

    @staticmethod
    @abstractmethod
    def law(n: Tensor, *numbers: Any) -> Tensor:
        """beta at n keys (float64), from the numbers of the rule in the order of its fields."""

    @property
    def numbers(self) -> tuple[Number, ...]:
        return tuple(getattr(self, each.name) for each in fields(self))  # type: ignore[arg-type]

    def of_counts(
        self, seen: Int[Tensor, "rows heads_or_1 q_seq"], places: Tensor | None = None
    ) -> Float[Tensor, "rows heads q_seq"]:
        return type(self).law(seen.clamp(min=1).double(), *_columns(self, seen.device))

    @property
    def label(self) -> str:
        shown = ["heads(..)" if isinstance(item, PerHead) else item for item in self._shown()]
        return (
            f"{self.name}({','.join(x if isinstance(x, str) else number_text(x) for x in shown)})"
        )

    def _shown(self) -> tuple[Number, ...]:
        """The numbers that the text form has."""
        return self.numbers

    def __str__(self) -> str:
        return call_text(self.name, *self._shown())

    def _check(self, **limits: tuple[float | int, float | int, str]) -> None:
        """ProfileError unless every number is finite and within its limits (low, high, words)."""
        counts = {len(item) for item in self.numbers if isinstance(item, PerHead)}
        if len(counts) > 1:
            raise ProfileError(
                f"{self.label}: its numbers are for {' and for '.join(map(str, sorted(counts)))} "
                "heads; give one number, or one for each head of the layer"
            )
        for each, given in zip(fields(self), self.numbers, strict=True):  # type: ignore[arg-type]
            low, high, words = limits.get(each.name, (-math.inf, math.inf, "a finite number"))
            for head, value in enumerate(given if isinstance(given, PerHead) else (given,)):
                if not (math.isfinite(value) and low <= value <= high):
                    place = f", head {head}" if isinstance(given, PerHead) else ""
                    raise ProfileError(
                        f"{self.label}{place}: {each.name} is {words}, not {number_text(value)}"
                    )


@functools.lru_cache(maxsize=4096)
def _columns(rule: LengthRule, device: torch.device) -> tuple[Tensor | float | int, ...]:
    """The numbers of a rule; those of single heads as Float[Tensor, "heads 1"] in float64."""
    return tuple(
        torch.tensor(item, dtype=torch.float64, device=device)[:, None]
        if isinstance(item, PerHead)
        else item
        for item in rule.numbers
    )


@dataclass(frozen=True)
class Bounded(Law):
    """A law whose T is held within bounds, where it has any.

    coldest, hottest: bounds of T. Queries that are held there are counted.
    """

    def __post_init__(self) -> None:
        self._check_numbers()
        coldest, hottest = self.bounds
        if not COLDEST <= coldest <= hottest <= HOTTEST:
            raise ProfileError(
                f"{self.label}: bounds of T lie in {COLDEST:g} to {HOTTEST:g}, the colder one "
                f"first; not {coldest:g}, {hottest:g}"
            )

    @abstractmethod
    def _check_numbers(self) -> None: ...

    @property
    def bounds(self) -> tuple[float, float]:
        """Coldest and hottest T."""
        coldest, hottest = self.numbers[-2:]
        assert isinstance(coldest, float | int) and isinstance(hottest, float | int)
        return float(coldest), float(hottest)

    @property
    def free(self) -> bool:
        """Whether the rule has no bounds of its own."""
        return self.bounds == (COLDEST, HOTTEST)

    def _shown(self) -> tuple[Number, ...]:
        return self.numbers[:-2] if self.free else self.numbers

    def at_bounds(self, beta: Tensor) -> tuple[int, int]:
        if self.free:
            return 0, 0
        coldest, hottest = self.bounds
        return int((beta >= 1 / coldest).sum()), int((beta <= 1 / hottest).sum())

    @staticmethod
    def held(beta: Tensor, coldest: Any, hottest: Any) -> Tensor:
        """beta with T held within bounds; bounds as wide as attention's own hold nothing."""
        if isinstance(coldest, Tensor) or (coldest, hottest) != (COLDEST, HOTTEST):
            beta = torch.minimum(beta, _beyond(coldest, beta, COLDEST, math.inf))
            beta = torch.maximum(beta, _beyond(hottest, beta, HOTTEST, -math.inf))
        return beta


def _beyond(bound: Any, beta: Tensor, limit: float, nothing: float) -> Tensor:
    """1/bound, or `nothing` where the bound is attention's own limit, which holds nothing."""
    value = torch.as_tensor(bound, dtype=beta.dtype, device=beta.device)
    return torch.where(value == limit, nothing, 1 / value)
