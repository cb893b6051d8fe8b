"""YAML read strictly: duplicate keys refused, unknown keys named with the closest known one.

Anchors and merge keys (`<<: *base`) work as YAML says: a mapping's own keys come first, those of
the merged mappings after. Numbers that YAML 1.1 reads otherwise than they look, 010 and 1:30, are
refused.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any

import yaml

from tempering.errors import DataError, InputError
from tempering.files import check_utf8

MERGE = "tag:yaml.org,2002:merge"
MOST = 10**9  # of a whole number in a plan
MOST_KEYS = 10_000  # of a mapping with what it merges: merges of merges grow without end
_OCTAL = re.compile(r"[-+]?0[0-7_]+")


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, and names the line of a value it can't read."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        # PyYAML calls this for a mapping that another one merges, and again when that mapping is
        # constructed itself, with the merged keys among its own. Only the first call sees the keys
        # as they were written.
        if node not in self._checked:
            self._checked[node] = True
            self._check_keys(node)
            super().flatten_mapping(node)
        if len(node.value) > MOST_KEYS:
            line = node.start_mark.line + 1
            raise DataError(f"line {line}: a mapping merges more than {MOST_KEYS} keys")

    def _check_keys(self, node: yaml.MappingNode) -> None:
        seen: set[object] = set()
        for key_node, _ in node.value:
            merge = key_node.tag == MERGE
            key = "<<" if merge else self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable) or key in seen:
                line = key_node.start_mark.line + 1
                what = "given twice; keep one" if isinstance(key, Hashable) else "no name"
                if merge:
                    what = "given twice; write <<: [*one, *other]"
                raise DataError(f"line {line}: the key {shown(key)} is {what}")
            seen.add(key)

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._checked: dict[yaml.Node, bool] = {}

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except DataError:
            raise
        except (ValueError, OverflowError) as error:
            # E.g. a 13th month, or a number of 5,000 digits.
            line = node.start_mark.line + 1
            raise DataError(f"line {line}: a value that can't be read: {error}") from None

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """An integer whose notation means the same in YAML and elsewhere."""
        line = node.start_mark.line + 1
        if _OCTAL.fullmatch(node.value) or ":" in node.value:
            raise DataError(
                f"line {line}: YAML reads {node.value} as {super().construct_yaml_int(node)}; "
                "write the number that you mean, or a text in quotes"
            )
        digits = len(node.value)
        if digits > 400:
            raise DataError(f"line {line}: a whole number of {digits} digits can't be read here")
        return int(super().construct_yaml_int(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


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
    except RecursionError as error:  # of ten thousand brackets, or a mapping that merges itself
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
    try:
        found = None if isinstance(value, bool) or not isinstance(value, Real) else float(value)
    except OverflowError:
        raise InputError(
            f"{where}: a number of {len(str(value))} digits is beyond what a float holds; expected "
            f"a number from {low:g} to {high:g}"
        ) from None
    if found is None or not low <= found <= high:
        hint = ""
        if isinstance(value, str) and re.fullmatch(r"[-+]?\d+[eE][-+]?\d+", value):
            hint = " (a text to YAML; write the point, as in 1.0e-3)"
        raise InputError(
            f"{where}: expected a number from {low:g} to {high:g}, got {shown(value)}{hint}"
        )
    return found


def whole(value: Any, where: str, low: int) -> int:
    """A whole number from `low` to 10^9; a larger one is a slip of the hand."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < low:
        raise InputError(f"{where}: expected a whole number, {low} or more, got {shown(value)}")
    if int(value) > MOST:
        raise InputError(f"{where}: expected at most {MOST}, got {shown(value)}")
    return int(value)


def text(value: Any, where: str) -> str:
    """A text that isn't blank."""
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: expected a text, got {shown(value)}")
    check_utf8(value, where)
    return value


def shown(value: Any) -> str:
    """A value, shortened for a message."""
    try:
        found = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return "a number of thousands of digits"
    return found if len(found) <= 60 else found[:57] + "..."
