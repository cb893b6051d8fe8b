"""A budget of tokens for a phase: cooler towards its end, and the closing tag at it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from jaxtyping import Float, Float64
from torch import Tensor

from tempering.errors import InputError
from tempering.tokens.clock import LONGEST
from tempering.tokens.known_delimiters import Delimiter, Header
from tempering.tokens.phases import BASE, Phases, Span
from tempering.tokens.policy import ConstantPolicy, PolicyOperation, every_part
from tempering.tokens.settings import RequestSettings
from tempering.tokens.temper import one_per_row
from tempering.tokens.token_bytes import token_bytes_of
from tempering.tokens.token_state import NOTHING_GIVEN, TokenState
from tempering.tokens.truncation import Cut

_COOLING = 4  # the last quarter of a budget cools


@dataclass(frozen=True, repr=False)
class BudgetPolicy(PolicyOperation):
    """x, with at most N tokens generated in a phase, the tokens of its closing tag among them.

        T = T(x) min(1, 4 r),   r = (N - k - spent)/(N - k)

    k is the number of tokens of the closing tag, spent counts the tokens generated in the phase.
    So T falls linearly over the last quarter of the budget. Where N - k are spent, the closing tag
    is forced, token by token: each has p = 1, whatever the logits say. A phase that is opened again
    after its budget is closed at once. Phases inside the phase (a code block while thinking) count.

    Parameters
    ----------
    inner: x. phase: "thinking", "tool", "code", or a phase of x. limit: N.
    tokenizer: of transformers' interface; needed unless x states the phase's delimiters as ids.

    Raises InputError: a phase without known delimiters or without a closing tag; a budget smaller
    than that tag.
    """

    name, signature = "budget", "x|budget(thinking=N)"
    summary = "at most N tokens in a phase: cooler over the last quarter, then its closing tag"
    example = "phases(a=between(1, ids(3), ids(4)), answer=0.2)|budget(a=64)"
    follows_phases = True

    phase: str
    limit: int
    tokenizer: Any = field(default=None, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.phase == BASE:
            raise InputError(
                f"{BASE} is everything outside the other phases and has no closing tag; limit it "
                "with the engine's own max_tokens"
            )
        tokens = len(self.closing)
        if not self.limit <= LONGEST:
            raise InputError(f"a budget is at most {LONGEST} tokens, got {self.limit}")
        if self.limit < tokens:
            raise InputError(
                f"budget({self.phase}={self.limit}) is smaller than the phase's closing tag, which "
                f"has {tokens} token{'' if tokens == 1 else 's'}: {self.closing}; give more"
            )

    @cached_property
    def _phases(self) -> Phases:
        """The phase alone, by its delimiters in x or by those that are known."""
        for part in every_part(self.inner):
            stated = dict(part.spans).get(self.phase) if isinstance(part, Phases) else None
            if stated is not None:
                own = replace(stated, policy=ConstantPolicy(1.0))
                break
        else:
            own = Span(ConstantPolicy(1.0))
        return Phases(((self.phase, own), (BASE, Span(ConstantPolicy(1.0)))), self.tokenizer)

    @cached_property
    def closing(self) -> tuple[int, ...]:
        """The token ids of the closing tag that is forced: the shortest that the phase has."""
        found = [
            ids
            for delimiter, meaning in self._phases.tracker.meanings.items()
            if self.phase in meaning.closes and (ids := self._ids(delimiter))
        ]
        if not found:
            raise InputError(
                f"{self.phase} has no closing tag that can be written; state one: "
                f'{self.phase}=between(x, "<{self.phase}>", "</{self.phase}>")'
            )
        return min(found, key=len)

    def _ids(self, delimiter: Delimiter) -> tuple[int, ...]:
        if isinstance(delimiter, tuple):
            return delimiter
        if isinstance(delimiter, Header):  # a part of it is the model's to choose
            return ()
        token_bytes = token_bytes_of(self.tokenizer)
        if delimiter in token_bytes.tags:
            return (token_bytes.tags[delimiter],)
        ids = tuple(map(int, self.tokenizer.encode(delimiter, add_special_tokens=False)))
        return ids if token_bytes.join(ids).endswith(delimiter.encode()) else ()

    def start(
        self, prompt: Sequence[int], *, sample: int = 0, given: RequestSettings = NOTHING_GIVEN
    ) -> TokenState:
        inner = self.inner.start(prompt, sample=sample, given=given)
        return self._around(inner, self._phases.start(prompt), ())

    def advance(self, state: TokenState, token: int) -> TokenState:
        own, phases = state.inner
        ids = (*state.ids, token)
        kept = min(len(self.closing) - 1, len(ids))
        return self._around(
            self.inner.advance(own, token),
            self._phases.advance(phases, token),
            ids[len(ids) - kept :],
        )

    def _around(self, inner: TokenState, phases: TokenState, ids: tuple[int, ...]) -> TokenState:
        whole = inner.within(phases, ids=ids)
        return whole if whole.phase else replace(whole, phase=phases.phase)

    @property
    def reads_tokens(self) -> bool:
        return True

    @property
    def forces(self) -> bool:
        return True

    def _left(self, state: TokenState) -> int | None:
        """Tokens before the closing tag; None outside the phase."""
        phases = state.inner[1]
        if phases.phase != self.phase:
            return None
        return self.limit - len(self.closing) - dict(phases.spent)[self.phase]

    def temperatures(
        self, energies: Float[Tensor, "batch vocab"], states: Sequence[TokenState]
    ) -> Float64[Tensor, " batch"]:
        own = self.inner.temperatures(energies, [state.inner[0] for state in states])
        factors = []
        for state in states:
            left = self._left(state)
            cooling = left is not None and left > 0
            free = self.limit - len(self.closing)
            factors.append(min(1.0, _COOLING * (left or 0) / free) if cooling else 1.0)
        return (
            own if all(factor == 1 for factor in factors) else own * one_per_row(factors, energies)
        )

    def forced(self, state: TokenState) -> int | None:
        left = self._left(state)
        if left is None or left > 0:
            return self.inner.forced(state.inner[0])
        # How much of the tag stands already: what was written since the budget was spent.
        for written in range(min(len(self.closing) - 1, -left), 0, -1):
            if state.ids[len(state.ids) - written :] == self.closing[:written]:
                return self.closing[written]
        return self.closing[0]

    def cut(self, state: TokenState) -> Cut:
        return self.inner.cut(state.inner[0])

    def __str__(self) -> str:
        return f"{self.inner}|{self.name}({self.phase}={self.limit})"
