"""The number that a reply answers with, or None.

A reader abstains where a reply names several answers (5 or 6), none, or one that it can't read with
certainty. Where a reply marks its answer, the first of these marks that occurs decides:

    \\boxed{..}   ####   final answer   answer   result, total, solution

Where a mark occurs several times, its last occurrence counts. Without a mark the answer is the last
number of the last sentence that has a number.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from tempering.agents.numerals import numerals, value_of
from tempering.agents.plain import OPAQUE, RETRACTION, after_thinking, boxes, plain, rival_boxes
from tempering.agents.spelled import SPELLED, WORD, spells, value_of_words

# The reading of a part of a reply: a value, UNCLEAR where it holds an answer that can't be read for
# certain, or None where it holds no answer.
UNCLEAR = "unclear"
Reading = Fraction | str | None

MOST_STATED = 600  # characters of a stated answer, and of the sentence around it
MOST_MARKS = 20  # of a kind, the last ones

# A quote stands before the link where the mark is a key of JSON: {"answer": 42}.
_LINK = r"(?:[\"']?\s*(?:is|are|was|equals|(?:would|should|must|will|can)(?:\s\w+)?\sbe|=|:)+)"
_OF = r"(?:\s(?:to|of|for|in)\b[^.:=\n]{0,80}?)?"
_MARKS = [
    re.compile(r"####()"),
    re.compile(rf"\bfinal[\s_](?:answer|result){_OF}{_LINK}()", re.IGNORECASE),
    re.compile(rf"\b(?:answer|ans)(?:{_OF}{_LINK}|\s*\n|(?=\s[-+$]?\d))()", re.IGNORECASE),
    re.compile(rf"\b(?:result|total|solution){_LINK}()", re.IGNORECASE),
]
_SENTENCE = re.compile(r"(?<=[.!?])[\"')\]]*\s+|\n+|(?<=。)")
_ABBREVIATED = re.compile(r"\b(approx|ca|resp|Rs|e\.g|i\.e|etc|No|Nr|vs)\.", re.IGNORECASE)
_OTHER = re.compile(r"\s[(\[]\s*(?:or|and)\b", re.IGNORECASE)  # 5 (or 6)
_ASIDE = re.compile(r"\s[(\[][^()\[\]]{0,200}[)\]]")
_UNSURE = re.compile(
    r"\bnot\b|n't\b|\b(?:cannot|unknown|unclear|undetermined|undefined|impossible|between|than|least"
    r"|most|under|over|below|above|nor|neither|either|half|twice|double|triple|third|quarter|root"
    r"|log|ln|sin|cos|every|if|unless|up to|one of|infinite|any|all|none|null|nan|n/a"
    r"|except)\b|[<>≤≥≠±≪≫]",
    re.IGNORECASE,
)
_OPERATION = re.compile(
    r"\s*(?:\)?\s?[+×÷*^]|[xX]\s?(?=\d)|-\s?(?=[\d(])|/\s?(?=[\w(])|(?:plus|minus|times|over|divided|squared"
    r"|cubed|factorial|multiplied|mod|dozens?|below|half|halves|thirds?|quarters?)\b"
    r"|(?:or|to)\s(?:more|less|fewer)|(?:more|less|fewer|greater|larger|smaller)\sthan\b|(?:out\s)?of\s(?:\w+\s)?\d)"
    # A factor of algebra: letters that are no unit.
    r"|\s?[beijknopqruvwxyz](?![\w'])",
    re.IGNORECASE,
)
_JOINED = re.compile(
    r"(?:[,;/|&+×÷*^±-]|\b(?:and|or|to|nor|vs|out of|of|by|per|in|times|plus|minus|over))"
    r"[\s≈~$€£+(]*$",
    re.IGNORECASE,
)
# 5! = 120, 5!/3!, 5! ways; but not: It is 42! Great.
_FACTORIAL = re.compile(r"(?<=[\w)])!(?=[ ]*[=+×÷*/^,;)-]|[.]|[ ]+[a-z])")
_UNITS = re.compile(r"\s*[A-Za-z]+\s*")
# The last two lines give values to two variables, and the reader can't know which is asked for.
_ASSIGNED = re.compile(r"^\W*([A-Za-z])\s*&?=[^\n]*\n\W*(?!\1)[A-Za-z]\s*&?=[^\n]*\s*\Z", re.M)
_REASON = re.compile(
    r"\b(?:since|because|as|where|when|given|using|from|if|check)\b", re.IGNORECASE
)
_REASONS = re.compile(
    r"\W*(?:explanation|explain|reason|because|since|steps?|working|solution|here|justification"
    r"|details|proof|check|to\s)",
    re.IGNORECASE,
)
# In a stated answer, what leads from one number to another that follows from it: 3 each, so 9.
_LEADS_ON = re.compile(
    r"\b(?:(?<!or\s)so|therefore|thus|hence|then|giving|making|total\w*|altogether|in all|i\.e"
    r"|that is|which\s(?:gives|makes|means|totals))\b",
    re.IGNORECASE,
)
# A sentence that checks or explains an answer, and so has numbers that are none.
_CHECK = re.compile(
    r"\W*(?:(?:let(?:'s| me| us)|we can|you can|to)\s(?:double[- ]?|re-?)?(?:check|verif)"
    r"|(?:double[- ]?|re-?)?(?:check|verif)|indeed\b|re(?:member|call)\b|hope\b"
    r"|for (?:example|instance)\b|we used\b|(?:this|that|it|which)\sincludes\b"
    r"|(?:since|because)\b[^,]*\Z|\([^()]*\)\W*\Z)",
    re.IGNORECASE,
)
_NOTES = re.compile(r"\s*\(?(?:note|checked|source|ref|confidence|time|tokens|p\.?s)\b", re.I)

_OR_SPELLED = re.compile(
    r"(?:\s?[A-Za-z%°^\d/]{1,12}){0,2}\s*(?:[,±+]|\bor|\band|\bto|\bof|\bby)(?:\s+(?:or|and))?\s+"
    + WORD,
    re.IGNORECASE,
)


def number(output: str, *, percent: bool = False) -> Fraction | None:
    """The number that a reply answers with; None where it gives none, or several."""
    output = after_thinking(output)
    boxed = boxes(output)
    if boxed:
        return _boxed(output, boxed, percent)
    text = _unlisted(_without_abbreviation_points(_prose(output)))
    stated = False
    for mark in _MARKS:
        for match in reversed(list(mark.finditer(text))[-MOST_MARKS:]):
            region = _region(text, match.end())
            found = _stated(region, percent)
            if isinstance(found, Fraction):
                return None if _retracted(text[match.end() + len(region) :], found) else found
            if found == UNCLEAR:
                return None
            stated = stated or bool(re.search(r"\w", region))
    return None if stated else _in_last_sentence(text, percent)


def _boxed(
    output: str, boxed: Sequence[tuple[int, int, str | None]], percent: bool
) -> Fraction | None:
    # In a box every "!" is a factorial's.
    contents = [
        None if c is None else _stated(f" {_prose(c).replace('!', OPAQUE)} ", percent)
        for _, _, c in boxed
    ]
    if rival_boxes(output, boxed) and contents[-1] != contents[-2]:
        return None
    return contents[-1] if isinstance(contents[-1], Fraction) else None


def _prose(text: str) -> str:
    """Plain text in which "=" stands for every arrow that leads to a result.

    The sign of a factorial becomes `OPAQUE`; as an exclamation mark it would end the sentence.
    """
    text = re.sub(r"->|=>|[→⇒⟹]|\\(?:to|Rightarrow|implies)(?![a-zA-Z])", "=", plain(text))
    return _FACTORIAL.sub(OPAQUE, text)


def _retracted(rest: str, value: Fraction) -> bool:
    """Whether the text after a stated answer takes it back: Answer: 42. Wait, it is 43."""
    taken = RETRACTION.search(rest)
    return taken is not None and (
        spells(rest[taken.end() :])
        or any(one.value != value for one in numerals(rest[taken.end() :]))
    )


def _without_abbreviation_points(text: str) -> str:
    """The text with no point after abbreviations, which would look like the end of a sentence."""
    return _ABBREVIATED.sub(r"\1", text)


def _unlisted(text: str) -> str:
    """The text without the numbers of a numbered list, and without bullets."""
    if all(re.search(rf"^[ \t]*{n}[.)][ \t]", text, re.M) for n in (1, 2)):
        text = re.sub(r"^[ \t]*\d{1,2}[.)][ \t]+", "", text, flags=re.M)
    return re.sub(r"^[ \t]*[-•*+]\s+", "", text, flags=re.M)


def _region(text: str, start: int) -> str:
    """The text from a mark to the end of its sentence, which may begin on a later line."""
    # Cut between words, since half a number would be read as another number.
    end = re.compile(r"\s").search(text, start + MOST_STATED)
    rest = text[start : end.start() if end else None]
    skipped = len(rest) - len(rest.lstrip(" \t\n:"))
    cut = _SENTENCE.search(rest, skipped)
    region = rest[: cut.start() if cut else None]
    if cut and region.rstrip().endswith(":"):
        return region + " " + _region(rest, cut.end())
    return region


def _without_asides(text: str) -> str:
    """The text without brackets that hold words, such as (see step 2)."""
    text = _ASIDE.sub(
        lambda m: " " if re.search(r"[A-Za-z]{2}", m[0]) and not _OTHER.match(m[0]) else m[0], text
    )
    # Without a quantity on its left, the sign means "about", and says nothing of an equation.
    return re.sub(r"(?<![\d)\s])(?<!\b[A-Za-z])(\s{0,3})≈", r"\1", text)


def _stated(region: str, percent: bool) -> Reading:
    """The reading of a stated answer."""
    region = _without_asides(region)
    found = numerals(region, percent=percent)
    if not found:
        return _spelled(region)
    if "=" in region or "≈" in region:
        reason = _REASON.search(region)
        claim = region[: reason.start()] if reason else region
        if not re.search("[=≈]", claim):  # 6, since 2 + 4 = 6
            return _stated(claim, percent) if numerals(claim) else UNCLEAR
        return _equations(claim, percent)
    first = found[0]
    before, after = region[: first.start], region[first.end :]
    if (
        first.value is None
        or any(one.value is None for one in found)
        or _UNSURE.search(before)
        or _UNSURE.match(after.lstrip())
    ):
        return UNCLEAR
    if re.search(r"-\s*$|[\w)]\s*[+×*/^]\s*$", before) or _OPERATION.match(after):
        return UNCLEAR
    if _OR_SPELLED.match(after) or spells(before):
        return UNCLEAR
    if re.search(r"\(\s*$", before) and after.lstrip().startswith(")") and first.value > 0:
        return UNCLEAR  # (7) is 7, or -7 to an accountant
    if len(found) == 1 or all(one.value == first.value for one in found):
        return first.value
    between = region[first.end : found[1].start]
    direct = not re.search(
        r"\w", re.sub(r"\b(?:about|around|approx\w*|exactly|just)\b", "", before)
    )
    leads_on = _LEADS_ON.search(between) or _LEADS_ON.search(region[found[-1].end :])
    if direct and not leads_on and not _several(between):
        return first.value
    return UNCLEAR


def _equations(region: str, percent: bool) -> Reading:
    """The value of `x = 42`, or of the last of several steps; UNCLEAR for `x = 1, y = 2`."""
    clauses = re.split(r"[,;]\s+|\s(?:and|so|thus|hence|or)\s", region)
    ending = numerals(clauses[-1], percent=percent)
    if ending and not re.search("[=≈]", clauses[-1]):
        # The last clause has no equation: it repeats the result, or gives another: x = 5 or 6.
        bare = value_of(clauses[-1].strip(" ."), percent=percent) is not None
        if len(ending) > 1 or ending[0].value is None:
            return UNCLEAR
        if bare or re.search(r"\s(?:and|or)\s[^=≈]*$", region):
            whole = _equation(clauses[-2], percent) if re.search("[=≈]", clauses[-2]) else None
            if whole != ending[0].value:
                return UNCLEAR
    clauses = [clause for clause in clauses if re.search("[=≈]", clause)]
    # x = 5 gives a name its value; 2x = 10 is a step on the way.
    named = [c for c in clauses if re.fullmatch(r"[^\d+×*/^]*[A-Za-z][^\d+×*/^]*[=≈].*", c, re.S)]
    if not clauses or len({re.split("[=≈]", c)[0].strip() for c in named}) > 1:
        return UNCLEAR
    values = [_equation(clause, percent) for clause in clauses]
    stated = {v for c, v in zip(clauses, values, strict=True) if c in named and v is not None}
    return UNCLEAR if len(stated) > 1 or values[-1] is None else values[-1]


def _equation(clause: str, percent: bool) -> Fraction | None:
    """The number that stands alone on a side of an equation; None where two sides differ."""
    first, *rest = re.split("[=≈]", clause)
    sides = [first, *(f"={side}" for side in rest)]
    found: list[Fraction] = []
    for side in sides:
        inside = numerals(side, percent=percent)
        if len(inside) != 1 or inside[0].value is None:
            continue
        before, after = side[: inside[0].start].lstrip("="), side[inside[0].end :]
        after = re.sub(r"(?<=[A-Za-z])\^-?\d", "", after)  # of a unit
        alone = not re.search(r"[\w)+×*/^-]\s*$|\w\(\s*$", before) and not _OPERATION.match(after)
        if alone and not _UNSURE.search(before) and not re.search(r"[+×*÷^]", after):
            found.append(inside[0].value)
    # The last side must be the result, or the sum behind a result on the left: 42 = 6 * 7.
    sum_of_numbers = not re.search(r"[^\W\dxX]", sides[-1]) and OPAQUE not in sides[-1]
    last = numerals(sides[-1], percent=percent)
    told = len(last) == 1 and last[0].value is not None
    if len(set(found)) != 1 or not (told or (sum_of_numbers and last)):
        return None
    return found[0]


def _in_last_sentence(text: str, percent: bool) -> Fraction | None:
    """The last number of the last sentence that has one."""
    sentences = [_without_asides(s) for s in _SENTENCE.split(text)]
    having = [s for s in sentences if numerals(s)]
    telling = [s for s in having if not _NOTES.match(s)] or having
    if not telling:
        found = _spelled(text) if len(text.split()) <= 8 else None
        return found if isinstance(found, Fraction) else None
    sentence = telling[-1]
    # What checks an answer has its numbers, and so has JSON without a key that is known.
    if _CHECK.match(sentence) and len(telling) > 1:
        return None
    if text.lstrip().startswith("{") and len({one.value for one in numerals(text)}) > 1:
        return None
    later = sentences[len(sentences) - sentences[::-1].index(sentence) :]
    if any(spells(s) for s in later if not _NOTES.match(s)):
        return None
    found = _on_a_line_of_its_own(text, sentence, percent)
    if found is not None:
        return found if isinstance(found, Fraction) else None
    reason = _REASON.search(sentence)
    if (
        reason
        and re.search(r"[=≈]", sentence[reason.end() :])
        and numerals(sentence[: reason.start()])
    ):
        return None
    if re.search(r"[=≈]", sentence):
        if _ASSIGNED.search(text):
            return None
        found = _equations(sentence, percent)
        return found if isinstance(found, Fraction) else None
    *others, last = numerals(sentence, percent=percent)
    if spells(sentence[last.end :]):
        return None
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
    if spells(between) and _JOINED.search(between):
        return None
    if re.search(r"\(\s*$", between) and sentence[last.end :].lstrip().startswith(")"):
        return last.value if last.value < 0 else None
    if others and others[-1].value != last.value and _several(between):
        return None
    return last.value


def _on_a_line_of_its_own(text: str, last: str, percent: bool) -> Reading:
    """The number that a reply begins with, on a line that holds no more, before its reasons.

    UNCLEAR where what follows is no reason, and ends in another number. None without such a line.
    """
    line, _, rest = text.strip().partition("\n")
    value = value_of(line.strip(" .\"'"), percent=percent)
    if value is None or not rest.strip() or line.strip() == last.strip():
        return None
    return value if _REASONS.match(rest) else UNCLEAR


def _several(between: str) -> bool:
    """Whether the text between two numbers makes them two answers: 5, 6; 5 apples or 6."""
    if len(between) > 60:
        return False
    joined = _JOINED.search(between)
    few = joined is not None and len(between[: joined.start()].split()) <= 3
    return few or not between.strip() or bool(_UNITS.fullmatch(between))


def _spelled(region: str) -> Reading:
    """The reading of a part with numbers in words only; a lone `one` is mostly a pronoun."""
    found = list(SPELLED.finditer(region))
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
    value = value_of_words(re.findall(r"[a-z]+", words))
    return UNCLEAR if value is None else Fraction(sign * value)
