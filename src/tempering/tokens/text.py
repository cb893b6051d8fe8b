"""The text form of policies: syntax -> calls -> policies. It embeds the text form of schedules.

policy      = call { "|" call }              x|f(a) means f(x, a)
call        = name "(" [ argument { "," argument } ] ")"
argument    = [ name "=" ] ( number | string | call { "|" call } )
string      = as in JSON: "</think>"

What a call's arguments mean is in `grammar.py`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from tempering.errors import ScheduleError
from tempering.schedules.text import complaint

_TOKEN = re.compile(
    r"""(?P<number>[+-]?(?:(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|inf\b))
    |(?P<name>[A-Za-z_][A-Za-z_0-9]*)
    |(?P<string>"(?:[^"\\]|\\.)*")
    |(?P<sign>[(),|=])""",
    re.VERBOSE | re.DOTALL,
)
_DEEPEST = 50
_LONGEST = 10_000  # characters: a request's policy is a line, not a document


@dataclass(frozen=True)
class Call:
    """One `name(arguments)`, at text[start:end] with what is piped into it."""

    name: str
    arguments: tuple[Argument, ...]
    start: int
    end: int
    name_at: int


@dataclass(frozen=True)
class Argument:
    """A number, a string or a call, perhaps behind `keyword=`; `at` is its offset in the text."""

    value: float | str | Call
    at: int
    keyword: str | None = None


def parse(text: str) -> Call:
    """Read the text form of a policy as a tree of calls.

    Raises
    ------
    ScheduleError: names the column, shows a caret under it, and says what was expected there.
    """
    if len(text) > _LONGEST:
        raise ScheduleError(f"a policy is a text of at most {_LONGEST} characters, got {len(text)}")
    reader = _Reader(text)
    tree = reader.expression(1)
    if reader.kind != "end":
        raise reader.expected("'|' or the end")
    return tree


class _Reader:
    """A cursor over the tokens of one text: `kind`, `word` and `at` describe the current one."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.end = 0  # behind the token before the current one
        self._next = 0
        self.advance()

    def advance(self) -> None:
        self.end = self._next
        self.at = self._next
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1
        if self.at == len(self.text):
            self.kind, self.word, self._next = "end", "", self.at
            return
        match = _TOKEN.match(self.text, self.at)
        if match is None:
            raise self.error(f"a policy has no place for {self.text[self.at]!r}")
        self.kind, self.word, self._next = str(match.lastgroup), match.group(), match.end()

    def error(self, message: str) -> ScheduleError:
        return complaint(self.text, self.at + 1, message)

    def expected(self, what: str) -> ScheduleError:
        found = "the end" if self.kind == "end" else repr(self.word[:40])
        return self.error(f"expected {what}, found {found}")

    def take(self, sign: str) -> None:
        if self.kind != "sign" or self.word != sign:
            raise self.expected(repr(sign))
        self.advance()

    def expression(self, depth: int) -> Call:
        tree = self.call(None, depth)
        while self.kind == "sign" and self.word == "|":
            self.advance()
            tree = self.call(tree, depth)
        return tree

    def call(self, piped: Call | None, depth: int) -> Call:
        if depth > _DEEPEST:
            raise self.error(f"more than {_DEEPEST} calls inside each other")
        if self.kind == "number":
            raise self.expected(f"a policy, such as constant({self.word[:40]})")
        if self.kind != "name":
            raise self.expected("the name of a policy")
        name, name_at = self.word, self.at
        self.advance()
        arguments = [] if piped is None else [Argument(piped, piped.start)]
        self.take("(")
        if self.word != ")" or self.kind != "sign":
            arguments.append(self.argument(depth))
            while self.kind == "sign" and self.word == ",":
                self.advance()
                arguments.append(self.argument(depth))
        if self.kind != "sign" or self.word != ")":
            raise self.expected("',' or ')'")
        self.advance()
        start = name_at if piped is None else piped.start
        return Call(name, tuple(arguments), start, self.end, name_at)

    def argument(self, depth: int) -> Argument:
        at = self.at
        keyword = None
        if self.kind == "name" and self.text[self._next :].lstrip().startswith("="):
            keyword = self.word
            self.advance()
            self.take("=")
        if self.kind == "number":
            return Argument(self.number(), at, keyword)
        if self.kind == "string":
            return Argument(self.string(), at, keyword)
        if self.kind != "name":
            raise self.expected("a number, a text in double quotes, or a call")
        return Argument(self.expression(depth + 1), at, keyword)

    def number(self) -> float:
        word, value = self.word, float(self.word)
        # float() rounds 1e999 to inf and 1e-999 to 0: limits that nobody asked for
        if value in (float("inf"), float("-inf")) and not word.endswith("inf"):
            raise self.expected("a number that float64 holds (write inf for the limit)")
        if value == 0 and re.search("[1-9]", re.split("[eE]", word)[0]):
            raise self.expected("a number that float64 holds (write 0 for the limit)")
        self.advance()
        return value

    def string(self) -> str:
        try:
            value = json.loads(self.word)
        except json.JSONDecodeError as error:
            raise self.error(f"this text is no JSON string: {error.msg}") from None
        if not value or any("\ud800" <= c <= "\udfff" for c in value):
            raise self.error("a delimiter is a text of one character or more, in Unicode")
        self.advance()
        return value
