"""Patterns of temperature (or of support, or of width) over progress u in [0, 1].

A `Schedule` is a small immutable tree of patterns and operations, a pure function of progress.
The scale that reads it decides what u means: depth, token position, training step, stage of a
pipeline. A scale with n layers, positions or steps reads it by `sample(n)`, on the clock of n
points u = l/(n-1), l = 0..n-1.

Its text form, shared by the command line, profiles and docs, round-trips exactly:

    schedule(str(s)) == s          throb(12,3,1,12)|amplitude(1.15)      x|f(a) means f(x, a)

Values are temperatures >= 0. The limits 0 and inf may be written in `constant`, `steps` and `clip`;
patterns and operations that work on logarithms take values > 0, finite.

`shuffle`, `uniform` and `invert` are the controls of an honest comparison. They keep the values,
or the geometric mean, of a pattern *on a clock*, so they exist only on one, by `sample(n)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tempering.binding import Readers, bind, number_arguments
from tempering.calls import Argument, CallNode, Grammar, number_text
from tempering.errors import ScheduleError
from tempering.schedules import operations, patterns
from tempering.schedules.base import PATTERN_CLASSES, Schedule

__all__ = ["PATTERNS", "Schedule", "as_schedule", "controls", "schedule", "schedule_of"]

# name -> (signature, what it does, an example that parses)
PATTERNS: dict[str, tuple[str, str, str]] = {
    kind.name: (kind.signature, kind.summary, kind.example)
    for kind in sorted(
        PATTERN_CLASSES.values(), key=lambda kind: not issubclass(kind, patterns.Pattern)
    )
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
    return schedule_of(_GRAMMAR.read(text))


def schedule_of(call: CallNode) -> Schedule:
    """The pattern that a call makes, for readers of larger texts; `schedule` reads a whole text."""
    kind = PATTERN_CLASSES.get(call.name)
    if kind is None:
        raise call.unknown(PATTERNS, "pattern")
    make: Callable[..., Schedule] = kind
    if issubclass(kind, patterns.Pattern):
        values = number_arguments(call, kind.signature)
        return call.made(lambda: make(values))
    bound = bind(call, kind, _READERS)
    return call.made(lambda: make(*bound))


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
        it has no geometric mean; or the same value everywhere, so that every control equals it.
    """
    values = pattern.sample(n)
    if bool((values == values[0]).all()):
        raise ScheduleError(
            f"{pattern} is {number_text(values[0].item())} everywhere on {n} points, "
            "so its controls would equal it; compare a pattern that varies"
        )
    operations.without_limits(values, pattern.uniform())
    return {
        "uniform": pattern.uniform(),
        "reversed": pattern.reversed(),
        "upside down": pattern.inverted(),
        **{f"shuffled {seed}": pattern.shuffled(seed) for seed in seeds},
    }


def _pattern(argument: Argument, what: str) -> Schedule:
    return schedule_of(argument.call(what, "pattern"))


_GRAMMAR = Grammar("pattern", ScheduleError)
_READERS: Readers = {
    "Schedule": _pattern,
    "int": Argument.whole,
    "float | int": Argument.number,
}
