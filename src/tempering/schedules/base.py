"""What every schedule is: a pure function of progress, read at a number, a tensor or a clock."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, SupportsIndex, TypeVar, overload

import torch
from jaxtyping import Float, Float64, Shaped
from torch import Tensor

from tempering.counts import whole_number
from tempering.errors import DepthWarning, ScheduleError

_LARGEST_TREE = 50  # patterns and operations in one schedule: keeps recursion far from its limit
_MOST_STAGES = 1_000_000
_MOST_KEPT = 8  # values that one operation remembers: a clock or two, each with two or three
# Progress this close to a joint between stages is on it, because l/(n-1) is rounded: where a
# pattern jumps there, with room for joints inside joints; where it is continuous, by one rounding.
JOINT = 1e-12
ROUNDING = 2.0**-52

Kept = TypeVar("Kept")
KNOWN: dict[str, type[Schedule]] = {}  # name in the text form -> class, in order of definition


class Schedule(ABC):
    """A pattern over progress u in [0, 1]; immutable and hashable; equal where its text is."""

    name: ClassVar[str]
    signature: ClassVar[str]
    summary: ClassVar[str]
    example: ClassVar[str]

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        if "name" in cls.__dict__:
            KNOWN[cls.name] = cls

    @overload
    def __call__(self, u: float | int) -> float: ...
    @overload
    def __call__(self, u: Tensor) -> Tensor: ...
    def __call__(
        self, u: float | int | Shaped[Tensor, "*shape"]
    ) -> float | Float[Tensor, "*shape"]:
        """The value at progress u.

        Parameters
        ----------
        u: progress in [0, 1], a number or a tensor of any shape.

        Returns
        -------
        The value, >= 0: a float for a number, else a tensor of u's shape and device, at least
        float32, computed in float64 and differentiable in u.

        Raises
        ------
        ScheduleError: u is NaN or outside [0, 1], or the pattern exists only on a clock.
        """
        progress = torch.as_tensor(u, dtype=torch.float64)
        outside = ~((progress >= 0) & (progress <= 1))
        if outside.any():
            where = tuple(outside.nonzero()[0].tolist())
            at = f" at position {list(where)}" if where else ""
            raise ScheduleError(
                f"progress is a number in [0, 1], got {progress[where].item():g}{at}; "
                "divide the step, layer or position by its last value"
            )
        values = self._at(progress)
        if isinstance(u, Tensor):
            return values.to(torch.promote_types(u.dtype, torch.float32))
        return values.item()

    def sample(self, n: SupportsIndex) -> Float64[Tensor, " points"]:
        """The values on the clock of n points, u = l/(n-1); u = 0 where n = 1.

        Parameters
        ----------
        n: points (layers, positions, steps), at least the pattern's `stages`.

        Returns
        -------
        n float64 values.

        Raises
        ------
        ScheduleError: fewer points than stages, so the pattern can't show its cycle.

        Warns
        -----
        DepthWarning: fewer than two points a stage, for a pattern of more than one stage.
        """
        n = whole_number(n, "points", error=ScheduleError)
        self._judge(n)
        return self._all(n)

    def check_clock(self, n: int) -> tuple[float, float]:
        """Raise and warn as `sample(n)` would, without its values; bounds of the values.

        Stricter in one thing: what a limit or float64's end refuses is judged by the pattern's
        whole range over [0, 1], whether a point of the clock meets it or not.
        """
        self._judge(n)
        self.part(n, 0, 1)
        return self._range(n)

    def _judge(self, n: int) -> None:
        if n < self.stages:
            raise ScheduleError(
                f"{self} has {count(self.stages, 'stage')} and can't show "
                f"{'it' if self.stages == 1 else 'them'} on {count(n, 'point')}; "
                f"use a shorter pattern, or at least {count(self.stages, 'point')}"
            )
        if self.stages > 1 and n < 2 * self.stages:
            warnings.warn(
                f"{self} has {self.stages} stages on {n} points, less than two points a stage: "
                f"its cycle shows poorly; {2 * self.stages} points or more show it",
                DepthWarning,
                stacklevel=3,
            )

    def part(self, n: int, start: int, stop: int) -> Float64[Tensor, " points"]:
        """The values l = start..stop-1 of `sample(n)`, without the others; to the last bit or two.

        Only what `whole_points` counts is evaluated beyond them.
        """
        return self._on(n, torch.arange(start, min(stop, n)))

    def whole_points(self, n: int) -> int:
        """How many points must be evaluated at once before one value on a clock of n is known.

        Each counts once for every part that it goes through. 0 for what is a function of progress
        alone. A control needs its whole clock, and `nest` the stages of both its patterns.
        """
        return sum(part.whole_points(n) for part in self._parts())

    @property
    @abstractmethod
    def stages(self) -> int:
        """How many stages the pattern goes through; a clock needs as many points."""

    @property
    def clock_only(self) -> bool:
        """Whether only `sample` defines the values: so it is for shuffled, uniform and inverted."""
        return False

    def amplitude(self, a: float | int) -> Schedule:
        """Map the log-range onto [log 1/a, log a]: the hottest value becomes a, the coldest 1/a."""
        return operation("amplitude")(self, a)

    def room(self, f: float | int) -> Schedule:
        """value ** f: deviations from 1 times f in logs; 0 gives 1 everywhere, 1 the pattern."""
        return operation("room")(self, f)

    def clip(self, lo: float | int, hi: float | int) -> Schedule:
        """Values below lo become lo, above hi become hi."""
        return operation("clip")(self, lo, hi)

    def reversed(self) -> Schedule:
        """The pattern from its end to its start."""
        return operation("reverse")(self)

    def repeat(self, n: SupportsIndex) -> Schedule:
        """n cycles of the pattern, one after the other."""
        return operation("repeat")(self, whole_number(n, "cycles", error=ScheduleError))

    def nested(self, inner: Schedule) -> Schedule:
        """The pattern of `inner` inside each stage of this one."""
        return operation("nest")(self, inner)

    def shuffled(self, seed: SupportsIndex) -> Schedule:
        """The values on a clock in an order drawn by seed (a control)."""
        return operation("shuffle")(self, whole_number(seed, "seed", error=ScheduleError))

    def uniform(self) -> Schedule:
        """The geometric mean over a clock, everywhere (a control)."""
        return operation("uniform")(self)

    def inverted(self) -> Schedule:
        """Upside down about the geometric mean over a clock (a control)."""
        return operation("invert")(self)

    def on_clock(self, n: SupportsIndex) -> Schedule:
        """The values of `sample(n)` as `steps`: a control becomes a function of any progress."""
        return operation("steps")(tuple(self.sample(n).tolist()))

    @abstractmethod
    def __str__(self) -> str:
        """The text form; `schedule` reads it back as an equal pattern."""

    def __repr__(self) -> str:
        return f"schedule({str(self)!r})"

    # Below is what patterns and operations define. A clock may have fewer points than stages here:
    # only `sample` judges that.

    @abstractmethod
    def _at(self, u: Tensor) -> Tensor:
        """Values at float64 progress of any shape."""

    def _on(self, n: int, places: Tensor) -> Tensor:
        """Values at some places (0..n-1) on the clock of n points."""
        return self._at(places.double() / max(n - 1, 1))

    def _all(self, n: int) -> Tensor:
        """Values on the whole clock of n points."""
        return self._on(n, torch.arange(n))

    @abstractmethod
    def _range(self, n: int | None) -> tuple[float, float]:
        """The closed range of the values over [0, 1]; n is the clock's, None without one."""

    def _kept(self, key: tuple[Any, ...], make: Callable[[], Kept]) -> Kept:
        """What `make` gives, computed once for a key: a range, a mean or an order on a clock.

        Without it, operations inside each other would ask those below them again and again, twice
        as often with each level.
        """
        kept = self.__dict__.setdefault("_known", {})
        if key not in kept:
            if len(kept) >= _MOST_KEPT:
                kept.clear()
            kept[key] = make()
        value: Kept = kept[key]
        return value

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_known"}

    def _parts(self) -> tuple[Schedule, ...]:
        return ()

    def size(self) -> int:
        """How many patterns and operations it is made of."""
        return 1 + sum(part.size() for part in self._parts())

    @abstractmethod
    def _check(self) -> None:
        """Raise a ScheduleError for arguments that the pattern has no place for."""

    def __post_init__(self) -> None:
        self._check()
        if (size := self.size()) > _LARGEST_TREE:
            raise ScheduleError(
                f"this pattern is made of {size} parts; at most {_LARGEST_TREE} are meant: "
                "merge operations that follow each other"
            )
        if self.stages > _MOST_STAGES:
            raise ScheduleError(
                f"{self.name} makes {self.stages} stages; at most {_MOST_STAGES} are meant"
            )


def operation(name: str) -> Callable[..., Schedule]:
    """The operation of that name in the text form; they are defined above this module."""
    return KNOWN[name]


def count(n: int, what: str) -> str:
    """`1 point`, `2 points`."""
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def segment(u: Tensor, segments: int, joint: float = JOINT) -> tuple[Tensor, Tensor]:
    """Which of equal segments of [0, 1] u lies in (0..segments), and how far into it (0..1)."""
    scaled = u * segments
    nearest = scaled.round()
    scaled = torch.where((scaled - nearest).abs() <= joint * segments, nearest, scaled)
    index = scaled.detach().floor()
    return index.long(), scaled - index
