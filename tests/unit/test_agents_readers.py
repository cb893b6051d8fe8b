"""Readers take the value that a reply states, exactly, or abstain; they never take another one.

The fuzz draws replies from a generator that knows the answer that it spelled
(`tests/unit/answers_drawn.py`). TEMPERING_FUZZ_REPLIES=10000 makes it long.
"""

from __future__ import annotations

import os
import random
import time
from fractions import Fraction

import pytest

from tempering.agents.aggregators import Answer, majority
from tempering.agents.checkers import checker, form
from tempering.agents.numerals import value_of, written
from tempering.agents.plain import after_thinking
from tempering.errors import InputError
from tests.unit import answers_drawn as drawn

REPLIES = int(os.environ.get("TEMPERING_FUZZ_REPLIES", "150"))
NUMBER, CHOICE = checker("number"), checker("choice")


def read(output: str, prompt: str = "") -> str | None:
    return NUMBER.read(output, {"prompt": prompt})


@pytest.mark.parametrize(
    ("output", "value"),
    [
        ("The answer is 1/2.", "0.5"),
        (r"The answer is \boxed{\frac{1}{2}}.", "0.5"),
        (r"\boxed{-\frac34}", "-0.75"),
        (r"\boxed{x=\dfrac{1}{3}}", "1/3"),
        ("Answer: 3 1/2", "3.5"),
        ("Answer: 3½", "3.5"),
        ("Answer: −1½ cups", "-1.5"),
        (r"The answer is \boxed{1{,}000}.", "1000"),
        (r"$12\,345$", "12345"),
        ("12 345", "12345"),
        ("Answer: 1\u202f234\u202f567,5", "1234567.5"),
        ("Answer: 1'234.50", "1234.5"),
        ("The population is 1,50,000.", "150000"),
        ("1.000.000", "1000000"),
        ("Answer: €1.234,50", "1234.5"),
        ("answer = 2,5", "2.5"),
        ("Answer: 0,125", "0.125"),
        ("Answer: 1_000", "1000"),
        ("Answer: 1e5", "100000"),
        ("It is 1.5e-3.", "0.0015"),
        ("about 3.0 × 10^8 m/s", "300000000"),
        (r"\boxed{1.5 \times 10^{3}}", "1500"),
        ("Answer: 2 × 10⁻³", "0.002"),
        ("Answer: 0x10", "16"),
        ("Answer: .5", "0.5"),
        ("The answer is -$5.", "-5"),
        ("The answer is $-5.", "-5"),
        ("The answer is –5.", "-5"),
        ("The answer is minus 5.", "-5"),
        ("Answer: (−7)", "-7"),
        ("x = - 7", "-7"),
        ("Answer: 50%", "0.5"),
        (r"Answer: 12.5\%", "0.125"),
        ("Answer: 5 million", "5000000"),
        ("Answer: $1.5M", "1500000"),
        ("The final answer is 42. I used 3 steps.", "42"),
        ("The answer is: 42. (See step 2)", "42"),
        (r"Answer: \boxed{42}. Checked in 2 ways.", "42"),
        ("Answer:\n\n42\n\n(1 mark)", "42"),
        ("#### 1,234", "1234"),
        ("~~41~~ **42**", "42"),
        ("<answer>42</answer>", "42"),
        ("<think>7? No, 8.</think>\n9", "9"),
        ("7 or 8?\n</think>\n9", "9"),
        ("In total 5 people ate, so 7 remain.", "7"),
        ("6 + 3 = 9 - 2 = 7", "7"),
        ("Answer: 42 = 6 * 7", "42"),
        ("42\n\nExplanation: 6 times 7, see page 3.", "42"),
        ("25 m^2", "25"),
        ("Water is H2O. It boils at 100 °C.", "100"),
        ("The answer is eight.", "8"),
        ("The answer is 6 since 2+2=4", "6"),
        ("The answer is **42** because 6*7 = 42", "42"),
        ("2x = 10, so x = 5", "5"),
        ("f(3) = 10", "10"),
        ("x = 0.5 or 50%", "0.5"),
        (r"\begin{aligned} x &= 2 + 3 \\ &= 5 \end{aligned}", "5"),
        ("答えは5万円です。", "50000"),
        ("Ответ: 42 руб.", "42"),
        ("Answer: 42 m/s^2", "42"),
        ("5! = 120", "120"),
        ("Answer: 4! = 24", "24"),
        ("The answer is 3! + 4! = 30.", "30"),
        ("Answer: 10!/8! = 90", "90"),
        ("Answer: 5! ways = 120", "120"),
        ("The answer is 42! Great.", "42"),
        ('{"answer": 42, "steps": 3}', "42"),
        ('```json\n{"final_answer": "42", "reasoning": "6 times 7"}\n```', "42"),
        ("{'answer': 42, 'unit': 'm2', 'confidence': 0.9}", "42"),
        ('{"result": "x = 42", "n": 3}', "42"),
        ("Answer: 42. Wait, 43.\nAnswer: 43", "43"),
        ("Answer: -10^2", "-100"),
        ("1. First 17.\n2. Then it is 9.", "9"),
        ("Answer: two thousand and twenty-four", "2024"),
        ("٨", "8"),
        ("４２", "42"),
    ],
)
def test_a_number_is_read_by_its_value(output, value):
    assert read(output) == value


