"""What is done to patterns: values mapped, progress rearranged, controls drawn on a clock."""

from __future__ import annotations

import math
import random
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from tempering.calls import number, piped, written
from tempering.errors import ScheduleError
from tempering.schedules.base import Schedule, segment


@dataclass(frozen=True, repr=False)
class Operation(Schedule):
    """A schedule made of another one; with its stages and its range unless it says otherwise."""

    inner: Schedule

    @property
    def stages(self) -> int:
        return self.inner.stages

    @property
    def clock_only(self) -> bool:
        return self.inner.clock_only

    def _parts(self) -> tuple[Schedule, ...]:
        return (self.inner,)

    def _check(self) -> None:
        """Any pattern will do."""

    def _range(self, n: int | None) -> tuple[float, float]:
        return self.inner._range(n)

    def __str__(self) -> str:
        return written(self.name, self.inner)


class Map(Operation):
    """Each value becomes another, wherever it stands; never falling, so that the range follows."""

    @abstractmethod
    def _map(self, values: Tensor, n: int | None) -> Tensor: ...

    def _at(self, u: Tensor) -> Tensor:
        return self._map(self.inner._at(u), None)

    def _on(self, n: int, places: Tensor) -> Tensor:
        return self._map(self.inner._on(n, places), n)

    def _range(self, n: int | None) -> tuple[float, float]:
        return self._kept(("range", n), lambda: self._mapped_range(n))

    def _mapped_range(self, n: int | None) -> tuple[float, float]:
        lo, hi = self._map(torch.tensor(self.inner._range(n), dtype=torch.float64), n).tolist()
        return lo, hi


@dataclass(frozen=True, repr=False)
class Amplitude(Map):
    name, signature = "amplitude", "x|amplitude(a)"
    summary = (
        "the log-range of x mapped onto [1/a, a]: its hottest value becomes a, its coldest 1/a"
    )
    example = "throb(12,3,1,12)|amplitude(1.15)"

    a: float | int

    def _map(self, values: Tensor, n: int | None) -> Tensor:
        positive(values, self)
        lo, hi = positive(values.new_tensor(self.inner._range(n)), self).log().tolist()
        if lo == hi:  # a constant has no hottest value: it stands at the middle, 1
            return torch.ones_like(values)
        place = ((values.log() - lo) / (hi - lo)).clamp(0, 1)
        return float(self.a) ** (2 * place - 1)

    def __str__(self) -> str:
        return piped(self.inner, self.name, self.a)

    def _check(self) -> None:
        if not 1 <= self.a < math.inf:
            hint = (
                f"; to turn a pattern upside down write invert(...)|amplitude({number(1 / self.a)})"
                if 0 < self.a < 1
                else ""
            )
            raise ScheduleError(f"amplitude takes a >= 1, finite; got {number(self.a)}{hint}")


@dataclass(frozen=True, repr=False)
class Room(Map):
    name, signature = "room", "x|room(f)"
    summary = "x^f: deviations from 1 times f in logs; 0 gives 1 everywhere, 1 gives x"
    example = "throb(1.3,1,0.8,1.3)|room(0.5)"

    f: float | int

    def _map(self, values: Tensor, n: int | None) -> Tensor:
        return no_new_limit(values**self.f, values, self)

    def __str__(self) -> str:
        return piped(self.inner, self.name, self.f)

    def _check(self) -> None:
        if not 0 <= self.f < math.inf:
            raise ScheduleError(
                f"room takes f >= 0, finite; got {number(self.f)}; "
                "a pattern is turned upside down by invert(...)"
            )
        object.__setattr__(self, "f", 0.0 + self.f)


@dataclass(frozen=True, repr=False)
class Clip(Map):
    name, signature = "clip", "x|clip(lo, hi)"
    summary = "values below lo become lo, above hi become hi"
    example = "throb(12,3,1,12)|clip(2,8)"

    lo: float | int
    hi: float | int

    def _map(self, values: Tensor, n: int | None) -> Tensor:
        return values.clamp(self.lo, self.hi)

    def __str__(self) -> str:
        return piped(self.inner, self.name, self.lo, self.hi)

    def _check(self) -> None:
        if not 0 <= self.lo <= self.hi:
            raise ScheduleError(
                f"clip takes 0 <= lo <= hi, got lo = {number(self.lo)} and hi = {number(self.hi)}"
            )
        object.__setattr__(self, "lo", 0.0 + self.lo)
        object.__setattr__(self, "hi", 0.0 + self.hi)


