"""Recall of facts strewn over a long text: questions with known answers, in many wordings.

A context holds some facts ("The secret code for the red door is 4821.") among sentences of a
real text; a question asks for one of them. Everything is drawn from a seed.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tempering.data import sample_text
from tempering.errors import InputError

# (name, how a fact is stated, how it is asked; the answer follows the question at once).
WORDINGS: tuple[tuple[str, str, str], ...] = (
    ("secret code", "The secret code for {k} is {v}.", "The secret code for {k} is"),
    ("password", "Remember: the password of {k} is {v}.", "The password of {k} is"),
    ("question", "{k} was given the number {v}.", "Q: Which number was {k} given?\nA:"),
    ("colon", "{k}: {v}", "{k}:"),
    ("arrow", "{k} -> {v}", "{k} ->"),
    ("equals", "{k} = {v}", "{k} ="),
    ("locker", "In the locker of {k} lies {v}.", "In the locker of {k} lies"),
    ("favourite", "The favourite of {k} was always {v}.", "The favourite of {k} was always"),
    ("belongs", "Item {v} belongs to {k}.", "The item that belongs to {k} is item"),
    ("json", '{{"name": "{k}", "value": "{v}"}}', '{{"name": "{k}", "value": "'),
    ("table", "| {k} | {v} |", "| {k} |"),
    ("assigned", "We assigned {v} to {k} yesterday.", "Yesterday, {k} was assigned"),
    ("told", '"My answer is {v}," said {k}.', 'What {k} said was: "My answer is'),
    ("record", "Record of {k}; entry {v}.", "Record of {k}; entry"),
    ("keeper", "The keeper of {v} is called {k}.", "The one called {k} is the keeper of"),
    ("letter", "A letter for {k} carried the mark {v}.", "The letter for {k} carried the mark"),
    ("label", "Label {v} was put on {k}.", "The label that was put on {k} is"),
    ("phone", "You can reach {k} under {v}.", "You can reach {k} under"),
    ("badge", "{k} wears the badge {v}.", "Question: What badge does {k} wear? Answer:"),
    ("python", 'codes["{k}"] = "{v}"', 'print(codes["{k}"])  # '),
    ("note", "Note to self - {k} goes with {v}.", "Note to self - {k} goes with"),
    ("bracket", "[{k}] {v}", "[{k}]"),
    ("room", "{k} stays in room {v}.", "The room in which {k} stays is"),
    ("prize", "The prize won by {k} was {v}.", "The prize won by {k} was"),
    ("ticket", "{k} holds ticket {v} for tonight.", "For tonight, {k} holds ticket"),
    ("list", "- {k} ({v})", "- {k} ("),
    ("order", "Order {v} was placed by {k}.", "The order placed by {k} was order"),
    ("recall", "Keep in mind that {k} means {v}.", "As noted before, {k} means"),
    ("xml", "<{k}>{v}</{k}>", "<{k}>"),
    ("shelf", "{k} can be found on shelf {v}.", "Where can {k} be found? On shelf"),
    ("agent", "Agent {k} has the alias {v}.", "The alias of agent {k} is"),
    ("csv", "{k},{v}", "{k},"),
    ("score", "The score of {k} came to {v}.", "The score of {k} came to"),
    ("chosen", "For {k} they chose {v}.", "What they chose for {k} is"),
)

NAMES = tuple(
    "Alder Basil Cedric Dorian Edith Flora Gideon Hester Ivor Jonas Kestrel Lydia Magnus Nadia "
    "Orson Petra Quentin Rowena Silas Tamsin Ursula Vernon Wilma Xavier Yvette Zelda Amber Boris "
    "Clara Desmond Elsa Felix Greta Hugo Irene Jasper Klaus Leona Mabel Nestor".split()
)
THINGS = tuple(
    f"the {colour} {thing}"
    for colour in "red blue green black white golden silver brown".split()
    for thing in "door box lamp boat tower garden bridge engine".split()
)
WORDS = tuple(
    "copper velvet harbor lantern meadow orchid pepper quartz ribbon saffron thunder umbrella "
    "violet walnut yonder zephyr almond bamboo cactus dolphin emerald falcon ginger hazel indigo "
    "jasmine kettle lemon marble nectar olive parrot rocket silver tulip vanilla willow anchor "
    "butter candle desert feather hammer island jungle ladder mirror needle ocean pencil".split()
)


def _digits(rng: random.Random) -> str:
    return str(rng.randint(1000, 9999))


def _word(rng: random.Random) -> str:
    return rng.choice(WORDS)


def _pair(rng: random.Random) -> str:
    return f"{rng.choice(WORDS)} {rng.choice(WORDS)}"


def _code(rng: random.Random) -> str:
    letters = "".join(rng.choice("ABCDEFGHKLMNPQRSTUVWXYZ") for _ in range(2))
    return f"{letters}-{rng.randint(100, 999)}"


VALUES: dict[str, Callable[[random.Random], str]] = {
    "digits": _digits,
    "word": _word,
    "two words": _pair,
    "code": _code,
}


@dataclass(frozen=True)
class Question:
    """A context with facts, the question at its end, and the answer that should follow."""

    prompt: str
    answer: str
    wording: str
    value: str


def recall_question(
    seed: int,
    *,
    wording: int | None = None,
    facts: int = 16,
    words: int = 620,
    value: str | None = None,
    text: str = "fiction",
    layout: str | None = None,
    wordings: Sequence[tuple[str, str, str]] = WORDINGS,
) -> Question:
    """One question about a fact in a long context.

    Parameters
    ----------
    seed: of every choice not fixed by another argument.
    wording: index into `wordings`. value: a kind of `VALUES`.
    facts: stated in the context; one is asked for. words: of filler text around them.
    text: the sample text that the filler comes from.
    layout: "strewn" (facts between sentences) or "block" (one list, filler around it).

    Raises InputError for more facts than there are keys.
    """
    rng = random.Random(seed)
    index = rng.randrange(len(wordings)) if wording is None else wording
    name, fact, question = wordings[index]
    kind = rng.choice(tuple(VALUES)) if value is None else value
    place = rng.choice(("strewn", "strewn", "block")) if layout is None else layout
    keys = NAMES if rng.random() < 0.6 else THINGS
    if not 1 <= facts <= len(keys):
        raise InputError(f"a context holds 1 to {len(keys)} facts, not {facts}")
    chosen = rng.sample(keys, facts)
    values: list[str] = []
    while len(values) < facts:
        drawn = VALUES[kind](rng)
        if drawn not in values:
            values.append(drawn)
    stated = [fact.format(k=k, v=v) for k, v in zip(chosen, values, strict=True)]
    filler = _sentences(text, rng, words)
    if place == "block":
        middle = rng.randint(0, len(filler))
        body = [*filler[:middle], "\n" + "\n".join(stated) + "\n", *filler[middle:]]
    else:
        body = filler
        for line in stated:
            body.insert(rng.randint(0, len(body)), line)
    asked = rng.randrange(facts)
    open_quote = question.endswith(('"', "(", "# ", ">", '","'))
    answer = values[asked] if open_quote else " " + values[asked]
    prompt = " ".join(body).replace(" \n", "\n").replace("\n ", "\n")
    return Question(prompt + "\n\n" + question.format(k=chosen[asked], v=""), answer, name, kind)


def _sentences(text: str, rng: random.Random, words: int) -> list[str]:
    sentences = re.split(r"(?<=[.!?])\s+", sample_text(text))
    start = rng.randrange(max(1, len(sentences) - words // 8))
    found: list[str] = []
    count = 0
    for sentence in sentences[start:]:
        line = " ".join(sentence.split())
        found.append(line)
        count += len(line.split())
        if count >= words:
            break
    return found
