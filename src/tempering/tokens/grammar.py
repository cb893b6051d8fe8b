"""The text form of policies: what the calls of `tempering.calls` mean here.

A policy is a call of one of `POLICIES`; its patterns are those of `tempering.schedules`. In
`phases(...)` each argument names a phase, and `between(x, "opener", "closer")` states delimiters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tempering.calls import Argument, Call, Grammar, Readers, bind, number
from tempering.errors import ScheduleError
from tempering.schedules import PATTERNS, Schedule, as_schedule, schedule_of
from tempering.tokens import targeted as targeted  # whose policies are KNOWN once it is imported
from tempering.tokens.clock import check_points
from tempering.tokens.delimiters import Mark
from tempering.tokens.phases import Phases, Span
from tempering.tokens.policy import KNOWN, Constant, Operation, Policy

# A request's policy is a line, not a document: sixty phases with a schedule each fit.
_GRAMMAR = Grammar("policy", ScheduleError, strings=True, calls=500, characters=10_000)

# name -> (signature, what it does, an example that parses)
POLICIES: dict[str, tuple[str, str, str]] = {
    kind.name: (kind.signature, kind.summary, kind.example)
    for kind in sorted(
        KNOWN.values(), key=lambda kind: (kind is not Phases, issubclass(kind, Operation))
    )
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
    InputError: a delimiter that the tokenizer can't produce, phases without a tokenizer, or
    patterns that together take too much time and memory.
    """
    return _Builder(tokenizer).policy(_GRAMMAR.read(text))


class _Builder:
    """Makes the policies of one text."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.points = 0  # of patterns that are evaluated at once, in the whole text
        self.readers: Readers = {
            "Policy": lambda argument, what: self.policy(argument.call(what, "policy")),
            "Schedule": _pattern,
            "float | int": Argument.number,
            "int": Argument.whole,
            "int | None": Argument.whole,
        }

    def policy(self, call: Call) -> Policy:
        if call.name == Phases.name:
            return call.made(lambda: Phases(self.spans(call), self.tokenizer))
        kind = KNOWN.get(call.name)
        if kind is None:
            if call.name in PATTERNS:
                raise call.complaint(
                    f"{call.name} is a pattern; say over how many tokens: "
                    f"schedule({call.text}, length=256)"
                )
            raise call.unknown(POLICIES, "policy")
        make: Callable[..., Policy] = kind
        bound = bind(call, kind, self.readers)
        if bound and isinstance(bound[0], Schedule):
            self.points += bound[0].whole_points(bound[1] or 1)
            call.made(lambda: check_points(self.points))
        return call.made(lambda: make(*bound))

    def spans(self, call: Call) -> tuple[tuple[str, Span], ...]:
        spans: dict[str, Span] = {}
        for argument in call.arguments:
            name = argument.keyword
            if name is None:
                raise argument.complaint(f"{Phases.signature}: name the phase, as answer=0.7")
            if name in spans:
                raise argument.complaint(f"phases: {name} is given twice")
            spans[name] = self.span(name, argument)
        return tuple(spans.items())

    def span(self, name: str, argument: Argument) -> Span:
        given = argument.value
        if not (isinstance(given, Call) and given.name == "between"):
            return Span(self.phase_policy(name, argument))
        signature = 'between(x, "opener", "closer")'
        if not 2 <= len(given.arguments) <= 3:
            raise given.complaint(f"{signature} takes 2 or 3 arguments")
        inner, *marks = given.arguments
        read = [_mark(mark, signature) for mark in marks]
        return Span(self.phase_policy(name, inner), (read[0],), tuple(read[1:]))

    def phase_policy(self, name: str, argument: Argument) -> Policy:
        given = argument.value
        if isinstance(given, str):
            raise argument.complaint(f"phases: {name} takes a number or a policy")
        if isinstance(given, float):
            if not given >= 0:
                raise argument.complaint(f"phases: {name} takes T in 0..inf, got {number(given)}")
            return Constant(given)
        return self.policy(given)


def _pattern(argument: Argument, what: str) -> Schedule:
    if isinstance(argument.value, Call):
        return schedule_of(argument.value)
    if isinstance(argument.value, str):
        raise argument.complaint(f"{what} takes a number or a pattern")
    given = argument.value
    return argument.made(lambda: as_schedule(given))


def _mark(argument: Argument, signature: str) -> Mark:
    given = argument.value
    if argument.keyword is None and isinstance(given, str):
        return given
    if isinstance(given, Call) and given.name == "ids" and given.arguments:
        ids = [each.whole("ids(...)") for each in given.arguments]
        if min(ids) < 0:
            raise argument.complaint("token ids are 0 or more")
        return tuple(ids)
    raise argument.complaint(f"{signature} takes its delimiters as text in quotes, or as ids(7,12)")
