"""Policies with `?` where numbers go: which number each of them is, and between which ends it lies.

    phases(thinking=?, answer=?[0.1,1])|clip(0.1, ?)

`?` may stand for every number of a policy's text but seeds, token ids and the rungs of a `ladder`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from tempering.calls import UNKNOWN, Argument, CallNode, number_text
from tempering.errors import InputError
from tempering.schedules import PATTERNS
from tempering.schedules.base import PATTERN_CLASSES
from tempering.schedules.patterns import Pattern
from tempering.tokens.after import AfterPolicy
from tempering.tokens.budget import BudgetPolicy
from tempering.tokens.grammar import GRAMMAR, POLICIES
from tempering.tokens.phases import Phases
from tempering.tokens.policy import POLICY_CLASSES

MOST_NUMBERS = 8  # a score a trial says too little about more
_DIGITS = 3  # of the numbers that are tried
_WIDE = 4.0  # a range whose ends have at least this ratio is searched in logs


class Place(NamedTuple):
    """What a number of one kind may be.

    low, high: ends of its range where the text states none. start: the value that changes nothing,
    or least, from which a search starts; the middle of the range where None. whole: a count.
    """

    low: float | int
    high: float | int
    start: float | int | None = None
    whole: bool = False


_T, _SUPPORT = Place(0.1, 2.0, 1.0), Place(1.0, 100.0)
_LENGTH = Place(16, 1024, whole=True)
# (call, argument) -> place. "value" is a number of a pattern.
PLACES: dict[tuple[str, str], Place] = {
    ("phases", "value"): _T,
    ("between", "x"): _T,
    ("constant", "T"): _T,
    ("sampler", "T"): _T,
    ("sampler", "top_p"): Place(0.5, 1.0, 1.0),
    ("sampler", "top_k"): Place(1, 200, 200, whole=True),
    ("sampler", "min_p"): Place(0.0, 0.5, 0.0),
    ("schedule", "value"): _T,
    ("schedule", "length"): _LENGTH,
    ("support", "value"): _SUPPORT,
    ("support", "length"): _LENGTH,
    ("entropy", "T0"): _T,
    ("entropy", "theta"): Place(0.01, 2.0, 0.01),
    ("dynatemp", "range"): Place(0.0, 1.0, 0.0),
    ("dynatemp", "exponent"): Place(0.25, 4.0, 1.0),
    ("dynatemp", "temperature"): _T,
    ("room", "f"): Place(0.0, 2.0, 1.0),
    ("clip", "lo"): Place(0.1, 1.0, 0.1),
    ("clip", "hi"): Place(1.0, 3.0, 3.0),
    ("after", "x"): _T,
    ("after", "n"): Place(1, 8, whole=True),
    ("after", "y"): _T,
    ("budget", "x"): _T,
    ("budget", "N"): Place(32, 4096, 4096, whole=True),
    ("loops", "heat"): Place(1.0, 5.0, 1.0),
    ("loops", "ngram"): Place(3, 16, 8, whole=True),
    ("loops", "window"): Place(32, 512, 256, whole=True),
    ("amplitude", "a"): Place(1.0, 2.0, 1.0),
    ("repeat", "n"): Place(1, 8, 1, whole=True),
}
_NAMES = {"inner": "x", "within": "y", "schedule": "value", "pattern": "value"}  # of fields


@dataclass(frozen=True)
class OpenNumber:
    """One `?`: text[begin:end], a number from low to high.

    label: what it is, such as "thinking T". log: whether equal factors count as equal steps.
    """

    label: str
    begin: int
    end: int
    low: float
    high: float
    start: float
    whole: bool

    @property
    def log(self) -> bool:
        return self.low > 0 and self.high / self.low >= _WIDE

    def rounded(self, value: float) -> float:
        """A value of the range in three digits, as it is written."""
        near = float(round(value)) if self.whole else float(f"{value:.{_DIGITS}g}")
        return min(max(near, self.low), self.high)


@dataclass(frozen=True)
class OpenPolicy:
    """A policy's text with numbers left open; `read_open_policy` makes it."""

    text: str
    numbers: tuple[OpenNumber, ...]

    def filled(self, values: Sequence[float | int]) -> str:
        """The text with a value for each open number."""
        parts, done = [], 0
        for number, value in zip(self.numbers, values, strict=True):
            parts += [self.text[done : number.begin], number_text(value)]
            done = number.end
        return "".join(parts) + self.text[done:]

    @property
    def start(self) -> tuple[float, ...]:
        """Where a search starts."""
        return tuple(number.start for number in self.numbers)

    def check(self, make: Callable[[str], Any]) -> None:
        """Make the policy at every corner of its ranges.

        Raises what `make` raises where that is of the policy at the start; InputError that names
        the numbers where it is of a corner.
        """
        make(self.filled(self.start))
        for corner in itertools.product(*((n.low, n.high) for n in self.numbers)):
            try:
                make(self.filled(corner))
            except InputError as error:
                raise InputError(
                    "not every policy in these ranges can be made; narrow a range, as in "
                    f"?[0.2,1.5]: {error}"
                ) from error


