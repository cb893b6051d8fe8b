"""The fate of each reply: answered, or why it has no answer; and warnings for the reader.

    failed      no reply came
    refused     the provider's filter or the model declined (its finish says so)
    cut         it reached its limit of tokens before an answer that is whole
    empty       it has no text
    unreadable  it has text, in which the checker finds no answer, or several

All five count as wrong, so that strategies are compared over all their samples, and each is counted
here, so that the reader can see it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tempering.agents.checkers import Checker

Row = dict[str, Any]
LOST = ("failed", "refused", "cut", "empty")
FATES = ("answered", *LOST, "unreadable")

_REFUSED = re.compile(
    r"filter|refus|safety|block|prohibit|recitation|spii|denied|guardrail", re.IGNORECASE
)
_LIMIT = re.compile(r"length|max_?\w*tokens|model_context_window", re.IGNORECASE)


def read_reply(row: Row, checker: Checker, task: Mapping[str, Any]) -> tuple[str | None, str]:
    """(answer or None, fate) of a sample's row.

    A reply that was cut may end in half a number or half a word. So an answer counts only if it
    stays the same when the text goes on, which is tried with a digit.
    """
    output, finish = row["output"], str(row.get("finish") or "")
    if output is None:
        return None, "refused" if _REFUSED.search(finish) else "failed"
    cut = _LIMIT.search(finish) is not None
    answer = checker.read(output, task) if output.strip() else None
    if answer is not None and cut and checker.read(output + "7", task) != answer:
        answer = None
    if answer is not None:
        return answer, "answered"
    if _REFUSED.search(finish):
        return None, "refused"
    if cut:
        return None, "cut"
    return None, "unreadable" if output.strip() else "empty"


def tally(strategy: str, by_task: Sequence[Sequence[Row]]) -> Row:
    """How many samples of a strategy had each fate, and how many tasks had no answer at all."""
    fates = [row["fate"] for rows in by_task for row in rows]
    silent = sum(bool(rows) and all(row["answer"] is None for row in rows) for rows in by_task)
    counts = {fate: fates.count(fate) for fate in FATES}
    return {"strategy": strategy, "samples": len(fates), **counts, "tasks without answer": silent}


def warnings_of(row: Row, tokens: int, option: str = "--tokens") -> list[str]:
    """Warnings about a tally; none where the only samples without an answer are unreadable ones.

    option: that sets the tokens of a reply.
    """
    lost = {fate: row[fate] for fate in LOST if row[fate]}
    if not lost and row["answered"]:
        return []
    if not row["answered"] and row["unreadable"]:
        lost["unreadable"] = row["unreadable"]
    counts = ", ".join(f"{count} {fate}" for fate, count in lost.items())
    text = (
        f"'{row['strategy']}': {sum(lost.values())} of {row['samples']} replies have no answer and "
        f"count as wrong: {counts}"
    )
    if row["cut"]:
        text += f"; raise {option} ({tokens} now), which include what a reasoning model thinks"
    elif lost.get("unreadable"):
        text += "; see whether the checker fits how the model answers"
    return [text]


def ladder_warnings(strategy: str, rows: Sequence[Row]) -> list[str]:
    """Warnings where the temperatures that were sent are not those that were asked for."""
    made = [row for row in rows if row["output"] is not None]
    asked = {row["temperature_asked"] for row in made}
    sent = {row["temperature_sent"] for row in made}
    if not made or all(row["temperature_asked"] == row["temperature_sent"] for row in made):
        return []
    if len(sent) == 1:
        (only,) = sent
        one = (
            "no temperature, which is the model's own" if only is None else f"temperature {only:g}"
        )
        text = f"'{strategy}': every sample was sent with {one}"
        if len(asked) > 1:
            text += f", so it is no ladder: its {len(asked)} temperatures became one"
        return [text]
    known = [value for value in sent if value is not None]
    return [
        f"'{strategy}': its temperatures were sent as {len(sent)} instead of {len(asked)}, from "
        f"{min(known):g} to {max(known):g}"
    ]
