"""The checkers of tasks, as commands name them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tempering.agents.checkers import Checker

CheckerName = Annotated[
    str | None,
    typer.Option(
        "--checker", help="number, choice, exact, regex:PATTERN or FILE.py; default: the task's."
    ),
]


def checkers_of(tasks: Sequence[Mapping[str, Any]], name: str | None) -> list[Checker]:
    """A checker for each task: the named one, or the task's own.

    Raises InputError for a task without any, or a checker that is none.
    """
    from tempering.agents.checkers import checker
    from tempering.errors import InputError

    names = [name or task.get("checker") for task in tasks]
    for task, own in zip(tasks, names, strict=True):
        if own is None:
            raise InputError(
                f"task {task['id']!r} names no checker; give one with --checker, e.g. number"
            )
    made = {own: checker(str(own)) for own in dict.fromkeys(names)}
    return [made[own] for own in names]
