"""Numbers in words, as English has them: twenty-one, two hundred and five thousand."""

from __future__ import annotations

import re
from collections.abc import Sequence

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_VALUES = {
    **{word: i for i, word in enumerate(_ONES)},
    **{word: 10 * (i + 2) for i, word in enumerate(_TENS)},
}
_LARGE = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
WORD = rf"(?:{'|'.join([*_VALUES, *_LARGE])})\b"
SPELLED = re.compile(rf"\b{WORD}(?:(?:[\s-]+|\s+and\s+){WORD})*", re.IGNORECASE)


def spells(text: str) -> bool:
    """Whether a text holds a number in words; a lone `one`, mostly a pronoun, doesn't count."""
    return any(m[0].lower() != "one" for m in SPELLED.finditer(text))


def value_of_words(words: Sequence[str]) -> int | None:
    """two hundred and five thousand -> 205000; None for five six."""
    total = current = 0
    below, ceiling = 1000, 10**12  # the next word must be less than `below`, a scale than `ceiling`
    for word in words:
        if word == "and":
            continue
        if word in _VALUES:
            value = _VALUES[word]
            if value >= below:
                return None
            current += value
            below = 10 if value >= 20 else 1
        elif word == "hundred":
            if not 0 < current < 10:
                return None
            current, below = current * 100, 100
        else:
            if not current or _LARGE[word] >= ceiling:
                return None
            total, current, below, ceiling = total + current * _LARGE[word], 0, 1000, _LARGE[word]
    return total + current
