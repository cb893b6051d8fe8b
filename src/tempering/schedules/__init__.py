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
from collections.abc import Callable, Sequence
from dataclasses import fields
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
    kind = KNOWN.get(call.name)
    if kind is None:
        close = difflib.get_close_matches(call.name, KNOWN, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        known = ", ".join(PATTERNS)
        message = f"no pattern is called {call.name!r}; {hint}known are {known}"
        raise complaint(text, call.column, message)
    if issubclass(kind, patterns.Pattern):
        values = tuple(_number(text, kind, given) for given in call.arguments)
        arguments: list[Any] = [values]
    else:
        arguments = _arguments(text, kind, call)
    make: Callable[..., Schedule] = kind
    try:
        return make(*arguments)
    except ScheduleError as error:
        raise complaint(text, call.column, str(error)) from None


def _arguments(text: str, kind: type[Schedule], call: Call) -> list[Any]:
    """What the fields of an operation take from the arguments of its call."""
    wanted = fields(kind)  # type: ignore[arg-type]  # operations are dataclasses, their base isn't
    if len(call.arguments) != len(wanted):
        message = f"takes {len(wanted)} arguments (x is one), got {len(call.arguments)}"
        raise complaint(text, call.column, f"{kind.signature} {message}")
    found: list[Any] = []
    for given, field in zip(call.arguments, wanted):
        if field.type != "Schedule":
            value = _number(text, kind, given, "seed" if field.name == "seed" else None)
            whole = value.is_integer() and abs(value) < 2**53
            if field.type == "int" and not whole:
                message = f"{kind.signature} takes a whole number here, got {number(value)}"
                raise complaint(text, given.column, message)
            found.append(int(value) if field.type == "int" else value)
        elif isinstance(given.value, Call):
            found.append(_build(text, given.value))
        else:
            message = f"takes a pattern here, such as constant({number(given.value)})"
            raise complaint(text, given.column, f"{kind.signature} {message}")
    return found


def _number(text: str, kind: type[Schedule], given: Argument, keyword: str | None = None) -> float:
    if isinstance(given.value, Call):
        message = "takes a number here, not a pattern"
    elif given.keyword == keyword:
        return given.value
    elif keyword is None:
        message = f"takes no keyword here: write {number(given.value)}"
    else:
        message = f"takes {keyword}={number(given.value)} here"
    raise complaint(text, given.column, f"{kind.signature} {message}")