@pytest.mark.parametrize(
    "output",
    [
        "The answer is 5-7.", "Answer: 5 to 7", "Answer: between 5 and 7", "Answer: 5 or 6",
        "Answer: 5, 6", "x = 1, y = 2", "x = 1 or x = 2", "Answer: (1, 2)", "Answer: 1 2 3",
        "Answer: 5 apples and 3 pears", "Answer: 2 hours 30 minutes", "Answer: 42 ± 1",
        "Answer: 3:2", "Answer: 3:30", "The answer is 2024-01-05", "Answer: 12/25/2024",
        "Answer: 1.2.3", "Answer: 5x", "Answer: 2π", r"\boxed{2\sqrt{3}}", "Answer: 0.333...",
        "Answer: 1/0", "Answer: 1e5.5", "Answer: 5k", "Answer: (7)", "($1,234)", "Answer: - 7",
        "Answer: at least 5", "Answer: > 5", "The answer is not 5.", "The answer is half of 5.",
        "Answer: 5 + 3", "Answer: 3 out of 8", "Answer: 3 less than 10", "Answer: 2 and a half",
        "The answer is unknown given the 5 facts.", "Answer: eight or 9", "Answer: 1e999999999",
        "Answer: 5°C ± nine", "The answer is from 3/4 cm³ to eleven.",
        "x = 5 or 6", "x = 5, 6", "area = 10, perimeter = 5", "x = 5\ny = 6", "5 → 6", r"x = \pm 5",
        r"0.\overline{3}", "Answer: (-10)^2", "So it is 6 since 2+2=4.", "3億5000万", "Answer: #5",
        "Answer: 555-1234", "Answer: 192.168.0.1", "May 5, 2024", "3(7)", "Answer: 1,234,56",
        r"\boxed{4", r"\boxed{3} or \boxed{4}", "<think>So it is 5", "9, 9 + 5 = 14, 14 - 3",
        "Answer: $3.00 each, so $9.00 total", "Answer: 12 a day, giving 84 a week",
        "Answer: 3 boxes, which makes 36 eggs", "Answer: 3 per person; total 12",
        "Answer: 5 (or 6)",
        "Answer: 15 minutes, i.e. 0.25 hours", "Answer: 4 apples and 5 pears, 9 in all",
        "Answer: 42. Actually, it is 43.", "The answer is 42. Wait, I made a mistake: 43.",
        "#### 42\nCorrection: forty-three", "So x = 7. Let me double check: 7 + 2 = 9.",
        "It is 7. Verification: 2*7 = 14.", "There are 7 left. (7 + 2 = 9)",
        "There are 7. Indeed, 7 + 2 = 9.", "He pays $42. That includes 5% tax.",
        '{"value": 42, "n": 3}', '{"answer": null, "n": 3}', r"\boxed{5!}", "The answer is 5!.",
        "The answer is blue. 5 birds.", "no number", "", "NaN", "-",
    ],
)  # fmt: skip
def test_what_is_no_one_number_is_an_abstention(output):
    assert read(output) is None


def test_equality_is_of_values_not_of_floats():
    third = {"id": "t", "answer": "1/3"}
    assert NUMBER.correct(read(r"\frac{2}{6}") or "", third)
    assert not NUMBER.correct("0.3333333333333333", third)
    large = {"id": "t", "answer": "9007199254740993"}
    assert not NUMBER.correct("9007199254740992", large)
    assert NUMBER.correct(read("9,007,199,254,740,993.0") or "", large)
    digits = "7" * 5000
    assert NUMBER.correct(read(f"Answer: {digits}") or "", {"id": "t", "answer": digits})
    assert NUMBER.correct("72", {"id": "t", "answer": "9 * 8 = 72\n#### 72"}), "as GSM8K has it"


