"""The answer in a reply: the number or the choice that it states, or None.

A reader abstains where a reply names several answers (5 or 6; A and B), none, or one that it can't
read with certainty. Where a reply marks its answer, the mark decides, in this order:

    \\boxed{..}   ####   final answer   answer   result, total, solution

and the last mark of a kind counts. Without a mark a number is the last one of the last sentence
that has one; a choice is the only one that is named, or the one that stands alone at an end.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from tempering.agents.numerals import numerals
from tempering.agents.plain import after_thinking, boxes, plain

# What a part of a reply says: a value, that it is unclear, or nothing.
UNCLEAR = "unclear"
Found = Fraction | str | None

_LINK = r"(?:\s*(?:is|are|was|equals|(?:would|should|must|will|can)(?:\s\w+)?\sbe|=|:|→|->|⇒|=>)+)"
_OF = r"(?:\s(?:to|of|for|in)\b[^.:=\n]{0,80}?)?"
_MARKS = [
    re.compile(r"####()"),
    re.compile(rf"\bfinal\s(?:answer|result){_OF}{_LINK}()", re.IGNORECASE),
    re.compile(rf"\b(?:answer|ans){_OF}(?:{_LINK}|\s*\n|(?=\s[-+$]?\d))()", re.IGNORECASE),
    re.compile(rf"\b(?:result|total|solution){_LINK}()", re.IGNORECASE),
]
_SENTENCE = re.compile(r"(?<=[.!?])[\"')\]]*\s+|\n+")
_ABBREVIATED = re.compile(r"\b(approx|ca|resp|Rs|e\.g|i\.e|etc|No|Nr|vs)\.", re.IGNORECASE)
_ASIDE = re.compile(r"\s[(\[][^()\[\]]*[A-Za-z]{2,}[^()\[\]]*[)\]]")
_UNSURE = re.compile(
    r"\bnot\b|n't\b|\b(?:cannot|unknown|unclear|undetermined|undefined|impossible|between|than|least"
    r"|most|under|over|below|above|nor|neither|either|half|twice|double|triple|third|quarter|root"
    r"|log|ln|sin|cos|every|if|unless|up to|infinite|any|all|none|except)\b|[<>≤≥≠±≪≫]",
    re.IGNORECASE,
)
_OPERATION = re.compile(
    r"\s*(?:[+×÷*^]|[xX]\s?(?=\d)|-\s?(?=[\d(])|/\s?(?=[\w(])|(?:plus|minus|times|over|divided|squared"
    r"|cubed|factorial|multiplied|mod|dozens?|below|half|halves|thirds?|quarters?)\b"
    r"|(?:or|to)\s(?:more|less|fewer)|(?:out\s)?of\s(?:\w+\s)?\d)",
    re.IGNORECASE,
)
_JOINED = re.compile(r"(?:\s*[A-Za-z%°]*){0,3}\s*(?:,|;|/|\||&|\band\b|\bor\b|\bto\b|\bnor\b)\s*")
_UNITS = re.compile(r"\s*[A-Za-z]+\s*")
_NOTES = re.compile(r"\s*\(?(?:note|checked|source|ref|confidence|time|tokens|p\.?s)\b", re.I)

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
_WORD = rf"(?:{'|'.join([*_VALUES, *_LARGE])})\b"
_SPELLED = re.compile(rf"\b{_WORD}(?:(?:[\s-]+|\s+and\s+){_WORD})*", re.IGNORECASE)


def number(output: str, *, percent: bool = False) -> Fraction | None:
    """The number that a reply answers with; None where it has none, or not one alone."""
    output = after_thinking(output)
    boxed = boxes(output)
    if boxed:
        return _boxed(output, boxed, percent)
    text = _unlisted(re.sub(r"\b(?:minus|negative)\s(?=[\d$€£])", "-", _whole(plain(output))))
    stated = False
    for mark in _MARKS:
        for match in reversed(list(mark.finditer(text))):
            region = _region(text, match.end())
            found = _in(region, percent)
            if isinstance(found, Fraction):
                return found
            if found == UNCLEAR:
                return None
            stated = stated or bool(re.search(r"\w", region))
    return None if stated else _last(text, percent)


def _boxed(output: str, boxed: Sequence[tuple[int, int, str | None]], percent: bool) -> Fraction | None:
    contents = [None if c is None else _in(f" {plain(c)} ", percent) for _, _, c in boxed]
    if len(boxed) > 1 and contents[-1] != contents[-2]:
        between = output[boxed[-2][1] : boxed[-1][0]]
        if not re.search(r"[.!?\n]", between):
            return None
    return contents[-1] if isinstance(contents[-1], Fraction) else None


def _whole(text: str) -> str:
    """Abbreviations without the point that would end a sentence."""
    return _ABBREVIATED.sub(r"\1", text)


def _unlisted(text: str) -> str:
    """Without the numbers of a numbered list, and without bullets."""
    if re.search(r"^\s*1[.)]\s", text, re.M) and re.search(r"^\s*2[.)]\s", text, re.M):
        text = re.sub(r"^\s*\d{1,2}[.)]\s+", "", text, flags=re.M)
    return re.sub(r"^[ \t]*[-•*+]\s+", "", text, flags=re.M)


def _region(text: str, start: int) -> str:
    """From a mark to the end of its sentence, which may begin on a later line."""
    rest = text[start:]
    skipped = len(rest) - len(rest.lstrip(" \t\n:"))
    cut = _SENTENCE.search(rest, skipped)
    region = rest[: cut.start() if cut else None]
    if cut and region.rstrip().endswith(":"):
        return region + " " + _region(rest, cut.end())
    return region


def _in(region: str, percent: bool) -> Found:
    """What a stated answer is."""
    region = _ASIDE.sub(" ", region)
    found = numerals(region, percent=percent)
    if not found:
        return _spelled(region)
    if "=" in region or "≈" in region:
        return _equations(region, percent)
    first = found[0]
    before, after = region[: first.start], region[first.end :]
    if first.value is None or _UNSURE.search(before) or _UNSURE.match(after.lstrip()):
        return UNCLEAR
    if re.search(r"-\s*$|[\w)]\s*[×*/^]\s*$", before) or _OPERATION.match(after):
        return UNCLEAR
    if re.search(r"\(\s*$", before) and after.lstrip().startswith(")") and first.value > 0:
        return UNCLEAR  # (7) is 7, or -7 to an accountant
    if len(found) == 1 or all(one.value == first.value for one in found):
        return first.value
    between = region[first.end : found[1].start]
    direct = not re.search(
        r"\w", re.sub(r"\b(?:about|around|approx\w*|exactly|just)\b", "", before)
    )
    if direct and not _JOINED.fullmatch(between) and not _UNITS.fullmatch(between):
        return first.value
    return UNCLEAR


def _equations(region: str, percent: bool) -> Found:
    """The value of `x = 42`, or of the last of several steps; UNCLEAR for x = 1, y = 2."""
    clauses = [
        c for c in re.split(r"[,;]\s+|\s(?:and|so|thus|hence|or)\s", region) if "=" in c or "≈" in c
    ]
    names = {c.split("=")[0].strip() for c in clauses if re.search(r"[A-Za-z]", c.split("=")[0])}
    if len(names) > 1 or not clauses:
        return UNCLEAR
    found: list[Fraction] = []
    parts = re.split(r"[=≈]", clauses[-1])
    for part in parts:
        inside = numerals(f"={part}" if part != parts[0] else part, percent=percent)
        if len(inside) != 1 or inside[0].value is None:
            continue
        own = f"={part}" if part != parts[0] else part
        before, after = own[: inside[0].start].lstrip("="), own[inside[0].end :]
        alone = not re.search(r"[\w)+×*/^-]\s*$", before) and not _OPERATION.match(after)
        if alone and not _UNSURE.search(before) and not re.search(r"[+×*÷^]", after):
            found.append(inside[0].value)
    last = numerals(f"={parts[-1]}", percent=percent)
    if not found or len(last) > 1 or any(value != found[-1] for value in found):
        return UNCLEAR
    return found[-1]


def _last(text: str, percent: bool) -> Fraction | None:
    """The last number of the last sentence that has one."""
    sentences = [_ASIDE.sub(" ", s) for s in _SENTENCE.split(text)]
    having = [s for s in sentences if numerals(s)]
    telling = [s for s in having if not _NOTES.match(s)] or having
    if not telling:
        return None
    sentence = telling[-1]
    if re.search(r"[=≈]", sentence):
        found = _equations(sentence, percent)
        return found if isinstance(found, Fraction) else None
    *others, last = numerals(sentence, percent=percent)
    start = others[-1].end if others else 0
    between = sentence[start : last.start]
    if last.value is None or _OPERATION.match(sentence[last.end :]):
        return None
    if re.search(
        r"-\s*$|[+×*/^]\s*$|\bnot\s(?:\w+\s)?$|\b(?:than|least|most|under|over)\s$|[<>≤≥]\s*$",
        between,
    ):
        return None
    if re.search(r"\b(?:don't|do not|cannot|can't|unknown|unclear)\b", sentence):
        return None
    if re.search(r"\(\s*$", between) and sentence[last.end :].lstrip().startswith(")"):
        return last.value if last.value < 0 else None
    if others and (_JOINED.fullmatch(between) or _UNITS.fullmatch(between)):
        before = sentence[: others[-1].start]
        if others[-1].value != last.value and not re.search(r"\w", before):
            return None
        if re.search(r"\b(?:or|and|to)\s*$|[/|&]\s*$", between) or _UNITS.fullmatch(between):
            return None
    return last.value


def _spelled(region: str) -> Found:
    """A number in words, where it is the only one; `one` alone is mostly a pronoun."""
    found = list(_SPELLED.finditer(region))
    if not found:
        return UNCLEAR if _UNSURE.search(region) else None
    words = found[0][0].lower()
    rest = region[: found[0].start()] + region[found[0].end() :]
    if len(found) > 1 or _UNSURE.search(rest) or (words == "one" and re.search(r"\w", rest)):
        return UNCLEAR
    if _OPERATION.match(region, found[0].end()) or re.search(
        r"\ba\b|-\s*$", region[: found[0].start()]
    ):
        return UNCLEAR
    if re.search(r"[-/]|\bpoint\b|\band\b", region[found[0].end() :]):
        return UNCLEAR
    sign = -1 if re.search(r"\b(?:minus|negative)\s*$", region[: found[0].start()], re.I) else 1
    value = _value(re.findall(r"[a-z]+", words))
    return UNCLEAR if value is None else Fraction(sign * value)


def _value(words: Sequence[str]) -> int | None:
    """two hundred and five thousand -> 205000; None for five six."""
    total = current = 0
    room, ceiling = 1000, 10**12  # what the next word must stay under
    for word in words:
        if word == "and":
            continue
        if word in _VALUES:
            value = _VALUES[word]
            if value >= room:
                return None
            current += value
            room = 10 if value >= 20 else 1
        elif word == "hundred":
            if not 0 < current < 10:
                return None
            current, room = current * 100, 100
        else:
            if not current or _LARGE[word] >= ceiling:
                return None
            total, current, room, ceiling = total + current * _LARGE[word], 0, 1000, _LARGE[word]
    return total + current
