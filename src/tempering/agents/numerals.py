"""Numbers as people and models write them, with exact values.

    1,234.5   1.234,5   1 234,5   1'234.5   1,23,456   1_000   2,5   .5   0x10
    1e5   3.0 × 10^8   2^10   1/2   3 1/2   -$5   $-5   50%   5 million   $80k

Where a notation has two readings, the English one counts: 1,234 is 1234, and 1.234 is 1.234. What
is several numbers, or no rational number, has the value None: a range 5-7, a time 3:30, a date, 2π,
5x, ±. An ordinal (3rd), a label (step 3) and a digit inside a word (CO2) are no numerals.
"""

from __future__ import annotations

import bisect
import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from tempering.agents.plain import OPAQUE

# The most digits that are read, and the largest power of ten. Beyond these a reader abstains: the
# value of 1e999999999 has few characters here and a billion digits in memory.
MOST_DIGITS = 10_000
MOST_POWER = 1_000

_RUN = re.compile(r"\d(?:\d|[.,'_](?=\d)| (?=\d{3}(?!\d)))*|\.\d+")
_HEX = re.compile(r"0x[0-9a-f]+(?!\w)|0b[01]+(?!\w)|0o[0-7]+(?!\w)", re.IGNORECASE)
_ENGLISH = re.compile(r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?|[1-9]\d?(?:,\d{2})+,\d{3}(?:\.\d+)?")
_CONTINENTAL = re.compile(r"[1-9]\d{0,2}(?:(?:\.\d{3}){2,}(?:,\d+)?|(?:\.\d{3})+,\d+)")
_SPACED = re.compile(r"[1-9]\d{0,2}(?:([ '_])\d{3})(?:\1\d{3})*(?:[.,]\d+)?")
_SIMPLE = re.compile(r"\d*[.,]\d+|\d+")
_EXPONENT = re.compile(
    r"[eE]([-+]?\d+)(?![\w])"
    r"|\s*(?:×|[xX*])\s*10\s*(?:\^|\*\*)\s*[({]?\s*([-+]?\d+)\s*[)}]?(?!\d|\.\d)"
)
_POWER = re.compile(r"\s*(?:\^|\*\*)\s*[({]?\s*([-+]?\d+)\s*[)}]?(?!\d|\.\d)")
_OVER = re.compile(r"\s?/\s?(\d+(?:\.\d+)?)(?![\d,/])")
_MIXED = re.compile(r"\s{1,2}(?:and\s)?(\d+)/(\d+)(?![\d/.,]\d)")
_CURRENCY = re.compile(
    r"(?:[A-Z]{0,2}\$|[€£¥₹₽₩₺₴₦₱฿]|(?<![A-Za-z])(?:USD|EUR|GBP|INR|JPY|CHF|CAD|AUD|Rs\.?))\s?$"
)
_PERCENT = re.compile(r"\s?%|\s(?:percent|per cent|pct)\b(?!\s*point)", re.IGNORECASE)
_SCALES = {
    "hundred": 2,
    "thousand": 3,
    "million": 6,
    "billion": 9,
    "trillion": 12,
    "lakh": 5,
    "crore": 7,
    "mio": 6,
    "mln": 6,
    "mrd": 9,
    "bn": 9,
}
_SCALE = re.compile(rf"[\s-]?({'|'.join(_SCALES)})s?\b", re.IGNORECASE)
_EAST_ASIAN_POWERS = {"十": 1, "百": 2, "千": 3, "万": 4, "萬": 4, "億": 8, "亿": 8, "兆": 12}
_EAST_ASIAN = re.compile(rf"\s?([{''.join(_EAST_ASIAN_POWERS)}])")
_SHORT = re.compile(r"\s?([kK]|[mM]n?|[bB]n?)(?![\w$])")
_LETTERS = re.compile(r"[^\W\d_]+")
_ONE_LETTER_UNITS = set("gmshlLNJWVACFtd°")
_LABEL = re.compile(
    r"(?:\b(?:step|question|problem|part|case|equation|eq|figure|fig|page|line|section|chapter"
    r"|method|option|note|item|example|table|round|attempt|version|nos?|nr)\.?\s*|(?<!#)#\s*)\(?$",
    re.IGNORECASE,
)
_JOINS = re.compile(
    rf"\s*(?:-|to|\.\.+|…|±|\+/-|:|/|{OPAQUE}|in|by|out of|of|per)\s*", re.IGNORECASE
)


@dataclass(frozen=True)
class Numeral:
    """A number in a text. value: None where there are several numbers, or none that is rational."""

    start: int
    end: int
    value: Fraction | None


def numerals(text: str, *, percent: bool = False) -> list[Numeral]:
    """The numbers of a plain text, in order; see the module's head.

    percent: read 50% as 50 rather than as 1/2, since the question asks for percent.
    """
    found: list[Numeral] = []
    place = 0
    while match := _RUN.search(text, place):
        numeral, place = _numeral_at(text, match, percent)
        if numeral is None:
            continue
        if found and _joined(text[found[-1].end : numeral.start], numeral, text):
            numeral = Numeral(found.pop().start, numeral.end, None)
        found.append(numeral)
    starts = [numeral.start for numeral in found]
    for opaque in [m.start() for m in re.finditer(OPAQUE, text)]:
        before = bisect.bisect_right(starts, opaque) - 1
        if before < 0 or found[before].end <= opaque:
            found.append(Numeral(opaque, opaque + 1, None))
    return sorted(found, key=lambda numeral: numeral.start)


def value_of(text: str, *, percent: bool = False) -> Fraction | None:
    """The number that a plain text is, all of it; None for another text."""
    if len(text.split()) > 8:  # "3 x 10 ^ ( -8 )" has 7
        return None
    found = numerals(text.strip(), percent=percent)
    whole = len(found) == 1 and (found[0].start, found[0].end) == (0, len(text.strip()))
    return found[0].value if whole else None


def written(value: Fraction) -> str:
    """The one text of a value: 42, -0.5, 1/3."""
    twos, fives = _power_of(value.denominator, 2), _power_of(value.denominator, 5)
    rest = value.denominator // (2**twos * 5**fives)
    if rest != 1:
        return f"{_digits(value.numerator)}/{_digits(value.denominator)}"
    places = max(twos, fives)
    shifted = abs(value.numerator) * 10**places // value.denominator
    digits = _digits(shifted).rjust(places + 1, "0")
    sign = "-" if value < 0 else ""
    return sign + (f"{digits[:-places]}.{digits[-places:]}" if places else digits)


def _digits(number: int) -> str:
    """Like str, which refuses more than 4,300 digits."""
    return format(Decimal(number), "f")


def _power_of(number: int, prime: int) -> int:
    count = 0
    while number % prime == 0:
        number, count = number // prime, count + 1
    return count


def _numeral_at(text: str, match: re.Match[str], percent: bool) -> tuple[Numeral | None, int]:
    """(numeral at a run of digits, or None where the run is no numeral; where to go on)."""
    start, end = match.span()
    if found := _HEX.match(text, start):
        value: Fraction | None = Fraction(int(found[0], 0)) if len(found[0]) < 2000 else None
        end = found.end()
    else:
        run = match[0]
        value = _plain_value(run)
        if " " in run and value is None:  # no groups of thousands: words of their own
            end = start + run.index(" ")
            value = _plain_value(text[start:end])
    # 40 characters before the number hold any sign, currency or label that changes it.
    reach = max(0, start - 40)
    currency = _CURRENCY.search(text[reach:start])
    begin = reach + currency.start() if currency else start
    left = text[reach:begin]
    if not currency and (_spaced_script(left[-1:]) or left[-1:] in ("^", "_")):
        return None, end  # CO2, x2, m^2
    if _LABEL.search(left):
        return None, end
    negative, begin = _sign(text, begin, currency is not None, start)
    if negative is None:
        return None, end  # COVID-19
    value, end = _suffixes(text, value, start, end, percent, currency is not None)
    if end < 0:
        return None, -end  # an ordinal
    if value is not None and negative:
        value = -value
    if text[begin - 1 : begin] == "±":
        value = None
    return Numeral(begin, end, value), end


def _sign(text: str, begin: int, currency: bool, start: int) -> tuple[bool | None, int]:
    """(negative, where the numeral begins); (None, ..) where a hyphen joins it to a word."""
    if currency and text[start - 1 : start] in "-+" and text[start - 1 : start]:
        return text[start - 1] == "-", begin
    sign = text[begin - 1 : begin] if begin else ""
    if sign not in ("-", "+"):
        # After an equals sign a blank may stand between the minus and its number: "= - 5".
        reach = max(0, begin - 40)
        apart = re.search(r"[=≈]\s*(-)\s+$", text[reach:begin])
        return (True, reach + apart.start(1)) if apart else (False, begin)
    ahead = text[max(0, begin - 40) : begin - 1]
    if _spaced_script(ahead[-1:]):
        return None, begin
    if before := _CURRENCY.search(ahead):  # $-5
        return sign == "-", begin - 1 - len(before[0])
    if ahead[-1:].isdigit() or ahead[-1:] in (")", "%", OPAQUE) or ahead[-1:] == sign:
        return False, begin  # between two numbers: `_joined` sees to it
    return sign == "-", begin - 1


def _spaced_script(letter: str) -> bool:
    """Whether this is a letter of a script with spaces between words, as Chinese has none."""
    return letter.isalpha() and letter < "\u2e80"


def _plain_value(run: str) -> Fraction | None:
    """The value of digits with separators, or None where they can't be read one way."""
    if sum(c.isdigit() for c in run) > MOST_DIGITS:
        return None
    if _ENGLISH.fullmatch(run):
        return _fraction(run.replace(",", ""))
    if _CONTINENTAL.fullmatch(run):
        return _fraction(run.replace(".", "").replace(",", "."))
    if _SPACED.fullmatch(run):
        return _fraction(re.sub("[ '_]", "", run).replace(",", "."))
    if _SIMPLE.fullmatch(run):
        return _fraction(run.replace(",", "."))
    return None


def _fraction(digits: str) -> Fraction:
    # By way of Decimal, which reads any number of digits; int() stops at 4,300.
    return Fraction(Decimal(digits))


def _suffixes(
    text: str, value: Fraction | None, start: int, end: int, percent: bool, currency: bool
) -> tuple[Fraction | None, int]:
    """(value, end) with what follows the digits: exponents, fractions, percent, scales, units.

    A negative end, -e, says that an ordinal ends at e, which is no numeral.
    """
    whole = text[start:end].isdigit()
    if found := _EXPONENT.match(text, end):
        value, end = _times_ten(value, int((found[1] or found[2])[:8])), found.end()
    elif found := _POWER.match(text, end):
        value, end = _power(value, int(found[1][:8])), found.end()
    elif whole and (found := _MIXED.match(text, end)):
        above, below = _fraction(found[1]), _fraction(found[2])
        proper = value is not None and 0 < above < below
        value, end = (value + above / below if value is not None and proper else None), found.end()
    elif found := _OVER.match(text, end):
        below = _fraction(found[1])
        value, end = (None if value is None or below == 0 else value / below), found.end()
        if re.match(r"\s?[/^]", text[end:]):
            value = None
    if found := _PERCENT.match(text, end):
        end = found.end()
        value = value if percent or value is None else value / 100
    elif text[end : end + 1] == "‰":
        value, end = (None if value is None else value / 1000), end + 1
    while found := _SCALE.match(text, end):
        value, end = _times_ten(value, _SCALES[found[1].lower()]), found.end()
    if currency and (found := _SHORT.match(text, end)):
        value = _times_ten(value, {"k": 3, "m": 6, "b": 9}[found[1][0].lower()])
        end = found.end()
    if found := _EAST_ASIAN.match(text, end):
        value, end = _times_ten(value, _EAST_ASIAN_POWERS[found[1]]), found.end()
        value = None if _RUN.match(text, end) else value  # 3億5000万
    if found := _LETTERS.match(text, end):
        word = found[0]
        if word.lower() in ("st", "nd", "rd", "th"):
            return None, -found.end()
        alone = len(word) == 1 and _spaced_script(word) and word not in _ONE_LETTER_UNITS
        based = text[start:end] == "0" and word[0] in "xXbBoO"
        if alone or based or text[found.end() : found.end() + 1].isdigit():
            return None, found.end()
        return value, end
    after = text[end : end + 2]
    if after[:1] in (OPAQUE, "_", "(", "\\") or re.match(
        r"\+(?!\s*[\d(])|[.,:'](?=\d)|√|!\s*=", text[end:]
    ):
        return None, end + (after[:1] == OPAQUE)
    if not whole and re.match(r"\.{2,}", text[end:]):
        return None, end  # 0.333...
    if re.match(r"\s+(?:and\s+)?(?:a|one|three)[\s-](?:half|third|quarters?)\b", text[end:]):
        return None, end
    return value, end


def _times_ten(value: Fraction | None, exponent: int) -> Fraction | None:
    if value is None or abs(exponent) > MOST_POWER:
        return None
    return value * Fraction(10) ** exponent


def _power(value: Fraction | None, exponent: int) -> Fraction | None:
    if value is None or (value == 0 and exponent <= 0):
        return None
    digits = max(value.numerator.bit_length(), value.denominator.bit_length()) * abs(exponent)
    return value**exponent if digits <= 4 * MOST_POWER else None


def _joined(between: str, numeral: Numeral, text: str) -> bool:
    """Whether two numerals are parts of one thing that is no number: a range, a date, a ratio."""
    if len(between) > 20:
        return False
    return bool(_JOINS.fullmatch(between)) or (not between.strip() and text[numeral.start] in "-+")