@pytest.mark.parametrize("value", ["0", "42", "-0.5", "1/3", "-22/7", "0.0000001", "123456.789"])
def test_a_written_value_is_read_back(value):
    assert written(Fraction(value)) == value and value_of(value) == Fraction(value)


def test_percent_is_the_unit_where_a_task_asks_for_percent():
    asked = {"id": "t", "prompt": "What percentage of them left?", "answer": "20"}
    assert NUMBER.correct(NUMBER.read("20%", asked) or "", asked)
    assert NUMBER.correct(NUMBER.read("Answer: 20", asked) or "", asked)
    assert NUMBER.correct("20", {**asked, "answer": "20%"})
    plain = {"id": "t", "prompt": "25% of 80 is how much?", "answer": "0.2"}
    assert NUMBER.read("20%", plain) == "0.2" and NUMBER.read("20", plain) == "20"


LETTERS = {
    "id": "q",
    "answer": "B",
    "choices": ["A", "B", "C", "D"],
    "prompt": "Which?\nA) red\nB) dark blue\nC) green\nD) none of them",
}
CITIES = {
    "id": "q",
    "answer": "B",
    "choices": ["Paris", "London"],
    "prompt": "Which?\nA. Paris\nB. London",
}


@pytest.mark.parametrize(
    ("output", "found"),
    [
        ("The answer is B because a car moves.", "b"),
        ("I would pick B — a safe choice.", "b"),
        ("Answer: B) since A is wrong", "b"),
        ("Option A is wrong.\nThe answer is B.", "b"),
        ("Let's see. A good start.\nAnswer: B", "b"),
        ("B, not C", "b"),
        ("not B, but C", "c"),
        ("B", "b"),
        ("(b)", "b"),
        ("**B.**", "b"),
        (r"$\boxed{\text{B}}$", "b"),
        ("dark blue", "b"),
        ("The answer is dark blue.", "b"),
        ("B) dark blue", "b"),
        ("B\n\nExplanation: A is red.", "b"),
        ("Between A and B, I choose B.", "b"),
        ("A is wrong, C is wrong, so B", "b"),
        ("Answer: A\nWait, no.\nAnswer: B", "b"),
        ("<think>A? C?</think>B", "b"),
        ("Vitamin C helps. Answer: D", "d"),
        ('{"answer": "B", "others": ["A", "C"]}', "b"),
        ("A: wrong\nB: right\nC: wrong", "b"),
        ("A? No. B? Yes.", "b"),
        ("Answer: B? No, C.", "c"),
        ("Answer: C. Actually, B.", None),
        ("The answer is A. Wait, I made a mistake: it is B.", None),
        ("The answer is A. Wait for me.", "a"),
        (r"\boxed{B} or \boxed{C}", None),
        (r"First \boxed{A}. Then \boxed{B}", "b"),
        ("A) dark blue", None),
        ("A or B", None),
        ("The answer is A or B.", None),
        (r"\boxed{A, B}", None),
        ("D and A are both fine", None),
        ("Neither A nor B", None),
        ("A good question.", None),
        ("The answer is E.", None),
        ("<think>So B", None),
        ("I don't know", None),
        ("", None),
    ],
)
def test_a_choice_is_the_one_that_is_named(output, found):
    assert CHOICE.read(output, LETTERS) == found


def test_letters_and_texts_of_choices_stand_for_each_other():
    assert CHOICE.read("The answer is B", CITIES) == CHOICE.read("london", CITIES) == "london"
    assert CHOICE.read("Answer: A. London", CITIES) is None
    assert CHOICE.correct("london", CITIES) and not CHOICE.correct("paris", CITIES)
    assert CHOICE.correct("b", {**LETTERS, "answer": "dark blue"})
    assert CHOICE.read("B", {**CITIES, "prompt": "Paris or London?"}) is None, "no letters there"


def test_an_answer_that_is_no_choice_is_named():
    with pytest.raises(InputError, match="the answer 'Z' of task 'q' is none of its choices: a, "):
        CHOICE.correct("b", {**LETTERS, "answer": "Z"})


