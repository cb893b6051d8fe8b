"""Where the reply begins in a prompt: the words by which a chat template changes turns."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from tempering.tokens.delimiters import texts_of
from tempering.tokens.known import TURNS, Mark
from tempering.tokens.pieces import Pieces

# What the template is rendered with, to see what it writes around it.
_SAID, _REPLY, _AGAIN, _RESULT = (f"tempering-{word}" for word in ("said", "reply", "more", "got"))
_USER = {"role": "user", "content": _SAID}
_ASSISTANT = {"role": "assistant", "content": _REPLY}
_ID = "tempering"  # nine letters, as Mistral's templates want
_GOT = {"role": "tool", "tool_call_id": _ID, "name": "call", "content": _RESULT}


class Turns(NamedTuple):
    """What ends a turn. Everything before the last of them is history.

    tokens: texts of added tokens, after which nothing is open, wherever they stand.
    others: those of them after which somebody else speaks: a user, or a tool with its result.
    headers: texts of several tokens, which count in a prompt only: a reply may write them too.
    other_headers: those of them after which somebody else speaks.
    """

    tokens: frozenset[str]
    others: frozenset[str]
    headers: frozenset[str]
    other_headers: frozenset[str]


class Templated:
    """A tokenizer as it is with another chat template, which a server or a request gave."""

    def __init__(self, tokenizer: Any, chat_template: str) -> None:
        self.untemplated = tokenizer
        self.chat_template = chat_template

    def apply_chat_template(self, messages: Any, **settings: Any) -> Any:
        return self.untemplated.apply_chat_template(
            messages, chat_template=self.chat_template, **settings
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self.untemplated, name)

    def __len__(self) -> int:
        return len(self.untemplated)


@lru_cache(maxsize=64)
def with_template(tokenizer: Any, chat_template: str | None) -> Any:
    """The tokenizer with this chat template; itself, when that is its own or none is given.

    One object for each pair, because policies and their tokenizers are kept by identity.
    """
    if not chat_template or chat_template == getattr(tokenizer, "chat_template", None):
        return tokenizer
    return Templated(tokenizer, chat_template)


def turns_of(
    pieces: Pieces, tokenizer: Any, openers: Sequence[Mark], closers: Sequence[Mark]
) -> Turns:
    """How turns change for this tokenizer and its chat template.

    The template is rendered for short conversations, with and without a tool's result. Added
    tokens between the messages are turns; where there are none, the words before the reply are.
    Tokens of published formats and the tokenizer's own ends are turns as well, since a prompt
    may have been written by another template.

    Parameters
    ----------
    openers, closers: of phases, those that the tokenizer names included. None of them is a turn,
        but for a closer that ends every message.
    """
    words = _Words(pieces, [t for m in openers for t in texts_of(m)], [*map(str, closers)])
    replies, others = _Side(), _Side()
    for before, after in _contexts_of(pieces, tokenizer):
        # Without a mark after it, nothing would end the other's turn.
        if replies.add(words.before_reply(after), words):
            others.add(words.before_other(before), words, last=True)
        replies.tokens |= words.ends(after)
    ends = (getattr(tokenizer, f"{name}_token_id", None) for name in ("eos", "bos"))
    known = {*TURNS, *(pieces(end).decode() for end in ends if isinstance(end, int))}
    known = {text for text in known if text in pieces.tags and text not in words.inside}
    return Turns(
        frozenset(replies.tokens | others.tokens | known),
        frozenset(others.tokens - replies.tokens),
        frozenset(replies.headers | others.headers),
        frozenset(others.headers - replies.headers),
    )


class _Words:
    """The words of a template beside the delimiters of phases."""

    def __init__(self, pieces: Pieces, openers: Sequence[str], closers: Sequence[str]) -> None:
        self.pieces = pieces
        self.openers, self.closers = openers, closers
        delimiters = [*openers, *closers]
        self.inside = {tag for tag in pieces.tags if any(tag in text for text in delimiters)}

    def before_reply(self, text: str) -> str:
        """A template may open a phase in the reply, or write an empty one: that is the reply's."""
        return self.before_other(_split(text, self.openers)[0])

    def before_other(self, text: str) -> str:
        """A message before may have ended in a phase."""
        parts = _split(text, self.closers)
        return next((part for part in reversed(parts) if part.strip()), "")

    def ends(self, text: str) -> set[str]:
        """A closer that stands right behind somebody's message ends all messages (harmony's)."""
        first = self.pieces.tags_in(text)[:1]
        return {tag for tag in first if tag in self.closers and text.lstrip().startswith(tag)}

    def tags(self, text: str) -> list[str]:
        return [tag for tag in self.pieces.tags_in(text) if tag not in self.inside]


