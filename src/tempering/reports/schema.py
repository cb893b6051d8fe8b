"""Checks of plain values, combined into the shapes of a record's sections.

A check takes (value, where) and returns nothing, or raises DataError that says where, what was
expected and what was found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tempering.errors import DataError

Check = Callable[[Any, str], None]


def described(value: Any) -> str:
    """A short description of a value for an error message."""
    if value is None:
        return "null"
    if isinstance(value, dict):
        return f"an object with {', '.join(sorted(value)[:6]) or 'no fields'}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    kind = {bool: "the flag ", str: "the text "}.get(type(value), "")
    shown = repr(value)
    return kind + (shown if len(shown) <= 60 else shown[:57] + "...")


def fail(where: str, expected: str, value: Any) -> DataError:
    """The error of a failed check."""
    return DataError(f"{where}: expected {expected}, got {described(value)}")


def a_text(value: Any, where: str) -> None:
    """A text."""
    if not isinstance(value, str):
        raise fail(where, "a text", value)


def a_flag(value: Any, where: str) -> None:
    """True or false."""
    if not isinstance(value, bool):
        raise fail(where, "true or false", value)


def a_number(value: Any, where: str) -> None:
    """A number; NaN and infinities count as numbers."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise fail(where, "a number", value)


def a_count(value: Any, where: str) -> None:
    """A whole number, 0 or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise fail(where, "a whole number, 0 or more", value)


def a_whole_number(value: Any, where: str) -> None:
    """A whole number of either sign."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise fail(where, "a whole number", value)


def a_scalar(value: Any, where: str) -> None:
    """Null, a flag, a number or a text: one cell of a table."""
    if isinstance(value, (list, dict)):
        raise fail(where, "a single value", value)


def anything(value: Any, where: str) -> None:
    """Whatever the record holds."""


def maybe(check: Check) -> Check:
    """Null, or what `check` accepts."""

    def run(value: Any, where: str) -> None:
        if value is not None:
            check(value, where)

    return run


def listed(check: Check) -> Check:
    """A list whose items all pass `check`."""

    def run(value: Any, where: str) -> None:
        if not isinstance(value, list):
            raise fail(where, "a list", value)
        for i, item in enumerate(value):
            check(item, f"{where}[{i}]")

    return run


def mapped(check: Check) -> Check:
    """An object whose values all pass `check`, under any names."""

    def run(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise fail(where, "an object", value)
        for key, item in value.items():
            check(item, f"{where}.{key}")

    return run


def an_object(
    required: Mapping[str, Check],
    optional: Mapping[str, Check] | None = None,
    *,
    extra: Check | None = None,
) -> Check:
    """An object with these fields; unknown ones must pass `extra`, or are refused without it."""
    optional = optional or {}
    known = {**required, **optional}

    def run(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise fail(where, f"an object with {', '.join(required)}", value)
        for name in required:
            if name not in value:
                raise DataError(
                    f"{where}: the field '{name}' is missing; it has {described(value)}"
                )
        for name, item in value.items():
            check = known.get(name, extra)
            if check is None:
                raise DataError(
                    f"{where}: the field '{name}' is unknown; known are {', '.join(sorted(known))}"
                )
            check(item, f"{where}.{name}")

    return run