class Reverse(Operation):
    name, signature = "reverse", "reverse(x)"
    summary, example = "x from its end to its start", "reverse(throb(12,3,1,6))"

    def _at(self, u: Tensor) -> Tensor:
        return self.inner._at(1 - u)

    def _on(self, n: int, places: Tensor) -> Tensor:
        return in_order(self.inner, n, n - 1 - places)


@dataclass(frozen=True, repr=False)
class Repeat(Operation):
    name, signature = "repeat", "repeat(x, n)"
    summary = "n cycles of x; a joint between two cycles is the start of the next"
    example = "repeat(throb(12,3,1,12), 2)"

    n: int

    @property
    def stages(self) -> int:
        return self.n * self.inner.stages

    def _at(self, u: Tensor) -> Tensor:
        cycle, t = segment(u, self.n)
        return self.inner._at(torch.where(cycle == self.n, 1.0, t))

    def _range(self, n: int | None) -> tuple[float, float]:
        return self.inner._range(None)

    def __str__(self) -> str:
        return written(self.name, self.inner, self.n)

    def _check(self) -> None:
        if self.n < 1:
            raise ScheduleError(f"repeat takes n >= 1 cycles, got {self.n}")
        on_progress(self.inner, self)


@dataclass(frozen=True, repr=False)
class Nest(Operation):
    name, signature = "nest", "nest(x, y)"
    summary = (
        "the pattern y inside each stage of x: in the k-th of equal stretches, the k-th stage of x "
        "times y over the geometric mean of y's stages"
    )
    example = "nest(throb(12,3,1,12), throb(1.2,1,1.2))"

    within: Schedule

    @property
    def stages(self) -> int:
        return self.inner.stages * self.within.stages

    @property
    def clock_only(self) -> bool:
        return False  # x is read on the clock of its own stages

    def _parts(self) -> tuple[Schedule, ...]:
        return (self.inner, self.within)

    def _at(self, u: Tensor) -> Tensor:
        levels = self._levels().to(u.device)
        index, t = segment(u, len(levels))
        end = index == len(levels)
        inside = self.within._at(torch.where(end, 1.0, t)) / self._mean()
        outside = levels[torch.where(end, len(levels) - 1, index)]
        return no_new_limit(outside * inside, outside, self)

    def _range(self, n: int | None) -> tuple[float, float]:
        levels = torch.stack(self._levels().aminmax())
        inside = levels.new_tensor(self.within._range(None)) / self._mean()
        lo, hi = no_new_limit(levels * inside, levels, self).tolist()
        return lo, hi

    def _check(self) -> None:
        on_progress(self.within, self)

    def whole_points(self, n: int) -> int:
        pairs = ((self.inner, self.inner.stages), (self.within, self.within.stages))
        return sum(part.size() * k + part.whole_points(k) for part, k in pairs)

    def _levels(self) -> Tensor:
        return self._kept(("levels",), lambda: self.inner._all(self.inner.stages))

    def _mean(self) -> float:
        return self._kept(
            ("mean",), lambda: geometric_mean(self.within._all(self.within.stages), self)
        )

    def __str__(self) -> str:
        return written(self.name, self.inner, self.within)


class Control(Operation):
    """What keeps the values, or the geometric mean, that a pattern has on a clock."""

    clock_only = True

    def _at(self, u: Tensor) -> Tensor:
        raise self._clockless()

    def _clockless(self) -> ScheduleError:
        return ScheduleError(
            f"{self} exists only on a clock: read it with sample(n), "
            "or as a function of progress with on_clock(n)"
        )

    def whole_points(self, n: int) -> int:
        return n * self.inner.size() + self.inner.whole_points(n)

    def _mean(self, n: int | None) -> float:
        """The geometric mean of the inner pattern on the clock of n points."""
        if n is None:
            raise self._clockless()
        return self._kept(("mean", n), lambda: geometric_mean(self.inner._all(n), self))


