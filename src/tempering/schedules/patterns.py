"""The patterns themselves: schedules given by their numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tempering.calls import number, written
from tempering.errors import ScheduleError
from tempering.schedules.base import ROUNDING, Schedule, count, segment


@dataclass(frozen=True, repr=False)
class Pattern(Schedule):
    """A schedule given by its numbers, each of them one stage."""

    values: tuple[float, ...]
    fewest: ClassVar[int] = 2
    most: ClassVar[float] = 2
    zero: ClassVar[bool] = False  # may the limit 0 be written?
    infinite: ClassVar[bool] = False  # may the limit inf be written?

    @property
    def stages(self) -> int:
        return len(self.values)

    def _range(self, n: int | None) -> tuple[float, float]:
        return min(self.values), max(self.values)

    def __str__(self) -> str:
        return written(self.name, *self.values)

    def _check(self) -> None:
        if not self.fewest <= len(self.values) <= self.most:
            more = "" if self.fewest == self.most else " or more"
            raise ScheduleError(
                f"{self.signature} takes {count(self.fewest, 'number')}{more}, "
                f"got {len(self.values)}"
            )
        for i, value in enumerate(self.values, 1):
            if not (
                value >= 0 and (self.zero or value > 0) and (self.infinite or value < math.inf)
            ):
                low = ">= 0" if self.zero else "> 0"
                high = "inf included" if self.infinite else "finite"
                raise ScheduleError(
                    f"{self.signature} takes values {low}, {high}; "
                    f"got {number(value)} as its number {i}"
                )
        # 0.0 + -0.0 is 0.0: a minus would show in the text form
        object.__setattr__(self, "values", tuple(0.0 + float(value) for value in self.values))


class Throb(Pattern):
    name, signature = "throb", "throb(a, b, ...)"
    summary = "through its stages at equally spaced progress, interpolated in the log domain"
    example = "throb(12,3,1,12)"
    most = math.inf

    def _at(self, u: Tensor) -> Tensor:
        stages = u.new_tensor(self.values)
        last = len(self.values) - 1
        index, t = segment(u, last, ROUNDING)
        a, b = stages[index], stages[(index + 1).clamp(max=last)]
        # a^(1-t) b^t is exact at the stages; the clamp only takes back its last rounding between
        return (a ** (1 - t) * b**t).clamp(torch.minimum(a, b), torch.maximum(a, b))


class Geometric(Throb):
    name, signature = "geometric", "geometric(a, b)"
    summary, example = "from a to b by equal factors: a (b/a)^u", "geometric(2,0.5)"
    most = 2


class HotToCold(Geometric):
    name, signature = "hot_to_cold", "hot_to_cold(a, b)"
    summary, example = "geometric, from a down to b < a", "hot_to_cold(1.2,0.8)"
    falls: ClassVar[bool] = True

    def _check(self) -> None:
        super()._check()
        a, b = self.values
        if not (a > b if self.falls else a < b):
            raise ScheduleError(
                f"{self.signature} starts {'hotter' if self.falls else 'colder'} than it ends, "
                f"got {number(a)} then {number(b)}; swap them"
            )


class ColdToHot(HotToCold):
    name, signature = "cold_to_hot", "cold_to_hot(a, b)"
    summary, example = "geometric, from a up to b > a", "cold_to_hot(0.8,1.2)"
    falls = False


class Linear(Pattern):
    name, signature = "linear", "linear(a, b)"
    summary, example = "from a to b in a straight line: a + (b - a) u", "linear(1.2,0.8)"
    zero = True

    def _at(self, u: Tensor) -> Tensor:
        a, b = (torch.full_like(u, value) for value in self.values)
        return torch.lerp(a, b, u)


class Cosine(Linear):
    name, signature = "cosine", "cosine(a, b)"
    summary = "from a to b along half a cosine: a + (b - a) (1 - cos(pi u))/2"
    example = "cosine(1.5,0.5)"

    def _at(self, u: Tensor) -> Tensor:
        return super()._at((1 - torch.cos(math.pi * u)) / 2)


class Steps(Pattern):
    name, signature = "steps", "steps(a, b, ...)"
    summary, example = "one value for each of equal stretches of progress", "steps(1.2,1,0.8)"
    fewest, most, zero, infinite = 1, math.inf, True, True

    def _at(self, u: Tensor) -> Tensor:
        index, _ = segment(u, len(self.values))
        return u.new_tensor(self.values)[index.clamp(max=len(self.values) - 1)]


class Constant(Steps):
    name, signature = "constant", "constant(a)"
    summary, example = "one value everywhere; 0 and inf are the limits", "constant(1)"
    most = 1
