"""Tasks whose answers can be checked: one JSON object a line, and generators of graded ones.

    {"id": "sum-1", "prompt": "What is 2 + 3?", "answer": "5"}

Optional: checker (see `checkers`), kind, level, choices; raw (true: a text to continue, not a chat
turn), stop (the output ends before it); and any field that a user's checker reads.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

from tempering.agents import generators
from tempering.agents.strict_yaml import shown
from tempering.counts import whole_number
from tempering.errors import DataError, InputError
from tempering.files import check_utf8, read_text, write_new

Task = dict[str, Any]
NEEDED = ("id", "prompt", "answer")


class Kind(NamedTuple):
    """A generator (rng, level) -> task fields, its levels, and the checker of its answers."""

    make: Callable[[random.Random, int], dict[str, Any]]
    levels: tuple[int, ...]
    checker: str
    summary: str


KINDS: dict[str, Kind] = {
    "arithmetic": Kind(
        generators.arithmetic_chain, (1, 2, 3, 4), "number", "a chain of additions and subtractions"
    ),
    "recall": Kind(
        generators.list_recall, (1, 2, 4, 8), "number", "one number of a list of so many, times 4"
    ),
    "words": Kind(generators.word_problem, (1, 2, 3), "number", "a story with so many steps"),
}


def generate_tasks(
    n: SupportsIndex,
    *,
    seed: SupportsIndex = 0,
    kinds: Sequence[str] = tuple(KINDS),
    levels: Sequence[int] | None = None,
) -> list[Task]:
    """n tasks with known answers, kinds and levels in turn, all different.

    Parameters
    ----------
    seed: of every choice; the same seed gives the same tasks.
    kinds: of `KINDS`. levels: of difficulty, for every kind; each kind's own where None.

    Raises InputError for an unknown kind, a level below 1, or more tasks than there are.
    """
    n, seed = whole_number(n, "n"), whole_number(seed, "seed")
    for kind in kinds:
        if kind not in KINDS:
            raise InputError(f"no kind of task '{kind}'; there are {', '.join(KINDS)}")
    if n < 1 or not kinds:
        raise InputError(f"give at least one task and one kind, not {n} of {list(kinds)}")
    # Levels in turn within a kind, kinds in turn.
    columns = [
        [(kind, level) for level in (KINDS[kind].levels if levels is None else levels)]
        for kind in kinds
    ]
    places = [place for row in zip_longest(*columns) for place in row if place is not None]
    if wrong := [level for _, level in places if level < 1]:
        raise InputError(f"a level is 1 or more, got {wrong[0]}")
    rng = random.Random(f"tasks/{seed}")
    tasks: list[Task] = []
    seen: set[str] = set()
    for i in range(n):
        kind, level = places[i % len(places)]
        for _ in range(1000):
            made = KINDS[kind].make(rng, level)
            if made["prompt"] not in seen:
                break
        else:
            raise InputError(
                f"there are not so many different tasks of kind {kind} at level {level}; ask for "
                f"fewer than {n}, or for higher levels"
            )
        seen.add(made["prompt"])
        head = {"id": f"{kind}-{level}-{i + 1}", "kind": kind, "level": level}
        form = {"raw": True, "stop": "\n", "checker": KINDS[kind].checker}
        tasks.append({**head, **made, **form})
    return tasks


def write_tasks(path: str | Path, tasks: Sequence[Task]) -> Path:
    """Write tasks as JSON lines to a new file; InputError where other tasks are there."""
    return write_new(path, "".join(json.dumps(task, ensure_ascii=False) + "\n" for task in tasks))


class Loaded(NamedTuple):
    """The tasks of a file, and for each broken line what is wrong with it."""

    tasks: list[Task]
    broken: list[str]


def load_tasks(path: str | Path, *, keep_going: bool = False) -> Loaded:
    """Read tasks; DataError names the first broken line, unless `keep_going`."""
    tasks: list[Task] = []
    broken: list[str] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            task = _task(line)
            if task["id"] in seen:
                raise DataError(f"the id {task['id']!r} is that of line {seen[task['id']]}")
        except DataError as error:
            broken.append(f"{path}, line {number}: {error}")
            if not keep_going:
                raise DataError(
                    f"{broken[0]}; mend the line, or leave such lines out with --keep-going"
                ) from None
            continue
        seen[task["id"]] = number
        tasks.append(task)
    if not tasks:
        raise DataError(f"{path} has no task that can be read" + "".join(f"; {b}" for b in broken))
    return Loaded(tasks, broken)


def _task(line: str) -> Task:
    try:
        task = json.loads(
            line,
            parse_int=_whole,
            parse_float=_Written,
            parse_constant=_no_constant,
            object_pairs_hook=_distinct,
        )
    except (json.JSONDecodeError, RecursionError) as error:
        reason = getattr(error, "msg", "nested too deep")
        raise DataError(f"not JSON ({reason}, column {getattr(error, 'colno', 0)})") from None
    if not isinstance(task, dict):
        raise DataError(f"expected an object with {', '.join(NEEDED)}, got {type(task).__name__}")
    for name in NEEDED:
        if name not in task:
            raise DataError(f"the field '{name}' is missing")
        if isinstance(task[name], int | float) and not isinstance(task[name], bool):
            task[name] = str(task[name])
        if not isinstance(task[name], str) or not task[name].strip():
            raise DataError(f"the field '{name}' is to be a text, got {shown(task[name])}")
    for name, value in task.items():
        _check_value(value, f"the field '{name}'")
    for name, kind, word in (
        ("checker", str, "a text"),
        ("kind", str, "a text"),
        ("stop", str, "a text"),
        ("raw", bool, "true or false"),
    ):
        if not isinstance(task.get(name, kind()), kind):
            raise DataError(f"the field '{name}' is to be {word}, got {shown(task[name])}")
    for name in ("tokens", "level"):
        count = task.get(name, 1)
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise DataError(
                f"the field '{name}' is to be a whole number above 0, got {shown(count)}"
            )
    return task


class _Written(float):
    """A number whose text is the one in the file: 0.10, 1e400, more digits than a float has."""

    def __new__(cls, literal: str) -> _Written:
        made = super().__new__(cls, literal)
        made.literal = literal
        return made

    literal: str

    def __str__(self) -> str:
        return self.literal


def _whole(digits: str) -> int | str:
    """An integer; its text where it has more digits than Python converts."""
    return int(digits) if len(digits) < sys.int_info.default_max_str_digits else digits


def _no_constant(name: str) -> float:
    raise DataError(f'{name} is no JSON; write a text, as in "{name}"')


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise DataError(f"the field '{name}' is given twice; keep one")
        found[name] = value
    return found


def _check_value(value: Any, where: str) -> None:
    """DataError for half a character in any text, and for a number that JSON can't write."""
    if isinstance(value, str):
        check_utf8(value, where)
    elif isinstance(value, float) and math.isinf(value):
        raise DataError(f"{where} holds a number beyond 1.8e308, {value}; write it as a text")
    elif isinstance(value, dict):
        for name, item in value.items():
            check_utf8(name, where)
            _check_value(item, where)
    elif isinstance(value, list):
        for item in value:
            _check_value(item, where)