@dataclass(frozen=True, repr=False)
class Shuffle(Control):
    name, signature = "shuffle", "shuffle(x, seed=s)"
    summary = "control: the values of x on a clock in an order drawn by the seed"
    example = "shuffle(throb(12,3,1,12), seed=0)"

    seed: int

    def _on(self, n: int, places: Tensor) -> Tensor:
        return in_order(self.inner, n, self._kept(("order", n), lambda: self._order(n))[places])

    def _order(self, n: int) -> Tensor:
        # Python promises the same random() for a seed in every version; torch doesn't for randperm
        draw = random.Random(self.seed)
        keys = [draw.random() for _ in range(n)]
        return torch.tensor(sorted(range(n), key=keys.__getitem__), dtype=torch.long)

    def __str__(self) -> str:
        return written(self.name, self.inner, seed=self.seed)

    def _check(self) -> None:
        if not 0 <= self.seed < 2**53:  # what the text form reads back exactly
            raise ScheduleError(f"shuffle takes a seed from 0 to 2^53 - 1, got {self.seed}")


class Uniform(Control):
    name, signature = "uniform", "uniform(x)"
    summary = "control: the geometric mean of x over a clock, everywhere"
    example = "uniform(throb(12,3,1,12))"

    def _on(self, n: int, places: Tensor) -> Tensor:
        return torch.full(places.shape, self._mean(n), dtype=torch.float64)

    def _range(self, n: int | None) -> tuple[float, float]:
        mean = self._mean(n)
        return mean, mean


class Invert(Control):
    name, signature = "invert", "invert(x)"
    summary = "control: x upside down, its geometric mean over a clock squared over x"
    example = "invert(throb(12,3,1,12))"

    def _on(self, n: int, places: Tensor) -> Tensor:
        mean = self._mean(n)
        return mean * (mean / self.inner._on(n, places))

    def _range(self, n: int | None) -> tuple[float, float]:
        mean = self._mean(n)
        lo, hi = self._kept(("range", n), lambda: self.inner._range(n))
        return mean * (mean / hi), mean * (mean / lo)


def in_order(inner: Schedule, n: int, places: Tensor) -> Tensor:
    """Values at places in any order, each the very one that the clock has there.

    Read from the start of the clock on, because the last bit of a vectorized power depends on
    where in its tensor a number stands.
    """
    values = torch.empty(places.shape, dtype=torch.float64)
    ordered, index = places.sort()
    values[index] = inner._on(n, ordered)
    return values


def on_progress(inner: Schedule, operation: Schedule) -> None:
    """Refuse what exists only on a clock where it would be read at other points."""
    if inner.clock_only:
        raise ScheduleError(
            f"{operation.name} reads its pattern at points of its own, but {inner} exists only on "
            f"a clock; put shuffle, uniform and invert outside {operation.name}"
        )


def positive(values: Tensor, operation: Schedule) -> Tensor:
    """The values, none of them a limit: a logarithm is taken next."""
    if not bool(((values > 0) & values.isfinite()).all()):
        raise ScheduleError(
            f"{operation.name} works on logarithms and takes values > 0, finite; {operation} has "
            "a limit, 0 or inf: clip it first"
        )
    return values


def geometric_mean(values: Tensor, operation: Schedule) -> float:
    """exp(mean(log values)); exact where all are one value."""
    lo, hi = positive(values, operation).aminmax()
    return values.log().mean().exp().clamp(lo, hi).item()


def no_new_limit(values: Tensor, source: Tensor, operation: Schedule) -> Tensor:
    """The values, unless one became 0 or inf where its source is neither: float64 ends there."""
    limit = (values == 0) | values.isinf()
    if bool((limit & (source > 0) & source.isfinite()).any()):
        raise ScheduleError(f"{operation} goes beyond the numbers that float64 holds")
    return values