class _Side:
    """The tokens, or else the words, that stand before the messages of one side."""

    def __init__(self) -> None:
        self.tokens: set[str] = set()
        self.headers: set[str] = set()

    def add(self, text: str, words: _Words, *, last: bool = False) -> bool:
        """Take in what stands before a message; whether that marks a turn at all."""
        tags = words.tags(text)
        header = text.rstrip()
        if tags:
            self.tokens |= set(tags[-1:] if last else tags)
        elif any(c.isalnum() for c in header):
            self.headers.add(header)
        else:
            return False
        return True


def _split(text: str, words: Sequence[str]) -> list[str]:
    ordered = sorted(words, key=len, reverse=True)
    return re.split("|".join(map(re.escape, ordered)), text) if ordered else [text]


# Rendering takes tens of milliseconds, and a server makes many policies of one tokenizer.
_KEPT: WeakKeyDictionary[Any, tuple[str, list[tuple[str, str]]]] = WeakKeyDictionary()


def _contexts_of(pieces: Pieces, tokenizer: Any) -> list[tuple[str, str]]:
    template = str(getattr(tokenizer, "chat_template", None))
    kept = _KEPT.get(tokenizer)
    if kept is None or kept[0] != template:
        kept = _KEPT[tokenizer] = template, list(_Template(pieces, tokenizer).contexts())
    return kept[1]


class _Template:
    """A tokenizer's chat template, rendered for short conversations."""

    def __init__(self, pieces: Pieces, tokenizer: Any) -> None:
        self.pieces = pieces
        self.tokenizer = tokenizer
        self.parts = False

    def contexts(self) -> Iterator[tuple[str, str]]:
        """(what is written before somebody's message, and between it and the reply)."""
        text = self.render(_USER)
        if _SAID not in text:  # some templates take contents in parts only
            self.parts = True
            text = self.render(_USER)
        yield "", _between(text, _SAID)
        yield "", _between(self.render(_USER, _ASSISTANT), _SAID, _REPLY)
        text = self.render(_USER, _ASSISTANT, {"role": "user", "content": _AGAIN})
        yield _between(text, _REPLY, _AGAIN), _between(text, _AGAIN)
        # Templates differ in what they take for a call.
        for arguments, content in product(({}, "{}"), ("", None)):
            function = {"name": "call", "arguments": arguments}
            calls = [{"id": _ID, "type": "function", "function": function}]
            called = {"role": "assistant", "content": content, "tool_calls": calls}
            text = self.render(_USER, called, _GOT)
            if _RESULT in text:
                yield _beyond(self.render(_USER, called), text), _between(text, _RESULT)
                yield "", _between(self.render(_USER, called, _GOT, _ASSISTANT), _RESULT, _REPLY)
                return

    def render(self, *messages: dict[str, Any]) -> str:
        """The text of a conversation, up to the reply; "" where the template refuses it."""
        # mistral-common warns of texts, and writes the reply's header without being asked.
        settings = (
            {"tokenize": True, "return_dict": False}
            if self.pieces.mistral
            else {"tokenize": False, "add_generation_prompt": messages[-1]["role"] != "assistant"}
        )
        given = [
            {**m, "content": [{"type": "text", "text": m["content"]}]}
            if self.parts and m["content"]
            else m
            for m in messages
        ]
        try:
            text = self.tokenizer.apply_chat_template(given, **settings)
        except Exception:  # a template is a program of its own and may raise anything
            return ""
        if self.pieces.mistral:
            return self.pieces.join(text).decode(errors="replace")
        return text if isinstance(text, str) else ""


def _between(text: str, before: str, after: str | None = None) -> str:
    """The text behind the last `before`, up to `after`; "" where they aren't in this order."""
    _, found, rest = text.rpartition(before)
    if after is None:
        return rest if found else ""
    between, closed, _ = rest.partition(after)
    return between if found and closed else ""


def _beyond(shorter: str, longer: str) -> str:
    """What a conversation adds to a shorter one, up to the tool's result."""
    if not shorter:
        return ""
    shared = next((i for i, (a, b) in enumerate(zip(shorter, longer)) if a != b), len(shorter))
    return longer[shared:].partition(_RESULT)[0]