def test_spellings_of_one_answer_have_one_form():
    spelled = ["Paris", "“Paris”", "Paris…", "$Paris$", "**Paris**", "Ｐaris", "PARIS!", "`paris`."]
    assert {form(text) for text in spelled} == {"paris"}
    assert form("café") == form("cafe\u0301") == "café"
    assert {form(t) for t in ("42", "42.0", " 42 ", "42.", "４２", r"\boxed{42}")} == {"42"}
    assert form("1,000") == form("1000") and form("1/2") == form("0.50")
    # What looks alike and is not.
    assert form("...") == "..." and checker("exact").read("?!", {}) == "?!"
    for one, other in [("007", "7"), ("C", "C++"), ("5!", "5"), ("-5", "5"), ("50%", "50")]:
        assert form(one) != form(other)


@pytest.mark.parametrize("name", ["exact", "regex:Answer: (.*)", "number"])
@pytest.mark.parametrize(
    "spelled",
    [
        (["42", "42.0", " 42 "], "7"),
        (["1,000", "1000", "1000.0"], "7"),
        (["0.5", "1/2", "½"], "7"),
    ],
)
def test_votes_count_what_correctness_compares(name, spelled):
    own = checker(name)
    same, other = spelled
    head = "" if name == "exact" else "Answer: "
    task = {"id": "q", "answer": same[0].strip()}
    texts = [own.read(head + text, task) for text in [*same, other, other]]
    answers = [Answer(t, form=None if t is None else own.form(t)) for t in texts]
    verdict = majority(answers)
    assert verdict.answer is not None and own.correct(verdict.answer, task)
    assert sorted(verdict.shares.values()) == pytest.approx([0.4, 0.6])
    assert majority([Answer(t) for t in texts]).answer == verdict.answer


def test_a_verdict_counts_those_who_abstained():
    verdict = majority([Answer("Paris"), Answer(None), Answer("paris."), Answer(None)])
    assert (verdict.answer, verdict.n, verdict.abstained) == ("Paris", 2, 2)
    assert majority([Answer(None)]).abstained == 1


def test_a_checker_of_ones_own_that_judges_votes_on_its_own_texts(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        "def read(output, task):\n    return output\n"
        "def correct(answer, task):\n    return answer == 'b'\n"
    )
    assert checker(str(path)).form("B.") == "B."


def test_a_pattern_reads_the_last_match_that_says_something():
    either = checker(r"regex:(?:A|B)|([0-9]+)")
    assert either.read("7 then A", {}) == "7"
    assert checker(r"regex:is (\d+)|= (\d+)").read("is 3 = 4", {}) == "4"
    assert checker("regex:Answer:(.*)").read("Answer: 4\nAnswer: ", {}) == "4"
    assert checker("regex:Answer:(.*)").read("Answer:", {}) is None


def test_thinking_is_no_answer():
    assert after_thinking("a<think>b</think>c<thinking>d</thinking>e") == "ace"
    assert after_thinking("b</think>c") == "c" and after_thinking("a<think>b") == "a"


def test_drawn_replies_about_numbers():
    rng = random.Random(13)
    shy = 0
    for _ in range(REPLIES):
        reply = drawn.reply(rng)
        found = read(reply.text)
        assert found is None or Fraction(found) == reply.value, reply
        shy += found is None and reply.value is not None and reply.sure
    assert shy <= REPLIES / 100  # abstaining always would be right too


def test_drawn_replies_about_choices():
    rng = random.Random(13)
    for _ in range(REPLIES):
        text, right = drawn.choice(rng)
        assert CHOICE.read(text, LETTERS) == right, text


def test_texts_that_mean_nothing_break_no_reader():
    rng = random.Random(13)
    readers = [NUMBER, CHOICE, checker("exact"), checker("regex:(.*)")]
    for _ in range(REPLIES):
        text = drawn.odd(rng)
        for own in readers:
            found = own.read(text, LETTERS)
            if found is not None:
                own.form(found)


@pytest.mark.parametrize(
    "piece",
    ["<think>", r"\boxed{", r"\frac{", "(", "answer: ", "1 ", "1,", "* ", "_", "\n", " ", "1=",
     "1e999 ", "π 1 ", "not B ", "9", "½", "5 or ", "#### ", "twenty-one "],
)  # fmt: skip
def test_a_long_reply_is_read_in_bounded_time(piece):
    text = "a" + piece * 1000 + "a"
    before = time.process_time()
    for own in (NUMBER, CHOICE, checker("exact")):
        own.read(text, LETTERS)
    assert time.process_time() - before < 5  # a cubic pattern takes minutes
