"""Recall of facts from a long text: questions with known answers, in many wordings.

A context holds some facts ("The secret code for the red door is 4821.") among sentences of a
real text; each question asks for one of them. Everything is drawn from a seed. The part to learn
from and the part to test with share no key and no sentence.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import cache

from tempering.data import sample_text
from tempering.errors import InputError
from tempering.evaluation.recall_pools import KEYS, VALUES, WORDINGS

# After these ends of a question the answer follows without a space.
_OPEN = ('"', "(", "# ", ">", '","', "=", "\n")
# Words of a sentence of the filler; longer sentences are cut, so that contexts are about as long as
# asked for.
_LONGEST = 60
# Draws without a new value before giving up: the last of 100 values is missed once in 20,000 times.
_PATIENCE = 1000
PARTS = ("learn", "test")


@dataclass(frozen=True)
class Recall:
    """A context with facts, and questions about them.

    questions: (question, answer that should follow it at once).
    """

    context: str
    questions: tuple[tuple[str, str], ...]
    wording: str
    value: str

    def pairs(self) -> list[tuple[str, str]]:
        """(prompt, answer): each question by itself after the context."""
        return [(f"{self.context}\n\n{asked}", answer) for asked, answer in self.questions]


def recall(
    seed: int,
    *,
    part: str = "test",
    wording: int | None = None,
    facts: int = 16,
    questions: int = 8,
    words: int = 620,
    value: str | None = None,
    keys: str | None = None,
    text: str = "fiction",
    layout: str | None = None,
) -> Recall:
    """A context with facts and some questions about them.

    Parameters
    ----------
    seed: of every choice not fixed by another argument.
    part: "learn" or "test"; they share neither keys nor sentences.
    wording: index into `WORDINGS`. value, keys: a kind of `VALUES` and of `KEYS`.
    facts: how many the context states (fewer where the part has fewer keys). questions: how many
    are asked, at most one for each fact. words: of filler around the facts, of about 1.3 tokens.
    text: the sample text that the filler comes from.
    layout: "strewn" (facts between sentences) or "block" (one list, filler around it).

    Raises InputError for an unknown kind, or numbers that do not fit.
    """
    for what, given, known in (
        ("part", part, PARTS),
        ("value", value, tuple(VALUES)),
        ("keys", keys, tuple(KEYS)),
        ("layout", layout, ("strewn", "block")),
        ("wording", wording, range(len(WORDINGS))),
    ):
        if given is not None and given not in known:
            shown = f"0 to {len(WORDINGS) - 1}" if isinstance(known, range) else ", ".join(known)
            raise InputError(f"{what} is one of {shown}; not {given!r}")
    if min(facts, questions, words) < 1 or questions > facts:
        raise InputError(
            f"a context has 1 or more facts, words, and questions for some of the facts; got "
            f"{facts} facts, {questions} questions, {words} words"
        )
    rng = random.Random(f"{part} {seed}")
    name, fact, question = WORDINGS[rng.randrange(len(WORDINGS)) if wording is None else wording]
    kind = rng.choice(sorted(VALUES)) if value is None else value
    pool = _keys(rng.choice(sorted(KEYS)) if keys is None else keys, part)
    chosen = rng.sample(pool, min(facts, len(pool)))
    values = _values(kind, len(chosen), rng)
    body = _filler(text, part, rng, words)
    stated = [fact.format(k=k, v=v) for k, v in zip(chosen, values, strict=True)]
    arrangement = rng.choice(("strewn", "strewn", "block")) if layout is None else layout
    if arrangement == "block":
        middle = rng.randint(0, len(body))
        body = [*body[:middle], "\n" + "\n".join(stated) + "\n", *body[middle:]]
    else:
        for line in stated:
            body.insert(rng.randint(0, len(body)), line)
    context = " ".join(body).replace(" \n", "\n").replace("\n ", "\n")
    space = "" if question.endswith(_OPEN) and name != "equals" else " "
    asked = rng.sample(range(len(chosen)), min(questions, len(chosen)))
    return Recall(
        context,
        tuple((question.format(k=chosen[i], v=""), space + values[i]) for i in asked),
        name,
        kind,
    )


def _values(kind: str, count: int, rng: random.Random) -> list[str]:
    """`count` different values of a kind."""
    values: list[str] = []
    missed = 0
    while len(values) < count:
        drawn = VALUES[kind](rng)
        missed = missed + 1 if drawn in values else 0
        if not missed:
            values.append(drawn)
        elif missed == _PATIENCE:
            raise InputError(
                f"there are {len(values)} different values of the kind '{kind}', too few for "
                f"{count} facts; give fewer facts, or another kind"
            )
    return values


def _keys(kind: str, part: str) -> list[str]:
    """The keys of a part: every second one of a kind, in a random order that is always the same."""
    pool = sorted(KEYS[kind])
    random.Random("keys").shuffle(pool)
    return pool[PARTS.index(part) :: 2]


@cache
def _sentences(text: str, part: str) -> list[str]:
    """The first half of a text's sentences to learn from, the second to test with."""
    cut = re.split(r"(?<=[.!?])\s+", sample_text(text))
    lines = [" ".join(sentence.split()[:_LONGEST]) for sentence in cut if sentence.strip()]
    half = len(lines) // 2
    return lines[:half] if part == "learn" else lines[half:]


def _filler(text: str, part: str, rng: random.Random, words: int) -> list[str]:
    lines = _sentences(text, part)
    chosen: list[str] = []
    count = 0
    for line in lines[rng.randrange(max(1, len(lines) - words // 8)) :]:
        if count >= words:
            break
        chosen.append(line)
        count += len(line.split())
    if count < words:
        raise InputError(f"the {part} part of the text '{text}' has no {words} words of filler")
    return chosen
