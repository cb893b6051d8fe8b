"""YAML read strictly: duplicate keys refused, unknown keys named with the closest known one."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any

import yaml

from tempering.errors import DataError, InputError
from tempering.files import check_utf8


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable) or key in seen:
                line = key_node.start_mark.line + 1
                what = "given twice; keep one" if isinstance(key, Hashable) else "no name"
                raise DataError(f"line {line}: the key {key!r} is {what}")
            seen.add(key)
        return super().construct_mapping(node, deep)


def load(text: str, where: str) -> Any:
    """The plain values of a YAML text; DataError names the line of what can't be read."""
    try:
        return yaml.load(text, _Loader)  # a SafeLoader: plain values only
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise DataError(f"{where}: {line}not YAML: {reason}") from None
    except (ValueError, RecursionError) as error:
        # Of the values: a 13th month, a number of 5,000 digits, ten thousand brackets.
        raise DataError(f"{where}: a value that can't be read: {error}") from None


def fields(
    value: Any, where: str, required: Iterable[str], optional: Iterable[str] = ()
) -> dict[str, Any]:
    """`value` as a mapping with these keys; InputError names an unknown or a missing one."""
    required = tuple(required)
    known = (*required, *optional)
    if not isinstance(value, Mapping):
        raise InputError(
            f"{where}: expected a mapping with {', '.join(required) or ', '.join(known)}, "
            f"got {shown(value)}"
        )
    for key in value:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean '{close[0]}'? " if close else ""
            raise InputError(f"{where}: unknown key '{key}'; {hint}known are {', '.join(known)}")
    for key in required:
        if key not in value:
            raise InputError(f"{where}: the key '{key}' is missing")
    return dict(value)


def number(value: Any, where: str, low: float, high: float) -> float:
    """A number in [low, high]; a text or a flag is none."""
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= float(value) <= high:
        raise InputError(f"{where}: expected a number from {low:g} to {high:g}, got {shown(value)}")
    return float(value)


def whole(value: Any, where: str, low: int) -> int:
    """A whole number of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < low:
        raise InputError(f"{where}: expected a whole number, {low} or more, got {shown(value)}")
    return int(value)


def text(value: Any, where: str) -> str:
    """A text with something in it."""
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: expected a text, got {shown(value)}")
    check_utf8(value, where)
    return value


def shown(value: Any) -> str:
    """A value, shortened for a message."""
    found = repr(value)
    return found if len(found) <= 60 else found[:57] + "..."
