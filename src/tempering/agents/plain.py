"""A reply as plain text: thinking, markup and LaTeX taken off, one sign for each meaning.

A quantity that is no rational number (a root, pi, a fraction of letters) becomes the character
`OPAQUE`, so that a reader doesn't take the numbers beside it for the whole quantity.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

OPAQUE = "\ufffc"

# Where a reply takes back what it answered before.
RETRACTION = re.compile(
    r"\b(?:actually|wait|correction|oops|sorry|scratch that|my mistake|on second thought"
    r"|I made an? (?:mistake|error)|let me (?:re\w+|correct|fix|try again))\b",
    re.IGNORECASE,
)
_TAG = re.compile(r"<(/?)(think|thinking|thought|reasoning)>", re.IGNORECASE)
MOST_BOXED = 2000  # characters in a box; a longer box counts as one that is never closed
_SUPERSCRIPT = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_SUPERSCRIPTS = re.compile("[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_SIGNS = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d", "-"),
        **dict.fromkeys("\u2018\u2019\u02bc\u2032", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u00ab\u00bb", '"'),
        **dict.fromkeys("\u22c5\u00b7\u2217", "×"),
        **dict.fromkeys("π√∞∛ℯ", OPAQUE),
        "\u2044": "/",
        "\u2215": "/",
        "\u066b": ".",
        "\u066c": ",",
        "\u2248": "≈",
        "\u2243": "≈",
        **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad", None),
    }
)
_GROUP = r"\{([^{}]*)\}"
_NUMBER = re.compile(r"\s*[-+]?\s*\d[\d.,]*\s*")
_LATEX = [
    (re.compile(r"\\\\"), "\n"),
    (re.compile(r"\\(?:begin|end)\{[a-zA-Z]+\*?\}|&(?==)"), ""),
    (re.compile(r"\\left|\\right|\\displaystyle|\\bigl?|\\bigr|\\!"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\{\.\}"), "."),
    (re.compile(r"\\[,;: ]|\\quad|\\qquad|~"), " "),
    (re.compile(r"\\([%$#&_{}])"), r"\1"),
    (re.compile(r"\\(?:times|cdot|ast)(?![a-zA-Z])"), "×"),
    (re.compile(r"\\div(?![a-zA-Z])"), "÷"),
    (re.compile(r"\\pm(?![a-zA-Z])"), "±"),
    (re.compile(r"\\(?:approx|simeq|sim)(?![a-zA-Z])"), "≈"),
    (re.compile(r"\\(?:leq?|geq?|neq?|lt|gt)(?![a-zA-Z])"), "≤"),
    (re.compile(r"\^\\circ|\^\{\\circ\}|\\degree|\\circ"), "°"),
    (re.compile(r"\\(?:pi|infty|tau|phi)(?![a-zA-Z])"), OPAQUE),
    (re.compile(r"\\[()\[\]]"), " "),
]
_WORDS = re.compile(
    r"\\(?:text|textbf|textit|textrm|texttt|mathrm|mathbf|mathit|mathsf|mbox|emph|underline)\s*"
    + _GROUP
)
_FRACTION = re.compile(rf"\\[dtc]?frac\s*(?:{_GROUP}|(\d))\s*(?:{_GROUP}|(\d))")
_OPERATOR = re.compile(rf"\\(?:sqrt|binom|log|ln|sin|cos|tan|exp)(?:\[[^\]]*\])?\s*(?:{_GROUP})?")
_STRUCK = re.compile(r"~~.+?~~|\\(?:cancel|sout)\{[^{}]*\}", re.DOTALL)
_HTML = re.compile(r"</?(?:b|i|em|strong|u|p|span|code|br|div|mark)\s*/?>", re.IGNORECASE)


def after_thinking(text: str) -> str:
    """A reply without its thinking; empty where the thinking never ends."""
    kept: list[str] = []
    start: int | None = 0  # of the text since the last thinking; None inside of thinking
    for tag in _TAG.finditer(text):
        if tag[1]:
            if start is not None:  # the template opened it: all text so far was thinking
                kept.clear()
            start = tag.end()
        elif start is not None:
            kept.append(text[start : tag.start()])
            start = None
    if start is not None:
        kept.append(text[start:])
    return "".join(kept)


def boxes(text: str) -> list[tuple[int, int, str | None]]:
    r"""(start, end, content) of the last ten \boxed{...}; None where no brace ends the box."""
    found: list[tuple[int, int, str | None]] = []
    for match in list(re.finditer(r"\\(?:boxed|fbox)\s*\{", text))[-10:]:
        depth, place = 1, match.end()
        end = min(len(text), match.end() + MOST_BOXED)
        while place < end and depth:
            depth += {"{": 1, "}": -1}.get(text[place], 0) * (text[place - 1] != "\\")
            place += 1
        content = text[match.end() : place - 1] if depth == 0 else None
        found.append((match.start(), place, content))
    return found


def rival_boxes(text: str, boxed: Sequence[tuple[int, int, str | None]]) -> bool:
    r"""Whether the last two boxes stand in one sentence: \boxed{3} or \boxed{4}."""
    return len(boxed) > 1 and not re.search(r"[.!?\n]", text[boxed[-2][1] : boxed[-1][0]])


def plain(text: str) -> str:
    """Unicode, LaTeX and Markdown as plain text; letters keep their case."""
    text = _STRUCK.sub(" ", text)
    text = _SUPERSCRIPTS.sub(lambda m: "^" + m[0].translate(_SUPERSCRIPT), text)
    text = "".join(map(_character, text)).translate(_SIGNS)
    text = unicodedata.normalize("NFKC", text).translate(_SIGNS)
    text = _latex(text)
    text = re.sub(r"<answer>", "\nAnswer: ", text, flags=re.IGNORECASE)
    text = _HTML.sub("", re.sub(r"</answer>", "\n", text, flags=re.IGNORECASE))
    text = _markdown(text)
    return re.sub(r"\b(?:minus|negative)\s(?=[\d$€£¥])", "-", text, flags=re.IGNORECASE)


def _character(one: str) -> str:
    """A vulgar fraction as ` 1/2`, a digit of any script as ASCII."""
    if one.isascii():
        return one
    if unicodedata.decomposition(one).startswith("<fraction>"):
        return f" {unicodedata.normalize('NFKC', one)}".replace("\u2044", "/")
    if unicodedata.category(one) == "Nd":
        return str(unicodedata.digit(one))
    return one


def _latex(text: str) -> str:
    if "\\" not in text and "{" not in text:
        return text
    for pattern, instead in _LATEX:
        text = pattern.sub(instead, text)
    # Innermost braces first, one level of nesting a round; no reply needs 20 levels.
    for _ in range(20):
        before = text
        text = _WORDS.sub(r" \1 ", text)
        text = _FRACTION.sub(_fraction, text)
        text = _OPERATOR.sub(OPAQUE, text)
        text = re.sub(r"\^\s*\{\s*([-+]?\d+)\s*\}", r"^\1", text)
        text = re.sub(r"\\(?:boxed|fbox)\s*\{([^{}]*)\}", r" \1 ", text)
        if text == before:
            break
    return re.sub(r"\\[a-zA-Z]+\s*\{[^{}]*\d[^{}]*\}", OPAQUE, text)  # 0.\overline{3}


def _fraction(match: re.Match[str]) -> str:
    above = match[1] if match[1] is not None else match[2]
    below = match[3] if match[3] is not None else match[4]
    if not _NUMBER.fullmatch(above) or not re.fullmatch(r"\s*\d[\d.,]*\s*", below):
        return OPAQUE
    signed = match.string[max(0, match.start() - 1) : match.start()] in ("-", "+")
    return f"{'' if signed else ' '}{above.replace(' ', '')}/{below.strip()} "


def _markdown(text: str) -> str:
    text = text.replace("`", "").replace("$$", " ")
    text = re.sub(r"(?<!\w)_{1,3}(?=\w)|(?<=[^\s_])_{1,3}(?!\w)", "", text)
    text = re.sub(r"^[ \t]*#{1,3}[ \t]+", "", text, flags=re.MULTILINE)  # four mark an answer

    def star(match: re.Match[str]) -> str:
        before = text[max(0, match.start() - 9) : match.start()]
        after = text[match.end() : match.end() + 9]
        if len(match[0]) == 1:  # 5 * x; a power is written without spaces: 5**2
            before, after = before.rstrip(" "), after.lstrip(" ")
        left, right = before[-1:], after[:1]
        operator = (left.isdigit() or left == ")") and (right.isalnum() or right in ("(", "-"))
        return match[0] if operator else ""

    return re.sub(r"\*+", star, text)
