"""Patterns of temperature (or of support, or of width) over progress u in [0, 1].

A `Schedule` is a small immutable tree of patterns and operations, a pure function of progress.
What u means is up to the scale that reads it: depth, token position, training step, stage of a
pipeline. A scale with n places reads it on the clock u = l/(n-1), l = 0..n-1, by `sample(n)`.

Its text form, shared by the command line, profiles and docs, round-trips exactly:

    schedule(str(s)) == s          throb(12,3,1,12)|amplitude(1.15)      x|f(a) means f(x, a)

Values are temperatures >= 0. The limits 0 and inf may be written as such in `constant`, `steps`
and `clip`; what works on logarithms asks for values > 0 and finite.

`shuffle`, `uniform` and `invert` are the controls of an honest comparison. They keep the values,
or the geometric mean, that a pattern has *on a clock*, so only `sample(n)` defines them.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from tempering.errors import ScheduleError
from tempering.schedules import operations, patterns
from tempering.schedules.base import KNOWN, Schedule, number
from tempering.schedules.text import Argument, Call, complaint, parse

__all__ = ["PATTERNS", "Schedule", "as_schedule", "controls", "schedule"]

# name -> (signature, what it does, an example that parses)
PATTERNS: dict[str, tuple[str, str, str]] = {
    kind.name: (kind.signature, kind.summary, kind.example)
    for kind in sorted(KNOWN.values(), key=lambda kind: not issubclass(kind, patterns.Pattern))
}


def schedule(text: str) -> Schedule:
    """Read a pattern from its text form.

    Parameters
    ----------
    text: e.g. `throb(12,3,1,12)`, `linear(1.2,0.8)`, `throb(12,3,1,12)|amplitude(1.15)`,
        `shuffle(throb(12,3,1,12), seed=0)`; `x|f(a)` means `f(x, a)`.

    Returns
    -------
    The pattern; `str` of it gives the text back in its one canonical form.

    Raises
    ------
    ScheduleError: names the column, with a caret under it, and says what is known or expected.
    """
    return _build(text, parse(text))


def as_schedule(x: str | float | int | Schedule) -> Schedule:
    """A pattern as it is; a text read as a pattern; a number as a constant."""
    if isinstance(x, Schedule):
        return x
    return schedule(x) if isinstance(x, str) else patterns.Constant((float(x),))


def controls(pattern: Schedule, n: int, seeds: Sequence[int] = (0,)) -> dict[str, Schedule]:
    """The patterns that an honest comparison on a clock of n points runs beside this one.

    Parameters
    ----------
    pattern: the pattern under test.
    n: points of the clock.
    seeds: one shuffled control for each.

    Returns
    -------
    name -> control: `uniform` (the geometric mean everywhere), `reversed`, `upside down`
    (inverted about the geometric mean), and `shuffled SEED` for each seed.

    Raises
    ------
    ScheduleError: the pattern has more stages than points; or a limit among its values, so that
        it has no geometric mean; or one value on this clock, so that every control equals it.
    """
    values = pattern.sample(n)
    if bool((values == values[0]).all()):
        raise ScheduleError(
            f"{pattern} is {number(values[0].item())} everywhere on {n} points, "
            "so its controls would equal it; compare a pattern that varies"
        )
    operations.positive(values, pattern.uniform())
    return {
        "uniform": pattern.uniform(),
        "reversed": pattern.reversed(),
        "upside down": pattern.inverted(),
        **{f"shuffled {seed}": pattern.shuffled(seed) for seed in seeds},
    }


def _build(text: str, call: Call) -> Schedule:
    if call.name not in KNOWN:
        close = difflib.get_close_matches(call.name, KNOWN, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise complaint(
            text,
            call.column,
            f"no pattern is called {call.name!r}; {hint}known are {', '.join(PATTERNS)}",
        )
    kind = KNOWN[call.name]
    make: Callable[..., Schedule] = kind
    wanted = {} if issubclass(kind, patterns.Pattern) else _parameters(kind)
    if wanted and len(call.arguments) != len(wanted):
        raise complaint(
            text,
            call.column,
            f"{kind.signature} takes {len(wanted)} arguments (x is one), got {len(call.arguments)}",
        )
    types = list(wanted.items()) or [("number", "float")] * len(call.arguments)
    arguments = [_argument(text, kind, *pair) for pair in zip(call.arguments, types)]
    try:
        return make(*arguments) if wanted else make(tuple(arguments))
    except ScheduleError as error:
        raise complaint(text, call.column, str(error)) from None


def _parameters(kind: type[Schedule]) -> dict[str, str]:
    return {name: p.annotation for name, p in inspect.signature(kind).parameters.items()}


def _argument(text: str, kind: type[Schedule], given: Argument, wanted: tuple[str, str]) -> Any:
    """The argument as the field `wanted` (name, annotation) takes it, or an error at its column."""
    name, annotation = wanted
    keyword = name if name == "seed" else None
    if given.keyword != keyword:
        example = 0.0 if isinstance(given.value, Call) else given.value
        how = f"{keyword}={number(example)}" if keyword else "no keyword"
        raise complaint(text, given.column, f"{kind.signature} takes {how} here")
    if annotation == "Schedule":
        if not isinstance(given.value, Call):
            raise complaint(
                text,
                given.column,
                f"{kind.signature} takes a pattern here, such as constant({number(given.value)})",
            )
        return _build(text, given.value)
    if isinstance(given.value, Call):
        raise complaint(text, given.column, f"{kind.signature} takes a number here, not a pattern")
    if annotation != "int":
        return given.value
    if not given.value.is_integer() or abs(given.value) >= 2**53:
        raise complaint(
            text,
            given.column,
            f"{kind.signature} takes a whole number here, got {number(given.value)}",
        )
    return int(given.value)
