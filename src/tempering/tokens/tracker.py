"""Which phases are open, from token ids: a pure fold over the text that the tokens spell."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from tempering.errors import InputError
from tempering.tokens.delimiters import Mark
from tempering.tokens.pieces import Pieces
from tempering.tokens.state import TokenState


class Meaning(NamedTuple):
    """What a delimiter does: opens a phase, closes the innermost of some, or begins a turn."""

    opens: str | None = None
    closes: tuple[str, ...] = ()
    turn: bool = False


@dataclass(frozen=True)
class Tracker:
    """Follows the delimiters through a stream of tokens.

    Phases nest: the innermost open one counts. A closer closes its phase and those opened inside
    it; without an open phase it does nothing, as does an opener of a phase that is open. One text
    that is opener and closer (a code fence) alternates. A new assistant turn closes everything.
    """

    meanings: Mapping[Mark, Meaning]
    pieces: Pieces | None
    _texts: re.Pattern[bytes] | None = field(init=False)
    _kept: int = field(init=False)
    _sequences: tuple[tuple[int, ...], ...] = field(init=False)

    def __post_init__(self) -> None:
        texts = [mark for mark in self.meanings if isinstance(mark, str)]
        inside = [(a, b) for a in texts for b in texts if a != b and a in b]
        if inside:
            short, long = inside[0]
            raise InputError(
                f"the delimiter {short!r} lies inside {long!r}, which would never be seen whole; "
                "leave one of them out"
            )
        encoded = [re.escape(text.encode()) for text in texts]
        sequences = tuple(mark for mark in self.meanings if not isinstance(mark, str))
        set_ = object.__setattr__
        set_(self, "_texts", re.compile(b"|".join(encoded)) if texts else None)
        set_(self, "_kept", max((len(text.encode()) for text in texts), default=1) - 1)
        set_(self, "_sequences", sequences)

    def read(self, state: TokenState, tokens: Sequence[int]) -> TokenState:
        """The state after these tokens, as to open phases and half-read delimiters."""
        if self._sequences:
            for token in tokens:
                state = self._read_ids(self._read_text(state, (token,)), token)
            return state
        return self._read_text(state, tokens)

    def _read_text(self, state: TokenState, tokens: Iterable[int]) -> TokenState:
        if self._texts is None or self.pieces is None:
            return state
        text = state.text + self.pieces.join(list(tokens))
        opened, consumed = state.opened, 0
        for match in self._texts.finditer(text):
            opened = _after(opened, self.meanings[match.group().decode()])
            consumed = match.end()
        rest = text[consumed:]
        tail = rest[len(rest) - min(self._kept, len(rest)) :]
        return replace(state, opened=opened, text=tail)

    def _read_ids(self, state: TokenState, token: int) -> TokenState:
        ids = (*state.ids, token)
        for mark in sorted(self._sequences, key=len, reverse=True):
            if ids[-len(mark) :] == mark:
                return replace(state, opened=_after(state.opened, self.meanings[mark]), ids=())
        kept = max(map(len, self._sequences)) - 1
        return replace(state, ids=ids[len(ids) - min(kept, len(ids)) :])


def _after(opened: tuple[str, ...], meaning: Meaning) -> tuple[str, ...]:
    if meaning.turn:
        return ()
    for depth in reversed(range(len(opened))):
        if opened[depth] in meaning.closes:
            return opened[:depth]
    if meaning.opens is not None and meaning.opens not in opened:
        return (*opened, meaning.opens)
    return opened
