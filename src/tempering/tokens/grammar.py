"""The text form of policies: makes policies from the calls that `tempering.calls` reads.

A policy is a call of one of `POLICIES`; its patterns are those of `tempering.schedules`. In
`phases(...)` each argument names a phase, and `between(x, "opener", "closer")` states delimiters.
The arguments of `order(...)` are words, `after(...)` takes a marker, `budget(...)` names a phase.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tempering.binding import Readers, bind
from tempering.calls import Argument, CallNode, Grammar, number_text
from tempering.errors import ScheduleError
from tempering.schedules import PATTERNS, Schedule, as_schedule, schedule_of

# Imported for their policies, which are in POLICY_CLASSES from then on.
from tempering.tokens import targeted as targeted
from tempering.tokens.after import AfterPolicy
from tempering.tokens.budget import BudgetPolicy
from tempering.tokens.clock import check_points
from tempering.tokens.loops import LoopsPolicy
from tempering.tokens.phases import Phases, Span
from tempering.tokens.policy import POLICY_CLASSES, ConstantPolicy, Policy, PolicyOperation
from tempering.tokens.sampler import OrderPolicy, SamplerPolicy

# Requests bring policies, so their size is bounded; sixty phases with a schedule each fit.
GRAMMAR = Grammar(
    "policy", ScheduleError, strings=True, calls=500, characters=10_000, words=(OrderPolicy.name,)
)
# Each reads the chat template when it is made, which takes milliseconds, and every token.
_MOST_READERS = 8
_WIDEST = 2**14  # tokens that the loops of one policy keep; copied at every token

# name -> (signature, what it does, an example that parses)
POLICIES: dict[str, tuple[str, str, str]] = {
    kind.name: (kind.signature, kind.summary, kind.example)
    for kind in sorted(
        POLICY_CLASSES.values(),
        key=lambda kind: (
            kind is not Phases,
            kind is not SamplerPolicy,
            issubclass(kind, PolicyOperation),
        ),
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
    patterns that together need too many points at once.
    """
    return _Builder(tokenizer).policy(GRAMMAR.read(text))


class _Builder:
    """Makes the policies of one text."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.points = 0  # that the patterns of the whole text need at once
        self.readers_of_text = 0
        self.window = 0
        self.readers: Readers = {
            "Policy": lambda argument, what: self.policy(argument.call(what, "policy")),
            "Policy | None": self.value,
            "Schedule": _pattern,
            "float | int": Argument.number,
            "float | int | None": Argument.number,
            "int": Argument.whole,
            "int | None": Argument.whole,
        }

    def policy(self, call: CallNode) -> Policy:
        if call.name in (Phases.name, BudgetPolicy.name):
            self.readers_of_text += 1
            if self.readers_of_text > _MOST_READERS:
                raise call.complaint(
                    f"a policy has {_MOST_READERS} of phases and budget at most; merge some"
                )
        if call.name == Phases.name:
            return call.made(lambda: Phases(self.spans(call), self.tokenizer))
        special = {
            OrderPolicy.name: self.order,
            AfterPolicy.name: self.after,
            BudgetPolicy.name: self.budget,
        }
        if call.name in special:
            return special[call.name](call)
        kind = POLICY_CLASSES.get(call.name)
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
        made = call.made(lambda: make(*bound))
        if isinstance(made, LoopsPolicy):
            self.window += made.window
            if self.window > _WIDEST:
                raise call.complaint(
                    f"the windows of a policy's loops come to {_WIDEST} tokens at most; give "
                    "shorter ones"
                )
        return made

    def spans(self, call: CallNode) -> tuple[tuple[str, Span], ...]:
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
        if not (isinstance(given, CallNode) and given.name == "between"):
            return Span(self.value(argument, f"phases: {name}"))
        signature = 'between(x, "opener", "closer")'
        if not 2 <= len(given.arguments) <= 3:
            raise given.complaint(f"{signature} takes 2 or 3 arguments")
        inner, *rest = given.arguments
        opener, *closers = [_delimiter(argument, signature) for argument in rest]
        return Span(self.value(inner, f"phases: {name}"), (opener,), tuple(closers))

    def value(self, argument: Argument, what: str) -> Policy:
        """A policy, or a number, which is `constant` of it."""
        given = argument.value
        if isinstance(given, str):
            raise argument.complaint(f"{what} takes a number or a policy")
        if isinstance(given, float):
            if not given >= 0:
                raise argument.complaint(f"{what} takes T in 0..inf, got {number_text(given)}")
            return ConstantPolicy(given)
        return self.policy(given)

    def order(self, call: CallNode) -> Policy:
        if not call.arguments or not isinstance(call.arguments[0].value, CallNode):
            raise call.complaint(
                f"{OrderPolicy.signature}: pipe a policy into it, such as constant(0.7)|{call.text}"
            )
        inner = self.policy(call.arguments[0].value)
        names: list[str] = []
        for argument in call.arguments[1:]:
            if not isinstance(argument.value, str):
                raise argument.complaint(f"{OrderPolicy.signature} takes one policy, then words")
            names.append(argument.value)
        return call.made(lambda: OrderPolicy(inner, tuple(names)))

    def after(self, call: CallNode) -> Policy:
        signature = AfterPolicy.signature
        if len(call.arguments) not in (3, 4):
            raise call.complaint(
                f"{signature} takes a marker, how often it is written, and the policy after it"
            )
        *before, marker, count, then = call.arguments
        for argument in call.arguments:
            if argument.keyword is not None:
                raise argument.complaint(f"{signature}: write its arguments without names")
        inner = self.value(before[0], f"{signature}: x") if before else SamplerPolicy()
        text = _delimiter(marker, signature, "its marker")
        n = count.whole(f"{signature}: n")
        after = self.value(then, f"{signature}: y")
        return call.made(lambda: AfterPolicy(inner, text, n, after, self.tokenizer))

    def budget(self, call: CallNode) -> Policy:
        signature = BudgetPolicy.signature
        named = [argument for argument in call.arguments if argument.keyword is not None]
        inner = [argument for argument in call.arguments if argument.keyword is None]
        if len(named) != 1 or len(inner) > 1:
            raise call.complaint(f"{signature} takes one policy and one phase with its tokens")
        phase, limit = str(named[0].keyword), named[0].whole(f"{signature}: N")
        policy = self.value(inner[0], f"{signature}: x") if inner else SamplerPolicy()
        return call.made(lambda: BudgetPolicy(policy, phase, limit, self.tokenizer))


def _pattern(argument: Argument, what: str) -> Schedule:
    if isinstance(argument.value, CallNode):
        return schedule_of(argument.value)
    if isinstance(argument.value, str):
        raise argument.complaint(f"{what} takes a number or a pattern")
    given = argument.value
    return argument.made(lambda: as_schedule(given))


def _delimiter(
    argument: Argument, signature: str, what: str = "its delimiters"
) -> str | tuple[int, ...]:
    given = argument.value
    if argument.keyword is None and isinstance(given, str):
        return given
    if isinstance(given, CallNode) and given.name == "ids" and given.arguments:
        ids = [each.whole("ids(...)") for each in given.arguments]
        if min(ids) < 0:
            raise argument.complaint("token ids are 0 or more")
        return tuple(ids)
    raise argument.complaint(f"{signature} takes {what} as text in quotes, or as ids(7,12)")
