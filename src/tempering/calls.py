"""The text form of patterns, policies and rules: a reader and a printer; `binding` binds arguments.

expression = call { "|" call }                  x|f(a) means f(x, a)
call       = name "(" [ argument { "," argument } ] ")"
argument   = [ name "=" ] ( number | string | expression ), or a name in a call that takes words
number     = 12 | 0.5 | 1e-3 | inf, or where a caller looks for numbers: ? | ?[0.2,1.5]
string     = as in JSON: "</think>"

A text is read once, into a tree of `CallNode`s. Callers decide what the names mean and build
objects from the calls; their errors, made by `CallNode.complaint` and `Argument.complaint`, show
the column. The limits of `Grammar` hold for every tree, so that building, evaluating, printing,
hashing and pickling what was read stays far from Python's recursion limit.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from tempering.errors import ScheduleError, TemperingError

_NUMBER = r"[+-]?(?:(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|inf\b)"
_TOKEN = re.compile(
    rf'(?P<number>{_NUMBER})|(?P<name>[A-Za-z_][A-Za-z_0-9]*)|(?P<string>"(?:[^"\\]|\\.)*")'
    r"|(?P<sign>[(),|=?\[\]])",
    re.DOTALL,
)
_KEYWORD_SIGN = re.compile(r"\s*=")
_CALL_SIGN = re.compile(r"\s*\(")
_EXCERPT = 72  # characters of a long text that an error shows around the column
_WHOLE = 2**53  # float64 holds every whole number below it
UNKNOWN = "?"  # the name of a call that stands for a number to be found
DEEPEST = 50  # calls inside each other, pipes counted: a twentieth of Python's recursion limit

Made = TypeVar("Made")


@dataclass(frozen=True)
class Grammar:
    """What a caller reads: a kind of text, its errors and its limits.

    what: "pattern", "policy" or "rule", for messages. error: the type of its errors.
    strings: whether arguments may be texts in quotes. calls, characters: the most of them.
    words: the calls whose arguments are words, as in order(top_k, temperature).
    unknowns: whether `?` may stand for a number. It is read as a call of that name, without
        arguments or with those of its range, `?[low,high]`.
    """

    what: str
    error: type[TemperingError]
    strings: bool = False
    calls: int = DEEPEST
    characters: int = 1_000_000
    words: tuple[str, ...] = ()
    unknowns: bool = False

    def read(self, text: str) -> CallNode:
        """Read a text as a tree of calls.

        Raises
        ------
        `error`: names the column, shows a caret under it, and says what was expected there.
        """
        if len(text) > self.characters:
            raise self.error(
                f"a {self.what} is a text of at most {self.characters} characters, got {len(text)}"
            )
        return _Reader(_SourceText(text, self)).whole()


@dataclass(frozen=True)
class _SourceText:
    """The text that calls stand in."""

    text: str
    grammar: Grammar

    def complaint(
        self, at: int, message: str, kind: type[TemperingError] | None = None
    ) -> TemperingError:
        """An error whose second and third line show the text and a caret under text[at]."""
        shown = "".join(c if c.isprintable() else " " for c in self.text)
        first = max(0, at + 1 - _EXCERPT // 2) if len(shown) > _EXCERPT else 0
        shown = shown[first : first + _EXCERPT]
        error = (kind or self.grammar.error)(
            f"column {at + 1}: {message}\n  {shown}\n  {' ' * (at - first)}^"
        )
        error.column = at + 1
        return error

    def made(self, at: int, make: Callable[[], Made]) -> Made:
        """What `make` returns; its errors point at text[at] unless they point elsewhere."""
        try:
            return make()
        except TemperingError as error:
            if error.column is not None:
                raise
            # An error of a pattern inside a rule has the rule's type.
            kind = self.grammar.error if isinstance(error, ScheduleError) else type(error)
            raise self.complaint(at, str(error), kind) from error


@dataclass(frozen=True)
class CallNode:
    """One `name(arguments)`; text[start:end] is the call with what is piped into it."""

    name: str
    arguments: tuple[Argument, ...]
    at: int
    start: int
    end: int
    source: _SourceText = field(repr=False, compare=False)

    @property
    def text(self) -> str:
        """The call as it was written."""
        return self.source.text[self.start : self.end]

    def complaint(self, message: str) -> TemperingError:
        """An error at the call's name."""
        return self.source.complaint(self.at, message)

    def unknown(self, known: Iterable[str], kind: str) -> TemperingError:
        """An error: no `kind` has this name; suggests the closest of the known names."""
        names = list(known)
        close = difflib.get_close_matches(self.name, names, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        return self.complaint(
            f"no {kind} is called {self.name!r}; {hint}known are {', '.join(names)}"
        )

    def made(self, make: Callable[[], Made]) -> Made:
        """What `make` returns; its errors point at this call unless they point elsewhere."""
        return self.source.made(self.at, make)


@dataclass(frozen=True)
class Argument:
    """A number, a string or a call, perhaps behind `keyword=`; `at` is its offset in the text."""

    value: float | str | CallNode
    at: int
    keyword: str | None = None
    source: _SourceText = field(repr=False, compare=False, kw_only=True)

    def complaint(self, message: str) -> TemperingError:
        """An error at this argument."""
        return self.source.complaint(self.at, message)

    def made(self, make: Callable[[], Made]) -> Made:
        """What `make` returns; its errors point at this argument."""
        return self.source.made(self.at, make)

    def number(self, what: str) -> float:
        """This argument as a number; `what` begins the message where it is none."""
        if not isinstance(self.value, float):
            given = self.source.grammar.what if isinstance(self.value, CallNode) else "text"
            raise self.complaint(f"{what} takes a number, not a {given}")
        return self.value

    def whole(self, what: str) -> int:
        """This argument as a whole number."""
        value = self.number(what)
        if not (value.is_integer() and abs(value) < _WHOLE):
            raise self.complaint(f"{what} takes a whole number, got {number_text(value)}")
        return int(value)

    def call(self, what: str, kind: str) -> CallNode:
        """This argument as a call, which makes a `kind`."""
        if isinstance(self.value, CallNode):
            return self.value
        if isinstance(self.value, str):
            raise self.complaint(f"{what} takes a {kind}, not a text")
        raise self.complaint(f"{what} takes a {kind}, such as constant({number_text(self.value)})")


def number_text(value: float | int) -> str:
    """The shortest text that reads back as this float."""
    return repr(float(value)).removesuffix(".0")


def call_text(name: str, *values: object, **keywords: object) -> str:
    """The text of a call: numbers in a row are joined by ",", all else by ", "."""
    parts = [_shown(value) for value in values]
    parts += [f"{key}={_shown(value)}" for key, value in keywords.items()]
    plain = [_is_number(value) for value in values] + [False] * len(keywords)
    text = parts[0] if parts else ""
    for before, after, part in zip(plain, plain[1:], parts[1:]):
        text += ("," if before and after else ", ") + part
    return f"{name}({text})"


def piped_text(inner: object, name: str, *values: object) -> str:
    """The text of a call that `inner` is piped into: x|name(values)."""
    return f"{inner}|{call_text(name, *values)}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _shown(value: object) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, float):
        return number_text(value)
    return str(value)


class _Reader:
    """A cursor over the tokens of a text; `kind`, `word` and `at` describe the current token."""

    def __init__(self, source: _SourceText) -> None:
        self.source, self.text, self.grammar = source, source.text, source.grammar
        self.end = 0  # where the token before the current one ends
        self._next = 0
        self._calls = 0
        self.advance()

    def whole(self) -> CallNode:
        tree, _ = self.expression(1)
        if self.kind != "end":
            raise self.expected("'|' or the end")
        return tree

    def advance(self) -> None:
        self.end = self._next
        at = self._next
        while at < len(self.text) and self.text[at].isspace():
            at += 1
        self.at = at
        if at == len(self.text):
            self.kind, self.word, self._next = "end", "", at
            return
        match = _TOKEN.match(self.text, at)
        if (
            match is None
            or (match.lastgroup == "string" and not self.grammar.strings)
            or (match.group() in "?[]" and not self.grammar.unknowns)
        ):
            raise self.error(f"a {self.grammar.what} has no place for {self.text[at]!r}")
        self.kind, self.word, self._next = str(match.lastgroup), match.group(), match.end()

    def error(self, message: str) -> TemperingError:
        return self.source.complaint(self.at, message)

    def expected(self, what: str) -> TemperingError:
        found = "the end" if self.kind == "end" else repr(self.word[:40])
        return self.error(f"expected {what}, found {found}")

    def stands(self, sign: str) -> bool:
        return self.kind == "sign" and self.word == sign

    def take(self, sign: str) -> None:
        if not self.stands(sign):
            raise self.expected(repr(sign))
        self.advance()

    def expression(self, depth: int) -> tuple[CallNode, int]:
        """A chain of calls at this depth of the text, and how deep the tree below it is."""
        tree, height = self.call(None, 0, depth)
        while self.stands("|"):
            self.advance()
            tree, height = self.call(tree, height, depth)
        return tree, height

    def call(self, inner: CallNode | None, height: int, depth: int) -> tuple[CallNode, int]:
        """A call, with `inner` (a tree of that height) piped into it."""
        self._calls += 1
        if self._calls > self.grammar.calls:
            raise self.error(
                f"a {self.grammar.what} of more than {self.grammar.calls} parts; merge some"
            )
        if depth + height > DEEPEST:
            raise self.error(f"more than {DEEPEST} calls inside each other; merge some")
        if self.kind == "number":
            example = f"constant({self.word[:40]})"
            raise self.expected(f"a {self.grammar.what}, such as {example}")
        if self.kind != "name":
            raise self.expected(f"the name of a {self.grammar.what}")
        name, at = self.word, self.at
        self.advance()
        arguments: list[Argument] = []
        if inner is not None:
            arguments.append(Argument(inner, inner.start, source=self.source))
        self.take("(")
        words = name in self.grammar.words
        if not self.stands(")"):
            height = max(height, self.argument(arguments, depth, words))
            while self.stands(","):
                self.advance()
                height = max(height, self.argument(arguments, depth, words))
        if not self.stands(")"):
            raise self.expected("',' or ')'")
        self.advance()
        start = at if inner is None else inner.start
        return CallNode(name, tuple(arguments), at, start, self.end, self.source), height + 1

    def argument(self, arguments: list[Argument], depth: int, words: bool) -> int:
        """Append one argument; the height of its tree, 0 for a number, a string or a word."""
        at, keyword, height = self.at, None, 0
        if words and not self.opens_call():
            if self.kind != "name":
                raise self.expected("a word")
            arguments.append(Argument(self.word, at, source=self.source))
            self.advance()
            return 0
        value: float | str | CallNode
        # `seed=0` and `steps(1,2)` both begin with a name; the sign after it tells them apart.
        if self.kind == "name" and _KEYWORD_SIGN.match(self.text, self._next):
            keyword = self.word
            self.advance()
            self.take("=")
        if self.kind == "number":
            value = self.number()
        elif self.kind == "string":
            value = self.string()
        elif self.kind == "name":
            value, height = self.expression(depth + 1)
        elif self.stands(UNKNOWN):
            value = self.unknown()
        else:
            texts = ", a text in double quotes," if self.grammar.strings else ""
            raise self.expected(f"a number{texts} or a {self.grammar.what}")
        arguments.append(Argument(value, at, keyword, source=self.source))
        return height

    def opens_call(self) -> bool:
        """Whether a call stands here: a name, and "(" after it."""
        return self.kind == "name" and bool(_CALL_SIGN.match(self.text, self._next))

    def unknown(self) -> CallNode:
        """`?`, or `?[low,high]`."""
        start, bounds = self.at, list[Argument]()
        self.advance()
        if self.stands("["):
            for sign in "[,":
                self.take(sign)
                if self.kind != "number":
                    raise self.expected("a number: a range is written ?[low,high]")
                at = self.at
                bounds.append(Argument(self.number(), at, source=self.source))
            self.take("]")
        return CallNode(UNKNOWN, tuple(bounds), start, start, self.end, self.source)

    def number(self) -> float:
        word, value = self.word, float(self.word)
        # float() rounds 1e999 to inf and 1e-999 to 0: limits that the text doesn't name.
        if math.isinf(value) and not word.endswith("inf"):
            raise self.expected("a number that float64 holds (write inf for the limit)")
        if value == 0 and re.search(r"[1-9]", re.split("[eE]", word)[0]):
            raise self.expected("a number that float64 holds (write 0 for the limit)")
        self.advance()
        return value

    def string(self) -> str:
        try:
            value = json.loads(self.word)
        except json.JSONDecodeError as error:
            raise self.error(f"this text is no JSON string: {error.msg}") from None
        if not value or any("\ud800" <= c <= "\udfff" for c in value):
            raise self.error("a text in quotes has one character or more, in Unicode")
        self.advance()
        return value
