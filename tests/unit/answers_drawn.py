"""Replies drawn to break the readers, by a generator that knows the answer that it spelled.

It shares no code with the readers: values are spelled from their digits, and frames put around.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from fractions import Fraction

VULGAR = {(1, 2): "½", (1, 4): "¼", (3, 4): "¾", (1, 3): "⅓", (2, 3): "⅔", (5, 8): "⅝"}
SUPER = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()


@dataclass(frozen=True)
class Drawn:
    """A reply; value: the number that it answers with, None where it has none or several."""

    text: str
    value: Fraction | None
    sure: bool  # a reader that abstains here is too shy


def grouped(digits: str, separator: str) -> str:
    """1234567 -> 1,234,567."""
    head = len(digits) % 3 or 3
    return separator.join(
        [digits[:head], *(digits[i : i + 3] for i in range(head, len(digits), 3))]
    )


def indian(digits: str) -> str:
    """1234567 -> 12,34,567."""
    head, tail = digits[:-3], digits[-3:]
    parts = [head[max(0, i - 2) : i] for i in range(len(head), 0, -2)][::-1]
    return ",".join([*parts, tail]) if head else tail


def whole(rng: random.Random, n: int) -> str:
    """A spelling of a whole number of 0 or more."""
    d = str(n)
    ways = [d, d, f"{d}.0", f"{d}.", "".join(chr(0xFF10 + int(c)) for c in d),
            "".join(chr(0x0660 + int(c)) for c in d), f"{d}e0", hex(n)]  # fmt: skip
    if n >= 1000:
        ways += [grouped(d, s) for s in (",", "'", "’", " ", "\u00a0", "\u202f", "\u2009", "_")]
        ways += [grouped(d, "{,}"), grouped(d, r"\,"), grouped(d, r"\ "), indian(d)]
    if n >= 1_000_000:
        ways.append(grouped(d, "."))
    if n % 1000 == 0 and n:
        t = n // 1000
        ways += [f"{t} thousand", f"{t}e3", rf"{t} \times 10^{{3}}", f"{t} × 10^3", f"{t} × 10³",
                 f"{t} x 10^3", f"{t}*10**3"]  # fmt: skip
    if n <= 12:
        ways.append(WORDS[n] if n != 1 else "1")
    if n == 1024:
        ways += ["2^10", "2^{10}", "2¹⁰"]
    return rng.choice(ways)


def decimal(rng: random.Random, n: int, places: int) -> str:
    """A spelling of n / 10^places."""
    d = str(n).rjust(places + 1, "0")
    before, after = d[:-places], d[-places:]
    ways = [f"{before}.{after}", f"{before}.{after}0", f"{n}e-{places}",
            rf"{n} \times 10^{{-{places}}}",
            f"{n} × 10{str(-places).translate(SUPER)}"]  # fmt: skip
    if places != 3 or before == "0":
        ways += (
            [f"{before},{after}", f"{before}{{,}}{after}"] if places != 3 else [f"{before},{after}"]
        )
    if before == "0":
        ways.append(f".{after}")
    if len(before) > 3:
        ways += [f"{grouped(before, ',')}.{after}", f"{grouped(before, '.')},{after}",
                 f"{grouped(before, ' ')},{after}"]  # fmt: skip
    return rng.choice(ways)


def fraction(rng: random.Random, a: int, b: int) -> str:
    """A spelling of a / b."""
    ways = [f"{a}/{b}", f"{a} / {b}", rf"\frac{{{a}}}{{{b}}}", rf"\dfrac{{{a}}}{{{b}}}", f"{a}⁄{b}"]
    if a < 10 and b < 10:
        ways.append(rf"\frac{a}{b}")
    if (a, b) in VULGAR:
        ways.append(VULGAR[a, b])
    if a > b and a % b:
        rest = f"{a % b}/{b}"
        ways += [f"{a // b} {rest}", rf"{a // b}\frac{{{a % b}}}{{{b}}}"]
        if (a % b, b) in VULGAR:
            ways.append(f"{a // b}{VULGAR[a % b, b]}")
    return rng.choice(ways)


def number(rng: random.Random) -> tuple[str, Fraction]:
    """A spelled number and its value."""
    kind = rng.randrange(6)
    if kind <= 1:
        n = rng.choice([rng.randrange(13), rng.randrange(1000), rng.randrange(10**9), 1024,
                        1000 * rng.randrange(1, 5000)])  # fmt: skip
        text, value = whole(rng, n), Fraction(n)
    elif kind == 2:
        n, places = rng.randrange(1, 10**6), rng.randrange(1, 5)
        text, value = decimal(rng, n, places), Fraction(n, 10**places)
    elif kind == 3:
        a, b = rng.randrange(1, 60), rng.randrange(2, 20)
        a, b = rng.choice([*VULGAR, (a, b)])
        text, value = fraction(rng, a, b), Fraction(a, b)
    elif kind == 4:
        n = rng.randrange(1, 200)
        sign = rng.choice(["%", " %", r"\%", " percent", "％"])
        return f"{n}{sign}", Fraction(n, 100)
    else:
        n = rng.randrange(1, 50)
        name, zeros = rng.choice([("million", 6), ("billion", 9), ("thousand", 3), ("hundred", 2)])
        return f"{n} {name}", Fraction(n * 10**zeros)
    if text[0].isdigit() and "/" not in text and rng.random() < 0.25:
        sign = rng.choice(["-", "−", "–", "-", "minus ", "negative ", "-$", "−€", "$-"])
        return f"{sign}{text}", -value
    if text[0].isascii() and text[0].isdigit() and "\\" not in text and rng.random() < 0.3:
        before, after = rng.choice([("$", ""), ("€", ""), ("", " dollars"), ("", " km/h"),
                                    ("", " m^2"), ("", "°C"), ("", " apples"), ("+", ""),
                                    ("", " cm³"), ("US$", ""), ("≈ ", ""), ("~", "")])  # fmt: skip
        text = before + text.rstrip(".") + after if after else before + text
    return text, value


# {} is the number; the second says whether a reader has no excuse.
FRAMES = [
    ("{}", True), ("{}\n", True), ("The answer is {}.", True), ("Answer: {}", True),
    ("**Answer:** {}", True), ("Answer: **{}**", True), ("**Answer: {}**", True),
    (r"\boxed{{{}}}", True), (r"So $\boxed{{{}}}$. Checked in 2 ways.", True), ("#### {}", True),
    ("There are 12 boys and 30 girls.\n#### {}", True), ("Final answer: {}", True),
    ("The final answer is {}. I used 3 steps.", True), ("<answer>{}</answer>", True),
    ("The answer is {}. (See step 2)", True), ("The answer is {} (see step 2).", True),
    ("<think>It may be 5, or 7.</think>The answer is {}", True), ("Answer:\n\n{}\n\n(1 mark)",
    True),
    ("Step 1: we have 17.\nStep 2: we have 5.\nAnswer: {}\n\nNote 1: done", True),
    ("x = {}", True), ("Answer: x = {}", True), ("The answer is about {}.", True),
    ("The answer is approximately {}. I used 3 steps.", True), ("## Answer\n{}", True),
    ("The answer to question 3 is {}.", False), ("Therefore, the answer is: {}!", False),
    ("It was 17 before; now it is {}.", False), ("Result: {}.\nTotal time: 3 s", True),
    ("The answer is `{}`", True), ("I thought 17, but wait. The answer is {}.", True),
    ("The answer is 17. No, that's wrong. The answer is {}.", True), ("_{}_", True),
    ("Answer: {} because 3 of 7 are left", False), ("~~17~~ {}", False), ("Ans: {}", True),
    ("My answer would be {}.", True), ("= {}", True), ("1. First 17.\n2. Then it is {}.", False),
]  # fmt: skip

# {} and {other} are both named, or neither is stated: nothing may be read.
UNCLEAR = [
    "The answer is {} or {other}.", "Answer: {}, {other}", "Answer: between {} and {other}",
    "The answer is from {} to {other}.", "Answer: x = {}, y = {other}", "Answer: {} ± {other}",
    "The answer is at least {}.", "The answer is more than {}.", "The answer is not {}.",
    "Answer: > {}", "The answer is unknown given {} of {other}.", "<think>So it is {}",
    r"\boxed{{{}",
    "The answer is {}π", "Answer: {}, and {other}", r"\boxed{{{}}} or \boxed{{{other}}}",
    r"\boxed{{{}, {other}}}", r"Answer: \sqrt{{{}}}", "The answer is half of {}.",
    "Answer: {} x + {other}",
    "Answer: {} + {other}", "Answer: {} out of {other}", "I don't know whether it is {}.",
    "The answer is {}, or {other}", "Either {} or {other}", "Answer: n ≥ {}",
]  # fmt: skip


def reply(rng: random.Random) -> Drawn:
    """One reply about a number."""
    text, value = number(rng)
    if rng.random() < 0.3:
        other, second = number(rng)
        while second == value:
            other, second = number(rng)
        return Drawn(rng.choice(UNCLEAR).format(text.rstrip("."), other=other), None, True)
    frame, sure = rng.choice(FRAMES)
    return Drawn(frame.format(text), value, sure)


CHOSEN = [
    "{}", "({})", "{}.", "**{}**", "Answer: {}", "The answer is {}.", "The answer is ({}).",
    "Answer: **{}**", r"\boxed{{{}}}", r"\text{{{}}}", "The answer is {} because a car moves.",
    "Answer: {}) since {x} is wrong", "Option {x} is wrong.\nThe answer is {}.", "{}, not {x}",
    "Let's see. A good start.\nAnswer: {}", "I would pick {} — a safe choice.", "not {x}, but {}",
    "The answer is {}. Note that {x} is a common distractor.", "#### {}", "<answer>{}</answer>",
    "<think>{x} or {y}?</think>{}", "The correct option is {}", "I choose option {}.",
    "Final answer: {}",
    "{x} can't be right.\n\nAnswer: {}", "It isn't {x}. It is {}.",
]  # fmt: skip
UNDECIDED = [
    "{} or {x}", "The answer is {} or {x}.", "Both {} and {x}", "None of the above", "I don't know",
    "Neither {} nor {x}", "Answer: {}, {x}", "Either {} or {x} could be right.", "A good question.",
    "It is not {}.", "<think>So {}", "{} and {x} are both fine",
]  # fmt: skip


def choice(rng: random.Random) -> tuple[str, str | None]:
    """A reply about one of A, B, C, D, and which it is, or None."""
    right, x, y = rng.sample("ABCD", 3)
    if rng.random() < 0.3:
        return rng.choice(UNDECIDED).format(right, x=x), None
    return rng.choice(CHOSEN).format(right, x=x, y=y), right.lower()


ODD = ["\x00", "\ud800", "\u202e", "\\", "{", "}", "\\frac{", "\\boxed{", "\\sqrt", "½", "²", "^",
       "**",
       "$", "%", "-", "−", "1", "9" * 50, "e", "1e99999", "0x", ",", ".", "/", "=", "≈", " ",
       "\n", "<think>",
       "</think>", "answer:", "The answer is ", "#### ", "or ", "A ", "B", "(", ")", "٣", "π",
       "\ufffc", "😀",
       "million", "percent", "twenty-one", "1/0", "0^-1", "not ", "[", "]", "|", "\u0301", "~~",
       "_", "`"]  # fmt: skip


def odd(rng: random.Random) -> str:
    """A text that means nothing, of what readers look for."""
    return "".join(rng.choice(ODD) for _ in range(rng.randrange(1, 40)))
