"""A schedule read token by token, at a cost that is known and bounded beforehand."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from tempering.errors import InputError
from tempering.schedules import Schedule

LONGEST = 2**20  # positions on one clock, as many as the longest contexts
# Points of patterns that a policy may need at once: those on which a control, such as shuffle, has
# its order or its mean. As many as the usual longest context; 0.1 s and 1 MB.
MOST_POINTS = 2**17
_BLOCK, _BLOCKS = 128, 8  # a clock keeps 8 stretches of 128 values: 32 kB of Python's numbers


@dataclass(frozen=True)
class Clock:
    """A schedule read at token positions: value l of `length` at position l, then the last one.

    Values are evaluated when they are asked for, a stretch at a time.
    """

    schedule: Schedule
    length: int

    def __post_init__(self) -> None:
        if not 1 <= self.length <= LONGEST:
            raise InputError(
                f"length is the expected number of tokens, 1..{LONGEST}; got {self.length}"
            )
        check_points(self.schedule.whole_points(self.length))
        _ = self.range  # a schedule that doesn't fit its length fails here, not while sampling

    @cached_property
    def range(self) -> tuple[float, float]:
        """Bounds of the values."""
        return self.schedule.check_clock(self.length)

    def at(self, position: int) -> float:
        block, place = divmod(min(position, self.length - 1), _BLOCK)
        values = self._blocks.get(block)
        if values is None:
            start = block * _BLOCK
            values = self.schedule.part(self.length, start, start + _BLOCK).tolist()
            if len(self._blocks) >= _BLOCKS:
                self._blocks.clear()
            self._blocks[block] = values
        return values[place]

    @property
    def most_bytes(self) -> int:
        """What the points and the stretches of values take: 8 and 32 bytes a number."""
        points = self.schedule.whole_points(self.length)
        return 8 * points + 32 * min(self.length, _BLOCK * _BLOCKS)

    @cached_property
    def _blocks(self) -> dict[int, list[float]]:
        return {}


def check_points(points: int) -> None:
    """InputError when the patterns of a policy need too many points at once."""
    if points > MOST_POINTS:
        raise InputError(
            f"the patterns of this policy need {points} points before their first value is known, "
            f"at most {MOST_POINTS} are meant: shuffle, uniform, invert and nest read their "
            "patterns whole; give a shorter length"
        )
