"""Reading an answer out of a text, and telling whether it is right.

A checker is `number` (the last number, or the one after "answer"), `choice` (the last of the
task's choices that is named), `exact` (the whole text), `regex:PATTERN` (its first group, or all
of it, at its last match), or a Python file with `read(output, task)` and perhaps
`correct(answer, task)`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from tempering.errors import InputError

Read = Callable[[str, Mapping[str, Any]], str | None]
Correct = Callable[[str, Mapping[str, Any]], bool]

_NUMBER = re.compile(r"(?<![\w.])[-−]?\d{1,3}(?:,\d{3})+(?:\.\d+)?|(?<![\w.])[-−]?\d+(?:\.\d+)?")
_AFTER = re.compile(r"(?:answer|result|total)\s*(?:is|=|:)?[\s*$]*", re.IGNORECASE)
NAMES = ("number", "choice", "exact", "regex:PATTERN", "FILE.py")


@dataclass(frozen=True)
class Checker:
    """How answers are read and judged. read: None where there is no answer to be read."""

    name: str
    read: Read
    correct: Correct


def checker(name: str) -> Checker:
    """A checker by name; InputError for an unknown one, DataError for a file that fails."""
    if name == "number":
        return Checker(name, _read_number, _same_number)
    if name == "choice":
        return Checker(name, _read_choice, _same_text)
    if name == "exact":
        return Checker(name, _read_exact, _same_text)
    if name.startswith("regex:"):
        return Checker(name, _regex(name.removeprefix("regex:")), _same_text)
    if name.endswith(".py"):
        return _from_file(Path(name))
    raise InputError(f"no checker '{name}'; there are {', '.join(NAMES)}")


def _read_number(output: str, task: Mapping[str, Any]) -> str | None:
    """The number after the last "answer is", "total:" or the like; without one, the last."""
    for match in reversed(list(_AFTER.finditer(output))):
        found = _NUMBER.match(output, match.end())
        if found:
            return _plain(found[0])
    numbers = _NUMBER.findall(output)
    return _plain(numbers[-1]) if numbers else None


def _plain(text: str) -> str:
    """One form for equal numbers: 1,000.0 and 1000 are the same answer."""
    # Not arithmetic of Decimal, which rounds to 28 digits.
    plain = format(Decimal(text.replace(",", "").replace("−", "-")), "f")
    if "." in plain:
        plain = plain.rstrip("0").rstrip(".")
    return "0" if plain == "-0" else plain


def _read_choice(output: str, task: Mapping[str, Any]) -> str | None:
    """The choice that is named last in the first sentence that names one."""
    choices = task.get("choices")
    if not isinstance(choices, list) or not choices:
        raise InputError(f"the checker choice needs 'choices' in the task {task.get('id')!r}")
    words = "|".join(re.escape(c) for c in sorted(map(str, choices), key=len, reverse=True))
    pattern = re.compile(rf"(?<!\w)(?:{words})(?!\w)", re.IGNORECASE)
    for sentence in re.split(r"(?<=[.!?\n])\s+", output):
        if found := pattern.findall(sentence):
            return str(found[-1]).lower()
    return None


def _read_exact(output: str, task: Mapping[str, Any]) -> str | None:
    found = " ".join(output.split()).strip(" .!\"'").lower()
    return found or None


def _regex(pattern: str) -> Read:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(f"regex:{pattern}: {error}") from None

    def read(output: str, task: Mapping[str, Any]) -> str | None:
        matches = list(compiled.finditer(output))
        if not matches:
            return None
        groups = matches[-1].groups()
        found = groups[0] if groups else matches[-1][0]
        return None if found is None else found.strip()

    return read


def _same_text(answer: str, task: Mapping[str, Any]) -> bool:
    return _read_exact(answer, task) == _read_exact(str(task["answer"]), task)


def _same_number(answer: str, task: Mapping[str, Any]) -> bool:
    try:
        return Decimal(answer) == Decimal(str(task["answer"]).replace(",", ""))
    except InvalidOperation:
        raise InputError(
            f"the checker number needs a number as the answer of task {task.get('id')!r}, "
            f"not {task['answer']!r}"
        ) from None


def _from_file(path: Path) -> Checker:
    """The functions of a user's Python file, which runs as any script that is asked for does."""
    from tempering.files import read_text

    names: dict[str, Any] = {"__name__": "checker", "__file__": str(path)}
    try:
        exec(compile(read_text(path), str(path), "exec"), names)
    except (Exception, SystemExit) as error:
        raise InputError(f"{path}: {type(error).__name__}: {error}") from error
    if not callable(names.get("read")):
        raise InputError(
            f"{path} defines no read(output, task); it returns the answer as a text, or None"
        )

    def read(output: str, task: Mapping[str, Any]) -> str | None:
        found = _guarded(path, names["read"], output, task)
        if found is not None and not isinstance(found, str):
            raise InputError(f"{path}: read returned {found!r}; expected a text or None")
        return found

    def correct(answer: str, task: Mapping[str, Any]) -> bool:
        return bool(_guarded(path, names["correct"], answer, task))

    return Checker(str(path), read, correct if callable(names.get("correct")) else _same_text)


def _guarded(path: Path, function: Callable[..., Any], text: str, task: Mapping[str, Any]) -> Any:
    try:
        return function(text, dict(task))
    except (Exception, SystemExit) as error:
        raise InputError(
            f"{path}: {function.__name__} failed on task {task.get('id')!r}: "
            f"{type(error).__name__}: {error}"
        ) from error
