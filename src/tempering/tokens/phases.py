"""A policy for each phase of the text: thinking, answer, tool call, code block, or others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from jaxtyping import Float, Float64
from torch import Tensor

from tempering.errors import InputError
from tempering.tokens.delimiters import (
    check_producible,
    delimiter_text,
    delimiters_of,
    named_delimiters,
)
from tempering.tokens.known_delimiters import KNOWN_DELIMITERS, Delimiter
from tempering.tokens.phase_tracker import Meaning, Tracker
from tempering.tokens.policy import Policy, check_ladders, dispatched, every_part, value_text
from tempering.tokens.settings import RequestSettings
from tempering.tokens.token_bytes import TokenBytes, token_bytes_of
from tempering.tokens.token_state import NOTHING_GIVEN, TokenState
from tempering.tokens.truncation import Cut
from tempering.tokens.turns import turns_of

BASE = "answer"  # the phase of everything outside the other phases


@dataclass(frozen=True)
class Span:
    """The settings of one phase: its policy, and its delimiters where the text form states them."""

    policy: Policy
    opens: tuple[Delimiter, ...] = ()
    closes: tuple[Delimiter, ...] = ()

    def __str__(self) -> str:
        text = value_text(self.policy)
        marks = map(delimiter_text, (*self.opens, *self.closes))
        return f"between({', '.join([text, *marks])})" if self.opens else text


@dataclass(frozen=True, repr=False)
class Phases(Policy):
    """A policy for each phase, told apart by delimiters in the text.

    Everything outside the other phases is `answer`. Phases nest, and the innermost open one counts.
    A phase opened in the last turn of the prompt is open when generation begins; phases of earlier
    turns are not. A phase may be reopened; one that is never closed lasts to the end of the turn. A
    delimiter of several tokens counts from its last token on, and its tokens belong to the phase
    that they end. The policy of a phase sees the tokens generated in that phase alone: its clock
    counts them, and `loops` and `after` read them.

    Parameters
    ----------
    spans: (phase, Span) in order; `answer` among them.
    tokenizer: any tokenizer of transformers' interface; needed where delimiters are texts.

    Raises
    ------
    InputError: no `answer`; a phase without known delimiters; a delimiter that the tokenizer
    can't produce, lies inside another, or opens two phases.
    """

    name, signature = "phases", "phases(answer=x, thinking=x, tool=x, code=x)"
    summary = (
        "a temperature, policy or sampler by phase; between(x, opener, closer) for other phases"
    )
    example = "phases(thinking=1, answer=0.2)"

    spans: tuple[tuple[str, Span], ...]
    tokenizer: Any = field(default=None, compare=False)

    def __post_init__(self) -> None:
        names = [name for name, _ in self.spans]
        if BASE not in names:
            raise InputError(
                f"phases needs {BASE}=, the temperature outside the other phases; "
                f"e.g. phases({BASE}=0.7, {', '.join(f'{n}=...' for n in names) or 'thinking=1'})"
            )
        for name, span in self.spans:
            if name == BASE and span.opens:
                raise InputError(
                    f"{BASE} is everything outside the other phases; give it no delimiters"
                )
            if name != BASE and not span.opens and name not in KNOWN_DELIMITERS:
                raise InputError(
                    f"the phase {name!r} has no known delimiters (phases that have: "
                    f"{', '.join(KNOWN_DELIMITERS)}); "
                    f'give them: {name}=between(0.7, "<{name}>", "</{name}>")'
                )
            if any(isinstance(part, Phases) for part in every_part(span.policy)):
                raise InputError(
                    f"phases don't go inside phases ({name}={span}); list them side by side"
                )
            if within := [part for part in every_part(span.policy) if part.follows_phases]:
                raise InputError(
                    f"{within[0]} counts a phase of the whole reply; put it around phases: "
                    f"phases(...)|{within[0].name}(...)"
                )
        check_ladders(self.parts)
        _ = self.tracker

    @cached_property
    def tracker(self) -> Tracker:
        """The delimiters, checked against the tokenizer."""
        token_bytes = self._token_bytes()
        meanings: dict[Delimiter, Meaning] = {}
        for name, span in self.spans:
            if name != BASE:
                self._add(meanings, name, span, token_bytes)
        if token_bytes is None:
            return Tracker(meanings, None)
        for delimiter in meanings:
            check_producible(delimiter, token_bytes)
        thinking, tool = (
            named_delimiters(phase, token_bytes, self.tokenizer) for phase in ("thinking", "tool")
        )
        if ("thinking", False) in ((name, bool(span.opens)) for name, span in self.spans):
            # A tool call ends thinking, also where no closer was written: so read vLLM's parsers of
            # Qwen3, GLM, Gemma 4, Kimi K2 and DeepSeek V4.
            stated = [str(delimiter) for delimiter in meanings]
            for delimiter in tool.opens:
                if delimiter in meanings or not any(str(delimiter) in other for other in stated):
                    meaning = meanings.get(delimiter, Meaning())
                    meanings[delimiter] = meaning._replace(ends=("thinking",))
        openers = [delimiter for delimiter, m in meanings.items() if m.opens]
        closers = [delimiter for delimiter, m in meanings.items() if m.closes]
        for named in (thinking, tool):
            openers += named.opens
            closers += named.closes
        turns = turns_of(token_bytes, self.tokenizer, openers, closers)
        for word in turns.tokens:
            meaning = meanings.get(word, Meaning())
            meanings[word] = meaning._replace(turn=True, others=word in turns.others)
        headers = {
            word: Meaning(turn=True, others=word in turns.other_headers) for word in turns.headers
        }
        return Tracker(meanings, token_bytes, headers)

    def _add(
        self,
        meanings: dict[Delimiter, Meaning],
        name: str,
        span: Span,
        token_bytes: TokenBytes | None,
    ) -> None:
        """Add the delimiters of one phase to those of the others."""
        opens, closes = span.opens, span.closes
        if not opens:
            known = delimiters_of(name, _need(token_bytes), self.tokenizer)
            opens, closes = known.opens, known.closes
        for delimiter in opens:
            meaning = meanings.get(delimiter, Meaning())
            if meaning.opens is not None:
                raise InputError(
                    f"the delimiter {delimiter_text(delimiter)} opens both {meaning.opens} "
                    f"and {name}"
                )
            meanings[delimiter] = meaning._replace(opens=name)
        for delimiter in closes:
            meaning = meanings.get(delimiter, Meaning())
            meanings[delimiter] = meaning._replace(closes=(*meaning.closes, name))

    def _token_bytes(self) -> TokenBytes | None:
        if self.tokenizer is not None:
            return token_bytes_of(self.tokenizer)
        for name, span in self.spans:
            if name != BASE and not all(isinstance(m, tuple) for m in (*span.opens, *span.closes)):
                _need(None)
        return None

    @cached_property
    def _policies(self) -> dict[str, Policy]:
        return {name: span.policy for name, span in self.spans}

    @cached_property
    def _followers(self) -> tuple[str, ...]:
        """The phases whose policy follows the tokens by itself."""
        return tuple(name for name, policy in self._policies.items() if policy.reads_tokens)

    def start(
        self, prompt: Sequence[int], *, sample: int = 0, given: RequestSettings = NOTHING_GIVEN
    ) -> TokenState:
        spent = tuple((name, 0) for name, _ in self.spans)
        inner = tuple(
            self._policies[name].start((), sample=sample, given=given) for name in self._followers
        )
        state = TokenState(sample=sample, spent=spent, given=given, inner=inner)
        return _with_phase(self.tracker.begin(state, prompt))

    def advance(self, state: TokenState, token: int) -> TokenState:
        spent = tuple((name, n + (name == state.phase)) for name, n in state.spent)
        inner = state.inner
        if state.phase in self._followers:
            inner = tuple(
                self._policies[name].advance(own, token) if name == state.phase else own
                for name, own in zip(self._followers, inner, strict=True)
            )
        after = replace(state, position=state.position + 1, spent=spent, inner=inner)
        return _with_phase(self.tracker.follow(after, token))

    @property
    def parts(self) -> tuple[Policy, ...]:
        return tuple(span.policy for _, span in self.spans)

    @property
    def reads_tokens(self) -> bool:
        return True

    def cut(self, state: TokenState) -> Cut:
        return self._policies[state.phase].cut(self._own(state))

    def _own(self, state: TokenState) -> TokenState:
        """The state that the policy of the current phase sees: of the tokens in that phase."""
        if state.phase in self._followers:
            return state.inner[self._followers.index(state.phase)]
        return replace(state, position=dict(state.spent)[state.phase], inner=())

    def temperatures(
        self, energies: Float[Tensor, "batch vocab"], states: Sequence[TokenState]
    ) -> Float64[Tensor, " batch"]:
        present = {state.phase for state in states}
        if foreign := present - self._policies.keys():
            raise InputError(
                f"a state is in the phase {foreign.pop()!r}, which {self} doesn't have; make the "
                "states by state(prompt, generated) of this policy"
            )
        policies = [self._policies[state.phase] for state in states]
        return dispatched(policies, energies, [self._own(state) for state in states])

    def __str__(self) -> str:
        return f"phases({', '.join(f'{name}={span}' for name, span in self.spans)})"


def _with_phase(state: TokenState) -> TokenState:
    """The state with the phase that its next token is sampled in."""
    return replace(state, phase=(state.opened[-1] if state.opened else "") or BASE)


def _need(token_bytes: TokenBytes | None) -> TokenBytes:
    if token_bytes is None:
        raise InputError(
            "phases are told apart by the tokenizer's text; give the tokenizer: "
            "parse_policy(text, tokenizer)"
        )
    return token_bytes
