"""After a marker: one policy, and another from the n-th time on that the model wrote a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from jaxtyping import Float, Float64
from torch import Tensor

from tempering.errors import InputError
from tempering.tokens.delimiters import check_producible, delimiter_text
from tempering.tokens.policy import (
    Policy,
    PolicyOperation,
    check_ladders,
    dispatched,
    value_text,
)
from tempering.tokens.settings import RequestSettings
from tempering.tokens.token_bytes import TokenBytes, token_bytes_of
from tempering.tokens.token_state import NOTHING_GIVEN, TokenState
from tempering.tokens.truncation import Cut


@dataclass(frozen=True, repr=False)
class AfterPolicy(PolicyOperation):
    """x until a marker was written n times, then y.

    The marker counts where the model wrote it, not in the prompt, and from its last token on. A
    marker that the vocabulary has as one added token is that token; any other is found in the
    bytes of the text, so "Wait" also counts in "Waiting". Copies don't overlap. Both policies read
    the whole reply, and their clocks count all of it.

    Parameters
    ----------
    inner: x. marker: a text, or token ids. n: 1 or more. then: y.
    tokenizer: of transformers' interface; needed where the marker is a text.

    Raises InputError: a marker that the tokenizer can't produce, or a text without tokenizer.
    """

    name, signature = "after", 'x|after("marker", n, y)'
    summary = "x until the model has written a marker n times, then y; without x, the request's own"
    example = "constant(1)|after(ids(7,12), 3, 0.5)"

    marker: str | tuple[int, ...]
    n: int
    then: Policy
    tokenizer: Any = field(default=None, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ladders(self.parts)
        if self.n < 1:
            raise InputError(f"after takes n = 1 or more, got {self.n}")
        if self._token_bytes is not None:
            check_producible(self.marker, self._token_bytes, "marker")
        elif isinstance(self.marker, str):
            raise InputError(
                "after finds its marker in the tokenizer's text; give the tokenizer: "
                "parse_policy(text, tokenizer)"
            )

    @property
    def parts(self) -> tuple[Policy, ...]:
        return (self.inner, self.then)

    @property
    def reads_tokens(self) -> bool:
        return True

    @cached_property
    def _token_bytes(self) -> TokenBytes | None:
        return None if self.tokenizer is None else token_bytes_of(self.tokenizer)

    @cached_property
    def _ids(self) -> tuple[int, ...] | None:
        """The marker as token ids, where it is matched on them."""
        if not isinstance(self.marker, str):
            return self.marker
        tags = {} if self._token_bytes is None else self._token_bytes.tags
        return (tags[self.marker],) if self.marker in tags else None

    def start(
        self, prompt: Sequence[int], *, sample: int = 0, given: RequestSettings = NOTHING_GIVEN
    ) -> TokenState:
        first, then = (part.start(prompt, sample=sample, given=given) for part in self.parts)
        return self._around(first, then, TokenState())

    def advance(self, state: TokenState, token: int) -> TokenState:
        first, then = (
            part.advance(own, token) for part, own in zip(self.parts, state.inner, strict=True)
        )
        return self._around(first, then, self._counted(state, token))

    def _around(self, first: TokenState, then: TokenState, own: TokenState) -> TokenState:
        """The state of the policy that is active, around the states of both."""
        shown = then if own.written >= self.n else first
        return replace(
            shown.within(), inner=(first, then), ids=own.ids, text=own.text, written=own.written
        )

    def _counted(self, state: TokenState, token: int) -> TokenState:
        """The state's `written`, and the end of the text that may begin a marker."""
        if state.written >= self.n:
            return state
        if self._ids is not None:
            ids = (*state.ids, token)
            if ids[-len(self._ids) :] == self._ids:
                return replace(state, written=state.written + 1, ids=())
            kept = len(self._ids) - 1
            return replace(state, ids=ids[len(ids) - min(kept, len(ids)) :])
        marker = str(self.marker).encode()
        text = state.text + token_bytes_of(self.tokenizer)(token)
        written, start = state.written, 0
        while (found := text.find(marker, start)) >= 0 and written < self.n:
            written, start = written + 1, found + len(marker)
        rest = text[start:]
        kept = len(marker) - 1 if written < self.n else 0
        return replace(state, written=written, text=rest[len(rest) - min(kept, len(rest)) :])

    def _active(self, state: TokenState) -> int:
        """0 for x, 1 for y."""
        return int(state.written >= self.n)

    def temperatures(
        self, energies: Float[Tensor, "batch vocab"], states: Sequence[TokenState]
    ) -> Float64[Tensor, " batch"]:
        active = [self._active(state) for state in states]
        inner = [state.inner[index] for state, index in zip(states, active)]
        return dispatched([self.parts[index] for index in active], energies, inner)

    def cut(self, state: TokenState) -> Cut:
        index = self._active(state)
        return self.parts[index].cut(state.inner[index])

    def forced(self, state: TokenState) -> int | None:
        index = self._active(state)
        return self.parts[index].forced(state.inner[index])

    def __str__(self) -> str:
        own = ", ".join([delimiter_text(self.marker), str(self.n), value_text(self.then)])
        return f"{self.inner}|{self.name}({own})"