def read_open_policy(text: str) -> OpenPolicy:
    """Read a policy with `?` where numbers go.

    text: e.g. `phases(thinking=?, answer=?[0.1,1])`. Without a range of its own, a number has that
        of `PLACES`.

    Raises ScheduleError: names the column; a `?` where no number goes, or one that can't be
    learned; a range that is none. InputError: no `?` at all, or more than 8.
    """
    tree = replace(GRAMMAR, unknowns=True).read(text)
    numbers = sorted(_found(tree, "", None), key=lambda number: number.begin)
    if not numbers:
        raise InputError(
            f"the policy {text:.200} has no ? in it, so there is nothing to learn; write ? for a "
            "number, as in phases(thinking=?, answer=?)"
        )
    if len(numbers) > MOST_NUMBERS:
        raise InputError(
            f"a policy has at most {MOST_NUMBERS} numbers to be learned, and {text:.200} has "
            f"{len(numbers)}; write some of them"
        )
    labels = [number.label for number in numbers]
    return OpenPolicy(
        text,
        tuple(
            replace(number, label=f"{number.label} ({labels[: i + 1].count(number.label)})")
            if labels.count(number.label) > 1
            else number
            for i, number in enumerate(numbers)
        ),
    )


def _found(call: CallNode, phase: str, unit: str | None) -> Iterator[OpenNumber]:
    """The open numbers of a call.

    phase: it stands in. unit: "schedule" or "support", the policy whose pattern the call is; None
    for a policy.
    """
    for index, argument in enumerate(call.arguments):
        name, own = _name(call, index, unit), phase
        if call.name == Phases.name and unit is None and argument.keyword is not None:
            own = f"{phase} {argument.keyword}".strip()
        if not isinstance(argument.value, CallNode):
            continue
        if argument.value.name == UNKNOWN:
            yield _open(call, argument, name, own, unit, index)
        else:
            opens = unit is None and name == "value" and call.name in ("schedule", "support")
            yield from _found(argument.value, own, call.name if opens else unit)


def _name(call: CallNode, index: int, unit: str | None) -> str:
    """Which argument of a call one is; "" where it is none that a number may stand for."""
    argument = call.arguments[index]
    if unit is None and call.name == Phases.name:
        return "value"
    if unit is None and call.name == "between":
        return "x" if index == 0 else ""
    if unit is None and call.name == BudgetPolicy.name:
        return "x" if argument.keyword is None else "N"
    if unit is None and call.name == AfterPolicy.name:
        last = len(call.arguments) - 1
        return {last: "y", last - 1: "n", last - 2: "", last - 3: "x"}.get(index, "")
    kind: Any = (POLICY_CLASSES if unit is None else PATTERN_CLASSES).get(call.name)
    if kind is None:
        return ""
    if issubclass(kind, Pattern):
        return "value"
    if argument.keyword is not None:
        return argument.keyword
    names = [_NAMES.get(each.name, each.name) for each in fields(kind)]
    return names[index] if index < len(names) else ""


def _open(
    call: CallNode, argument: Argument, name: str, phase: str, unit: str | None, index: int
) -> OpenNumber:
    place = _place(call, name, unit)
    if place is None:
        known = POLICY_CLASSES.get(call.name) if unit is None else PATTERN_CLASSES.get(call.name)
        if known is None and call.name not in ("between", "ids"):
            names, what = (POLICIES, "policy") if unit is None else (PATTERNS, "pattern")
            raise call.unknown(names, what)
        raise argument.complaint(
            f"? stands for a number that can be learned, and {call.name} has none here; write what "
            "belongs here"
        )
    given: Any = argument.value
    low, high, start = float(place.low), float(place.high), place.start
    if given.arguments:
        low, high = (each.number("?[low,high]") for each in given.arguments)
        if not low < high < math.inf:
            raise argument.complaint(
                f"a range goes from a lower to a higher number, both finite; got "
                f"{number_text(low)} to {number_text(high)}"
            )
        if place.whole and not (low.is_integer() and high.is_integer()):
            raise argument.complaint(f"{name} is a whole number, and so are the ends of its range")
    own = f"{call.name} {index + 1}" if unit is not None and name == "value" else name
    if name in ("x", "y", "value") and unit is None:
        own = "support" if call.name == "support" else "T"
    label = f"{phase} {own}".strip()
    number = OpenNumber(label, given.start, given.end, low, high, 0.0, place.whole)
    middle = math.sqrt(low * high) if number.log else (low + high) / 2
    own_start = middle if start is None else min(max(float(start), low), high)
    return replace(number, start=number.rounded(own_start))


def _place(call: CallNode, name: str, unit: str | None) -> Place | None:
    if unit is None:
        return PLACES.get((call.name, name))
    if name == "value":
        return PLACES[unit, "value"]
    if unit == "support" and call.name == "clip":  # its ends are numbers of tokens
        return _SUPPORT if name in ("lo", "hi") else None
    return PLACES.get((call.name, name))
