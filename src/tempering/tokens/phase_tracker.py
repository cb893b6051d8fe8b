"""Which phases are open after some token ids, from the delimiters in the text that they spell."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from tempering.errors import InputError
from tempering.tokens.known_delimiters import Delimiter, Header
from tempering.tokens.token_bytes import TAG, TokenBytes
from tempering.tokens.token_state import TokenState

# The open "phase" of a turn that is not the model's: no delimiter counts until the next turn.
OTHERS = ""
# Bytes that a header may have between two of its parts. A tool's name, with its namespace, is the
# longest of them: OpenAI's API allows 64 characters.
_GAP = 96


class Meaning(NamedTuple):
    """What a delimiter does, tried in this order.

    turn: it begins a turn, which closes all phases. others: that turn is not the model's.
    closes: it closes the innermost open phase among these, and does nothing more.
    ends: it closes the innermost open phase among these, and goes on to `opens`.
    opens: it opens this phase.
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
    it. The closer of a phase that isn't open does nothing, and neither does the opener of one that
    is. A text that both opens and closes (a code fence) alternates. A new turn closes all phases,
    and in a turn that is not the model's no delimiter counts. In a reply only special tokens begin
    turns: other tags, such as `<tool_response>`, a model may write about.

    A delimiter that the vocabulary has as one added token is matched as that token, and not where
    other tokens spell its text. Any other delimiter is matched on the bytes of the text.

    Parameters
    ----------
    meanings: what each delimiter does. headers: texts that count in prompts only, likewise.
    """

    meanings: Mapping[Delimiter, Meaning]
    token_bytes: TokenBytes | None
    headers: Mapping[str, Meaning] = field(default_factory=dict)
    _tokens: dict[int, Meaning] = field(init=False)
    _reply_tokens: dict[int, Meaning] = field(init=False)  # those that count in a reply
    _reply: _Texts | None = field(init=False)
    _prompt: _Texts | None = field(init=False)
    _sequences: tuple[tuple[int, ...], ...] = field(init=False)

    def __post_init__(self) -> None:
        texts = [delimiter for delimiter in self.meanings if isinstance(delimiter, str)]
        tag_ids = self.token_bytes.tags if self.token_bytes is not None else {}
        plain = [text for text in texts if text not in tag_ids]
        inside = [(a, b) for a in plain for b in plain if a != b and a in b]
        if inside:
            short, long = inside[0]
            raise InputError(
                f"the delimiter {short!r} lies inside {long!r}, which would never be seen whole; "
                "leave one of them out"
            )
        spelled: dict[Delimiter, Meaning] = {
            delimiter: meaning
            for delimiter, meaning in self.meanings.items()
            if delimiter not in tag_ids and not isinstance(delimiter, tuple)
        }
        set_ = object.__setattr__
        tokens = {tag_ids[m]: self.meanings[m] for m in texts if m in tag_ids}
        special = self.token_bytes.special if self.token_bytes is not None else ()
        set_(self, "_tokens", tokens)
        turnless = {t: m._replace(turn=False) for t, m in tokens.items() if t not in special}
        in_reply = {t: m for t, m in (tokens | turnless).items() if m != Meaning(others=m.others)}
        set_(self, "_reply_tokens", in_reply)
        set_(self, "_reply", self._texts(spelled, {}))
        set_(self, "_prompt", self._texts(spelled, self.headers))
        set_(self, "_sequences", tuple(m for m in self.meanings if isinstance(m, tuple)))

    def _texts(
        self, spelled: Mapping[Delimiter, Meaning], headers: Mapping[str, Meaning]
    ) -> _Texts | None:
        if self.token_bytes is None or not (spelled or headers):
            return None
        patterns = {
            _pattern(delimiter, self.token_bytes): meaning for delimiter, meaning in spelled.items()
        }
        # A header that the template puts behind a space may also begin the prompt.
        for text, meaning in headers.items():
            patterns[_pattern(text.lstrip(), self.token_bytes, alone=text[:1].isspace())] = meaning
        return _Texts(patterns, self.token_bytes)

    def begin(self, state: TokenState, prompt: Sequence[int]) -> TokenState:
        """The state after a prompt, of which only the last turn counts."""
        turns = [i for i, t in enumerate(prompt) if (m := self._tokens.get(t)) and m.turn]
        tail = prompt[turns[-1] :] if turns else prompt
        return self._read(state, tail, self._tokens, self._prompt)

    def follow(self, state: TokenState, token: int) -> TokenState:
        """The state after one more token of the reply."""
        return self._read(state, (token,), self._reply_tokens, self._reply)

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
        for i, token in enumerate(tokens):
            meaning = single.get(token)
            if meaning is not None:
                if texts is not None:
                    opened, _ = texts.read(opened, text, tokens[start:i])
                opened, text, start = _after(opened, meaning), b"", i + 1
        if texts is not None:
            opened, text = texts.read(opened, text, tokens[start:])
        return replace(state, opened=opened, text=text)

    def _read_ids(self, state: TokenState, token: int) -> TokenState:
        ids = (*state.ids, token)
        for delimiter in sorted(self._sequences, key=len, reverse=True):
            if ids[-len(delimiter) :] == delimiter:
                return replace(state, opened=_after(state.opened, self.meanings[delimiter]), ids=())
        kept = max(map(len, self._sequences)) - 1
        return replace(state, ids=ids[len(ids) - min(kept, len(ids)) :])


class _Texts:
    """Delimiters that are matched on the bytes of the text."""

    def __init__(self, meanings: Mapping[_Pattern, Meaning], token_bytes: TokenBytes) -> None:
        # Of two that begin at one byte the longer counts; the expression tries them in order.
        ordered = sorted(meanings, key=lambda pattern: pattern.longest, reverse=True)
        self._meanings = [meanings[pattern] for pattern in ordered]
        self._regex = re.compile(b"|".join(b"(%b)" % pattern.regex for pattern in ordered))
        # One byte more than may begin a delimiter: `alone` looks at the byte before.
        self._kept = max(pattern.longest for pattern in ordered)
        self._finals = {pattern.final for pattern in ordered}
        self._token_bytes = token_bytes
        self._tags = {token_bytes.tags[t]: _tagged(t) for pattern in ordered for t in pattern.tags}

    def read(
        self, opened: tuple[str, ...], before: bytes, tokens: Sequence[int]
    ) -> tuple[tuple[str, ...], bytes]:
        """Open phases, and the bytes that may begin a delimiter, after these tokens."""
        if self._tags:
            new = b"".join(self._tags.get(token) or self._token_bytes(token) for token in tokens)
        else:
            new = self._token_bytes.join(tokens)
        text, consumed = before + new, 0
        if not self._finals.isdisjoint(new):  # a new delimiter ends in the new bytes
            for match in self._regex.finditer(text):
                opened = _after(opened, self._meanings[(match.lastindex or 1) - 1])
                consumed = match.end()
        rest = text[consumed:]
        return opened, rest[len(rest) - min(self._kept, len(rest)) :]


class _Pattern(NamedTuple):
    """A delimiter as a regular expression.

    longest: bytes that it may span. final: its last byte. tags: the added tokens in it.
    """

    regex: bytes
    longest: int
    final: int
    tags: tuple[str, ...]


def _pattern(delimiter: Delimiter, token_bytes: TokenBytes, *, alone: bool = False) -> _Pattern:
    """The pattern of a delimiter.

    Its added tokens are set between bytes that no text has, so that text can't imitate them.
    alone: match only where a text, a line or a word begins.
    """
    spelled, tags = [], []
    for part in delimiter.parts if isinstance(delimiter, Header) else (str(delimiter),):
        literal, rest = b"", part
        for tag in token_bytes.tags_in(part):
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
    """The open phases after a delimiter."""
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
