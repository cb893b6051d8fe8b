"""What the calls of a policy's text form mean: names, arguments, and the policies they make."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from tempering.errors import InputError, ScheduleError
from tempering.schedules import PATTERNS, as_schedule
from tempering.schedules.base import number
from tempering.schedules.text import complaint
from tempering.tokens.delimiters import Mark
from tempering.tokens.phases import Phases, Span
from tempering.tokens.policy import Clip, Constant, Ladder, Policy, Room, Scheduled
from tempering.tokens.targeted import DynaTemp, Entropy, Support
from tempering.tokens.text import Argument, Call, parse

# name -> (policy, its parameters in order: kind of value, and a default where it has one)
_FORMS: dict[str, tuple[type[Policy], dict[str, tuple[str, Any]]]] = {
    "constant": (Constant, {"T": ("number", ...)}),
    "schedule": (Scheduled, {"schedule": ("pattern", ...), "length": ("whole", ...)}),
    "support": (Support, {"pattern": ("pattern", ...), "length": ("whole", None)}),
    "entropy": (Entropy, {"T0": ("number", ...), "theta": ("number", ...)}),
    "dynatemp": (
        DynaTemp,
        {"range": ("number", ...), "exponent": ("number", 1.0), "temperature": ("number", 1.0)},
    ),
    "ladder": (Ladder, {"a": ("number", ...), "b": ("number", ...), "n": ("whole", ...)}),
    "room": (Room, {"inner": ("policy", ...), "f": ("number", ...)}),
    "clip": (Clip, {"inner": ("policy", ...), "lo": ("number", ...), "hi": ("number", ...)}),
}

_KINDS: dict[str, type[Policy]] = {"phases": Phases} | {n: kind for n, (kind, _) in _FORMS.items()}
# name -> (signature, what it does, an example that parses)
POLICIES: dict[str, tuple[str, str, str]] = {
    name: (kind.signature, kind.summary, kind.example) for name, kind in _KINDS.items()
}


def parse_policy(text: str, tokenizer: Any = None) -> Policy:
    """Read a policy from its text form.

    Parameters
    ----------
    text: e.g. `phases(thinking=1.0, answer=0.2)|clip(0.1,2)`, `support(12)`,
        `schedule(throb(1.5,1,0.5,1.5), length=256)`; `x|f(a)` means `f(x, a)`.
    tokenizer: any tokenizer of transformers' interface; `phases` needs it.

    Returns
    -------
    The policy; `str` of it gives the text back in its one canonical form.

    Raises
    ------
    ScheduleError: names the column, with a caret under it, and says what is known or expected.
    InputError: a delimiter that the tokenizer can't produce, or phases without a tokenizer.
    """
    return _Builder(text, tokenizer).policy(parse(text))


class _Builder:
    """Makes policies of the calls of one text, so that every error can show its column."""

    def __init__(self, text: str, tokenizer: Any) -> None:
        self.text = text
        self.tokenizer = tokenizer

    def error(self, at: int, message: str) -> ScheduleError:
        return complaint(self.text, at + 1, message)

    def policy(self, call: Call) -> Policy:
        if call.name == "phases":
            return self.made(call, lambda: Phases(self.spans(call), self.tokenizer))
        if call.name not in _FORMS:
            raise self.error(call.name_at, self.unknown(call))
        kind, form = _FORMS[call.name]
        values = self.bound(call, kind.signature, form)
        return self.made(call, lambda: kind(**values))

    def made(self, call: Call, make: Callable[[], Policy]) -> Policy:
        try:
            return make()
        except InputError as error:
            if str(error).startswith("column "):
                raise
            raise type(error)(str(self.error(call.name_at, str(error)))) from error

    def unknown(self, call: Call) -> str:
        if call.name in PATTERNS:
            pattern = self.text[call.start : call.end]
            return (
                f"{call.name} is a pattern; say over how many tokens: "
                f"schedule({pattern}, length=256)"
            )
        close = difflib.get_close_matches(call.name, POLICIES, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        return f"no policy is called {call.name!r}; {hint}known are {', '.join(POLICIES)}"

    def bound(
        self, call: Call, signature: str, form: Mapping[str, tuple[str, Any]]
    ) -> dict[str, Any]:
        """The arguments by parameter name, positional ones first, as Python binds them."""
        values: dict[str, Any] = {}
        names = list(form)
        for place, argument in enumerate(call.arguments):
            if argument.keyword is not None:
                name = argument.keyword
            elif place < len(names):
                name = names[place]
            else:
                raise self.error(argument.at, f"{signature} takes {len(names)} arguments at most")
            if name not in form:
                raise self.error(argument.at, f"{signature} has no argument {name!r}")
            if name in values:
                raise self.error(argument.at, f"{signature}: {name} is given twice")
            values[name] = self.value(argument, form[name][0], f"{signature}: {name}")
        for name, (_, default) in form.items():
            if default is ... and name not in values:
                raise self.error(call.name_at, f"{signature} needs {name}")
            values.setdefault(name, default)
        return values

    def value(self, argument: Argument, kind: str, what: str) -> Any:
        given = argument.value
        if kind == "policy":
            if not isinstance(given, Call):
                raise self.error(argument.at, f"{what} takes a policy")
            return self.policy(given)
        if kind == "pattern":
            if isinstance(given, Call):
                # Spaces in place of what stands before keep the pattern's columns right.
                return as_schedule(" " * given.start + self.text[given.start : given.end])
            if not isinstance(given, str):
                return as_schedule(given)
            raise self.error(argument.at, f"{what} takes a number or a pattern")
        if not isinstance(given, float):
            raise self.error(argument.at, f"{what} takes a number")
        if kind == "number":
            return given
        if not given.is_integer():
            raise self.error(argument.at, f"{what} takes a whole number, got {number(given)}")
        return int(given)

    def spans(self, call: Call) -> tuple[tuple[str, Span], ...]:
        spans: dict[str, Span] = {}
        for argument in call.arguments:
            name = argument.keyword
            if name is None:
                raise self.error(argument.at, f"{Phases.signature}: name the phase, as answer=0.7")
            if name in spans:
                raise self.error(argument.at, f"phases: {name} is given twice")
            spans[name] = self.span(name, argument)
        return tuple(spans.items())

    def span(self, name: str, argument: Argument) -> Span:
        given = argument.value
        if not (isinstance(given, Call) and given.name == "between"):
            return Span(self.phase_policy(name, argument))
        signature = 'between(x, "opener", "closer")'
        if not 2 <= len(given.arguments) <= 3:
            raise self.error(given.name_at, f"{signature} takes 2 or 3 arguments")
        inner, *marks = given.arguments
        read = [self.mark(mark, signature) for mark in marks]
        return Span(self.phase_policy(name, inner), (read[0],), tuple(read[1:]))

    def phase_policy(self, name: str, argument: Argument) -> Policy:
        given = argument.value
        if isinstance(given, str):
            raise self.error(argument.at, f"phases: {name} takes a number or a policy")
        if isinstance(given, float):
            if not given >= 0:
                raise self.error(
                    argument.at, f"phases: {name} takes T in 0..inf, got {number(given)}"
                )
            return Constant(given)
        return self.policy(given)

    def mark(self, argument: Argument, signature: str) -> Mark:
        given = argument.value
        if argument.keyword is None and isinstance(given, str):
            return given
        if isinstance(given, Call) and given.name == "ids" and given.arguments:
            ids = [self.value(each, "whole", "ids(...)") for each in given.arguments]
            if min(ids) < 0:
                raise self.error(argument.at, "token ids are 0 or more")
            return tuple(ids)
        raise self.error(
            argument.at, f"{signature} takes its delimiters as text in quotes, or as ids(7,12)"
        )
