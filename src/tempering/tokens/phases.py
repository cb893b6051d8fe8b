"""A policy for each phase of the text: thinking, answer, tool call, code block, or others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tempering.calls import number
from tempering.errors import InputError
from tempering.tokens.delimiters import KNOWN, Mark, check_producible, chosen, named
from tempering.tokens.pieces import Pieces, pieces_of
from tempering.tokens.policy import Constant, Operation, Policy
from tempering.tokens.state import TokenState
from tempering.tokens.tracker import Meaning, Tracker
from tempering.tokens.turns import turns_of

BASE = "answer"  # the phase of everything outside the others


@dataclass(frozen=True)
class Span:
    """One phase: its policy, and its delimiters where the text form states them."""

    policy: Policy
    opens: tuple[Mark, ...] = ()
    closes: tuple[Mark, ...] = ()

    def __str__(self) -> str:
        inner = self.policy
        text = number(inner.T) if isinstance(inner, Constant) else str(inner)
        return f"between({', '.join([text, *map(_quoted, self._marks())])})" if self.opens else text

    def _marks(self) -> tuple[Mark, ...]:
        return (*self.opens, *self.closes)


@dataclass(frozen=True, repr=False)
class Phases(Policy):
    """A policy for each phase, told apart by delimiters in the text.

    Outside all other phases is `answer`. Phases nest, and the innermost open one counts. A phase
    opened in the prompt or by its template is open when generation begins; phases of earlier
    turns are not. A phase may be reopened; one never closed lasts. A delimiter split over several
    tokens counts from its last token on, and a delimiter's own tokens belong to the phase that
    they end. The clock of a phase's policy counts the tokens generated in that phase.

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
    summary = "a temperature or policy for each phase; between(x, opener, closer) for other phases"
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
                raise InputError(f"{BASE} is what lies outside the other phases; give it no marks")
            if name != BASE and not span.opens and name not in KNOWN:
                raise InputError(
                    f"the phase {name!r} has no known delimiters (known: {', '.join(KNOWN)}); "
                    f'give them: {name}=between(0.7, "<{name}>", "</{name}>")'
                )
            if isinstance(_innermost(span.policy), Phases):
                raise InputError(
                    f"phases don't go inside phases ({name}={span}); list them side by side"
                )
        rungs = {n for _, span in self.spans if (n := span.policy.samples) is not None}
        if len(rungs) > 1:
            raise InputError(f"the ladders of one policy have one n, got {sorted(rungs)}")
        _ = self.tracker

    @cached_property
    def tracker(self) -> Tracker:
        """The delimiters, checked against the tokenizer."""
        pieces = self._pieces()
        meanings: dict[Mark, Meaning] = {}
        for name, span in self.spans:
            if name != BASE:
                self._add(meanings, name, span, pieces)
        if pieces is None:
            return Tracker(meanings, None)
        for mark in meanings:
            check_producible(mark, pieces)
        names = [named(phase, pieces, self.tokenizer) for phase in ("thinking", "tool")]
        if ("thinking", False) in ((name, bool(span.opens)) for name, span in self.spans):
            # A call ends thinking, with or without its closer: vLLM's parsers of Qwen3, GLM,
            # Gemma 4, Kimi K2 and DeepSeek V4 all read it so.
            given = [str(mark) for mark in meanings]
            for mark in names[1].opens:
                if mark in meanings or not any(str(mark) in other for other in given):
                    meaning = meanings.get(mark, Meaning())
                    meanings[mark] = meaning._replace(ends=("thinking",))
        openers = [mark for mark, m in meanings.items() if m.opens]
        closers = [mark for mark, m in meanings.items() if m.closes]
        for found in names:
            openers += found.opens
            closers += found.closes
        turns = turns_of(pieces, self.tokenizer, openers, closers)
        for word in turns.tokens:
            meaning = meanings.get(word, Meaning())
            meanings[word] = meaning._replace(turn=True, others=word in turns.others)
        headers = {
            word: Meaning(turn=True, others=word in turns.other_headers) for word in turns.headers
        }
        return Tracker(meanings, pieces, headers)

    def _add(
        self, meanings: dict[Mark, Meaning], name: str, span: Span, pieces: Pieces | None
    ) -> None:
        """What the delimiters of one phase mean, beside those of the others."""
        opens, closes = span.opens, span.closes
        if not opens:
            found = chosen(name, _need(pieces), self.tokenizer)
            opens, closes = found.opens, found.closes
        for mark in opens:
            meaning = meanings.get(mark, Meaning())
            if meaning.opens is not None:
                raise InputError(
                    f"the delimiter {_quoted(mark)} opens both {meaning.opens} and {name}"
                )
            meanings[mark] = meaning._replace(opens=name)
        for mark in closes:
            meaning = meanings.get(mark, Meaning())
            meanings[mark] = meaning._replace(closes=(*meaning.closes, name))

    def _pieces(self) -> Pieces | None:
        if self.tokenizer is not None:
            return pieces_of(self.tokenizer)
        for name, span in self.spans:
            if name != BASE and not all(isinstance(m, tuple) for m in (*span.opens, *span.closes)):
                _need(None)
        return None

    @cached_property
    def _policies(self) -> dict[str, Policy]:
        return {name: span.policy for name, span in self.spans}

    def start(self, prompt: Sequence[int], *, sample: int = 0) -> TokenState:
        state = TokenState(sample=sample, spent=tuple((name, 0) for name, _ in self.spans))
        return _placed(self.tracker.begin(state, prompt))

    def advance(self, state: TokenState, token: int) -> TokenState:
        spent = tuple((name, n + (name == state.phase)) for name, n in state.spent)
        after = replace(state, position=state.position + 1, spent=spent)
        return _placed(self.tracker.follow(after, token))

    @property
    def samples(self) -> int | None:
        rungs = (span.policy.samples for _, span in self.spans)
        return next((n for n in rungs if n is not None), None)

    @property
    def reads_tokens(self) -> bool:
        return True

    @property
    def most_bytes(self) -> int:
        return sum(span.policy.most_bytes for _, span in self.spans)

    def temperatures(
        self, energies: Float[Tensor, "batch vocab"], states: Sequence[TokenState]
    ) -> Float64[Tensor, " batch"]:
        present = {state.phase for state in states}
        if foreign := present - self._policies.keys():
            raise InputError(
                f"a state is in the phase {foreign.pop()!r}, which {self} doesn't have; make the "
                "states with this policy's own state(prompt, generated)"
            )
        inner = [replace(state, position=dict(state.spent)[state.phase]) for state in states]
        if len(present) == 1:
            return self._policies[present.pop()].temperatures(energies, inner)
        result = energies.new_empty(len(states), dtype=torch.float64)
        for phase in present:
            rows = [row for row, state in enumerate(states) if state.phase == phase]
            policy = self._policies[phase]
            result[rows] = policy.temperatures(energies[rows], [inner[row] for row in rows])
        return result

    def __str__(self) -> str:
        return f"phases({', '.join(f'{name}={span}' for name, span in self.spans)})"


def _innermost(policy: Policy) -> Policy:
    while isinstance(policy, Operation):
        policy = policy.inner
    return policy


def _placed(state: TokenState) -> TokenState:
    return replace(state, phase=(state.opened[-1] if state.opened else "") or BASE)


def _need(pieces: Pieces | None) -> Pieces:
    if pieces is None:
        raise InputError(
            "phases are told apart by the tokenizer's text; give the tokenizer: "
            "parse_policy(text, tokenizer)"
        )
    return pieces


def _quoted(mark: Mark) -> str:
    if isinstance(mark, tuple):
        return f"ids({','.join(map(str, mark))})"
    return json.dumps(str(mark), ensure_ascii=False)
