"""The choice that a reply answers with, among those of its task."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from tempering.agents.plain import RETRACTION, after_thinking, boxes, plain, rival_boxes

_MARK = re.compile(
    r"(?:\b(?:answer|ans|choice|option|selection|solution)[\"']?"
    r"(?:\s(?:to|of|for)\b[^.:=\n]{0,80}?)?(?:\s(?:is|would be|should be|must be|:|=)|[:=])"
    r"|\b(?:answer|ans)\s*\n"
    r"|\b(?:pick|choose|select|chose|picked|selected|go with|going with|opt for)\b"
    r"|####)\s*",
    re.IGNORECASE,
)
_LEAD = (
    r"(?:(?:clearly|definitely|therefore|thus|most likely|probably|simply|option|choice|letter"
    r"|answer|the)\s+)*"
)
_OPEN = r"[\s\"'(\[:]*"
_AFTER_BARE = re.compile(r"[\s\"')\]]*(?:[.,;:!—–)\]-]|$|\n|(?:because|since|as|for)\b)")
_NEGATED = re.compile(
    r"(?:\bnot|n't|\brather than|\binstead of|\bexcept|\belimin\w+|\brul\w+ out|\bexclud\w+"
    r"|\bneither|\bnor|\bavoid|\bwithout|\breject\w*|\bthan)\s+(?:\w+\s+)?"
    r"(?:the\s|option\s|choice\s|answer\s)*[(\"']*$",
    re.IGNORECASE,
)
_WRONG = re.compile(
    r"[\s\"')\].]*(?:is|are|was|seems|looks|can be|must be|cannot|can't|isn't|doesn't|won't)\b"
    r"[^.,;\n]{0,80}?\b(?:wrong|incorrect|false|out|not|eliminated|distractor|excluded|n't|invalid"
    r"|be right|fit|work)\b"
    r"|[\s\"')\]]*(?:isn't|cannot|can't|doesn't|won't)\b"
    r"|[\"')\]]*\s?(?:\?\s?(?:no|nope|wrong)|:\s?(?:wrong|incorrect))\b",
    re.IGNORECASE,
)
# Before a word in lower case, A is an article and I a pronoun, and neither is a choice; the words
# listed here are those that also follow a choice: "A or B", "A is right".
_AND = r"or|and|nor|because|since|but|not"
_IS = r"is|are|was|were|can|could|would|cannot|seems|looks|must|should|has|fits"
_WORD_AFTER = {
    "A": re.compile(rf"\s+(?!(?:{_AND}|{_IS})\b)[a-z]"),
    "I": re.compile(rf"\s+(?!(?:{_AND}|is|are)\b)[a-z]"),
}
_LABELS = re.compile(r"[\s\"').:\](-]{1,4}")
_OR = re.compile(
    r"[\s\"')\]]*(?:or|and|/|,|&|\|)\s*(?:option\s|choice\s|perhaps\s|maybe\s)?[\"'(\[]*", re.I
)
_LABEL = re.compile(r"^[ \t]*[(\[]?([A-Z])[).:\]][ \t]+(\S.*?)[ \t]*$", re.MULTILINE)


class Options(NamedTuple):
    """names: every name of a choice -> the choice. letters: names that are a single letter."""

    names: dict[str, str]
    letters: frozenset[str]


def options(choices: Sequence[object], prompt: str) -> Options:
    """The choices by their own names, and by the letters or texts that the prompt gives them.

    A line `A) Paris` of the prompt makes Paris another name of the choice A, or A one of Paris.
    """
    own = [str(choice) for choice in choices]
    names = {" ".join(plain(c).split()).casefold(): c.lower() for c in own}
    letters = {c.upper() for c in own if len(c) == 1 and c.isalpha()}
    labels = _LABEL.findall(prompt)
    texts = [" ".join(plain(text).split()).rstrip(".").casefold() for _, text in labels]
    for (letter, _), text in zip(labels, texts, strict=True):
        if letters:
            if letter in letters and texts.count(text) == 1:
                names.setdefault(text, letter.lower())
        elif text in names:
            names[letter.casefold()] = names[text]
    if not letters:
        letters = {letter for letter, text in zip((row[0] for row in labels), texts, strict=True)
                   if text in names}  # fmt: skip
    return Options(names, frozenset(letters))


class _Mention(NamedTuple):
    start: int
    end: int
    choice: str
    article: bool  # A or I, which may be a word


def choice(output: str, known: Options) -> str | None:
    """The choice that a reply names as its answer; None where it names none, or not one alone."""
    output = after_thinking(output)
    boxed = boxes(output)
    if boxed:
        inside = [None if c is None else _in_box(plain(c), known) for _, _, c in boxed]
        return None if rival_boxes(output, boxed) and inside[-1] != inside[-2] else inside[-1]
    text = plain(output).strip()
    if whole := known.names.get(text.strip(" .!?\"'()[]:").casefold()):
        return whole
    found = _mentions(text, known)
    for mark in reversed(list(_MARK.finditer(text))[-20:]):
        after = re.compile(_OPEN + _LEAD + _OPEN, re.IGNORECASE).match(text, mark.end())
        place = after.end() if after else mark.end()
        marked = next((m for m in found if m.start == place), None)
        if marked is None and text[place : place + 1].casefold() in known.names:
            marked = _lower_case_letter(text, place, known)
        if marked is not None and not _negated(text, marked):
            unclear = _joined(text, marked, found) or _retracted(text, marked, found)
            return None if unclear else marked.choice
    found = [m for m in found if not m.article and not _negated(text, m)]
    if len({m.choice for m in found}) <= 1:
        return found[0].choice if found else None
    return _at_either_end(text, known)


def _in_box(text: str, known: Options) -> str | None:
    """The choice in a box, where the box names no other."""
    stripped = text.strip(" .\"'()[]:").casefold()
    if stripped in known.names:
        return known.names[stripped]
    found = {m.choice for m in _mentions(text, known) if not _negated(text, m)}
    return found.pop() if len(found) == 1 else None


def _lower_case_letter(text: str, place: int, known: Options) -> _Mention | None:
    """`answer: b`, a letter in lower case right after a mark."""
    if re.match(r"\w\w|\w'|\w\s+[a-z]", text[place : place + 3] + " "):
        return None
    return _Mention(place, place + 1, known.names[text[place].casefold()], False)


def _mentions(text: str, known: Options) -> list[_Mention]:
    words = sorted(
        (n for n in known.names if n.upper() not in known.letters), key=len, reverse=True
    )
    patterns = []
    if words:
        joined = "|".join(r"\s+".join(map(re.escape, word.split())) for word in words)
        patterns.append(
            (re.compile(rf"(?<![\w])(?<!\d[.,])(?:{joined})(?!\w|[.,]\d)", re.I), False)
        )
    if known.letters:
        letters = "".join(sorted(known.letters))
        patterns.append((re.compile(rf"(?<![\w'.&+-])[{letters}](?![\w'&+#]|\.\w|-\w)"), True))
    found = []
    for pattern, letter in patterns:
        for m in pattern.finditer(text):
            name = " ".join(m[0].split()).casefold()
            word = letter and m[0] in _WORD_AFTER and _WORD_AFTER[m[0]].match(text, m.end())
            labelled = re.search(
                r"\b(?:option|choice|answer|letter)\s$",
                text[max(0, m.start() - 9) : m.start()],
                re.I,
            )
            found.append(_Mention(*m.span(), known.names[name], bool(word) and not labelled))
    return sorted(found)


def _negated(text: str, mention: _Mention) -> bool:
    return bool(
        _NEGATED.search(text[max(0, mention.start - 60) : mention.start])
        or _WRONG.match(text, mention.end)
    )


def _joined(text: str, mention: _Mention, found: Sequence[_Mention]) -> bool:
    """Whether another choice is joined to this one: `A or B`, `A, B`, `A) text of B`.

    `A, not B` doesn't count.
    """
    glue, label = _OR.match(text, mention.end), _LABELS.match(text, mention.end)
    others = [m for m in found if m.choice != mention.choice and not m.article]
    if glue is not None and any(m.start == glue.end() for m in others):
        return True
    # The letter of one choice with the text of another.
    spelled = (m for m in others if m.end > m.start + 1 and not _negated(text, m))
    return label is not None and any(m.start == label.end() for m in spelled)


def _retracted(text: str, mention: _Mention, found: Sequence[_Mention]) -> bool:
    """Whether the text after a marked choice takes it back for another: C. Actually, B."""
    taken = RETRACTION.search(text, mention.end)
    return taken is not None and any(
        m.start > taken.end() and m.choice != mention.choice and not m.article for m in found
    )


def _at_either_end(text: str, known: Options) -> str | None:
    """The choice that begins or ends a reply, where it stands alone and the other end agrees."""
    found = _mentions(text, known)
    ends = set()
    first = found[0]
    begins = not text[: first.start].strip(" \"'([") and _AFTER_BARE.match(text, first.end)
    if begins and not first.article and not _joined(text, first, found):
        ends.add(first.choice)
    lines = text.split("\n")
    if len(lines) > 1 and (name := lines[-1].strip(" .!\"'()[]:").casefold()) in known.names:
        ends.add(known.names[name])
    return ends.pop() if len(ends) == 1 else None
