"""Prompt templates of stages: {task}, {notes} and {answer}, and the defaults."""

from __future__ import annotations

import string
from typing import Any, TypeVar

from tempering.errors import InputError

T = TypeVar("T")
FIELDS = {
    "task": "what was asked",
    "notes": "what the stage before found",
    "answer": "the answer of the round before",
}

EXPLORE = "{task}\n\nPropose one approach or answer of your own, and say briefly why it could work."
EXPLORE_AGAIN = (
    "{task}\n\nAn answer so far:\n{answer}\n\nPropose one way to do better that this answer "
    "misses, and say briefly why."
)
MERGE = (
    "{task}\n\nProposals:\n{notes}\n\nMerge what is best in these proposals into one, settle where "
    "they disagree, and leave out what is wrong."
)
EXECUTE = "{task}\n\nNotes:\n{notes}\n\nUsing these notes, write the final answer, and only that."


def check_template(template: str, where: str) -> None:
    """InputError for a template with an unknown field, or braces that don't match."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InputError(f"{where}: {error}; write {{{{ and }}}} for braces") from None
    for _, name, form, conversion in parts:
        if name is None:
            continue
        if name not in FIELDS or form or conversion:
            known = ", ".join(f"{{{field}}}" for field in FIELDS)
            raise InputError(
                f"{where}: unknown field {{{name}}}; known are {known}; "
                "write {{ and }} for braces"
            )


def fill(template: str, task: str, notes: list[str], answer: str) -> str:
    """The prompt; several notes are numbered."""
    joined = "\n\n".join(f"[{i}] {note}" for i, note in enumerate(notes, 1))
    values: dict[str, Any] = {
        "task": task,
        "notes": notes[0] if len(notes) == 1 else joined,
        "answer": answer,
    }
    return template.format(**values)


def numbering(notes: int) -> int:
    """The most tokens that numbering so many notes takes; a token is a byte or more."""
    return 0 if notes == 1 else notes * len(f"[{notes}] \n\n")


def deal(notes: list[T], width: int) -> list[list[T]]:
    """Which notes each of `width` workers reads.

    With fewer workers than notes, the notes are dealt out in turn: each worker gets notes of hot
    and of cold workers, and the cost grows with the notes rather than with notes times workers.
    Otherwise every worker reads all notes.
    """
    if width >= len(notes):
        return [list(notes) for _ in range(width)]
    return [notes[i::width] for i in range(width)]
