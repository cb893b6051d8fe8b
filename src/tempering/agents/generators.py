"""Three kinds of tasks with known answers: (rng, level) -> prompt, answer, tokens it takes at most.

Prompts are texts to continue, with worked examples first: asked in this way, the embedded model of
135M parameters solves 8 of 10 small sums, and in a chat turn hardly any. All tasks of a kind and
level have the same examples, which an engine then reads once.
"""

from __future__ import annotations

import random
from typing import Any

NAMES = (
    "Anna Ben Clara David Emma Frank Grace Henry Iris Jack Kate Leo Mary Noah Olive Paul Rose Sam "
    "Tina Victor Wendy Yusuf Zoe Alice Bob Carol Daniel Eva Fred Helen Ivan Julia"
).split()
THINGS = "apples books cards coins marbles pencils stickers stamps shells buttons candies".split()


def arithmetic_chain(rng: random.Random, level: int) -> dict[str, Any]:
    """(level + 1) // 2 sums or differences, of numbers to 9 at odd levels, to 20 at even ones."""
    steps, most = (level + 1) // 2, 9 if level % 2 else 20
    examples = random.Random(f"examples/arithmetic/{level}")
    shown = (_chain(examples, steps, most) for _ in range(3))
    lines = [f"{text} = {total}" for text, total in shown]
    text, total = _chain(rng, steps, most)
    return {"prompt": "\n".join([*lines, f"{text} ="]), "answer": str(total), "tokens": 8}


def _chain(rng: random.Random, steps: int, most: int) -> tuple[str, int]:
    """A chain that never falls below 0, and its value."""
    total = rng.randint(2, most)
    text = str(total)
    for _ in range(steps):
        number = rng.randint(2, most)
        if total >= number and rng.random() < 0.5:
            text, total = f"{text} - {number}", total - number
        else:
            text, total = f"{text} + {number}", total + number
    return text, total


def list_recall(rng: random.Random, level: int) -> dict[str, Any]:
    """The number that one of 4 * level names was given (32 at most)."""
    names = rng.sample(NAMES, min(4 * level, len(NAMES)))
    numbers = [str(number) for number in rng.sample(range(1000, 10000), len(names))]
    lines = [f"The code of {n} is {c}." for n, c in zip(names, numbers, strict=True)]
    asked = rng.randrange(len(names))
    prompt = "\n".join([*lines, "", f"The code of {names[asked]} is"])
    return {"prompt": prompt, "answer": numbers[asked], "tokens": 8}


def word_problem(rng: random.Random, level: int) -> dict[str, Any]:
    """A story of `level` steps about who has how many things; examples show the working."""
    shown = random.Random(f"examples/words/{level}")
    examples = []
    for _ in range(2):
        story, working, _ = _story(shown, level)
        examples.append(f"Q: {story}\nA: {working}\n")
    story, _, total = _story(rng, level)
    prompt = "\n".join([*examples, f"Q: {story}\nA:"])
    return {"prompt": prompt, "answer": str(total), "tokens": 12 * level}


def _story(rng: random.Random, steps: int) -> tuple[str, str, int]:
    """A story, its working, and the number at its end."""
    name, other = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS)
    total = rng.randint(3, 9)
    story, working = [f"{name} has {total} {thing}."], []
    for _ in range(steps):
        number = rng.randint(2, 6)
        kind = rng.randrange(3)
        if kind == 0 and total > number:
            story.append(f"{name} gives {number} {thing} to {other}.")
            working.append(f"{total} - {number} = {total - number}")
            total -= number
        elif kind == 1 and total > number:
            story.append(f"{name} loses {number} {thing}.")
            working.append(f"{total} - {number} = {total - number}")
            total -= number
        else:
            story.append(f"{other} gives {number} {thing} to {name}.")
            working.append(f"{total} + {number} = {total + number}")
            total += number
    story.append(f"How many {thing} does {name} have now?")
    return " ".join(story), ", ".join(working), total
