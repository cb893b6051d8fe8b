"""Where turns begin in a prompt: the tokens and words that a chat template writes between them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from tempering.tokens.delimiters import texts_of
from tempering.tokens.known_delimiters import TURNS, Delimiter
from tempering.tokens.token_bytes import TokenBytes

# Messages that the template is rendered with, to see what it writes around them.
_SAID, _REPLY, _AGAIN, _RESULT = (f"tempering-{word}" for word in ("said", "reply", "more", "got"))
_USER = {"role": "user", "content": _SAID}
_ASSISTANT = {"role": "assistant", "content": _REPLY}
_CALL_ID = "tempering"  # nine letters, which Mistral's templates require
_TOOL = {"role": "tool", "tool_call_id": _CALL_ID, "name": "call", "content": _RESULT}


class Turns(NamedTuple):
    """What begins a turn. What comes before the last turn of a prompt is history.

    tokens: texts of added tokens. They close all phases, in a prompt and in a reply.
    others: those of them that begin the turn of a user or of a tool.
    headers: texts of several tokens. They count in a prompt only: a reply may write them, too.
    other_headers: those of them that begin the turn of a user or of a tool.
    """

    tokens: frozenset[str]
    others: frozenset[str]
    headers: frozenset[str]
    other_headers: frozenset[str]


class Templated:
    """A tokenizer with another chat template, given by a server or a request."""

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
    """The tokenizer with this chat template; the tokenizer itself where the template is its own.

    The same pair gives the same object, because policies are cached by the id of their tokenizer.
    """
    if not chat_template or chat_template == getattr(tokenizer, "chat_template", None):
        return tokenizer
    return Templated(tokenizer, chat_template)


def turns_of(
    token_bytes: TokenBytes,
    tokenizer: Any,
    openers: Sequence[Delimiter],
    closers: Sequence[Delimiter],
) -> Turns:
    """What begins turns for this tokenizer and its chat template.

    The template is rendered for short conversations, with and without a tool's result. Added
    tokens between the messages begin turns; where there are none, the words before a message do.
    Tokens of published formats and the tokenizer's own end and begin tokens do as well, since
    another template may have written the prompt.

    Parameters
    ----------
    openers, closers: of phases, with those that the tokenizer names. None of them begins a turn,
        except a closer that ends every message.
    """
    words = _Words(token_bytes, [t for m in openers for t in texts_of(m)], [*map(str, closers)])
    replies, others = _Side(), _Side()
    for before, after in _contexts_of(token_bytes, tokenizer):
        # The other's turn counts only if something begins the reply, and so ends it.
        if replies.add(words.before_reply(after), words):
            others.add(words.before_other(before), words, last=True)
        replies.tokens |= words.ends(after)
    ends = (getattr(tokenizer, f"{name}_token_id", None) for name in ("eos", "bos"))
    known = {*TURNS, *(token_bytes(end).decode() for end in ends if isinstance(end, int))}
    known = {text for text in known if text in token_bytes.tags and text not in words.inside}
    return Turns(
        frozenset(replies.tokens | others.tokens | known),
        frozenset(others.tokens - replies.tokens),
        frozenset(replies.headers | others.headers),
        frozenset(others.headers - replies.headers),
    )


class _Words:
    """Tells the tags and words of a template that begin turns from the delimiters of phases."""

    def __init__(
        self, token_bytes: TokenBytes, openers: Sequence[str], closers: Sequence[str]
    ) -> None:
        self.token_bytes = token_bytes
        self.openers, self.closers = openers, closers
        delimiters = [*openers, *closers]
        self.inside = {tag for tag in token_bytes.tags if any(tag in text for text in delimiters)}

    def before_reply(self, text: str) -> str:
        """What stands before a reply, without a phase that the template opens in the reply."""
        return self.before_other(_split(text, self.openers)[0])

    def before_other(self, text: str) -> str:
        """What stands before another message, without the closer of a phase in the one before."""
        parts = _split(text, self.closers)
        return next((part for part in reversed(parts) if part.strip()), "")

    def ends(self, text: str) -> set[str]:
        """A closer right after a message of a user or tool: it ends every message (in harmony)."""
        first = self.token_bytes.tags_in(text)[:1]
        return {tag for tag in first if tag in self.closers and text.lstrip().startswith(tag)}

    def tags(self, text: str) -> list[str]:
        return [tag for tag in self.token_bytes.tags_in(text) if tag not in self.inside]


class _Side:
    """The tokens, or else the words, before the messages of one side: the model, or the others."""

    def __init__(self) -> None:
        self.tokens: set[str] = set()
        self.headers: set[str] = set()

    def add(self, text: str, words: _Words, *, last: bool = False) -> bool:
        """Add what stands before a message; returns whether that can begin a turn."""
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


# Tokenizer -> its template and contexts. Rendering takes tens of milliseconds, and a server makes
# many policies with one tokenizer.
_CONTEXTS: WeakKeyDictionary[Any, tuple[str, list[tuple[str, str]]]] = WeakKeyDictionary()


def _contexts_of(token_bytes: TokenBytes, tokenizer: Any) -> list[tuple[str, str]]:
    template = str(getattr(tokenizer, "chat_template", None))
    cached = _CONTEXTS.get(tokenizer)
    if cached is None or cached[0] != template:
        cached = _CONTEXTS[tokenizer] = template, list(_Template(token_bytes, tokenizer).contexts())
    return cached[1]


class _Template:
    """A tokenizer's chat template, rendered for short conversations."""

    def __init__(self, token_bytes: TokenBytes, tokenizer: Any) -> None:
        self.token_bytes = token_bytes
        self.tokenizer = tokenizer
        self.in_parts = False

    def contexts(self) -> Iterator[tuple[str, str]]:
        """(the text before a message of a user or tool, the text between it and the reply)."""
        text = self.render(_USER)
        if _SAID not in text:  # some templates take contents as lists of parts only
            self.in_parts = True
            text = self.render(_USER)
        yield "", _between(text, _SAID)
        yield "", _between(self.render(_USER, _ASSISTANT), _SAID, _REPLY)
        text = self.render(_USER, _ASSISTANT, {"role": "user", "content": _AGAIN})
        yield _between(text, _REPLY, _AGAIN), _between(text, _AGAIN)
        # Templates differ in the form of a tool call that they take.
        for arguments, content in product(({}, "{}"), ("", None)):
            function = {"name": "call", "arguments": arguments}
            calls = [{"id": _CALL_ID, "type": "function", "function": function}]
            called = {"role": "assistant", "content": content, "tool_calls": calls}
            text = self.render(_USER, called, _TOOL)
            if _RESULT in text:
                yield _beyond(self.render(_USER, called), text), _between(text, _RESULT)
                yield "", _between(self.render(_USER, called, _TOOL, _ASSISTANT), _RESULT, _REPLY)
                return

    def render(self, *messages: dict[str, Any]) -> str:
        """The text of a conversation, up to the reply; "" where the template refuses it."""
        # mistral-common warns of texts, and writes the reply's header without being asked.
        settings = (
            {"tokenize": True, "return_dict": False}
            if self.token_bytes.mistral
            else {"tokenize": False, "add_generation_prompt": messages[-1]["role"] != "assistant"}
        )
        conversation = [
            {**m, "content": [{"type": "text", "text": m["content"]}]}
            if self.in_parts and m["content"]
            else m
            for m in messages
        ]
        try:
            text = self.tokenizer.apply_chat_template(conversation, **settings)
        except Exception:  # a template is a program of its own and may raise anything
            return ""
        if self.token_bytes.mistral:
            return self.token_bytes.join(text).decode(errors="replace")
        return text if isinstance(text, str) else ""


def _between(text: str, before: str, after: str | None = None) -> str:
    """The text after the last `before`, up to `after`; "" where they don't come in this order."""
    _, opened, rest = text.rpartition(before)
    if after is None:
        return rest if opened else ""
    between, closed, _ = rest.partition(after)
    return between if opened and closed else ""


def _beyond(shorter: str, longer: str) -> str:
    """What a conversation adds to a shorter one, up to the tool's result."""
    if not shorter:
        return ""
    shared = next((i for i, (a, b) in enumerate(zip(shorter, longer)) if a != b), len(shorter))
    return longer[shared:].partition(_RESULT)[0]
