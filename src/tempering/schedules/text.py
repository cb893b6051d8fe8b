"""The syntax of patterns: text -> a tree of calls with columns; what names mean is not known here.

expression  = call { "|" call }              x|f(a) means f(x, a)
call        = name "(" [ argument { "," argument } ] ")"
argument    = expression | number | name "=" number
number      = 12 | 0.5 | 1e-3 | inf
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from tempering.errors import ScheduleError

_NUMBER = r"[+-]?(?:(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|inf\b)"
_TOKEN = re.compile(rf"(?P<number>{_NUMBER})|(?P<name>[A-Za-z_][A-Za-z_0-9]*)|(?P<sign>[(),|=])")
_KEYWORD_SIGN = re.compile(r"\s*=")
_EXCERPT = 72  # characters of a long text that an error shows around the column
_MOST_CALLS = 50  # as many parts as base.py allows a pattern; bounds the recursion


@dataclass(frozen=True)
class Call:
    """One `name(arguments)`; `column` counts from 1."""

    name: str
    column: int
    arguments: tuple[Argument, ...]


@dataclass(frozen=True)
class Argument:
    """A number or a call, perhaps behind `keyword=`; `column` counts from 1."""

    value: float | Call
    column: int
    keyword: str | None = None


def complaint(text: str, column: int, message: str) -> ScheduleError:
    """An error whose second and third line show the text and a caret under `column` (from 1)."""
    shown = "".join(c if c.isprintable() else " " for c in text)
    first = max(0, column - _EXCERPT // 2) if len(shown) > _EXCERPT else 0
    shown = shown[first : first + _EXCERPT]
    return ScheduleError(f"column {column}: {message}\n  {shown}\n  {' ' * (column - 1 - first)}^")


def parse(text: str) -> Call:
    """Read the text form of a pattern as a tree of calls.

    Parameters
    ----------
    text: one expression of the grammar above; white space between tokens is free.

    Returns
    -------
    The outermost call; a pipe `x|f(a)` is the call `f(x, a)`.

    Raises
    ------
    ScheduleError: names the column, shows a caret under it, and says what was expected there.
    """
    reader = _Reader(text)
    tree = reader.expression()
    if reader.kind != "end":
        raise reader.expected("'|' or the end")
    return tree


class _Reader:
    """A cursor over the tokens of a text; `kind`, `word` and `column` describe the current one."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._next = 0
        self._calls = 0
        self.advance()

    def advance(self) -> None:
        start = self._next
        while start < len(self.text) and self.text[start].isspace():
            start += 1
        self.column = start + 1
        if start == len(self.text):
            self.kind, self.word, self._next = "end", "", start
            return
        match = _TOKEN.match(self.text, start)
        if match is None:
            raise complaint(
                self.text, self.column, f"a pattern has no place for {self.text[start]!r}"
            )
        self.kind, self.word, self._next = str(match.lastgroup), match.group(), match.end()

    def expected(self, what: str) -> ScheduleError:
        found = "the end" if self.kind == "end" else repr(self.word[:40])
        return complaint(self.text, self.column, f"expected {what}, found {found}")

    def take(self, sign: str) -> None:
        if self.word != sign:
            raise self.expected(repr(sign))
        self.advance()

    def expression(self) -> Call:
        tree = self.call(None)
        while self.word == "|":
            self.advance()
            tree = self.call(tree)
        return tree

    def call(self, piped: Call | None) -> Call:
        self._calls += 1
        if self._calls > _MOST_CALLS:
            raise complaint(
                self.text, self.column, f"a pattern of more than {_MOST_CALLS} parts; merge some"
            )
        if self.kind == "number":
            raise self.expected(f"a pattern, such as constant({self.word[:40]})")
        if self.kind != "name":
            raise self.expected("the name of a pattern")
        name, column = self.word, self.column
        self.advance()
        arguments = [] if piped is None else [Argument(piped, piped.column)]
        self.take("(")
        if self.word != ")":
            arguments.append(self.argument())
            while self.word == ",":
                self.advance()
                arguments.append(self.argument())
        if self.word != ")":
            raise self.expected("',' or ')'")
        self.advance()
        return Call(name, column, tuple(arguments))

    def argument(self) -> Argument:
        column = self.column
        if self.kind == "number":
            return Argument(self.number(), column)
        if self.kind != "name":
            raise self.expected("a number or a pattern")
        # `seed=0` and `steps(1,2)` both begin with a name: the sign behind it tells them apart
        if _KEYWORD_SIGN.match(self.text, self._next):
            keyword = self.word
            self.advance()
            self.take("=")
            if self.kind != "number":
                raise self.expected("a number")
            return Argument(self.number(), column, keyword)
        return Argument(self.expression(), column)

    def number(self) -> float:
        value = float(self.word)
        # float() rounds 1e999 to inf and 1e-999 to 0: limits that nobody asked for
        if math.isinf(value) and not self.word.endswith("inf"):
            raise self.expected("a number that float64 holds (write inf for the limit)")
        if value == 0 and re.search(r"[1-9]", re.split("[eE]", self.word)[0]):
            raise self.expected("a number that float64 holds (write 0 for the limit)")
        self.advance()
        return value
