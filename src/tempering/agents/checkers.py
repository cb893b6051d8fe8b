"""Reading an answer out of a text, and telling whether it is right.

A checker is `number`, `choice` (one of the task's choices), `exact` (the whole text),
`regex:PATTERN` (its last match: the first group that took part, or all of the match), or a Python
file with `read(output, task)` and perhaps `correct(answer, task)`. Where a text holds no answer,
several, or one that can't be read for certain, it is read as None: an abstention, never a guess.

Two answers are the same where `form` gives the same text for both; correctness and votes compare
forms.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from tempering.agents import choices, reading
from tempering.agents.numerals import value_of, written
from tempering.agents.plain import after_thinking, plain
from tempering.errors import InputError

Read = Callable[[str, Mapping[str, Any]], str | None]
Correct = Callable[[str, Mapping[str, Any]], bool]
Form = Callable[[str], str]

NAMES = ("number", "choice", "exact", "regex:PATTERN", "FILE.py")
_CODE = re.compile(r"[-+]?0\d+")  # 007 is a name, not the number 7
_ASKS_PERCENT = re.compile(
    r"\b(?:what|which|how many|find the|calculate the|compute the)\b[^.?!]*?(?:\bper\s?cent|%)"
    r"|\b(?:in|as a) per\s?cent",
    re.IGNORECASE,
)


@functools.lru_cache(maxsize=1024)  # votes ask for the same few answers again and again
def form(text: str) -> str:
    """What all spellings of an answer share: lower case, without markup, without quotes and
    points at its ends; a number in one notation.

    The same: Paris, paris, "Paris."; 42, 42.0; 1,000, 1000. Not the same: 007 and 7.
    """
    found = " ".join(plain(text).split())
    found = re.sub(r"^\$(.+)\$$", r"\1", found).strip()
    before = None
    while before != found:
        before = found
        found = found.strip(" .\"'…")
        # After a number an exclamation mark is a factorial and stays; so do brackets.
        found = re.sub(r"(?<=[^\W\d])[!?,;:]+$", "", found)
    if not _CODE.fullmatch(found) and "%" not in found:
        value = value_of(found)
        if value is not None and not re.search(r"[^\W\d]|[$€£¥]", found):
            return written(value)
    return found.casefold() or text.strip()


@dataclass(frozen=True)
class Checker:
    """How answers are read and judged.

    read: gives None where a text has no answer. form: gives the same text for answers that
    `correct` can't tell apart; votes compare these texts.
    """

    name: str
    read: Read
    correct: Correct
    form: Form = form


def checker(name: str) -> Checker:
    """A checker by name; InputError for an unknown one, DataError for a file that fails."""
    if name == "number":
        return Checker(name, _read_number, _same_number, str)
    if name == "choice":
        return Checker(name, _read_choice, _same_choice, str)
    if name == "exact":
        return Checker(name, _read_exact, _same_text)
    if name.startswith("regex:"):
        return Checker(name, _regex(name.removeprefix("regex:")), _same_text)
    if name.endswith(".py"):
        return _from_file(Path(name))
    raise InputError(f"no checker '{name}'; there are {', '.join(NAMES)}")


def _read_number(output: str, task: Mapping[str, Any]) -> str | None:
    """The number that a reply answers with, see `reading`; one text for each value."""
    found = reading.number(output, percent=_in_percent(task))
    return None if found is None else written(found)


def _in_percent(task: Mapping[str, Any]) -> bool:
    """Whether the task asks for percent; then 50% means 50, and else 0.5."""
    return bool(_ASKS_PERCENT.search(str(task.get("prompt", ""))))


def _options(task: Mapping[str, Any]) -> choices.Options:
    own = task.get("choices")
    if not isinstance(own, list) or not own:
        raise InputError(f"the checker choice needs 'choices' in the task {task.get('id')!r}")
    return choices.options(own, str(task.get("prompt", "")))


def _read_choice(output: str, task: Mapping[str, Any]) -> str | None:
    """The choice that a reply answers with, in lower case; see `choices`."""
    return choices.choice(output, _options(task))


def _same_choice(answer: str, task: Mapping[str, Any]) -> bool:
    names = _options(task).names
    given, right = (" ".join(plain(t).split()).casefold() for t in (answer, str(task["answer"])))
    if right not in names:
        raise InputError(
            f"the answer {task['answer']!r} of task {task.get('id')!r} is none of its choices: "
            f"{', '.join(names)}"
        )
    return names.get(given) == names[right]


def _read_exact(output: str, task: Mapping[str, Any]) -> str | None:
    return form(after_thinking(output)) or None


def _regex(pattern: str) -> Read:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(f"regex:{pattern}: {error}") from None

    def read(output: str, task: Mapping[str, Any]) -> str | None:
        for match in reversed(list(compiled.finditer(after_thinking(output)))):
            parts = match.groups() or (match[0],)
            found = next((part.strip() for part in parts if part is not None), "")
            if found:
                return found
        return None

    return read


def _same_text(answer: str, task: Mapping[str, Any]) -> bool:
    return form(answer) == form(str(task["answer"]))


def _same_number(answer: str, task: Mapping[str, Any]) -> bool:
    right = _stated(str(task["answer"]), task)
    if right is None:
        raise InputError(
            f"the checker number needs a number as the answer of task {task.get('id')!r}, "
            f"not {task['answer']!r}"
        )
    return _stated(answer, task) == right


def _stated(text: str, task: Mapping[str, Any]) -> Fraction | None:
    """The number that a text is, or that it marks as its answer (as in GSM8K, `... #### 42`)."""
    percent = _in_percent(task)
    value = value_of(plain(text), percent=percent)
    return reading.number(text, percent=percent) if value is None and "####" in text else value


def _from_file(path: Path) -> Checker:
    """A checker from a user's Python file, which is executed: it is the user's own code."""
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

    if callable(names.get("correct")):
        return Checker(str(path), read, correct, str)  # only the file knows its equals
    return Checker(str(path), read, _same_text)


def _guarded(path: Path, function: Callable[..., Any], text: str, task: Mapping[str, Any]) -> Any:
    try:
        return function(text, dict(task))
    except (Exception, SystemExit) as error:
        raise InputError(
            f"{path}: {function.__name__} failed on task {task.get('id')!r}: "
            f"{type(error).__name__}: {error}"
        ) from error
