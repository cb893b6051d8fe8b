"""Which phases are open, from token ids: a pure fold over the text that the tokens spell."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from tempering.errors import InputError
from tempering.tokens.known import Header, Mark
from tempering.tokens.pieces import TAG, Pieces
from tempering.tokens.state import TokenState

OTHERS = ""  # what is "open" while somebody else speaks: no delimiter counts until the next turn
_GAP = 96  # bytes of a header between two of its parts; tools' names have 64 characters at most


class Meaning(NamedTuple):
    """What a delimiter does, in this order.

    turn: begins a turn: closes everything. others: that turn is not the model's.
    closes: closes the innermost open phase of these, and then opens nothing.
    ends: the same, but opens its own phase all the same.
    opens: a phase.
    """

    opens: str | None = None
    closes: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    turn: bool = False
    others: bool = False


@dataclass(frozen=True)
class Tracker:
    """Follows the delimiters through a stream of tokens.

    Phases nest: the innermost open one counts. A closer closes its phase and those opened inside
    it; without an open phase it does nothing, as does an opener of a phase that is open. One text
    that is opener and closer (a code fence) alternates. A new turn closes everything, and in a
    turn that is not the model's no delimiter counts. In a reply only special tokens are turns: a
    model may write of others, such as `<tool_response>`.

    A delimiter that the vocabulary has as one added token is that token; text that other tokens
    spell is then only text. Any other is matched on the bytes of the text.

    Parameters
    ----------
    meanings: of each delimiter. headers: more of them, which count in prompts only.
    """

    meanings: Mapping[Mark, Meaning]
    pieces: Pieces | None
    headers: Mapping[str, Meaning] = field(default_factory=dict)
    _tokens: dict[int, Meaning] = field(init=False)
    _own: dict[int, Meaning] = field(init=False)  # those that count in a reply
    _reply: _Texts | None = field(init=False)
    _prompt: _Texts | None = field(init=False)
    _sequences: tuple[tuple[int, ...], ...] = field(init=False)

    def __post_init__(self) -> None:
        texts = [mark for mark in self.meanings if isinstance(mark, str)]
        tags = self.pieces.tags if self.pieces is not None else {}
        plain = [text for text in texts if text not in tags]
        inside = [(a, b) for a in plain for b in plain if a != b and a in b]
        if inside:
            short, long = inside[0]
            raise InputError(
                f"the delimiter {short!r} lies inside {long!r}, which would never be seen whole; "
                "leave one of them out"
            )
        spelled: dict[Mark, Meaning] = {
            mark: meaning
            for mark, meaning in self.meanings.items()
            if mark not in tags and not isinstance(mark, tuple)
        }
        set_ = object.__setattr__
        tokens = {tags[m]: self.meanings[m] for m in texts if m in tags}
        special = self.pieces.special if self.pieces is not None else ()
        set_(self, "_tokens", tokens)
        others = {t: m._replace(turn=False) for t, m in tokens.items() if t not in special}
        own = {t: m for t, m in (tokens | others).items() if m != Meaning(others=m.others)}
        set_(self, "_own", own)
        set_(self, "_reply", self._texts(spelled, {}))
        set_(self, "_prompt", self._texts(spelled, self.headers))
        set_(self, "_sequences", tuple(m for m in self.meanings if isinstance(m, tuple)))

    def _texts(
        self, spelled: Mapping[Mark, Meaning], headers: Mapping[str, Meaning]
    ) -> _Texts | None:
        if self.pieces is None or not (spelled or headers):
            return None
        found = {_pattern(mark, self.pieces): meaning for mark, meaning in spelled.items()}
        # A header that its template sets off by a space may also stand at the prompt's beginning.
        for text, meaning in headers.items():
            found[_pattern(text.lstrip(), self.pieces, alone=text[:1].isspace())] = meaning
        return _Texts(found, self.pieces)

    def begin(self, state: TokenState, prompt: Sequence[int]) -> TokenState:
        """The state after a prompt, of which only the last turn counts."""
        turns = [i for i, t in enumerate(prompt) if (m := self._tokens.get(t)) and m.turn]
        tail = prompt[turns[-1] :] if turns else prompt
        return self._read(state, tail, self._tokens, self._prompt)

    def follow(self, state: TokenState, token: int) -> TokenState:
        """The state after one more token of the reply."""
        return self._read(state, (token,), self._own, self._reply)

    def _read(
        self,
        state: TokenState,
        tokens: Sequence[int],
        single: Mapping[int, Meaning],
        texts: _Texts | None,
    ) -> TokenState:
        if self._sequences:
            for token in tokens:
                state = self._read_ids(self._read_texts(state, (token,), single, texts), token)
            return state
        return self._read_texts(state, tokens, single, texts)

    def _read_texts(
        self,
        state: TokenState,
        tokens: Sequence[int],
        single: Mapping[int, Meaning],
        texts: _Texts | None,
    ) -> TokenState:
        opened, text, start = state.opened, state.text, 0
        for place, token in enumerate(tokens):
            meaning = single.get(token)
            if meaning is not None:
                if texts is not None:
                    opened, _ = texts.read(opened, text, tokens[start:place])
                opened, text, start = _after(opened, meaning), b"", place + 1
        if texts is not None:
            opened, text = texts.read(opened, text, tokens[start:])
        return replace(state, opened=opened, text=text)

    def _read_ids(self, state: TokenState, token: int) -> TokenState:
        ids = (*state.ids, token)
        for mark in sorted(self._sequences, key=len, reverse=True):
            if ids[-len(mark) :] == mark:
                return replace(state, opened=_after(state.opened, self.meanings[mark]), ids=())
        kept = max(map(len, self._sequences)) - 1
        return replace(state, ids=ids[len(ids) - min(kept, len(ids)) :])


class _Texts:
    """Delimiters that are matched on the bytes of the text."""

    def __init__(self, found: Mapping[_Pattern, Meaning], pieces: Pieces) -> None:
        # At one place the longest counts; alternatives are tried in order.
        ordered = sorted(found, key=lambda pattern: pattern.longest, reverse=True)
        self._meanings = [found[pattern] for pattern in ordered]
        self._regex = re.compile(b"|".join(b"(%b)" % pattern.regex for pattern in ordered))
        self._kept = max(pattern.longest for pattern in ordered)  # and what stands before it
        self._finals = {pattern.final for pattern in ordered}
        self._pieces = pieces
        self._tags = {pieces.tags[t]: _tagged(t) for pattern in ordered for t in pattern.tags}

    def read(
        self, opened: tuple[str, ...], before: bytes, tokens: Sequence[int]
    ) -> tuple[tuple[str, ...], bytes]:
        """Open phases, and the bytes that may begin a delimiter, after these tokens."""
        if self._tags:
            new = b"".join(self._tags.get(token) or self._pieces(token) for token in tokens)
        else:
            new = self._pieces.join(tokens)
        text, consumed = before + new, 0
        if not self._finals.isdisjoint(new):  # a delimiter that wasn't there ends in what is new
            for match in self._regex.finditer(text):
                opened = _after(opened, self._meanings[(match.lastindex or 1) - 1])
                consumed = match.end()
        rest = text[consumed:]
        return opened, rest[len(rest) - min(self._kept, len(rest)) :]


class _Pattern(NamedTuple):
    """A delimiter as a regular expression. longest: bytes it may span. final: its last byte."""

    regex: bytes
    longest: int
    final: int
    tags: tuple[str, ...]


def _pattern(mark: Mark, pieces: Pieces, *, alone: bool = False) -> _Pattern:
    """Added tokens in it stand between bytes that no text has, so that text can't imitate them.

    alone: only where a text, a line or a word begins.
    """
    spelled, tags = [], []
    for part in mark.parts if isinstance(mark, Header) else (str(mark),):
        literal, rest = b"", part
        for tag in pieces.tags_in(part):
            before, _, rest = rest.partition(tag)
            literal += before.encode() + _tagged(tag)
            tags.append(tag)
        spelled.append(literal + rest.encode())
    gap = b"[^<%b]{0,%d}" % (TAG, _GAP)
    longest = sum(map(len, spelled)) + _GAP * (len(spelled) - 1)
    regex = (b"(?<![^\\s%b])" % TAG if alone else b"") + gap.join(map(re.escape, spelled))
    return _Pattern(regex, longest, spelled[-1][-1], tuple(tags))


def _tagged(tag: str) -> bytes:
    return TAG + tag.encode() + TAG


def _after(opened: tuple[str, ...], meaning: Meaning) -> tuple[str, ...]:
    if meaning.turn:
        return (OTHERS,) if meaning.others else ()
    if opened[:1] == (OTHERS,):
        return opened
    for closes, done in ((meaning.closes, True), (meaning.ends, False)):
        for depth in reversed(range(len(opened))):
            if opened[depth] in closes:
                opened = opened[:depth]
                if done:
                    return opened
                break
    if meaning.opens is not None and meaning.opens not in opened:
        return (*opened, meaning.opens)
    return opened
